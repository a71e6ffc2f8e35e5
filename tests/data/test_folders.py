"""Folders as people leave them: splits, classes, what lies beside them, links, rights and odd names."""

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

from robustok.data import dataset as dataset_module
from robustok.data.dataset import open_images
from robustok.data.folders import split_of
from robustok.data.loader import batches_in_order
from robustok.data.sources import Folder, Parquet, data_at
from robustok.errors import UserError
from robustok.files import IMAGE_SUFFIXES
from tiny_images import picture, save_tree


def found(path, split="train", **settings):
    """Number of images, classes and labels of a split, and the note on what is left out."""
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        dataset = open_images(Folder(path=path, **settings), 8, split)
    notes = [str(warning.message) for warning in noted]
    assert len(notes) < 2
    return len(dataset), dataset.classes, dataset.labels.tolist(), "".join(notes)


def save_flat(folder, count, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        picture(i, 9, 7).save(folder / f"{i:03d}.png")
    return folder


# Splits


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "valid"), ("training", "testing"), ("Train", "Test"), ("TRAIN", "VAL"), ("train", "dev"),
        ("train", "eval"), ("Training", "Validation"), ("train", "evaluation"), ("train_set", "test_set"),
        ("train2017", "val2017"), ("imagenet-train", "imagenet-val"), ("trainset", "testset"), ("train", "val_images"),
        ("01_train", "02_test"), ("seg_train/seg_train", "seg_test/seg_test"),
    ],
)  # fmt: skip
def test_folders_with_names_of_splits_are_splits(tmp_path, train, test):
    save_tree(tmp_path / train, count=6)
    save_tree(tmp_path / test, count=2)
    assert found(tmp_path, "train") == (12, ["cat", "dog"], [0] * 6 + [1] * 6, "")
    assert found(tmp_path, "test") == (4, ["cat", "dog"], [0, 0, 1, 1], "")


@pytest.mark.parametrize("classes", [("bus", "car", "train"), ("cat", "dog", "test"), ("bullet_train", "crash_test")])
def test_a_class_may_have_the_name_of_a_split(tmp_path, classes):
    save_tree(tmp_path, classes, count=2)
    assert found(tmp_path, holdout=0)[:2] == (2 * len(classes), list(classes))


def test_what_lies_beside_the_splits_is_noted(tmp_path):
    save_tree(tmp_path / "train", count=3)
    save_tree(tmp_path / "val", count=1)
    save_flat(tmp_path / "test", 2)
    save_flat(tmp_path / "previews", 2)
    save_flat(tmp_path, 1)
    (tmp_path / "labels.txt").write_text("cat dog")
    (tmp_path / "private").mkdir(mode=0o000)  # not read: it is no split
    assert found(tmp_path, "test") == (
        2, ["cat", "dog"], [0, 1],
        f"left out of {tmp_path.name} test: 3 folders beside the splits (previews, private, test); "
        "1 images beside the splits (000.png); 1 files of other kinds (.txt)",
    )  # fmt: skip


def test_splits_inside_of_classes_or_deeper_are_refused(tmp_path):
    for name in ("bottle", "cable"):
        for split in ("train", "test"):
            save_flat(tmp_path / "mvtec" / name / split / "good", 2)
    with pytest.raises(UserError, match=r"bottle holds the splits t\w+ and t\w+; give data\.path=.*bottle, or put"):
        found(tmp_path / "mvtec")
    save_tree(tmp_path / "kaggle/ILSVRC/Data/CLS-LOC/train")
    save_tree(tmp_path / "kaggle/ILSVRC/Data/CLS-LOC/val")
    with pytest.raises(UserError, match=r"holds the splits .*; give data\.path=.*kaggle/ILSVRC/Data/CLS-LOC, or put"):
        found(tmp_path / "kaggle")


def test_class_folders_beside_test_images_of_the_same_classes_are_refused(tmp_path):
    save_tree(tmp_path)
    save_tree(tmp_path / "test")
    with pytest.raises(UserError, match="class folders cat, dog and test has them too; move those beside test into"):
        found(tmp_path)


def test_a_class_without_training_images_keeps_its_number(tmp_path):
    save_tree(tmp_path / "train", ("b", "c"), 2)
    save_tree(tmp_path / "val", ("a", "c"), 1)
    (tmp_path / "train" / "a").mkdir()
    assert found(tmp_path, "train")[:3] == (4, ["a", "b", "c"], [1, 1, 2, 2])
    assert found(tmp_path, "test")[:3] == (2, ["a", "b", "c"], [0, 2])


def test_the_split_that_a_name_says():
    said = {name: split_of(name) for name in ("train-00000-of-00001", "latest", "train-test", "My Validation", "dev")}
    assert {name: one and (one.split, one.rest) for name, one in said.items()} == {
        "train-00000-of-00001": ("train", "00000-of-00001"),
        "latest": None,
        "train-test": None,
        "My Validation": ("test", "my "),
        "dev": ("test", ""),
    }


# Classes


def test_class_folders_named_by_numbers_count_as_numbers(tmp_path):
    names = [str(i) for i in range(12)]
    save_tree(tmp_path / "a", names, 1)
    assert found(tmp_path / "a", holdout=0)[1:3] == (names, list(range(12)))
    save_tree(tmp_path / "b", ["class10", "class9"], 1)
    assert found(tmp_path / "b", holdout=0)[1] == ["class10", "class9"]  # as everywhere


def test_folders_that_hold_no_images_are_no_classes(tmp_path):
    save_tree(tmp_path, count=2)
    for name in ("__MACOSX/cat", "@eaDir", "lost+found", ".thumbnails", "cat/@eaDir/000.png"):
        save_flat(tmp_path / name, 1)
    (tmp_path / "__MACOSX" / "cat" / "._00.png").write_bytes(b"\0\5\26\7")
    (tmp_path / "dog" / "._000.png").write_bytes(b"\0\5\26\7")
    (tmp_path / "empty").mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "run.txt").write_text("step 1")
    assert found(tmp_path, holdout=0) == (
        4, ["cat", "dog"], [0, 0, 1, 1],
        f"left out of {tmp_path.name} train: 6 hidden or system files (.thumbnails, @eaDir, __MACOSX, ...); "
        "1 files of other kinds (.txt); 2 folders without images (empty, logs)",
    )  # fmt: skip


def test_of_images_and_folders_side_by_side_the_larger_part_counts(tmp_path):
    save_flat(tmp_path / "a", 20)
    save_flat(tmp_path / "a" / "preview", 2)
    note = "left out of a train: 2 images in folders beside the others (preview)"
    assert found(tmp_path / "a", holdout=0) == (20, ["all"], [0] * 20, note)
    save_tree(tmp_path / "b", count=5)
    save_flat(tmp_path / "b", 4)
    note = "left out of b train: 4 images beside the class folders (000.png, 001.png, 002.png, ...)"
    assert found(tmp_path / "b", holdout=0) == (10, ["cat", "dog"], [0] * 5 + [1] * 5, note)


def test_what_was_found_is_said_in_one_line(tmp_path, capsys):
    dataset_module._print_once.cache_clear()
    save_tree(tmp_path / "photos", count=10)
    dataset = open_images(Folder(path=tmp_path / "photos"), 8)
    assert capsys.readouterr().err == ""  # what is refused before the first batch is one line
    for indices in ([0], [1]):
        dataset.read(indices)
    line = "data: photos train: 18 of 20 images, 2 classes (cat, dog); classes from folders\n"
    assert capsys.readouterr().err == line
    save_tree(tmp_path / "many", [f"{i:03d}" for i in range(12)], 1)
    open_images(Folder(path=tmp_path / "many", holdout=0), 8).read([0])
    assert "12 images, 12 classes (000, 001, 002, ..., 011)" in capsys.readouterr().err


def test_a_folder_that_was_right_keeps_its_fingerprint(tmp_path):
    save_tree(tmp_path / "a")
    save_flat(tmp_path / "b", 5)
    save_tree(tmp_path / "c" / "train")
    save_tree(tmp_path / "c" / "val", count=3)
    prints = {
        (name, split): open_images(Folder(path=tmp_path / name), 8, split).fingerprint
        for name in "abc"
        for split in ("train", "test")
    }
    assert prints == PRINTS


PRINTS = {  # of version 0.1.0
    ("a", "train"): "319ad189a43a",
    ("a", "test"): "ffb5ef2504fc",
    ("b", "train"): "b31e85c8912c",
    ("b", "test"): "fc86387a852c",
    ("c", "train"): "9d94bfb04e78",
    ("c", "test"): "8aa15a3d78cc",
}


# Images without class folders, and lists of labels


def flat_validation(root, classes=("n01", "n02", "n03")):
    """Sorted training images beside flat validation images, as ImageNet is downloaded; and the right classes."""
    save_tree(root / "train", classes, 2)
    save_flat(root / "val", 6)
    return [classes[i * 5 % len(classes)] for i in range(6)]


def test_flat_validation_images_have_no_labels(tmp_path):
    flat_validation(tmp_path)
    dataset = open_images(Folder(path=tmp_path), 8, "test")  # reconstructions need none
    assert (len(dataset), dataset.labels.tolist()) == (6, [-1] * 6)
    assert sum(len(batch.indices) for batch in batches_in_order(dataset, 4)) == 6
    with pytest.raises(UserError, match=r"val has no class folders, .*train has; .* data\.labels=FILE"):
        dataset.check_labels()
    open_images(Folder(path=tmp_path), 8, "train").check_labels()


LISTS = {
    "synsets.txt": lambda names: names,
    "val.txt": lambda names: [f"{i:03d}.png {int(name[1:]) - 1}" for i, name in enumerate(names)][::-1],
    "paths.txt": lambda names: [f"./val/{i:03d}.png {name}" for i, name in enumerate(names)],
    "numbers.txt": lambda names: [str(int(name[1:]) - 1) for name in names],
    "LOC_val_solution.csv": lambda names: [
        "ImageId,PredictionString", *(f"{i:03d},{name} 85 1 499 272 {name} 3 4 5 6" for i, name in enumerate(names)),
    ],
    "plain.csv": lambda names: [f"{i:03d}.png,{name}" for i, name in enumerate(names)],
    "table.csv": lambda names: ["file_name,size,label", *(f"{i:03d}.png,9,{name}" for i, name in enumerate(names))],
    "excel.csv": lambda names: ["file_name;size;label", *(f"{i:03d}.png;9,5;{name}" for i, name in enumerate(names))],
    "tabs.csv": lambda names: ["file_name\tlabel", *(f"{i:03d}.png\t{name}" for i, name in enumerate(names))],
    "table.jsonl": lambda names: [json.dumps({"file_name": f"{i:03d}.png", "cls": n}) for i, n in enumerate(names)],
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_labels_gives_them(tmp_path, name):
    names = flat_validation(tmp_path / "set")
    (tmp_path / name).write_text("\n".join(LISTS[name](names)) + "\n")
    dataset = open_images(Folder(path=tmp_path / "set", labels=tmp_path / name), 8, "test")
    dataset.check_labels()
    assert [dataset.classes[label] for label in dataset.labels] == names
    assert dataset.classes == ["n01", "n02", "n03"]
    assert dataset.fingerprint != open_images(Folder(path=tmp_path / "set"), 8, "test").fingerprint
    assert len(open_images(Folder(path=tmp_path / "set", labels=tmp_path / name), 8, "train")) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01\nn02\n", "has 2 labels for 6 images; expected as many"),
        ("n01\nn02\nn03\nn01\nn02\nn09\n", "has the label 'n09'; expected one of n01, n02, n03"),
        ("1\n2\n3\n1\n2\n3\n", "labels from 1 to 3, expected 0 to 2; count from 0 or give a list with the names"),
        ("000.png n01\n001.png n02\n", "has no label for 4 images such as val/002.png; list all of them"),
        ("000.png n01\n000.png n02\n", "gives 000.png the labels n01 and n02"),
        ("a,b,c\nd,e,f,g\n", r"has \[3, 4\] words a line; expected LABEL or NAME LABEL"),
        ("file_name,x\n000.png,3\n", "has no column of file names or none of labels"),
        ("\xff\xfe", "cannot read .*; expected a list of labels as text"),
    ],
)
def test_lists_that_do_not_fit_are_refused(tmp_path, text, message):
    flat_validation(tmp_path / "set")
    (tmp_path / "list.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        open_images(Folder(path=tmp_path / "set", labels=tmp_path / "list.txt"), 8, "test")


def test_labels_without_names_need_a_certain_order_of_the_files(tmp_path):
    for i in range(11):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "list.txt").write_text("a\n" * 11)
    with pytest.raises(UserError, match=r"numbered without zeros in front, .* not certain; give lines NAME LABEL"):
        found(tmp_path, labels=tmp_path / "list.txt")


def test_a_list_for_class_folders_is_refused(tmp_path):
    save_tree(tmp_path / "set", count=1)
    (tmp_path / "list.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"has class folders, so it needs no list of labels; leave data\.labels out"):
        found(tmp_path / "set", labels=tmp_path / "list.txt")


def write_metadata(folder, rows, name="metadata.jsonl"):
    lines = [json.dumps(row) for row in rows]
    if name.endswith(".csv"):
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    (folder / name).write_text("\n".join(lines))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("inside", ["", "images"])
def test_metadata_of_hugging_face_give_labels(tmp_path, name, inside):
    save_flat(tmp_path / inside, 6)
    write_metadata(
        tmp_path, [{"file_name": os.path.join(inside, f"{i:03d}.png"), "label": 2 * (i % 2)} for i in range(5)], name
    )
    count, classes, labels, note = found(tmp_path, holdout=0)
    assert (count, classes, labels) == (5, ["0", "1", "2"], [0, 2, 0, 2, 0])  # class 2 has the number 2
    assert f"1 images that {name} does not list" in note


def test_metadata_in_both_splits_number_the_names_alike(tmp_path):
    for split, names in (("train", "bca"), ("test", "cc")):
        save_flat(tmp_path / split, len(names))
        write_metadata(tmp_path / split, [{"file_name": f"{i:03d}.png", "label": n} for i, n in enumerate(names)])
    assert found(tmp_path, "train")[1:3] == (["a", "b", "c"], [1, 2, 0])
    assert found(tmp_path, "test")[1:3] == (["a", "b", "c"], [2, 2])


def test_another_column_of_the_metadata(tmp_path):
    save_flat(tmp_path, 2)
    write_metadata(tmp_path, [{"file_name": f"{i:03d}.png", "text": "a", "kind": f"k{i}"} for i in range(2)])
    count, classes, _, note = found(tmp_path, holdout=0)
    assert (count, classes) == (2, ["all"])
    assert "1 files of other kinds (metadata.jsonl)" in note
    assert found(tmp_path, holdout=0, label="kind") == (2, ["k0", "k1"], [0, 1], "")
    with pytest.raises(UserError, match=r"data\.label=size: no metadata\.jsonl or metadata\.csv in .* has it"):
        found(tmp_path, label="size")


def test_class_folders_count_more_than_metadata_unless_a_column_is_asked_for(tmp_path):
    save_tree(tmp_path, count=1)
    rows = [
        {"file_name": "cat/000.png", "label": 1, "size": "s"},
        {"file_name": "dog/000.png", "label": 0, "size": "l"},
    ]
    write_metadata(tmp_path, rows)
    count, classes, labels, note = found(tmp_path, holdout=0)
    assert (count, classes, labels) == (2, ["cat", "dog"], [0, 1])
    assert "metadata.jsonl" in note
    assert found(tmp_path, holdout=0, label="size")[:3] == (2, ["l", "s"], [1, 0])


def test_the_list_of_the_test_images_does_not_matter_to_one_training_class(tmp_path):
    flat_validation(tmp_path / "set", ("n01",))
    (tmp_path / "list.txt").write_text("n01\n" * 6)
    for split, count in (("train", 2), ("test", 6)):
        assert found(tmp_path / "set", split, labels=tmp_path / "list.txt")[:3] == (count, ["n01"], [0] * count)


# Links, rights and names


def test_links_in_a_circle_are_followed_once(tmp_path):
    save_tree(tmp_path, count=3)
    os.symlink(".", tmp_path / "cat" / "all")
    os.symlink("..", tmp_path / "cat" / "up")
    os.symlink("self.png", tmp_path / "dog" / "self.png")
    os.symlink("self", tmp_path / "dog" / "self")
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        dataset = open_images(Folder(path=tmp_path, holdout=0), 8)
    left_out, broken = (str(warning.message) for warning in noted)
    assert "2 links in a circle (all, up); 1 files of other kinds (self)" in left_out
    assert re.search(r"self\.png: .*symbolic links", broken)
    assert (len(dataset), list(dataset.broken)) == (7, [6])


def test_links_to_folders_elsewhere_are_followed(tmp_path):
    save_flat(tmp_path / "elsewhere", 3)
    save_tree(tmp_path / "set", ("cat",), 2)
    os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "dog")
    assert found(tmp_path / "set", holdout=0) == (5, ["cat", "dog"], [0, 0, 1, 1, 1], "")


def without_rights(code):
    """What Python prints for this code, of which root's rights are taken after the imports."""
    code = code.replace("\n\n", "\nimport os\nif os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n", 1)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def open_path():
    """A folder that every user may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_a_folder_that_may_not_be_read_is_one_line(open_path):
    save_tree(open_path, count=3)
    (open_path / "dog").chmod(0)
    shown = without_rights(f"""
from robustok.data.dataset import open_images
from robustok.data.sources import Folder, Parquet
from robustok.errors import UserError
import pyarrow.parquet

for data in (Folder(path={str(open_path)!r}), Parquet(path={str(open_path)!r})):
    try:
        open_images(data, 8)
    except UserError as error:
        print(error)
""")
    line = f"cannot read the folder {open_path}/dog: Permission denied; make it readable or move it away\n"
    assert shown == 2 * line


def test_names_of_any_bytes(tmp_path):
    save_tree(tmp_path / "set", count=6)
    os.rename(tmp_path / "set/cat/000.png", os.fsencode(tmp_path) + b"/set/cat/caf\xe9.png")
    os.rename(tmp_path / "set/dog", os.fsencode(tmp_path) + b"/set/d\xf6g")
    count, classes, _, _ = found(tmp_path / "set", holdout=0)
    assert (count, classes) == (12, ["cat", r"d\udcf6g"])
    json.dumps(classes).encode("ascii")


@pytest.mark.parametrize("path", ["x" * 300, "/dev/null/images"])
def test_paths_that_cannot_exist_are_one_line(path):
    with pytest.raises(UserError, match="no folder"):
        open_images(Folder(path=path), 8)
    with pytest.raises(UserError, match="no parquet files"):
        open_images(Parquet(path=path), 8)
    with pytest.raises(UserError, match="does not exist"):
        data_at(path)


def test_a_fifo_among_the_images_is_no_image(tmp_path):
    save_flat(tmp_path, 3)
    os.mkfifo(tmp_path / "001a.png")
    with pytest.warns(UserWarning, match=r"001a\.png: .*FIFO"):
        dataset = open_images(Folder(path=tmp_path, holdout=0), 8)
    assert list(dataset.broken) == [2]


@pytest.mark.parametrize(
    ("name", "message"), [("set.zip", "no folder .*an archive: unpack it"), ("set.txt", "no folder")]
)
def test_a_file_instead_of_a_folder(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match=message):
        open_images(Folder(path=tmp_path / name), 8)
    with pytest.raises(UserError, match="archive: unpack it" if "zip" in name else "another kind"):
        data_at(tmp_path / name)


def test_a_folder_of_archives_is_told_so(tmp_path):
    (tmp_path / "shard.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"files found: \.tar\); expected CLASS/FILE .*; unpack the archive"):
        open_images(Folder(path=tmp_path), 8)


def test_the_suffixes_are_those_people_use():
    assert {".jfif", ".jpe", ".avif", ".jp2", ".tga", ".jpg", ".png", ".webp"} <= IMAGE_SUFFIXES.keys()
