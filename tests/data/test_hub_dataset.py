"""Data sets of the Hugging Face Hub and folders, through ``datasets``."""

import json
import re

import huggingface_hub
import pytest

from robustok.cli import main
from robustok.data.dataset import open_images
from robustok.data.loader import training_batches
from robustok.data.sources import Folder, HubDataset
from robustok.errors import UserError
from tiny_images import encoded, picture, save_tree

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def table(path, rows, start=0, **columns):
    """A parquet file as of the Hub: images in bytes, classes with names."""
    images = [{"bytes": encoded(picture(start + i)), "path": f"{start + i}.png"} for i in range(rows)]
    features = datasets.Features(
        {"picture": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
        | {name: datasets.Value("string") for name in columns}
    )
    content = {"picture": images, "label": [i % 2 for i in range(rows)], **columns}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(content, features=features).to_parquet(path)


def opened(path, side="train", **settings):
    return open_images(HubDataset(path=str(path), **{"holdout": 0} | settings), 8, side)


def test_splits_classes_and_pixels_are_those_of_the_data_set(tmp_path):
    table(tmp_path / "set" / "train-0.parquet", 6)
    table(tmp_path / "set" / "validation-0.parquet", 2, 50)
    train, test = opened(tmp_path / "set"), opened(tmp_path / "set", "test")
    assert (len(train), train.classes, train.labels.tolist()) == (6, ["cat", "dog"], [0, 1] * 3)
    assert (len(test), test.names) == (2, ["50", "51"])
    expected = [picture(i).getpixel((3, 2)) for i in range(6)]
    assert [tuple(p) for p in train.read(range(6)).pixels[:, :, 2, 3].tolist()] == expected
    part = opened(tmp_path / "set", split="train[:50%]")
    assert len(part) == 3
    assert part.fingerprint != train.fingerprint
    assert len(opened(tmp_path / "set", "test", split="train", holdout=0.5)) == 3


def test_captions_and_labels_are_columns(tmp_path):
    table(tmp_path / "set" / "a.parquet", 3, text=["x", "y", "x"], kind=["b", "a", "b"])
    data = opened(tmp_path / "set", captions="text")
    assert [data.captions[label] for label in data.labels] == ["x", "y", "x"]
    assert opened(tmp_path / "set", label="kind").labels.tolist() == [1, 0, 1]
    with pytest.raises(UserError, match=r"has the columns picture, label, text, kind, not data\.label=no"):
        opened(tmp_path / "set", label="no")
    with pytest.raises(UserError, match=r"picture \(Image\), label \(ClassLabel\).*no data\.image=img"):
        opened(tmp_path / "set", image="img")
    table(tmp_path / "gaps" / "a.parquet", 2, text=["x", None])
    with pytest.raises(UserError, match=r"1 of 2 images have no caption .*gaps train row 1"):
        opened(tmp_path / "gaps", captions="text")


def test_an_image_folder_gives_the_batches_of_the_folder_source(tmp_path):
    """In the process itself and in workers."""
    save_tree(tmp_path / "set" / "train", ("cat", "dog"), 5)
    save_tree(tmp_path / "set" / "test", ("cat", "dog"), 1)
    ours, theirs = opened(tmp_path / "set"), open_images(Folder(path=tmp_path / "set", holdout=0), 8)
    assert ours.names == theirs.names
    ours._memory = None  # as of a large set
    for workers in (0, 1):
        batches = training_batches(ours, 4, 0, 0, 2, workers=workers)
        for a, b in zip(batches, training_batches(theirs, 4, 0, 0, 2), strict=True):
            assert a.pixels.equal(b.pixels)
            assert a.labels.equal(b.labels)


def test_metadata_of_an_image_folder_are_columns(tmp_path):
    (tmp_path / "set").mkdir()
    rows = [{"file_name": f"{i}.png", "text": f"caption {i}"} for i in range(3)]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i in range(3):
        picture(i).save(tmp_path / "set" / f"{i}.png")
    data = opened(tmp_path / "set", captions="text")
    assert [data.captions[label] for label in data.labels] == ["caption 0", "caption 1", "caption 2"]


def test_a_path_in_a_table_is_not_read(tmp_path):
    picture(0).save(tmp_path / "secret.png")
    features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    rows = [{"bytes": None, "path": str(tmp_path / "secret.png")}, {"bytes": encoded(picture(1)), "path": None}]
    found = datasets.Dataset.from_dict({"image": rows}, features=features)
    (tmp_path / "set").mkdir()
    found.cast_column("image", datasets.Image(decode=False)).to_parquet(tmp_path / "set" / "a.parquet")
    with pytest.warns(UserWarning, match=r"set train row 0: it is only a path, .*secret\.png, which is not read"):
        assert len(opened(tmp_path / "set").read(range(2)).pixels) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.path=nobody/nothing"], "cannot load nobody/nothing .*check name, subset, split, network and"),
        (["data.path={}", "data.split=trian"], "cannot load .*trian"),
        (["data.path={}/texts"], "is a data set of the kind text; expected parquet, arrow, imagefolder"),
        (["data.path={}/tars"], "is a data set of the kind webdataset; .*set data.name=tar"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(tmp_path, capsys, words, said):
    table(tmp_path / "set" / "a.parquet", 2)
    (tmp_path / "set" / "texts").mkdir()
    (tmp_path / "set" / "texts" / "a.txt").write_text("a")
    (tmp_path / "set" / "tars").mkdir()
    (tmp_path / "set" / "tars" / "a.tar").write_bytes(bytes(1024))
    words = [word.format(tmp_path / "set") for word in words]
    code = main(["train-classifier", "data.name=hf", *words, "image_size=16", f"out={tmp_path / 'out'}"])
    err = capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1), err
    assert re.search(said, err), err
