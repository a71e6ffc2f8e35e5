"""Images in folders: which folders are splits, which are classes, and what is left out.

Folders are read as people leave them: with system folders, previews and logs beside the images, with links and with
empty folders. What is left out is counted.
"""

import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from robustok.data.labels import METADATA, LabelList, number_labels, sort_classes
from robustok.errors import UserError
from robustok.files import IMAGE_SUFFIXES, bytes_digest, reason

Split = Literal["train", "test"]
SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("val", "valid", "validation", "dev", "eval", "evaluation", "test", "testing"),
}  # names on disk, in any case; of several the first one is used
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
_WORDS = "|".join(word for words in SPLITS.values() for word in words)
_SPLIT = re.compile(rf"(?<![a-z])({_WORDS})[-_ ]?(?:set|split|images|data)?(?![a-z])")
_SYSTEM = {"__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information", "__pycache__"}
_OTHERS = "files of other kinds"
LeftOut = defaultdict[str, Counter[str]]  # kind -> names


@dataclass(frozen=True, order=True)
class SplitName:
    """The split that a name says.

    Attributes:
        rest: the name without the word: "2017" of train2017.
        rank: place of the word in SPLITS; the lower is preferred.
        split: the split.
    """

    rest: str
    rank: int
    split: Split


def split_of(name: str) -> SplitName | None:
    """The split that the name of a file or folder says; None if it says none, or both."""
    name = re.sub("^[0-9]+[-_. ]+", "", name.lower())  # 01_train and 02_test are a pair
    said = set(_SPLIT.findall(name))
    found = [(split, names) for split, names in SPLITS.items() if said & set(names)]
    if len(found) != 1:
        return None
    split, names = found[0]
    return SplitName(_SPLIT.sub("", name), min(map(names.index, said)), split)


# Reading folders


def entries(folder: str | Path, left: LeftOut | None = None) -> tuple[list[os.DirEntry], list[os.DirEntry]]:
    """The folders and the files in a folder, by name, without hidden and system ones, which ``left`` counts.

    Raises:
        UserError: the folder may not be read.
    """
    try:
        found = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {reason(error)}; make it readable or move it away") from None
    folders, files = [], []
    for entry in found:
        if entry.name.startswith(".") or entry.name.lower() in _SYSTEM:
            if left is not None:
                left["hidden or system files"][entry.name] += 1
        else:
            (folders if _is_folder(entry) else files).append(entry)
    return folders, files


def walk(
    folder: str | Path, suffixes: Collection[str], left: LeftOut | None = None, splits: bool = True
) -> Iterator[os.DirEntry]:
    """The files with these suffixes in a folder and in those inside it, in a fixed order.

    Links to folders are followed, but not in a circle.

    Args:
        folder: the folder.
        suffixes: in lower case.
        left: counts what is left out.
        splits: whether folders inside may be train and test side by side.

    Raises:
        UserError: a folder may not be read, or holds train and test where it should not.
    """
    above = {_identity(parent) for parent in Path(os.path.abspath(folder)).parents}
    stack = [(_identity(folder), _in_order(folder, left, splits))]
    while stack:
        entry = next(stack[-1][1], None)
        if entry is None:
            stack.pop()
        elif not _is_folder(entry):
            if has_suffix(entry, suffixes, left):
                yield entry
        elif (identity := _identity(entry.path)) not in above.union(one for one, _ in stack):
            stack.append((identity, _in_order(entry.path, left, splits)))
        elif left is not None:
            left["links in a circle"][entry.name] += 1


def _in_order(folder: str | Path, left: LeftOut | None, splits: bool) -> Iterator[os.DirEntry]:
    folders, files = entries(folder, left)
    names = {said.split: entry.name for entry in folders if (said := split_of(entry.name)) and not said.rest}
    if len(names) == len(SPLITS) and not splits:
        raise UserError(
            f"{folder} holds the splits {' and '.join(names.values())}; give data.path={folder}, or put splits above "
            "classes, as train/CLASS/FILE"
        )
    return iter(sorted([*folders, *files], key=lambda entry: entry.name))


def _is_folder(entry: os.DirEntry) -> bool:
    # entry.is_dir() raises an error for a link that leads to itself.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _identity(folder: str | Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def has_suffix(entry: os.DirEntry, suffixes: Collection[str], left: LeftOut | None = None) -> bool:
    """Whether a file has one of the suffixes; if not, ``left`` counts it."""
    suffix = os.path.splitext(entry.name)[1]
    if suffix.lower() in suffixes:
        return True
    if left is not None:
        left[_OTHERS][entry.name if entry.name in METADATA else suffix or entry.name] += 1
    return False


def has_images(folder: str | Path) -> bool:
    """Whether there is an image in a folder or in one inside it."""
    with suppress(OSError), os.scandir(folder) as found:  # at once, where the first file is one
        if any(has_suffix(e, IMAGE_SUFFIXES) and not e.name.startswith(".") and e.is_file() for e in found):
            return True
    return any(True for _ in walk(folder, IMAGE_SUFFIXES))


def describe_left_out(left: LeftOut) -> str:
    """What was left out, on one line; empty if nothing was."""
    parts = []
    for kind, names in left.items():
        if names:
            shown = ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")
            parts.append(f"{names.total():,} {kind} ({shown})")
    return "; ".join(parts)


# Splits and classes


@dataclass(frozen=True)
class Found:
    """The images of a split.

    Attributes:
        paths: of the images.
        labels: (N,) int64; all -1 if they are unknown.
        classes: names of the classes; empty without classes.
        identity: digest of names and sizes.
        whole: there is one split only.
        about: what gave the labels.
        unlabelled: why the labels are unknown, and what to do; empty if they are known.
        left: what is left out.
    """

    paths: list[str]
    labels: np.ndarray
    classes: list[str]
    identity: str
    whole: bool
    about: str
    unlabelled: str
    left: LeftOut


def find_images(root: Path, split: Split, labels: Path | None = None, column: str | None = None) -> Found:
    """The images of a split in a folder: CLASS/FILE, train/CLASS/FILE beside a test split, or without classes.

    Args:
        root: the folder.
        split: the split.
        labels: a list of labels for images without class folders.
        column: column of the labels in it, or in ``metadata.jsonl`` or ``.csv``.

    Raises:
        UserError: a folder cannot be read, or its splits, classes or labels are not certain.
    """
    left: LeftOut = defaultdict(Counter)
    splits = _splits(root, left)
    whole = len(splits) < 2
    base = next(iter(splits.values()), root)  # the classes of the training images number those of both splits
    folder = base if whole else splits[split]
    loose, groups = _contents(folder, left)
    classes = _class_names(base, splits.get("test", base))
    if unknown := sorted(groups.keys() - set(classes)):
        raise UserError(f"{folder} has classes that {base} lacks: {', '.join(unknown[:5])}; give both the same")
    if labels is not None and groups and (whole or split == "test"):
        raise UserError(f"{folder} has class folders, so it needs no list of labels; leave data.labels out")
    # Class folders give the labels, unless there is one only or a column is asked for.
    by_folder = bool(groups) and (labels is not None or (len(classes) > 1 and column is None))
    listed = None if by_folder else LabelList.find([folder, root], labels, column)
    found = _listed(listed, loose or [*chain(*groups.values())], root, labels is not None, left) if listed else []
    if column is not None and not (found or by_folder):
        raise UserError(
            f"data.label={column}: no {' or '.join(METADATA)} in {folder} has it; give a list in data.labels"
        )
    digest, unlabelled = "", ""
    if found:
        known = classes if len(classes) > 1 and not groups else None
        if known is None and not whole and split == "test":
            known = find_images(root, "train", labels, column).classes or None
        files, values = zip(*found, strict=True)
        numbers, classes = number_labels(values, str(listed.file), known)
        about, digest = f"labels from {listed.describe()}", listed.digest
        left[_OTHERS].pop(listed.file.name, None)
    elif classes and not groups:
        files, numbers, about = loose, [-1] * len(loose), "labels unknown"
        unlabelled = (
            f"{folder} has no class folders, {base} has; sort its images into such folders, or list their labels in "
            "data.labels=FILE"
        )
    else:
        files = [entry for name in classes for entry in groups.get(name, ())] or loose
        numbers = [label for label, name in enumerate(classes) for _ in groups.get(name, ())] or [0] * len(loose)
        about = "classes from folders" if classes else "no class folders"
    if not files:
        others = sorted(left[_OTHERS]) or ["none"]
        unpack = "; unpack the archive" if set(ARCHIVES) & set(others) else ""
        raise UserError(
            f"no images in {folder} or in class folders inside it (files found: {', '.join(others[:8])}); "
            f"expected CLASS/FILE with one of {' '.join(sorted(IMAGE_SUFFIXES))}{unpack}"
        )
    lines = [f"{os.path.relpath(entry.path, folder)} {_size(entry)}" for entry in files] + [digest] * bool(digest)
    identity = bytes_digest("\n".join(lines).encode("utf-8", "surrogateescape"))
    paths = [entry.path for entry in files]
    return Found(paths, np.array(numbers, np.int64), classes, identity, whole, about, unlabelled, left)


def _splits(root: Path, left: LeftOut) -> dict[Split, Path]:
    """The folders of the splits, train first; empty if the folders are classes."""
    names = [entry.name for entry in entries(root)[0]]
    best: dict[Split, tuple[SplitName, str]] = {}
    for said, name in sorted((said, name) for name in names if (said := split_of(name))):
        best.setdefault(said.split, (said, name))
    found = {split: name for split, (_, name) in best.items()}
    exact = {split: name for split, (said, name) in best.items() if not said.rest}
    rests = {said.rest for said, _ in best.values()} - {""}
    unnamed = (name for name in names if not split_of(name))
    # Other names, such as train2017 and val2017, are splits only as a pair.
    if len(found) < 2 or (len(exact) < 2 and (len(rests) > 1 or any(has_images(root / name) for name in unnamed))):
        found = {split: name for split, name in exact.items() if _is_split(root, split, name, names)}
    if found:
        folders, files = entries(root, left)
        left["folders beside the splits"].update(e.name for e in folders if e.name not in found.values())
        left["images beside the splits"].update(e.name for e in files if has_suffix(e, IMAGE_SUFFIXES, left))
    return {split: _descend(root / found[split]) for split in SPLITS if split in found}


def _descend(folder: Path) -> Path:
    """The folder, or the only one inside it if that has the same name, as in seg_train/seg_train/CLASS/FILE."""
    folders, files = entries(folder)
    alone = [entry.name for entry in folders] == [folder.name]
    return folder / folder.name if alone and not any(has_suffix(e, IMAGE_SUFFIXES) for e in files) else folder


def _is_split(root: Path, split: Split, name: str, names: list[str]) -> bool:
    """Whether a folder with the name of a split is one, or the class of that name, such as CIFAR-100's train."""
    folders = {entry.name for entry in entries(root / name)[0]}
    if split == "train" and any(has_images(root / name / folder) for folder in folders):
        return True
    beside = {other for other in names if other != name and has_images(root / other)}
    if split == "test" and (shared := sorted(folders & beside)):
        raise UserError(
            f"{root} has the class folders {', '.join(shared[:3])} and {name} has them too; move those beside {name} "
            "into a folder train"
        )
    return len(beside) < 2 if split == "train" else not beside


def _contents(folder: Path, left: LeftOut) -> tuple[list[os.DirEntry], dict[str, list[os.DirEntry]]]:
    """Images in a folder itself, and those of each folder inside it. One of the two: the larger part counts."""
    folders, files = entries(folder, left)
    loose = [entry for entry in files if has_suffix(entry, IMAGE_SUFFIXES, left)]
    groups = {entry.name: [*walk(entry.path, IMAGE_SUFFIXES, left, splits=False)] for entry in folders}
    left["folders without images"].update(name for name, inside in groups.items() if not inside)
    groups = {name: inside for name, inside in groups.items() if inside}
    if len(loose) > sum(map(len, groups.values())):
        left["images in folders beside the others"].update({name: len(inside) for name, inside in groups.items()})
        return loose, {}
    left["images beside the class folders"].update(entry.name for entry in loose if groups)
    return ([], groups) if groups else (loose, {})


def _class_names(base: Path, test: Path) -> list[str]:
    """Names of the class folders with images in either split; empty where the training images have none."""
    folders, files = entries(base)
    if any(has_suffix(entry, IMAGE_SUFFIXES) for entry in files) and not _contents(base, defaultdict(Counter))[1]:
        return []
    names = [entry.name for entry in folders]
    return sort_classes(n for n in names if has_images(base / n) or ((test / n).is_dir() and has_images(test / n)))


def _listed(
    listed: LabelList, files: Sequence[os.DirEntry], root: Path, all_of_them: bool, left: LeftOut
) -> list[tuple[os.DirEntry, Any]]:
    """The files that a list names, with their labels."""
    names = [os.path.relpath(entry.path, root) for entry in files]
    values = listed.of(names)
    found = [pair for pair in zip(files, values, strict=True) if pair[1] is not None]
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing and all_of_them:
        raise UserError(f"{listed.file} has no label for {len(missing)} images such as {missing[0]}; list all of them")
    if found:
        left[f"images that {listed.file.name} does not list"].update(missing)
    return found


def _size(entry: os.DirEntry) -> int:
    """Bytes of a file; 0 for dangling links and FIFOs, which are reported when they are read."""
    try:
        found = entry.stat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0
