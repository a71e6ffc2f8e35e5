"""The kinds of data set: their images, labels and splits, and the errors of bad ones."""

import hashlib
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robustok.config import Config, validate
from robustok.data.dataset import open_images
from robustok.data.loader import batches_in_order
from robustok.data.pixels import to_pixels
from robustok.data.sources import DATASETS, Cifar10, Data, Digits, Folder, Npz, Parquet, data_at
from robustok.errors import UserError
from robustok.files import IMAGE_FORMATS, IMAGE_SUFFIXES
from tiny_images import encoded, picture, postscript, save_tree, truncate, watch_postscript


def save_parquet(path, count=12, labels=None, names=("cat", "dog"), column="img", row_group_size=5):
    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(count)]
    labels = [i % 2 for i in range(count)] if labels is None else labels
    table = pa.table({column: images, "label": pa.array(labels, pa.int64())})
    if names:
        info = json.dumps({"info": {"features": {"label": {"names": names}}}})
        table = table.replace_schema_metadata({"huggingface": info})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def test_digits_are_the_whole_set_in_two_disjoint_splits():
    train, test = open_images(Digits(), 8, "train"), open_images(Digits(), 8, "test")
    assert (len(train), len(test)) == (1348, 449)
    from sklearn.datasets import load_digits

    def key(image):
        return image.astype(np.uint8).tobytes()

    shown = sorted(
        key((b.images[0, 0].numpy() + 1) / 2 * 16 + 0.5) for s in (train, test) for b in batches_in_order(s, 1)
    )
    assert shown == sorted(key(image) for image in load_digits().images)
    assert train.fingerprint != test.fingerprint
    assert train.classes == [str(i) for i in range(10)]
    assert set(train.labels) == set(range(10))


def test_folder_with_splits(tmp_path):
    save_tree(tmp_path / "train", count=6)
    save_tree(tmp_path / "val", classes=("dog",), count=3)
    train, test = (open_images(Folder(path=tmp_path), 8, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (12, 3)
    assert test.labels.tolist() == [1, 1, 1]  # dog is 1 in training, whatever the test split holds
    assert train.classes == test.classes == ["cat", "dog"]


def test_folder_with_one_split_holds_out(tmp_path):
    save_tree(tmp_path)
    train, test = (open_images(Folder(path=tmp_path, holdout=0.25), 8, split) for split in ("train", "test"))
    images = [b.images.numpy().tobytes() for s in (train, test) for b in batches_in_order(s, 1)]
    assert (len(train), len(test)) == (15, 5)
    assert len(set(images)) == 20
    assert len(open_images(Folder(path=tmp_path, holdout=0), 8, "test")) == 20


def test_flat_folder_is_one_class(tmp_path):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.JPEG")
    dataset = open_images(Folder(path=tmp_path, holdout=0), 8)
    assert dataset.classes == ["all"]
    assert dataset.labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize("layout", ["{}.parquet", "data/{}-00000-of-00001.parquet", "{}/0000.parquet"])
def test_parquet_splits_are_chosen_by_file_name(tmp_path, layout):
    save_parquet(tmp_path / layout.format("train"), 12)
    save_parquet(tmp_path / layout.format("validation"), 4, column="img")
    train, test = (open_images(Parquet(path=tmp_path), 8, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (12, 4)
    assert train.classes == ["cat", "dog"]
    for i, batch in enumerate(batches_in_order(train, 1)):
        assert np.array_equal(to_pixels(batch.images)[0].permute(1, 2, 0), np.asarray(picture(i)))
        assert batch.labels.item() == i % 2


def test_parquet_file_glob_and_other_column(tmp_path):
    save_parquet(tmp_path / "latest-1.parquet", 7, names=None, column="image")
    save_parquet(tmp_path / "latest-2.parquet", 6, names=None, column="image")
    assert len(open_images(Parquet(path=tmp_path / "*.parquet", holdout=0), 8)) == 13
    one = open_images(Parquet(path=tmp_path / "latest-2.parquet", holdout=0), 8)
    assert len(one) == 6
    assert one.classes == ["0", "1"]


def test_brackets_in_a_name_that_exists_are_no_glob(tmp_path):
    folder = tmp_path / "set [cfg=1.5]"
    for name in ("part [0]", "deep/er/part-1"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_parquet(folder / f"{name}.parquet")
    for path, count in (("part [0].parquet", 12), ("part*.parquet", 12), ("**/part*.parquet", 24), ("", 24)):
        source = DATASETS["parquet"](Parquet(path=folder / path), "train")
        assert len(source.labels) == count, path
    np.savez(folder / "samples [cfg=1.5].npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    assert data_at(folder / "samples [cfg=1.5].npz").name == "npz"
    assert data_at(folder / "part [0].parquet").path.is_file()
    assert data_at(folder).name == "parquet"
    with pytest.raises(UserError, match="no parquet files"):
        DATASETS["parquet"](Parquet(path=folder / "a**/x.parquet"), "train")


def test_cifar10_in_either_folder(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    contents = {
        name: {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(n)]}
        for name, n in (("data_batch_1", 20), ("test_batch", 10))
    }
    contents["batches.meta"] = {"label_names": [f"class{i}" for i in range(10)]}
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    )
    for path in (tmp_path, folder):
        train, test = (open_images(Cifar10(path=path), 32, split) for split in ("train", "test"))
        assert (len(train), len(test)) == (20, 10)
        assert train.classes[3] == "class3"
        pixels = to_pixels(train.read([5]).images)[0]
        assert np.array_equal(pixels.numpy().reshape(-1), contents["data_batch_1"]["data"][5])


# Bad data


def _missing(path):
    return Folder(path=path / "nowhere")


def _empty(path):
    return Folder(path=path)


def _other_files(path):
    (path / "cat").mkdir()
    (path / "cat" / "notes.txt").write_text("no image")
    return Folder(path=path)


def _new_class_in_test(path):
    save_tree(path / "train", count=1)
    save_tree(path / "test", classes=("emu",), count=1)
    return Folder(path=path)


def _negative_labels(path):
    return Parquet(path=save_parquet(path / "a.parquet", 3, labels=[0, -1, 1]))


def _large_labels(path):
    return Parquet(path=save_parquet(path / "a.parquet", 3, labels=[0, 2, 1]))


def _no_column(path):
    return Parquet(path=save_parquet(path / "a.parquet", 3, column="picture"))


def _no_parquet(path):
    (path / "a.parquet").write_text("this is text")
    return Parquet(path=path)


def _no_parquet_files(path):
    return Parquet(path=path)


def _no_cifar(path):
    return Cifar10(path=path)


def _one_image(path):
    return Folder(path=save_tree(path, classes=("cat",), count=1))


def _all_broken(path):
    for file in save_tree(path, count=2).rglob("*.png"):
        truncate(file)
    return Folder(path=path, holdout=0)


@pytest.mark.parametrize(
    ("make", "split", "message"),
    [
        (_missing, "train", "no folder"),
        (_empty, "train", "no images in .*files found: none"),
        (_other_files, "train", r"no images in .*\.txt"),
        (_new_class_in_test, "test", "emu"),
        (_negative_labels, "train", "labels from -1 to 1, expected 0 to 1"),
        (_large_labels, "train", "labels from 0 to 2, expected 0 to 1"),
        (_no_column, "train", "picture, label"),
        (_no_parquet, "train", "cannot read .*a.parquet"),
        (_no_parquet_files, "train", "no parquet files"),
        (_no_cifar, "train", "cifar-10-batches-py"),
        (_one_image, "train", "none for the train split"),
        (_all_broken, "train", "cannot be read"),
    ],
)
@pytest.mark.filterwarnings("ignore:skipping")
def test_bad_data_is_one_line_for_the_user(tmp_path, make, split, message):
    with pytest.raises(UserError, match=message) as caught:
        open_images(make(tmp_path), 8, split)
    assert "\n" not in str(caught.value)


def test_a_broken_parquet_row_is_named(tmp_path):
    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(7)]
    images[5] = {"bytes": images[5]["bytes"][:60], "path": None}
    pq.write_table(pa.table({"image": images}), tmp_path / "b.parquet", row_group_size=2)
    pq.write_table(pa.table({"image": images[:2]}), tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match=r"b\.parquet row 5"):
        dataset = open_images(Parquet(path=tmp_path, holdout=0), 8)
    assert (len(dataset), list(dataset.broken), dataset.classes) == (9, [7], ["all"])


@pytest.mark.parametrize("size", [8, None])
@pytest.mark.parametrize("kind", ["folder", "bytes", "plain bytes", "path"])
def test_an_image_that_is_postscript_cannot_be_read(tmp_path, monkeypatch, kind, size):
    opened = watch_postscript(monkeypatch)
    save_tree(tmp_path, classes=("cat",), count=6)
    files = sorted((tmp_path / "cat").iterdir())
    files[3].write_bytes(postscript())
    values = {
        "bytes": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "plain bytes": [file.read_bytes() for file in files],
        "path": [{"bytes": None, "path": f"cat/{file.name}"} for file in files],
    }
    if kind != "folder":
        pq.write_table(pa.table({"image": values[kind]}), tmp_path / "a.parquet")
    data = Folder(path=tmp_path, holdout=0) if kind == "folder" else Parquet(path=tmp_path / "a.parquet", holdout=0)
    with pytest.warns(UserWarning, match="cannot identify image file"):
        dataset = open_images(data, size)
    assert (len(dataset), list(dataset.broken)) == (6, [3])
    assert not opened


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_a_file_of_every_suffix_is_read_whichever_of_the_formats_it_has(tmp_path, suffix):
    for number, form in enumerate(IMAGE_FORMATS):
        picture(number, 9, 7).save(tmp_path / f"{number}{suffix}", form)
    dataset = open_images(Folder(path=tmp_path, holdout=0), 8)
    assert (len(dataset), dataset.broken) == (len(IMAGE_FORMATS), {})


def test_data_is_chosen_by_name(tmp_path):
    class Run(Config):
        data: Data

    assert isinstance(validate(Run, {"data": {"name": "folder", "path": str(tmp_path)}}).data, Folder)
    with pytest.raises(UserError, match=r"'data\.holdout'"):
        validate(Run, {"data": {"name": "cifar10", "holdout": 0.5}})


# A path instead of a configuration


def test_the_data_set_at_a_path(tmp_path):
    save_tree(tmp_path / "tree")
    save_parquet(tmp_path / "hub" / "data" / "train.parquet", 4)
    (tmp_path / "flat").mkdir()
    picture().save(tmp_path / "flat" / "0.png")
    np.savez(tmp_path / "a.npz", np.zeros((3, 8, 8, 3), np.uint8))
    np.save(tmp_path / "a.npy", np.zeros((3, 8, 8, 3), np.uint8))
    expected = {
        "tree": (Folder, 20),
        "flat": (Folder, 1),
        "hub": (Parquet, 4),
        "hub/data/train.parquet": (Parquet, 4),
        "hub/data/*.parquet": (Parquet, 4),
        "a.npz": (Npz, 3),
        "a.npy": (Npz, 3),
    }
    for path, (kind, count) in expected.items():
        data = data_at(str(tmp_path / path))
        assert type(data) is kind, path
        for split in ("train", "test"):
            assert len(open_images(data, None, split)) == count  # all of them: nothing is held out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere", None, "does not exist"),
        ("notes.txt", "text", "is a file of another kind"),
        ("cache/manifest.json", "{}", "holds latents, which a tokenizer must decode"),
        ("run/config.yaml", "{}", "holds a model or a run"),
    ],
)
def test_a_path_to_anything_else_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    with pytest.raises(UserError, match=rf"{message}.*expected a folder of images, an \.npz .* parquet"):
        data_at(path.parent if "/" in name else path)
