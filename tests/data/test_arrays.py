"""Arrays of images on disk: read image by image, written batch by batch, and errors for other files."""

import os
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from robustok.data.arrays import open_array, write_npz
from robustok.data.dataset import open_images
from robustok.data.loader import batches_in_order
from robustok.data.pixels import to_pixels
from robustok.data.sources import Npz
from robustok.errors import UserError


def images(count=12, height=8, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def save_npy(file, pixels):
    np.save(file, pixels)


def save_plain(file, pixels):
    np.savez(file, pixels)


def save_compressed(file, pixels):
    np.savez_compressed(file, pixels)


def save_streamed(file, pixels):
    write_npz(file, np.array_split(pixels, 3), pixels.shape, np.arange(len(pixels)))


WRITERS = {"a.npy": save_npy, "a.npz": save_plain, "compressed.npz": save_compressed, "streamed.npz": save_streamed}


def everything(dataset):
    return torch.cat([to_pixels(b.images) for b in batches_in_order(dataset, 5)]).permute(0, 2, 3, 1).numpy()


# Reading


@pytest.mark.parametrize("name", WRITERS)
def test_pixels_are_read_in_any_order(tmp_path, name):
    WRITERS[name](tmp_path / name, images())
    array, _ = open_array(tmp_path / name)
    assert array.shape == (12, 8, 8, 3)
    assert array.compressed == (name == "compressed.npz")
    for row in (0, 1, 7, 11, 3, 3, 0):
        assert np.array_equal(array.read(row), images()[row])
    assert np.array_equal(pickle.loads(pickle.dumps(array)).read(5), images()[5])
    assert len(pickle.dumps(array)) < 1000


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", WRITERS)
def test_a_data_set_of_them(tmp_path, monkeypatch, name, workers):
    monkeypatch.setattr("robustok.data.dataset.MEMORY_LIMIT", 0)
    WRITERS[name](tmp_path / name, images())
    data = Npz(path=tmp_path / name, holdout=0)
    dataset = open_images(data, None)
    dataset.read([11])  # the stream is open before there are workers
    shown = torch.cat([to_pixels(b.images) for b in batches_in_order(dataset, 5, workers=workers)])
    assert np.array_equal(shown.permute(0, 2, 3, 1).numpy(), images())
    assert np.array_equal(everything(open_images(data, 8)), images())  # their own size: the crop changes nothing
    assert (dataset.shape, dataset.image_size) == ((8, 8), None)
    assert f"{name} train, as they are, 8x8, 12 images" in dataset.describe()


def test_the_same_pixels_are_the_same_data_in_every_file_format(tmp_path):
    prints = set()
    for name, write in WRITERS.items():
        write(tmp_path / name, images())
        prints.add(open_images(Npz(path=tmp_path / name), 8).fingerprint)
    assert len(prints) == 1
    changed = images()
    changed[7, 3, 3, 1] ^= 1
    for name, write in WRITERS.items():
        write(tmp_path / name, changed)
        prints.add(open_images(Npz(path=tmp_path / name), 8).fingerprint)
    assert len(prints) == 2


@pytest.mark.parametrize("key", ["arr_1", "labels", None])
def test_labels_beside_the_images(tmp_path, key):
    labels = {} if key is None else {key: np.arange(12, dtype=np.int32) % 3}
    np.savez(tmp_path / "a.npz", arr_0=images(), **labels)
    train, test = (open_images(Npz(path=tmp_path / "a.npz", holdout=0.25), 8, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (9, 3)
    assert train.classes == (["0", "1", "2"] if key else ["all"])
    everyone = open_images(Npz(path=tmp_path / "a.npz", holdout=0), 8)
    assert everyone.labels.tolist() == ([i % 3 for i in range(12)] if key else [0] * 12)


def test_labels_of_minus_one(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=images(), arr_1=np.arange(12) - 1)
    with pytest.raises(UserError, match=r"a\.npz has labels from -1 to 10, expected 0 to 10"):
        open_images(Npz(path=tmp_path / "a.npz"), 8)
    np.savez(tmp_path / "a.npz", arr_0=images(), arr_1=np.full(12, -1))
    dataset = open_images(Npz(path=tmp_path / "a.npz"), 8)
    with pytest.raises(UserError, match=r"a\.npz has the label -1 everywhere, which means none"):
        dataset.check_labels()


@pytest.mark.parametrize("name", WRITERS)
def test_reading_does_not_hold_the_array(tmp_path, monkeypatch, name):
    monkeypatch.setattr("robustok.data.dataset.MEMORY_LIMIT", 0)
    pixels = images(300, 128, 128)  # 15 MB
    WRITERS[name](tmp_path / name, pixels)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        dataset = open_images(Npz(path=tmp_path / name, holdout=0), None)
        sums = [int(to_pixels(b.images).sum(dtype=torch.int64)) for b in batches_in_order(dataset, 8)]
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert sum(sums) == pixels.sum()
    assert peak < 4 * 2**20  # an .npy file is checked in parts of 1 MB; decoded batches of 8 take 0.4 MB


# Writing


def test_writing_holds_one_batch_and_shows_only_whole_files(tmp_path):
    pixels, file = images(16, 64, 64), tmp_path / "samples.npz"

    def batches(count):
        for i in range(count):
            assert not file.exists()
            yield np.tile(pixels, (8, 1, 1, 1))  # 1.6 MB
            if i == 30:
                raise KeyboardInterrupt

    shape = (16 * 8 * 25, 64, 64, 3)  # 39 MB
    with pytest.raises(KeyboardInterrupt):
        write_npz(file, batches(50), shape, np.zeros(shape[0]))
    assert list(tmp_path.iterdir()) == []
    tracemalloc.start()
    try:
        write_npz(file, batches(25), shape, np.arange(shape[0]) % 10)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20
    assert list(tmp_path.iterdir()) == [file]
    with np.load(file) as found:
        assert sorted(found) == ["arr_0", "arr_1"]
        assert np.array_equal(found["arr_0"], np.tile(pixels, (8 * 25, 1, 1, 1)))
        assert found["arr_1"].tolist() == [i % 10 for i in range(shape[0])]
    content = file.read_bytes()
    write_npz(tmp_path / "again.npz", (np.tile(pixels, (8, 1, 1, 1)) for _ in range(25)), shape, np.arange(3200) % 10)
    assert (tmp_path / "again.npz").read_bytes() == content


# Files that are no arrays of images


def npz(**arrays):
    return lambda file: np.savez(file, **arrays)


def npy(array, **options):
    return lambda file: np.save(file.with_suffix(".npy"), array, **options)


def floats(*values):
    array = np.zeros((3, 8, 8, 3), dtype=np.float32)
    array[0, 0, 0, : len(values)] = values
    return array


def cut(writer, share):
    def write(file):
        writer(file)
        (whole,) = file.parent.iterdir()
        whole.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])

    return write


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was executed')",)


def short_member(file):
    with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (9, 8, 8, 3)})
        stream.write(images(4).tobytes())


def zipped(*names):
    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            for name in names:
                archive.writestr(name, "content")

    return write


def header(shape):
    """A file whose header has this shape, as text."""
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': " + shape + b", }\n"
    return lambda file: file.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)


def short_labels(file):
    np.savez(file, arr_0=images())
    with zipfile.ZipFile(file, "a") as archive, archive.open("arr_1.npy", "w") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<i8", "fortran_order": False, "shape": (12,)})
        stream.write(bytes(40))


BAD = {
    "statistics": (npz(mu=np.zeros(4), sigma=np.eye(4)), "holds mu, sigma; .* as arr_0; statistics are no images"),
    "other keys": (npz(samples=images()), "holds samples; expected uint8 pixels .* as arr_0"),
    "no keys": (npz(), "holds nothing"),
    "floats": (npz(arr_0=floats(-1, 1)), r"arr_0 of .* is float32 \(3, 8, 8, 3\) with values from -1 to 1; expected"),
    "NaN": (npz(arr_0=floats(np.nan)), "float32 .* from nan to nan; expected uint8"),
    "float .npy": (npy(floats(0, 1)), "float32 .* from 0 to 1"),
    "int64": (npz(arr_0=images().astype(int)), "is int64"),
    "NCHW": (npz(arr_0=images().transpose(0, 3, 1, 2).copy()), r"is uint8 \(12, 3, 8, 8\); expected .*\(N, H, W, 3\)"),
    "grey": (npz(arr_0=images()[..., 0]), r"is uint8 \(12, 8, 8\)"),
    "Fortran": (npy(np.asfortranarray(images())), "Fortran order"),
    "no images": (npz(arr_0=images(0)), "is empty"),
    "objects": (npz(arr_0=np.array([Bomb()], dtype=object)), "holds pickled objects, which are never loaded"),
    "object .npy": (npy(np.array([Bomb()], dtype=object)), "pickled objects"),
    "object labels": (npz(arr_0=images(1), arr_1=np.array([Bomb()], dtype=object)), r"arr_1 of .* is object"),
    "float labels": (npz(arr_0=images(), arr_1=np.zeros(12)), r"arr_1 of .* is float64 \(12,\); expected integer"),
    "few labels": (npz(arr_0=images(), arr_1=np.zeros(11, int)), r"\(11,\); expected integer labels \(12,\)"),
    "pickle": (lambda file: file.write_bytes(pickle.dumps(Bomb())), "is neither an .npz nor an .npy file"),
    "text": (lambda file: file.write_text("pixels"), "is neither an .npz nor an .npy file"),
    "nothing": (lambda file: file.write_bytes(b""), "is neither an .npz nor an .npy file"),
    "half a zip": (cut(npz(arr_0=images()), 0.5), "is cut off or damaged"),
    "half an .npy": (cut(npy(images()), 0.5), "is cut off or damaged: .* expected 2304"),
    "half a header": (cut(npy(images()), 0.02), "is no NumPy array"),
    "a header that never ends": (header(b"(((("), "is no NumPy array"),
    "a deep header": (header(b"-" * 4000 + b"1"), "is no NumPy array"),
    "an odd header": (header(b"{[]: 1}"), "is no NumPy array"),
    "short member": (short_member, "768 bytes of pixels, expected 1728"),
    "folder": (lambda file: file.mkdir(), "cannot read .*it is a folder"),
    "FIFO": (os.mkfifo, "cannot read .*it is a FIFO"),
    "zip of pictures": (zipped("a/0.png", "a/1.png"), "is a zip archive of images; unpack it and give the folder"),
    "large zip": (zipped(*map(str, range(9999))), "holds 0, 1, 10, 100, 1000, 9994 more; expected"),
    "git-lfs": (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1"), "is a git-lfs pointer"),
    "large label": (npz(arr_0=images(), arr_1=np.arange(12) + 2**40), "class numbers from 0 to 99,999"),
    "unsigned label": (npz(arr_0=images(), arr_1=np.arange(12, dtype=np.uint64) + 2**63), "expected class numbers"),
    "cut labels": (short_labels, "arr_1 of .* is cut off: 40 bytes for 12 labels"),
    "missing": (lambda file: None, "cannot read .*No such file"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("error")
def test_bad_files_are_one_line_that_names_them(tmp_path, kind):
    write, message = BAD[kind]
    write(tmp_path / "some.npz")
    file = next(tmp_path.iterdir(), tmp_path / "some.npz")
    with pytest.raises(UserError, match=message) as caught:
        open_images(Npz(path=file), 8)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_damage_inside_a_compressed_file_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("robustok.data.dataset.MEMORY_LIMIT", 0)
    save_compressed(tmp_path / "a.npz", images(200, 16, 16))
    opened = open_images(Npz(path=tmp_path / "a.npz", holdout=0), None)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    (tmp_path / "a.npz").write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"a\.npz is damaged at image \d+"):
        everything(opened)
    with pytest.raises(UserError, match=r"a\.npz is cut off or damaged"):
        open_images(Npz(path=tmp_path / "a.npz", holdout=0), None)
