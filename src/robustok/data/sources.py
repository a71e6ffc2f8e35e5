"""The kinds of data set: a configuration for each, and the function that finds its files.

A :class:`Source` opens images by row; ``robustok.data.dataset`` crops them and makes batches. To add a data set, write
a configuration for ``Data``, a function (configuration, split) -> ``Source``, and a line in ``DATASETS``.
"""

import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from io import BytesIO
from operator import attrgetter, getitem
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from robustok.config import Config
from robustok.data.arrays import open_array
from robustok.data.crops import RGB
from robustok.errors import UserError
from robustok.files import IMAGE_FORMATS, IMAGE_SUFFIXES, bytes_digest, one_line

SPLITS = {"train": ["train"], "test": ["val", "validation", "test"]}  # names on disk; the first one found is used

Split = Literal["train", "test"]
Holdout = Annotated[
    float, Field(ge=0, lt=1, description="test share of a source with one split; 0: both are all of it")
]


class _DataConfig(Config):
    limit: int | None = Field(None, ge=1, description="keep this many images of the split, chosen by a fixed shuffle")
    max_broken: float = Field(
        0.01, ge=0, le=1, description="share of unreadable images to skip (five at least); 0 skips none"
    )
    rgb: RGB = Field(
        "adm",
        description="adm: as published statistics, which ignore transparency and EXIF and clip 16 bits; "
        "viewer: as an image viewer shows them",
    )


class Digits(_DataConfig):
    """Scikit-learn's 1,797 handwritten digits, 8x8, in ten classes."""

    name: Literal["digits"] = "digits"
    holdout: float = Field(0.25, ge=0, lt=1, description="share of the digits that is the test split")


class Cifar10(_DataConfig):
    """CIFAR-10 in the python version that torchvision downloads: 50,000 + 10,000 images, 32x32."""

    name: Literal["cifar10"] = "cifar10"
    path: Path | None = Field(None, description="folder that holds cifar-10-batches-py; by default ~/.cache/robustok")
    download: bool = Field(False, description="download (170 MB) into path; without a path this is done anyway")


class Folder(_DataConfig):
    """Image files as CLASS/FILE, or train/CLASS/FILE beside val, validation or test. Without CLASS: one class."""

    name: Literal["folder"] = "folder"
    path: Path = Field(description="the folder")
    holdout: Holdout = 0.1


class Parquet(_DataConfig):
    """Parquet files as on the Hugging Face Hub: encoded images in the column ``img`` or ``image``, and ``label``.

    Files with train, val, validation or test in their names are those splits. Training on many gigabytes is slow, as it
    reads a row group for almost every image: extract such images to a folder.
    """

    name: Literal["parquet"] = "parquet"
    path: Path = Field(description="a file, a folder or a glob")
    holdout: Holdout = 0.1


class Npz(_DataConfig):
    """An array of images: ``.npz`` with ``arr_0`` (uint8 NHWC) as in ADM's evaluation, or ``.npy``.

    The .npz may have labels as ``arr_1`` or ``labels``. A compressed .npz can only be read from front to back: to train
    on a large one, save it as .npy first.
    """

    name: Literal["npz"] = "npz"
    path: Path = Field(description="the .npz or .npy file")
    holdout: Holdout = 0.1


Data = Annotated[Digits | Cifar10 | Folder | Parquet | Npz, Field(discriminator="name")]


@dataclass(frozen=True)
class Source:
    """Images and labels before any decoding.

    Attributes:
        name: its name in results.
        open: row 0..N-1 -> image. May raise anything if the image is broken. Picklable: data workers get a copy.
        where: row -> name of the image in messages.
        labels: (N,) int64 in 0..len(classes)-1.
        classes: names of the classes.
        identity: digest of the file names and sizes, or of the bytes.
        whole: the source has one split only, from which the test images must be held out.
        shape: (H, W) of every image; None where files may differ.
    """

    name: str
    open: Callable[[int], Image.Image]
    where: Callable[[int], str]
    labels: np.ndarray
    classes: list[str]
    identity: str
    whole: bool
    shape: tuple[int, int] | None = None


def _array_source(name: str, pixels: np.ndarray, labels: Sequence[int], classes: list[str], whole: bool) -> Source:
    """Images (N, H, W) or (N, H, W, 3) uint8 in memory."""
    where, identity = partial("{} image {}".format, name), bytes_digest(pixels.tobytes())
    opener = partial(_to_image, partial(getitem, pixels))
    return Source(name, opener, where, np.array(labels), classes, identity, whole, pixels.shape[1:3])


def _to_image(pixels: Callable[[int], np.ndarray], row: int) -> Image.Image:
    return Image.fromarray(pixels(row))


def _digits(data: Digits, split: Split) -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # (1797, 8, 8), from levels 0..16
    return _array_source("digits", pixels, digits.target, [str(i) for i in range(10)], whole=True)


def _cifar10(data: Cifar10, split: Split) -> Source:
    from torchvision.datasets import CIFAR10

    root = (data.path or Path("~/.cache/robustok")).expanduser()
    if root.name == CIFAR10.base_folder:
        root = root.parent
    try:
        cifar = CIFAR10(root, train=split == "train", download=data.download or data.path is None)
    except (RuntimeError, OSError) as error:  # missing, damaged, or no network
        raise UserError(
            f"no CIFAR-10 in {root} ({one_line(error)}); put the unpacked folder {CIFAR10.base_folder} there, "
            "or set data.path to the folder that holds it, or data.download=true where there is a network"
        ) from None
    return _array_source("cifar10", cifar.data, cifar.targets, cifar.classes, whole=False)


def _folder(data: Folder, split: Split) -> Source:
    root = data.path.expanduser()
    if not root.is_dir():
        raise UserError(f"no folder {root}; data.path must be a folder of images as CLASS/FILE or train/CLASS/FILE")
    inside = set(_subfolders(root))
    folders = {key: next((root / name for name in names if name in inside), None) for key, names in SPLITS.items()}
    found = [folder for folder in folders.values() if folder]
    if not folders["train"] and inside - set(SPLITS["test"]):
        found = []  # "test" is the name of a class
    whole = len(found) < 2
    folder = (found[0] if found else root) if whole else folders[split]
    # Both splits number the classes of the training images, so that a class without test images changes no label.
    classes = _subfolders(found[0] if found else root)
    if unknown := sorted(set(_subfolders(folder)) - set(classes)):
        raise UserError(f"{folder} has classes that {found[0]} lacks: {', '.join(unknown[:5])}; give both the same")
    files = [(file, size, label) for label, name in enumerate(classes) for file, size in _image_files(folder / name)]
    if not files:  # images without class folders
        classes = ["all"]
        files = [(file, size, 0) for file, size in _image_files(folder, deep=False)]
    if not files:
        others = sorted({p.suffix or p.name for p in folder.rglob("*") if p.is_file()})
        raise UserError(
            f"no images in {folder} or in class folders inside it (files found: {', '.join(others[:8]) or 'none'}); "
            f"expected CLASS/FILE with one of {' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    identity = bytes_digest("\n".join(f"{os.path.relpath(file, folder)} {size}" for file, size, _ in files).encode())
    paths, labels = [file for file, _, _ in files], np.array([label for _, _, label in files])
    name = root.resolve().name
    return Source(name, partial(_open_file, paths), partial(getitem, paths), labels, classes, identity, whole)


def _open_file(paths: Sequence[str], row: int) -> Image.Image:
    return Image.open(paths[row], formats=IMAGE_FORMATS)


def _subfolders(folder: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _image_files(folder: Path, deep: bool = True) -> Iterator[tuple[str, int]]:
    """Paths and sizes of image files in a fixed order; hidden files are no images."""
    if not folder.is_dir():
        return
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _image_files(Path(entry.path)) if deep else ()
        elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:  # a dangling link is reported when it is read
            yield entry.path, entry.stat().st_size if entry.is_file() else 0


def _parquet(data: Parquet, split: Split) -> Source:
    import pyarrow
    import pyarrow.parquet

    path = data.path.expanduser()
    files, whole = _parquet_files(path, split)
    groups, labels, identity = [], [], []
    for file in files:
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
            schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
            column = next((name for name in ("img", "image") if name in schema.names), None)
            found = parquet.read(columns=["label"])["label"].to_pylist() if "label" in schema.names else [0] * rows
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"cannot read {file} as parquet: {one_line(error)}; replace or remove the file") from None
        if column is None:
            raise UserError(f"{file} has the columns {', '.join(schema.names)}; expected images in 'img' or 'image'")
        if not all(isinstance(label, int) for label in found):
            raise UserError(f"column 'label' of {file} does not hold integers only; expected class numbers from 0")
        first = 0
        for group in range(parquet.num_row_groups):
            groups.append(_RowGroup(str(file), group, column, len(labels) + first, first))
            first += parquet.metadata.row_group(group).num_rows
        labels += found
        identity.append(f"{file.name} {file.stat().st_size}")
    # Hugging Face data sets store the names of the classes in the schema.
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    numbers = [str(i) for i in range(max(labels, default=0) + 1)]
    classes = features.get("label", {}).get("names") or (numbers if "label" in schema.names else ["all"])
    name, identity = path.resolve().name, bytes_digest("\n".join(identity).encode())
    opener, where = partial(_open_row, groups), partial(_where_row, groups)
    return Source(name, opener, where, np.array(labels, dtype=np.int64), classes, identity, whole)


@dataclass(frozen=True)
class _RowGroup:
    """A row group, the unit in which parquet is read.

    Attributes:
        file: path of the parquet file.
        number: number of the group in the file.
        column: column of the images.
        start: its first row, counted in the source.
        first: its first row, counted in the file.
    """

    file: str
    number: int
    column: str
    start: int
    first: int


def _group_of(groups: list[_RowGroup], row: int) -> _RowGroup:
    return groups[bisect_right(groups, row, key=attrgetter("start")) - 1]


def _open_row(groups: list[_RowGroup], row: int) -> Image.Image:
    group = _group_of(groups, row)
    value = _read_group(group)[row - group.start].as_py()
    if isinstance(value, dict) and not value.get("bytes"):  # {"bytes": None, "path": ...}
        return Image.open(Path(group.file).parent / value["path"], formats=IMAGE_FORMATS)
    return Image.open(BytesIO(value["bytes"] if isinstance(value, dict) else value), formats=IMAGE_FORMATS)


def _where_row(groups: list[_RowGroup], row: int) -> str:
    group = _group_of(groups, row)
    return f"{group.file} row {row - group.start + group.first}"


@lru_cache(maxsize=32)
def _read_group(group: _RowGroup):
    """The encoded images of a row group, a ``pyarrow.ChunkedArray``; the last few groups stay in memory."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(group.file) as parquet:
        return parquet.read_row_group(group.number, columns=[group.column]).column(group.column)


def _is_glob(path: Path) -> bool:
    """Whether a path is a pattern such as ``data/**/train-*.parquet``; a name that exists is none."""
    return any(c in str(path) for c in "*?[") and not path.exists()


def _parquet_files(path: Path, split: Split) -> tuple[list[Path], bool]:
    """The split's files in order of name, and whether there is one split only."""
    if path.is_dir():
        base, files = path, sorted(path.rglob("*.parquet"))
    elif _is_glob(path):
        base = next(folder for folder in path.parents if folder.exists())  # whose own name may have brackets
        try:
            files = sorted(base.glob(str(path.relative_to(base))))
        except ValueError as error:  # such as a**
            raise UserError(f"{path} is no glob: {one_line(error)}; write such as data/**/train-*.parquet") from None
    else:
        base, files = path.parent, [path] if path.is_file() else []
    if not files:
        raise UserError(f"no parquet files at {path}; data.path must be a file, a folder of *.parquet or a glob")

    def named(word: str) -> list[Path]:
        return [f for f in files if re.search(rf"(?<![a-z]){word}(?![a-z])", str(f.relative_to(base)).lower())]

    found = {key: next((named(word) for word in words if named(word)), []) for key, words in SPLITS.items()}
    if found["train"] and found["test"]:
        return found[split], False
    return found["train"] or found["test"] or files, True


def _npz(data: Npz, split: Split) -> Source:
    path = data.path.expanduser()
    array, labels = open_array(path)
    count, height, width, _ = array.shape
    classes = ["all"] if labels is None else [str(i) for i in range(max(0, labels.max()) + 1)]
    labels = np.zeros(count, dtype=np.int64) if labels is None else labels
    where, identity = partial("{} image {}".format, path), bytes_digest(f"{array.shape} {array.checksum}".encode())
    opener = partial(_to_image, array.read)
    return Source(path.name, opener, where, labels, classes, identity, True, (height, width))


def data_at(path: str | Path) -> Folder | Parquet | Npz:
    """The data set at a path, with all its images: a folder of images, an .npz or .npy file, or parquet files.

    Raises:
        UserError: the path does not exist, or is none of these.
    """
    path = Path(path).expanduser()
    accepted = "a folder of images, an .npz or .npy file (arr_0, uint8 NHWC), or parquet (a file, a folder, a glob)"
    if path.suffix in (".npz", ".npy"):
        return Npz(path=path, holdout=0)
    if path.suffix == ".parquet" or _is_glob(path):
        return Parquet(path=path, holdout=0)
    if not path.is_dir():
        found = "is a file of another kind" if path.exists() else "does not exist"
        raise UserError(f"{path} {found}; expected {accepted}")
    if (path / "manifest.json").is_file():
        raise UserError(f"{path} holds latents, which a tokenizer must decode first; expected {accepted}")
    if (path / "config.yaml").is_file():
        raise UserError(f"{path} holds a model or a run, not images; expected {accepted}")
    parquet = not any(_image_files(path)) and any(path.rglob("*.parquet"))
    return Parquet(path=path, holdout=0) if parquet else Folder(path=path, holdout=0)


DATASETS = {"digits": _digits, "cifar10": _cifar10, "folder": _folder, "parquet": _parquet, "npz": _npz}
