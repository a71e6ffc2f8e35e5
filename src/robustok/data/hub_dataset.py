"""The data set ``hf``: a data set of the Hugging Face Hub by its name, or a folder that ``datasets`` understands.

The library ``datasets`` downloads it once and keeps it as Arrow files, which are read by row: trainings resume exactly.
With ``streaming`` it only says where the parquet files are.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from PIL import Image
from pydantic import Field

from robustok.console import shows_bars
from robustok.data.captions import checked
from robustok.data.folders import SPLITS, Split
from robustok.data.image_file import open_image
from robustok.data.labels import LABEL_COLUMNS, number_labels
from robustok.data.parquet_stream import read_remote_table, table_source
from robustok.data.remote_files import described
from robustok.data.source import Holdout, Source, captioned, without_labels
from robustok.data.streaming import Remote
from robustok.errors import UserError
from robustok.files import bytes_digest, one_line

KINDS = ("parquet", "arrow", "imagefolder")  # of the loaders in ``datasets``, those that are used


class HubDataset(Remote):
    """A data set of the Hugging Face Hub by its name, with images in a column; needs the package ``datasets``."""

    name: Literal["hf"] = "hf"
    path: str = Field(description="ORG/NAME, ORG/NAME@REVISION, or a folder as of imagefolder, with its metadata")
    subset: str | None = Field(None, description="configuration of the data set, where it has several")
    split: str | None = Field(
        None,
        description="the only split to use, such as train or train[:10%], which holdout divides; null: train and, of "
        "validation and test, the first one",
    )
    holdout: Holdout = 0.1
    image: str | None = Field(None, description="column of the images; null: the first one of images")
    label: str | None = Field(
        None, description=f"column of the labels, numbers or names; null: {', '.join(LABEL_COLUMNS)}, if there is one"
    )
    captions: str | None = Field(None, description="column of captions in the place of labels, for pipelines")


def hub_source(data: HubDataset, split: Split) -> Source:
    """Find the images of a split.

    Raises:
        UserError: no such data set, split or column; no network or no access; it has no images.
    """
    if data.streaming:
        return _streamed(data, split)
    table, whole, from_files = _load(data, split)
    features = table.features
    image = _image_column(data, features)
    label = data.label or next((name for name in LABEL_COLUMNS if name in features), None)
    for setting, column in (("label", data.label), ("captions", data.captions)):
        if column is not None and column not in features:
            raise UserError(f"{data.path} has the columns {', '.join(features)}, not data.{setting}={column}; name one")
    images, where = _column(table, image), partial(_where, f"{data.path} {table.split}")
    labels = _column(table, label).to_pylist() if label else [0] * len(table)
    named = getattr(features[label], "names", None) if label else ["all"]
    numbers, classes = number_labels(
        [-1 if one is None else one for one in labels], f"column {label} of {data.path}", named
    )
    paths = _paths(images)
    names = [_name(path, data.path, from_files) for path in paths]
    content = (_sizes(images), numbers.tobytes(), "\n".join(names).encode("utf-8", "surrogateescape"))
    source = Source(
        data.path.rstrip("/").rpartition("/")[2],
        partial(_open, table.select_columns([image]).with_format("arrow"), image, from_files),
        where,
        numbers,
        classes,
        bytes_digest(" ".join(map(bytes_digest, content)).encode()),
        whole,
        files=paths if from_files else [one["filename"] for one in table.cache_files],
        names=[os.path.splitext(name)[0] for name in names] if "" not in names else [],
        about=f"labels from column {label}" if label else "no labels",
        unlabelled=without_labels(numbers, f"column {label} of {data.path}") if label else "",
    )
    if data.captions is None:
        return source
    captions = _column(table, data.captions).to_pylist()
    return captioned(source, checked(captions, [*map(where, range(len(table)))], f"column {data.captions}"))


def _streamed(data: HubDataset, split: Split) -> Source:
    """The images of a split, of which none is read."""
    if os.path.exists(data.path):
        raise UserError(
            f"data.streaming=true reads data sets of the Hub, and data.path={data.path} is on this machine; set "
            "data.streaming=false"
        )
    with _loading(data):
        builder, kind = _builder(data)
        found = {str(name): list(files) for name, files in builder.config.data_files.items()}
        features = builder.info.features or {}
    if kind != "parquet":
        path = data.path.partition("@")[0]
        converted = f"hf://datasets/{path}@refs/convert/parquet/{data.subset or 'default'}"
        raise UserError(
            f"{data.path} is a data set of the kind {kind}, and data.streaming=true reads parquet; set "
            f"data.name=parquet data.path={converted}, where the Hub has converted it"
        )
    if data.split and data.split not in found:
        raise UserError(f"{data.path} has the splits {', '.join(found)}; streaming takes one of them, not {data.split}")
    chosen, whole = (data.split, True) if data.split else _chosen(list(found), split)
    files = described(found[chosen])
    table = read_remote_table(files, data, data.image and [data.image], data.label, data.captions)
    labels = [-1 if one is None else one for one in table.labels]
    names = getattr(features.get(table.column), "names", None) or table.names
    content = [f"{file.name} {file.size}" for file in files] + [f"{data.image} {data.label}"]
    identity = bytes_digest("\n".join(content).encode("utf-8", "surrogateescape"))
    name = data.path.rstrip("/").rpartition("/")[2]
    return table_source(replace(table, labels=labels, names=names), name, f"{data.path} {chosen}", identity, whole)


def _load(data: HubDataset, split: Split) -> tuple[Any, bool, bool]:
    """The rows of a split, whether it is the only one, and whether images are files that ``datasets`` found itself."""
    datasets = _datasets()
    with _loading(data):
        builder, kind = _builder(data)
        builder.download_and_prepare()
        found = list(builder.info.splits)
        chosen, whole = (data.split, True) if data.split else _chosen(found, split)
        table = builder.as_dataset(split=chosen)
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table, whole, kind == "imagefolder"


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("data.name=hf needs the package datasets; pip install 'robustok[datasets]'") from None
    return datasets


def _builder(data: HubDataset) -> tuple[Any, str]:
    """What ``datasets`` knows of a data set, and its kind."""
    datasets = _datasets()
    if not shows_bars():
        datasets.disable_progress_bars()
    path, _, revision = (data.path, "", "") if os.path.exists(data.path) else data.path.partition("@")
    # Its token is the one in HF_TOKEN, or that of `hf auth login`. No code of the data set is executed.
    builder = datasets.load_dataset_builder(path, data.subset, revision=revision or None)
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in KINDS:
        hint = f"; set data.name=tar data.path=hf://datasets/{path}" if kind == "webdataset" else ""
        raise UserError(f"{data.path} is a data set of the kind {kind}; expected {', '.join(KINDS)}{hint}")
    return builder, kind


@contextmanager
def _loading(data: HubDataset) -> Iterator[None]:
    """Context in which what ``datasets`` raises becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many types
        reason = one_line(error, 300)
        raise UserError(
            f"cannot load {data.path} ({type(error).__name__}: {reason}); check name, subset, split, network and, for "
            "one that is not public, HF_TOKEN or `hf auth login`"
        ) from None


def _chosen(found: list[str], split: Split) -> tuple[str, bool]:
    """The split of a data set with these splits, and whether test images must be held out of it."""
    by_name = {ours: next((name for name in names if name in found), None) for ours, names in SPLITS.items()}
    if None in by_name.values():
        return by_name["train"] or by_name["test"] or found[0], True
    return by_name[split], False


def _image_column(data: HubDataset, features: Any) -> str:
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    found = [name for name, kind in kinds.items() if kind == "Image"]
    if data.image is not None:
        found = [data.image] if data.image in found else []
    if not found:
        wanted = f"data.image={data.image}" if data.image else "a column of images"
        raise UserError(f"{data.path} has the columns {', '.join(f'{n} ({k})' for n, k in kinds.items())}; no {wanted}")
    return found[0]


def _column(table: Any, name: str) -> Any:
    """A column of the rows, a ``pyarrow.ChunkedArray``; that of images is mapped into memory, not read."""
    return table.select_columns([name]).with_format("arrow")[:][name]


def _paths(images: Any) -> list[str]:
    return [path or "" for path in _field(images, "path").to_pylist()]


def _sizes(images: Any) -> bytes:
    """Bytes of each image, 0 where it is a file beside the table; its lengths are read, not its content."""
    import pyarrow.compute as compute

    return compute.binary_length(_field(images, "bytes")).fill_null(0).to_numpy().astype("<i8").tobytes()


def _field(images: Any, name: str) -> Any:
    import pyarrow
    import pyarrow.compute as compute

    return pyarrow.chunked_array([compute.struct_field(chunk, name) for chunk in images.chunks] or [[]])


def _name(path: str, root: str, from_files: bool) -> str:
    """What an image is called, the same on every machine."""
    inside = from_files and os.path.isdir(root)
    return os.path.relpath(path, os.path.abspath(root)) if inside else os.path.basename(path)


def _open(table: Any, column: str, from_files: bool, row: int) -> Image.Image:
    """The image of a row.

    Raises:
        OSError: it is no image.
        ValueError: it is null, or a path in a table, which could lead anywhere.
    """
    found = table[row][column][0].as_py() or {}
    if found.get("bytes"):
        return open_image(found["bytes"])
    if from_files and found.get("path"):
        return open_image(found["path"])
    raise ValueError(
        "it is null" if not found.get("path") else f"it is only a path, {found['path']}, which is not read"
    )


def _where(what: str, row: int) -> str:
    return f"{what} row {row}"
