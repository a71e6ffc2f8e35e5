"""Parquet files that are read where they are: an index of footers and small columns, and row groups as blocks."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from robustok.data.captions import checked
from robustok.data.labels import LABEL_COLUMNS, number_labels
from robustok.data.parquet_files import class_names, some_of
from robustok.data.remote_files import RemoteFile, RemoteStream
from robustok.data.source import Source, captioned, without_labels
from robustok.data.streaming import Remote, StreamedImages, block_cache, indexed
from robustok.errors import UserError
from robustok.files import bytes_digest, one_line


@dataclass(frozen=True)
class RemoteTable:
    """The rows of remote parquet files.

    Attributes:
        images: of the rows.
        files: addresses of the files.
        first: (F + 1,) the first row of each file, and the number of rows.
        labels: of each row, as they are stored; zeros without a column of labels.
        column: of the labels; None without.
        names: names of the classes; None if the schema has none.
        captions: of each row; None where none were asked for.
        stamp: digest of the files' versions and the sizes of their row groups.
    """

    images: StreamedImages
    files: Sequence[str]
    first: np.ndarray
    labels: list[Any]
    column: str | None
    names: list[str] | None
    captions: list[Any] | None
    stamp: str


@dataclass(frozen=True)
class _RowGroups:
    """The row groups of remote files; arrays (B,) have a value for each.

    Attributes:
        files: the files.
        footers: of the files, on this machine.
        column: of the images.
        file: which file.
        number: of the group in the file.
        rows: how many.
        size: bytes of the images.
    """

    files: Sequence[RemoteFile]
    footers: Sequence[Path]
    column: str
    file: np.ndarray
    number: np.ndarray
    rows: np.ndarray
    size: np.ndarray

    def fetch(self, block: int) -> list[bytes]:
        """The bytes of the images of a row group; empty for rows without."""
        file, number = int(self.file[block]), int(self.number[block])
        with _reading(self.files[file]):
            parquet = _opened(self.files[file], self.footers[file])
            column = f"{self.column}{_suffix(parquet.schema_arrow, self.column)}"
            rows = parquet.read_row_group(number, columns=[column], use_threads=False)[self.column].to_pylist()
        return [(row.get("bytes") if isinstance(row, dict) else row) or b"" for row in rows]


def read_remote_table(
    files: Sequence[RemoteFile],
    data: Remote,
    images: Sequence[str] | None,
    label: str | None,
    captions: str | None,
) -> RemoteTable:
    """Index the row groups, labels and captions of remote parquet files; no image is read.

    Args:
        files: the files.
        data: settings of the cache, which keeps the index too.
        images: names of columns, of which the first that is there holds the images; None: the first one of images.
        label: column of the labels; None looks for one.
        captions: column of captions; None: none.

    Raises:
        UserError: a file cannot be read, lacks a column or has other ones than the first, or the cache is too small.
    """
    index = partial(indexed, files, data.cache_folder / "index")
    footers = index("footer", _read_footer, "reading footers of parquet files")
    metadata = list(map(_footer, footers))
    schemas = [one.schema.to_arrow_schema() for one in metadata]
    first = schemas[0]
    for setting, column in (("label", label), ("captions", captions)):
        if column is not None and column not in first.names:
            found = some_of(first.names)
            raise UserError(
                f"{files[0].address} has the columns {found}, not data.{setting}={column}; name one of them"
            )
    image = _image_column(files[0], first, images)
    label = label or next((name for name in LABEL_COLUMNS if name in first.names), None)
    small = [name for name in dict.fromkeys((label, captions)) if name is not None]
    for file, schema in zip(files, schemas, strict=True):
        _check_same(file, schema, files[0], first, [image, *small], label)
    columns: dict[str, list[Any]] = {name: [] for name in small}
    if small:
        read = partial(_read_columns, dict(zip(files, footers, strict=True)), small)
        for path in index(f"{bytes_digest(json.dumps(small).encode())}.json", read, "reading labels of parquet files"):
            for name, values in json.loads(path.read_bytes()).items():
                columns[name] += values
    groups = _row_groups(files, footers, image)
    rows = np.concatenate([[0], np.cumsum([one.num_rows for one in metadata])])  # of the files
    return RemoteTable(
        images=_images(groups, data),
        files=[file.address for file in files],
        first=rows,
        labels=columns[label] if label else [0] * int(rows[-1]),
        column=label,
        names=class_names(first.metadata, label),
        captions=columns[captions] if captions else None,
        stamp=bytes_digest(" ".join([*(file.version for file in files), str(groups.size.tolist())]).encode(), 16),
    )


def _check_same(
    file: RemoteFile, schema: Any, other: RemoteFile, first: Any, used: list[str], label: str | None
) -> None:
    """Refuse a file whose columns or classes are not those of the first one."""
    same = all(name in schema.names and schema.field(name).type == first.field(name).type for name in used)
    if not same or class_names(schema.metadata, label) != class_names(first.metadata, label):
        raise UserError(
            f"{file.address} has other columns or names of classes than {other.address}; read one of them alone"
        )


def _images(groups: _RowGroups, data: Remote) -> StreamedImages:
    blocks = zip(groups.file.tolist(), groups.number.tolist(), strict=True)
    names = [f"{groups.files[file].digest} {number} {groups.column}" for file, number in blocks]
    return StreamedImages(
        groups.fetch,
        np.concatenate([[0], groups.rows.cumsum()]),
        [bytes_digest(name.encode(), 20) for name in names],
        block_cache(data, groups.size, max(1, int(groups.rows.sum()))),
    )


def table_source(table: RemoteTable, name: str, where: str, identity: str, whole: bool, left_out: str = "") -> Source:
    """The source of a table's images, with its labels or captions.

    Args:
        table: the rows.
        name: of the data set, for results.
        where: it is, for messages.
        identity: digest of the files' names and sizes.
        whole: whether it is the only split.
        left_out: what was left out.

    Raises:
        UserError: a label is no class, or a caption is missing.
    """
    described = f"column {table.column} of {where}"
    labels, classes = number_labels(table.labels, described, table.names if table.column else ["all"])
    source = Source(
        name, table.images.open, partial(_where, table.files, table.first), labels, classes, identity, whole,
        about=f"labels from column {table.column}" if table.column else "no labels", left_out=left_out,
        unlabelled=without_labels(labels, described), blocks=table.images.blocks, stamp=table.stamp,
    )  # fmt: skip
    if table.captions is None:
        return source
    counts = np.diff(table.first).tolist()
    rows = [f"{file} row {row}" for file, count in zip(table.files, counts, strict=True) for row in range(count)]
    return captioned(source, checked(table.captions, rows, "text in its column of captions"))


def _where(files: Sequence[str], first: np.ndarray, row: int) -> str:
    file = int(first.searchsorted(row, "right")) - 1
    return f"{files[file]} row {row - first[file]}"


def _row_groups(files: Sequence[RemoteFile], footers: Sequence[Path], column: str) -> _RowGroups:
    found = []
    for number, path in enumerate(footers):
        footer = _footer(path)
        name = f"{column}{_suffix(footer.schema.to_arrow_schema(), column)}"
        for group in range(footer.num_row_groups):
            row_group = footer.row_group(group)
            chunks = (row_group.column(i) for i in range(row_group.num_columns))
            size = next(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == name)
            found.append((number, group, row_group.num_rows, size))
    arrays = np.array(found, np.int64).reshape(-1, 4).T
    return _RowGroups(files, footers, column, *arrays)


def _image_column(file: RemoteFile, schema: Any, images: Sequence[str] | None) -> str:
    found = [name for name in images or schema.names if name in schema.names and _suffix(schema, name) is not None]
    if images is None:  # text may be bytes too
        found = [name for name in found if _suffix(schema, name)]
    if not found:
        columns = some_of([f"{field.name} ({field.type})" for field in schema])
        wanted = " or ".join(images or ("a column of images",))
        raise UserError(f"{file.address} has the columns {columns}; expected images, with their bytes, in {wanted}")
    return found[0]


def _suffix(schema: Any, column: str) -> str | None:
    """What follows a column's name where it has the bytes of images; None if it has none."""
    import pyarrow.types as types

    kind = schema.field(column).type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return ".bytes"
    return "" if types.is_binary(kind) or types.is_large_binary(kind) else None


# Reading


def _read_footer(file: RemoteFile) -> bytes:
    import pyarrow

    with _reading(file), pyarrow.BufferOutputStream() as stream:
        _opened(file).metadata.write_metadata_file(stream)
        return stream.getvalue().to_pybytes()


def _read_columns(footers: Mapping[RemoteFile, Path], columns: Sequence[str], file: RemoteFile) -> bytes:
    with _reading(file):
        table = _opened(file, footers[file]).read(columns=list(columns), use_threads=False)
        return json.dumps(table.to_pydict(), default=lambda value: [repr(value)]).encode()  # neither text nor number


@lru_cache(maxsize=512)
def _footer(path: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(path)


def _opened(file: RemoteFile, footer: Path | None = None) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(RemoteStream(file), metadata=None if footer is None else _footer(footer))


@contextmanager
def _reading(file: RemoteFile) -> Iterator[None]:
    """Context in which a damaged file is a UserError.

    Raises:
        UserError: it is damaged, or no parquet file.
    """
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"cannot read {file.address} as parquet: {one_line(error, 200)}; replace the file or leave it out"
        ) from None
