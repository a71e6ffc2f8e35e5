"""Parquet files as the Hub has them: splits, columns, labels, metadata and images that are none."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robustok.data.dataset import open_images
from robustok.data.sources import Parquet, data_at
from robustok.errors import UserError
from tiny_images import encoded, picture, save_tree


def save(path, labels=(0, 1, 0, 1), column="label", images=None, metadata=None, extra=()):
    """A parquet file with noise pictures and a column of labels; None writes no labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(images or labels)
    columns = {"image": images or [{"bytes": encoded(picture(i)), "path": None} for i in range(count)]}
    columns |= {} if column is None else {column: pa.array(labels)}
    columns |= {name: ["x"] * count for name in extra}
    table = pa.table(columns)
    pq.write_table(table if metadata is None else table.replace_schema_metadata(metadata), path)
    return path


def found(path, split="train", **settings):
    dataset = open_images(Parquet(path=path, **settings), 8, split)
    return len(dataset), dataset.classes, dataset.labels.tolist()


def huggingface(names, label="label"):
    return {"huggingface": json.dumps({"info": {"features": {label: {"names": names}}}})}


# Splits


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training-00000-of-00001", "testing-00000-of-00001"), ("Train-0", "Test-0"), ("train", "valid"),
        ("data/train-0", "data/dev-0"), ("train/0000", "eval/0000"), ("Training/0", "Evaluation/0"),
        ("test_data/train-0", "test_data/validation-0"), ("val/train-0", "val/test-0"), ("train2017", "val2017"),
    ],
)  # fmt: skip
def test_files_are_divided_by_name_and_else_by_folder(tmp_path, train, test):
    save(tmp_path / f"{train}.parquet", [0, 1, 0, 1])
    save(tmp_path / f"{test}.parquet", [1, 1])
    assert found(tmp_path, "train") == (4, ["0", "1"], [0, 1, 0, 1])
    assert found(tmp_path, "test") == (2, ["0", "1"], [1, 1])


def test_files_of_no_split_are_noted(tmp_path):
    for name in ("train", "val", "test", "extra"):
        save(tmp_path / f"{name}.parquet")
    with pytest.warns(UserWarning, match=r"2 parquet files of no split or of another \(extra"):
        assert found(tmp_path)[0] == 4


@pytest.mark.parametrize(
    ("pattern", "count"), [("**/*.parquet", 12), ("a/**/*.parquet", 8), ("*/*.parquet", 8), ("a*", 8), ("**", 12)]
)
def test_globs(tmp_path, pattern, count):
    for name in ("a/0", "a/b/1", "c/2"):
        save(tmp_path / f"{name}.parquet")
    assert found(tmp_path / pattern, holdout=0)[0] == count
    assert len(open_images(data_at(tmp_path / pattern), None)) == count


@pytest.mark.parametrize("pattern", ["", "**/*.parquet", "**", "a/**", "*"])
def test_links_are_followed_and_those_in_a_circle_once(tmp_path, pattern):
    save(tmp_path / "set" / "a" / "0.parquet")
    save(tmp_path / "elsewhere" / "1.parquet")
    os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "a" / "link")
    for name, target in (("all", "."), ("up", "..")):
        os.symlink(target, tmp_path / "set" / "a" / name)
    assert found(tmp_path / "set" / pattern, holdout=0)[0] == 8


def test_brackets_in_a_name_that_exists_are_no_glob(tmp_path):
    save(tmp_path / "train[1].parquet")
    save(tmp_path / "run [cfg=1.5]" / "0.parquet")
    save_tree(tmp_path / "photos[1]", count=3)
    assert found(tmp_path / "train[1].parquet", holdout=0)[0] == 4
    assert found(tmp_path / "run [cfg=1.5]", holdout=0)[0] == 4
    assert found(tmp_path / "run [cfg=1.5]" / "*.parquet", holdout=0, max_broken=0)[0] == 4
    counts = {name: len(open_images(data_at(tmp_path / name), None)) for name in os.listdir(tmp_path)}
    assert counts == {"train[1].parquet": 4, "run [cfg=1.5]": 4, "photos[1]": 6}


# Labels


@pytest.mark.parametrize("column", ["label", "labels", "fine_label", "cls", "class"])
def test_columns_that_are_labels(tmp_path, column):
    assert found(save(tmp_path / "a.parquet", [0, 2, 1], column), holdout=0) == (3, ["0", "1", "2"], [0, 2, 1])


def test_another_column_is_named(tmp_path):
    path = save(tmp_path / "a.parquet", [0, 2, 1], "breed", extra=["text"])
    assert found(path, holdout=0) == (3, ["all"], [0, 0, 0])
    assert found(path, holdout=0, label="breed") == (3, ["0", "1", "2"], [0, 2, 1])
    prints = {open_images(Parquet(path=path, label=label), 8).fingerprint for label in (None, "breed")}
    assert len(prints) == 2
    with pytest.raises(UserError, match=r"has the columns image, breed, text, not data\.label=kind; name one of them"):
        found(path, label="kind")


def test_labels_that_are_names(tmp_path):
    save(tmp_path / "train.parquet", ["dog", "cat", "emu"])
    save(tmp_path / "test.parquet", ["emu", "dog"])
    assert found(tmp_path) == (3, ["cat", "dog", "emu"], [1, 0, 2])
    assert found(tmp_path, "test") == (2, ["cat", "dog", "emu"], [2, 1])
    save(tmp_path / "test.parquet", ["ant", "dog"])
    with pytest.raises(UserError, match="has the label 'ant'; expected one of cat, dog, emu"):
        found(tmp_path, "test")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2_000_000], "labels from 0 to 2000000, expected class numbers from 0 to 99,999; choose another column"),
        ([0, 2**62], "labels from 0 to 4611686018427387904, expected"),
        ([0, -1], "labels from -1 to 0, expected 0 to 0; correct them"),
        ([0, None], "has 'None' in row 1; expected class numbers or names only"),
        ([0.0, 1.5], "has '0.0' in row 0; expected class numbers or names only"),
        ([[1], [2]], r"has '\[1\]' in row 0; expected class numbers or names only"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, message):
    with pytest.raises(UserError, match=message):
        found(save(tmp_path / "a.parquet", labels), holdout=0)


def test_the_label_minus_one_everywhere_means_none(tmp_path):
    dataset = open_images(Parquet(path=save(tmp_path / "a.parquet", [-1, -1]), holdout=0), 8)
    assert dataset.labels.tolist() == [-1, -1]
    with pytest.raises(UserError, match="has the label -1 everywhere, which means none; give images with labels"):
        dataset.check_labels()


@pytest.mark.parametrize(
    "metadata",
    [
        {"huggingface": "{not json"}, {"huggingface": "[]"}, {"huggingface": "null"}, {"huggingface": '{"info": null}'},
        {"huggingface": '{"info": {"features": []}}'}, {"huggingface": '{"info": {"features": {"label": 3}}}'},
        {"huggingface": b"\xff\xfe"}, {"huggingface": "[" * 10**5}, huggingface(3), huggingface([1, 2]),
        huggingface([]), huggingface({"0": "a"}), huggingface(["a", "b"], "other"),
    ],
)  # fmt: skip
def test_odd_metadata_name_no_classes(tmp_path, metadata):
    assert found(save(tmp_path / "a.parquet", metadata=metadata), holdout=0)[1] == ["0", "1"]


def test_metadata_name_the_classes_of_the_column_that_is_read(tmp_path):
    path = save(tmp_path / "a.parquet", [1, 0], "fine_label", metadata=huggingface(["b", "a"], "fine_label"))
    assert found(path, holdout=0) == (2, ["b", "a"], [1, 0])


def test_files_with_other_classes_are_refused(tmp_path):
    save(tmp_path / "a.parquet", metadata=huggingface(["cat", "dog"]))
    save(tmp_path / "b.parquet", metadata=huggingface(["dog", "cat"]))
    with pytest.raises(UserError, match=r"b\.parquet has other labels or names of classes than .*a\.parquet"):
        found(tmp_path)
    save(tmp_path / "b.parquet", column="labels")
    with pytest.raises(UserError, match=r"b\.parquet has other labels"):
        found(tmp_path)


# Images and files that are none


def test_images_that_are_none_say_what_they_are(tmp_path):
    good = [{"bytes": encoded(picture(i)), "path": None} for i in range(8)]
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    odd = [
        {"bytes": None, "path": None}, {"bytes": b"", "path": "/etc/hostname"}, {"bytes": None, "path": "../out.png"},
        {"bytes": pointer, "path": "x.png"}, {"bytes": b"text", "path": None},
    ]  # fmt: skip
    picture(0).save(tmp_path / "out.png")
    path = save(tmp_path / "set" / "a.parquet", images=good + odd, column=None)
    with pytest.warns(UserWarning, match="skipping"):
        dataset = open_images(Parquet(path=path, holdout=0), 8)
    reasons = [
        "column image holds neither bytes nor a path",
        f"its path /etc/hostname leads out of {tmp_path}/set, where alone images are read",
        f"its path ../out.png leads out of {tmp_path}/set, where alone images are read",
        "cannot identify image file, it is a git-lfs pointer in place of the file: run git lfs pull",
        "cannot identify image file",
    ]
    assert dataset.broken == {8 + i: reason for i, reason in enumerate(reasons)}


def test_null_images_and_columns_of_other_types(tmp_path):
    path = save(tmp_path / "a.parquet", images=[encoded(picture(0)), None, b""], column=None)
    with pytest.warns(UserWarning, match=r"row 1: column image holds null, no image"):
        dataset = open_images(Parquet(path=path, holdout=0), 8)
    assert dataset.broken[2] == "cannot identify image file, it is empty"
    path = save(tmp_path / "b.parquet", images=["a", "b"], column=None)
    with pytest.raises(UserError, match="column image holds str, no image"):
        found(path, holdout=0, max_broken=0)


def test_paths_inside_of_the_data_folder_are_read(tmp_path):
    save_tree(tmp_path / "images", ("cat",), 2)
    images = [{"bytes": None, "path": f"../images/cat/{i:03d}.png"} for i in range(2)]
    path = save(tmp_path / "data" / "train.parquet", images=images, column=None)
    assert found(tmp_path, holdout=0, max_broken=0)[0] == 2
    with pytest.raises(UserError, match=r"leads out of .*data, where alone"):  # only what is named is searched
        found(path, holdout=0, max_broken=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "it is a git-lfs pointer without the content",
        ),
        (b"", "as parquet, it is empty"),
        (b"PAR1" * 100, "as parquet: "),
        (b"PK\3\4", "as parquet: "),
    ],
)
def test_files_that_are_no_parquet_say_what_they_are(tmp_path, content, message):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        found(tmp_path)
    assert len(str(caught.value)) < 500


def test_a_fifo_is_no_parquet_file(tmp_path):
    os.mkfifo(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="FIFO"):
        found(tmp_path)
