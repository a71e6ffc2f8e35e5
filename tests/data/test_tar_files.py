"""Tar files: webdataset's samples, folders, ImageNet's tar of tars, copies of remote ones, and damaged files."""

import io
import json
import os
import pickle
import tarfile

import fsspec
import numpy as np
import pytest

from robustok.cli import main
from robustok.data.dataset import open_images
from robustok.data.loader import training_batches
from robustok.data.sources import Folder, Tar, data_at
from robustok.errors import UserError
from robustok.files import IMAGE_SUFFIXES
from tiny_images import encoded, picture, postscript, save_tree, watch_postscript


def tar_bytes(members, **settings):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **settings) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def save(path, members, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, **settings))
    return path


def image(seed):
    return encoded(picture(seed))


def samples(rows, start=0, **parts):
    """Members of a webdataset file: an image for each row, and further parts by suffix, one for each row."""
    members = {}
    for i in range(rows):
        for suffix, values in parts.items():
            members[f"{start + i:04d}.{suffix}"] = values[i]
        members[f"{start + i:04d}.png"] = image(start + i)
    return members


def found(path, split="train", **settings):
    dataset = open_images(Tar(path=path, **{"holdout": 0} | settings), 8, split)
    return len(dataset), dataset.classes, dataset.labels.tolist()


def pixels(data):
    return data.read(range(len(data))).pixels


# What is read


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_images_labels_and_names_are_those_of_the_members(tmp_path, form):
    long = f"{'x' * 70}/{'y' * 60}.jpg.png" if form != tarfile.USTAR_FORMAT else "y.jpg.png"
    save(
        tmp_path / "a" / "00.tar",
        {**samples(3, cls=[b"2", b"0", b"1\n"]), long: image(3), f"{long[:-8]}.cls": b"0"},
        format=form,
    )
    data = open_images(Tar(path=tmp_path / "a", holdout=0), 8)
    assert data.labels.tolist() == [2, 0, 1, 0]
    assert data.names == ["0000", "0001", "0002", long[:-4]]
    expected = np.stack([np.array(picture(i)) for i in range(4)]).transpose(0, 3, 1, 2)
    assert (pixels(data).numpy() == expected).all()


def test_labels_and_captions_are_columns_of_json(tmp_path):
    rows = [json.dumps({"breed": name, "text": f"a {name}"}).encode() for name in ("pug", "cat", "pug")]
    file = save(tmp_path / "a.tar", samples(3, json=rows, txt=[b"one", b"two", b" three "]))
    assert found(file, label="breed") == (3, ["cat", "pug"], [1, 0, 1])
    assert found(file)[1] == ["all"]  # no column that is a label by its name
    captions = lambda **settings: open_images(Tar(path=file, holdout=0, **settings), 8)  # noqa: E731
    data = captions(captions="text")
    assert [data.captions[label] for label in data.labels] == ["a pug", "a cat", "a pug"]
    data = captions(captions="txt")
    assert [data.captions[label] for label in data.labels] == ["one", "two", "three"]
    with pytest.raises(UserError, match=r"its columns are breed, text"):
        found(file, label="colour")
    with pytest.raises(UserError, match=r"3 of 3 images have no caption .*give each title in its \.json"):
        captions(captions="title")


def test_folders_in_a_tar_are_classes_as_on_the_disk(tmp_path):
    """The same images in the same order as those of the folder, so the same batches, with workers too."""
    root = save_tree(tmp_path / "photos", ("cat", "dog", "emu"), 5)
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(root, "./photos")  # in the order of the disk
    ours = {file: (root / file).read_bytes() for file in sorted(str(f.relative_to(root)) for f in root.glob("*/*"))}
    save(tmp_path / "sorted.tar", ours)
    assert found(tmp_path / "photos.tar")[:2] == (15, ["cat", "dog", "emu"])
    folder = open_images(Folder(path=root, holdout=0), 8)
    data = open_images(Tar(path=tmp_path / "sorted.tar", holdout=0), 8)
    assert data.names == folder.names
    data._memory = None  # as of a large set
    batches = training_batches(data, 4, 0, 0, 4, workers=1)
    for ours, theirs in zip(batches, training_batches(folder, 4, 0, 0, 4), strict=True):
        assert ours.pixels.equal(theirs.pixels)
        assert ours.labels.equal(theirs.labels)


def test_files_are_splits_by_their_names_and_ranges_as_in_bash(tmp_path):
    for number in range(12):
        save(tmp_path / f"train-{number:03d}.tar", samples(2, 2 * number, cls=[b"dog", b"cat"]))
    save(tmp_path / "val.tar", samples(1, 90, cls=[b"dog"]))
    assert found(tmp_path)[0] == 24
    assert found(tmp_path, "test") == (1, ["cat", "dog"], [1])
    assert found(tmp_path / "train-{000..010}.tar")[0] == 22
    assert found(tmp_path / "train-{007..007}.tar")[0] == 2
    assert found(tmp_path / "train-00*.tar")[0] == 20
    assert data_at(tmp_path / "val.tar") == Tar(path=tmp_path / "val.tar", holdout=0)
    with pytest.raises(UserError, match=r"no tar files at .*train-012"):
        found(tmp_path / "train-{000..012}.tar")


def test_imagenet_as_it_is_downloaded(tmp_path):
    """A tar of tars, a class each; validation images flat, with a list of labels."""
    inner = {
        f"{name}.tar": tar_bytes({f"{name}_{i}.JPEG": encoded(picture(10 * c + i), "JPEG") for i in range(3)})
        for c, name in enumerate(("n01440764", "n01443537"))
    }
    save(tmp_path / "ILSVRC2012_img_train.tar", inner)
    flat = {f"ILSVRC2012_val_{i:08d}.JPEG": encoded(picture(50 + i), "JPEG") for i in (1, 2, 3)}
    save(tmp_path / "ILSVRC2012_img_val.tar", flat)
    (tmp_path / "labels.txt").write_text("n01443537\nn01440764\nn01443537\n")
    assert found(tmp_path) == (6, ["n01440764", "n01443537"], [0, 0, 0, 1, 1, 1])
    assert found(tmp_path, "test", labels=tmp_path / "labels.txt")[2] == [1, 0, 1]
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n" + "".join(f"ILSVRC2012_val_{i:08d},n01443537 1 2 3 4\n" for i in (1, 2, 3))
    )
    assert found(tmp_path, "test", labels=tmp_path / "LOC_val_solution.csv")[2] == [1, 1, 1]
    data = open_images(Tar(path=tmp_path / "ILSVRC2012_img_train.tar", holdout=0), 8)
    assert data.names[3] == "n01443537/n01443537_0"


# What is refused, and what is left out


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: cut(path, 5000), r"a\.tar ends early, after \d+ members .*copy it again"),
        (lambda path: cut(path, 100), r"a\.tar is no tar file"),
        (lambda path: path.write_bytes(b"x" * 4096), r"a\.tar is no tar file"),
        (lambda path: path.write_bytes(b""), r"a\.tar is no tar file"),
        (
            lambda path: path.write_bytes(b"\x1f\x8b" + bytes(600)),
            r"is compressed, so nothing in it can be found; unpack",
        ),
        (
            lambda path: path.write_bytes(path.read_bytes()[:1024] + b"x" * 512 + path.read_bytes()[1536:]),
            r"a\.tar is damaged after 1 members, at byte 1,024; copy it again",
        ),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, capsys, harm, said):
    file = save(tmp_path / "a.tar", samples(4, cls=[b"0"] * 4))
    harm(file)
    with pytest.raises(UserError, match=said):
        found(file)
    words = ["train-classifier", "data.name=tar", f"data.path={file}", "image_size=16", f"out={tmp_path / 'out'}"]
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_that_was_cut_between_two_members_is_noted(tmp_path):
    file = save(tmp_path / "a.tar", samples(2))
    with tarfile.open(file) as archive:
        end = archive.getmembers()[-1].offset
    cut(file, end)
    with pytest.warns(UserWarning, match="no end mark, as if it had been cut off after 1 members"):
        assert found(file)[0] == 1


def test_what_is_no_image_is_counted_and_pickles_are_never_opened(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    members = samples(2) | {"0000.pyd": pickle.dumps(Evil()), "a.pkl": b"", "b.seg.png": image(7), "0000.heic": b""}
    members |= {"0001.jpg": image(8), ".hidden.png": b"", "lonely.cls": b"0"}
    file = save(tmp_path / "a.tar", members)
    with tarfile.open(file, "a") as archive:
        link = tarfile.TarInfo("9999.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.warns(UserWarning, match="left out of") as notes:
        assert found(file, label=None)[0] == 3
    said = str(notes[0].message)
    assert "2 members that may hold pickles, which are never opened (0000.pyd, a.pkl)" in said
    assert "1 links and the like (9999.png)" in said
    assert "1 further images of a sample (0001.jpg)" in said
    assert not (tmp_path / "owned").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]  # nothing was unpacked


def test_a_broken_image_is_named_and_skipped_and_no_other_format_is_opened(tmp_path, monkeypatch):
    opened = watch_postscript(monkeypatch)
    file = save(tmp_path / "a.tar", samples(3) | {"9.png": postscript(), "../../8.png": b"broken"})
    with pytest.warns(UserWarning, match=r"a\.tar: (9\.png|\.\./\.\./8\.png): cannot identify image file"):
        assert len(pixels(open_images(Tar(path=file, holdout=0), 8))) == 3
    assert opened == []
    assert ".eps" not in IMAGE_SUFFIXES


def test_labels_that_some_images_lack_are_one_line(tmp_path):
    members = samples(3, cls=[b"0", b"1", b"2"])
    del members["0001.cls"]
    with pytest.raises(UserError, match=r"1 of 3 images have no label in \.cls, such as .*a\.tar: 0001\.png"):
        found(save(tmp_path / "a.tar", members))
    with pytest.raises(UserError, match=r"the \.json of .*0000\.png holds no JSON object"):
        found(save(tmp_path / "b.tar", samples(1, json=[b"[1"])))
    with pytest.raises(UserError, match=r"no images in .*c\.tar \(found: 1 samples without an image"):
        found(save(tmp_path / "c.tar", {"0.cls": b"1"}))


# Elsewhere


def test_remote_files_are_copied_once(tmp_path, monkeypatch):
    store = fsspec.filesystem("memory")
    for number in range(3):
        store.pipe(f"/bucket/deep/train-{number:02d}.tar", tar_bytes(samples(2, 2 * number)))
    store.pipe("/bucket/deep/val.tar", tar_bytes(samples(1, 9)))
    cache = tmp_path / "cache"
    assert found("memory://bucket/deep/train-{00..01}.tar", cache=cache)[0] == 4
    assert found("memory://bucket/deep", cache=cache)[0] == 6
    assert found("memory://bucket/deep", "test", cache=cache)[0] == 1
    monkeypatch.setattr(type(store), "get_file", None)  # nothing is copied again
    assert found("memory://bucket/deep", cache=cache)[0] == 6


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("memory://bucket/none.tar", "cannot read memory://bucket/none.tar .*check the address, the network"),
        ("memory://nothing/*.tar", "no .tar files at memory://nothing"),
        ("nosuch://bucket/a.tar", "cannot read nosuch://bucket/a.tar .*Protocol not known"),
        ("s3://bucket/a.tar", "cannot read s3://bucket/a.tar .*[Ii]nstall s3fs"),
    ],
)
def test_an_address_that_cannot_be_read_is_one_line(tmp_path, address, said):
    if address.startswith("s3"):
        _skip_if_installed("s3fs")
    with pytest.raises(UserError, match=said):
        found(address, cache=tmp_path)


def _skip_if_installed(package):
    from importlib.util import find_spec

    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
