"""Images in parquet files, as on the Hugging Face Hub: which files, columns and labels, and reading by row."""

import json
import os
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

from PIL import Image

from robustok.data.folders import LeftOut, Split, entries, split_of, walk
from robustok.data.image_file import instead, open_image
from robustok.data.labels import LABEL_COLUMNS
from robustok.data.remote_files import expand
from robustok.errors import UserError
from robustok.files import one_line, regular_file

IMAGE_COLUMNS = ("img", "image")
PARQUET = (".parquet",)


@dataclass(frozen=True)
class RowGroup:
    """A row group, the unit in which parquet is read.

    Attributes:
        file: path of the parquet file.
        number: number of the group in the file.
        column: column of the images.
        start: its first row, counted in the source.
        first: its first row, counted in the file.
        root: folder outside of which no image is read.
    """

    file: str
    number: int
    column: str
    start: int
    first: int
    root: str


@dataclass
class Table:
    """The rows of parquet files.

    Attributes:
        groups: their row groups.
        labels: of each row; 0 where there is no column of labels.
        column: of the labels; None without.
        names: names of the classes; None if the schema has none.
        images: names of the images without suffix; empty if not all have one.
    """

    groups: list[RowGroup]
    labels: list[Any]
    column: str | None
    names: list[str] | None
    images: list[str] = field(default_factory=list)


def files_at(path: Path, left: LeftOut | None = None, suffixes: Sequence[str] = PARQUET) -> tuple[Path, list[Path]]:
    """The files at a path (a file, a folder or a glob), by name, and the folder that they are in.

    The part of the path that exists is no glob, whatever brackets are in its names.

    Raises:
        UserError: there are none, or a folder may not be read.
    """
    several = [] if os.path.lexists(path) else [*expand(str(path))]
    if several not in ([], [str(path)]):
        each = [files_at(Path(one), left, suffixes) for one in several]
        return Path(os.path.commonpath([base for base, _ in each])), sorted(
            {file for _, files in each for file in files}
        )
    base = next(folder for folder in (path, *path.parents) if os.path.lexists(folder) or folder == folder.parent)
    if base == path:
        base, found = (path, [path]) if path.is_dir() else (path.parent, [path])
    else:
        found = _matching(base, path.relative_to(base).parts, suffixes)
    files = {file for one in found for file in (_below(one, left, suffixes) if one.is_dir() else [one])}
    if not files:
        kind = suffixes[0].removeprefix(".")
        raise UserError(f"no {kind} files at {path}; data.path must be a file, a folder of *.{kind} or a glob")
    return base, sorted(files)


def _matching(base: Path, pattern: Sequence[str], suffixes: Sequence[str]) -> set[Path]:
    """What a glob finds in a folder. Unlike Python's, it follows links in a circle once, as everywhere here."""
    found = {base}
    for part in pattern:
        folders = [one for one in found if one.is_dir()]
        if part == "**":
            found = {
                p
                for folder in folders
                for file in _below(folder, suffixes=suffixes)
                for p in file.parents
                if folder in (p, *p.parents)
            }
        else:
            inside = (entry for folder in folders for entry in chain(*entries(folder)))
            found = {Path(entry.path) for entry in inside if fnmatchcase(entry.name, part)}
    return found


def _below(folder: Path, left: LeftOut | None = None, suffixes: Sequence[str] = PARQUET) -> Iterator[Path]:
    return (Path(entry.path) for entry in walk(folder, suffixes, left))


def has_parquet(folder: Path) -> bool:
    """Whether there is a parquet file in a folder or in one inside it."""
    return any(True for _ in _below(folder))


def split_files(path: Path, suffixes: Sequence[str] = PARQUET) -> tuple[Path, dict[Split, list[Path]], LeftOut]:
    """The files of each split; only "train" holds files if the files are not divided.

    A file belongs to the split that its name says, else the folder it is in.

    Returns:
        The folder that the files are in, the files, and what is left out.
    """
    left: LeftOut = defaultdict(Counter)
    base, files = files_at(path, left, suffixes)
    return base, divide(files, base, suffixes, left), left


def divide(files: Sequence[Path], base: Path, suffixes: Sequence[str], left: LeftOut) -> dict[Split, list[Path]]:
    """The files of each split, as :func:`split_files` gives them; the others are counted as left out."""
    said = {file: _said(file, base) for file in files}
    found: dict[Split, list[Path]] = {}
    for one in ("train", "test"):
        ranks = [name.rank for name in said.values() if name and name.split == one]
        if ranks:
            found[one] = [file for file, name in said.items() if name and (name.split, name.rank) == (one, min(ranks))]
    used = {file for some in found.values() for file in some} or set(files)
    left[f"{suffixes[0].removeprefix('.')} files of no split or of another"].update(
        file.name for file in files if file not in used
    )
    return found or {"train": list(files)}


def _said(file: Path, base: Path) -> Any:
    parts = [file.stem, *reversed(file.relative_to(base).parts[:-1])]
    return next((said for part in parts if (said := split_of(part))), None)


def read_table(files: list[Path], root: Path, column: str | None) -> Table:
    """Row groups and labels of parquet files.

    Args:
        files: the files.
        root: folder outside of which no image is read.
        column: column of the labels; None looks for one.

    Raises:
        UserError: a file cannot be read, has no images or not the column, or other classes than the first.
    """
    table = Table([], [], None, None)
    for file in files:
        parquet, label, labels = _read_labels(file, column)
        schema = parquet.schema_arrow
        image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
        if image is None:
            raise UserError(f"{file} has the columns {some_of(schema.names)}; expected images in 'img' or 'image'")
        names = class_names(schema.metadata, label)
        if table.groups and (label != table.column or (names and table.names and names != table.names)):
            raise UserError(f"{file} has other labels or names of classes than {files[0]}; read one of them alone")
        table.column, table.names = label, table.names or names
        table.images += _image_names(parquet, image)
        first = 0
        for group in range(parquet.num_row_groups):
            table.groups.append(RowGroup(str(file), group, image, len(table.labels) + first, first, str(root)))
            first += parquet.metadata.row_group(group).num_rows
        table.labels += labels
    if not all(table.images):
        table.images = []
    return table


def _image_names(parquet: Any, column: str) -> list[str]:
    """The paths that Hugging Face stores beside the bytes of images, without suffix; "" where there is none."""
    kind = parquet.schema_arrow.field(column).type
    if not hasattr(kind, "get_field_index") or kind.get_field_index("path") < 0:
        return [""] * parquet.metadata.num_rows
    rows = parquet.read(columns=[f"{column}.path"])[column].to_pylist()
    return [os.path.splitext(str((row or {}).get("path") or ""))[0] for row in rows]


def _read_labels(file: Path, column: str | None) -> tuple[Any, str | None, list[Any]]:
    """The open file, the name of its column of labels, and the labels; zeros without such a column."""
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(regular_file(file))
        columns = parquet.schema_arrow.names
        if column is not None and column not in columns:
            raise UserError(f"{file} has the columns {some_of(columns)}, not data.label={column}; name one of them")
        label = column or next((name for name in LABEL_COLUMNS if name in columns), None)
        labels = parquet.read(columns=[label])[label].to_pylist() if label else [0] * parquet.metadata.num_rows
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        what = instead(file) or f": {one_line(error, 200)}"
        raise UserError(f"cannot read {file} as parquet{what}; replace or remove the file") from None
    return parquet, label, labels


def class_names(metadata: Mapping[bytes, bytes] | None, label: str | None) -> list[str] | None:
    """Names of the classes, which Hugging Face data sets store in the schema."""
    try:
        found = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return found if isinstance(found, list) and found and all(isinstance(name, str) for name in found) else None


def some_of(columns: list[str]) -> str:
    """The first ten names, for a message."""
    return ", ".join(columns[:10]) + (f" and {len(columns) - 10} more" if len(columns) > 10 else "")


# Reading by row


def open_row(groups: list[RowGroup], row: int) -> Image.Image:
    """The image of a row.

    Raises:
        OSError: it is no image, or cannot be read.
        ValueError: it is null, or its path leads out of the data folder.
    """
    group = _group_of(groups, row)
    value = _read_group(group)[row - group.start].as_py()
    if isinstance(value, dict) and not value.get("bytes"):  # {"bytes": None, "path": ...}
        return open_image(_inside(group, value.get("path")))
    value = value["bytes"] if isinstance(value, dict) else value
    if not isinstance(value, bytes):
        raise ValueError(f"column {group.column} holds {'null' if value is None else type(value).__name__}, no image")
    return open_image(value)


def _inside(group: RowGroup, name: str | None) -> str:
    if not isinstance(name, str):
        raise ValueError(f"column {group.column} holds neither bytes nor a path")
    root, path = os.path.abspath(group.root), os.path.abspath(Path(group.file).parent / name)
    if os.path.commonpath([root, path]) != root:
        raise ValueError(f"its path {name} leads out of {group.root}, where alone images are read")
    return path


def where_row(groups: list[RowGroup], row: int) -> str:
    """File and row, for messages."""
    group = _group_of(groups, row)
    return f"{group.file} row {row - group.start + group.first}"


def _group_of(groups: list[RowGroup], row: int) -> RowGroup:
    return groups[bisect_right(groups, row, key=attrgetter("start")) - 1]


@lru_cache(maxsize=32)
def _read_group(group: RowGroup):
    """The encoded images of a row group, a ``pyarrow.ChunkedArray``; the last few groups stay in memory."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(group.file) as parquet:
        return parquet.read_row_group(group.number, columns=[group.column]).column(group.column)
