"""The kinds of data set: a configuration for each, and the function that finds its files.

A :class:`Source` opens images by row; ``robustok.data.dataset`` crops them and makes batches. To add a data set, write
a configuration for ``Data``, a function (configuration, split) -> ``Source``, and a line in ``DATASETS``.
"""

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import getitem
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from robustok.data.arrays import open_array
from robustok.data.captions import captions_in_folder, captions_in_parquet
from robustok.data.folders import ARCHIVES, Split, describe_left_out, find_images, has_images
from robustok.data.hub_dataset import HubDataset, hub_source
from robustok.data.image_file import open_image
from robustok.data.labels import LABEL_COLUMNS, METADATA, number_labels
from robustok.data.parquet_files import IMAGE_COLUMNS, has_parquet, open_row, read_table, split_files, where_row
from robustok.data.parquet_stream import read_remote_table, table_source
from robustok.data.remote_files import address_of
from robustok.data.source import DataConfig, Holdout, Source, captioned, without_labels
from robustok.data.streaming import Remote, copied, streamed_splits
from robustok.data.tar_files import TARS
from robustok.data.tar_source import Tar, tar_source
from robustok.errors import UserError
from robustok.files import bytes_digest, one_line


class Digits(DataConfig):
    """Scikit-learn's 1,797 handwritten digits, 8x8, in ten classes."""

    name: Literal["digits"] = "digits"
    holdout: float = Field(0.25, ge=0, lt=1, description="share of the digits that is the test split")


class Cifar10(DataConfig):
    """CIFAR-10 in the python version that torchvision downloads: 50,000 + 10,000 images, 32x32."""

    name: Literal["cifar10"] = "cifar10"
    path: Path | None = Field(None, description="folder that holds cifar-10-batches-py; by default ~/.cache/robustok")
    download: bool = Field(False, description="download (170 MB) into path; without a path this is done anyway")


class Folder(DataConfig):
    """Image files as CLASS/FILE, or train/CLASS/FILE beside val, valid, validation, dev, eval or test.

    Without CLASS: one class, or the labels of ``metadata.jsonl`` or ``.csv``, or of a list.
    """

    name: Literal["folder"] = "folder"
    path: Path = Field(description="the folder")
    holdout: Holdout = 0.1
    labels: Path | None = Field(
        None,
        description="file with the labels of images that have no class folders, such as ImageNet's validation images: "
        "a line for each, LABEL in the order of the file names or NAME LABEL, or a table (.csv, .jsonl)",
    )
    label: str | None = Field(None, description="column of the labels in such a table")
    captions: str | None = Field(
        None,
        description="captions in the place of labels, for pipelines: txt: photo.txt beside photo.jpg; else their "
        "column in metadata.jsonl or .csv, such as text",
    )


class Parquet(Remote):
    """Parquet files as on the Hugging Face Hub: encoded images in the column ``img`` or ``image``, and ``label``.

    Files with train, val, test and the like in their names or folders are those splits. Training on many gigabytes is
    slow, as it reads a row group for almost every image: data.name=hf reads the same files faster, from a copy, and
    data.streaming=true reads each row group once an epoch.
    """

    name: Literal["parquet"] = "parquet"
    path: Path = Field(
        description="a file, a folder or a glob such as images/**/*.parquet; also hf://datasets/ORG/NAME, s3://, gs:// "
        "and others of fsspec, of which the files are copied to data.cache once, or streamed"
    )
    holdout: Holdout = 0.1
    label: str | None = Field(
        None, description=f"column of the labels, numbers or names; null: {', '.join(LABEL_COLUMNS)}, if there is one"
    )
    captions: str | None = Field(None, description="column of captions in the place of labels, for pipelines")


class Npz(DataConfig):
    """An array of images: ``.npz`` with ``arr_0`` (uint8 NHWC) as in ADM's evaluation, or ``.npy``.

    The .npz may have labels as ``arr_1`` or ``labels``. A compressed .npz can only be read from front to back: to train
    on a large one, save it as .npy first.
    """

    name: Literal["npz"] = "npz"
    path: Path = Field(description="the .npz or .npy file")
    holdout: Holdout = 0.1


Data = Annotated[Digits | Cifar10 | Folder | Parquet | Tar | HubDataset | Npz, Field(discriminator="name")]


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

    root = data.path or Path("~/.cache/robustok").expanduser()
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
    root = data.path
    if not os.path.isdir(root):
        unpack = " (an archive: unpack it)" if root.suffix in ARCHIVES else ""
        unpack = " (a tar file: set data.name=tar)" if root.suffix in TARS and root.exists() else unpack
        raise UserError(
            f"no folder {root}{unpack}; data.path must be a folder of images as CLASS/FILE or train/CLASS/FILE"
        )
    found = find_images(root, split, data.labels, data.label)
    for names in found.left.values() if data.captions else ():
        for name in (".txt", *METADATA):  # which are read
            names.pop(name, None)
    opener, where = partial(_open_file, found.paths), partial(getitem, found.paths)
    names = [os.path.splitext(os.path.relpath(path, root))[0] for path in found.paths]
    source = Source(
        root.resolve().name, opener, where, found.labels, found.classes or ["all"], found.identity, found.whole,
        files=found.paths, names=names, about=found.about, left_out=describe_left_out(found.left),
        unlabelled=found.unlabelled,
    )  # fmt: skip
    if data.captions is None:
        return source
    return captioned(source, captions_in_folder(root, found.paths, data.captions))


def _open_file(paths: Sequence[str], row: int) -> Image.Image:
    return open_image(paths[row])


def _parquet(data: Parquet, split: Split) -> Source:
    if data.streaming:
        return _streamed_parquet(data, split)
    path = copied(data, ".parquet")
    base, splits, left = split_files(path)
    whole = len(splits) < 2
    files = next(iter(splits.values())) if whole else splits[split]
    table = read_table(files, base, data.label)
    names, where = table.names, f"column {table.column} of {path}"
    if names is None and not whole and split == "test" and any(isinstance(label, str) for label in table.labels):
        names = number_labels(read_table(splits["train"], base, data.label).labels, where)[1]
    labels, classes = number_labels(table.labels, where, names if table.column else ["all"])
    content = [f"{file.name} {file.stat().st_size}" for file in files]
    content += [f"label {data.label}"] * (data.label is not None)
    source = Source(
        path.resolve().name, partial(open_row, table.groups), partial(where_row, table.groups), labels, classes,
        bytes_digest("\n".join(content).encode("utf-8", "surrogateescape")), whole,
        files=files, names=table.images, about=f"labels from column {table.column}" if table.column else "no labels",
        left_out=describe_left_out(left), unlabelled=without_labels(labels, where),
    )  # fmt: skip
    return source if data.captions is None else captioned(source, captions_in_parquet(files, data.captions))


def _streamed_parquet(data: Parquet, split: Split) -> Source:
    splits, left = streamed_splits(data, ".parquet")
    whole = len(splits) < 2
    files = next(iter(splits.values())) if whole else splits[split]
    table = read_remote_table(files, data, IMAGE_COLUMNS, data.label, data.captions)
    if table.names is None and not whole and split == "test" and any(isinstance(one, str) for one in table.labels):
        train = read_remote_table(splits["train"], data, IMAGE_COLUMNS, data.label, None)
        table = replace(table, names=number_labels(train.labels, f"column {table.column} of {data.path}")[1])
    content = [f"{file.name} {file.size}" for file in files]  # as of the same files on this machine
    content += [f"label {data.label}"] * (data.label is not None)
    identity = bytes_digest("\n".join(content).encode("utf-8", "surrogateescape"))
    return table_source(table, address_of(data.path), address_of(data.path), identity, whole, describe_left_out(left))


def _npz(data: Npz, split: Split) -> Source:
    path = data.path
    array, labels = open_array(path)
    count, height, width, _ = array.shape
    labels, classes = (np.zeros(count, np.int64), ["all"]) if labels is None else number_labels(labels, f"{path}")
    where, identity = partial("{} image {}".format, path), bytes_digest(f"{array.shape} {array.checksum}".encode())
    opener = partial(_to_image, array.read)
    unlabelled = without_labels(labels, str(path))
    return Source(path.name, opener, where, labels, classes, identity, True, (height, width), unlabelled=unlabelled)


def data_at(path: str | Path) -> Folder | Parquet | Tar | Npz:
    """The data set at a path, with all its images: a folder of images, a .tar, .npz or .npy file, or parquet files.

    Raises:
        UserError: the path does not exist, or is none of these.
    """
    path = Path(os.path.expanduser(path))
    accepted = (
        "a folder of images, an .npz or .npy file (arr_0, uint8 NHWC), a .tar, or parquet (a file, a folder, a glob)"
    )
    exists = os.path.lexists(path)
    if path.suffix in (".npz", ".npy"):
        return Npz(path=path, holdout=0)
    if path.suffix in TARS and os.path.isfile(path):
        return Tar(path=path, holdout=0)
    if path.suffix == ".parquet" or (not exists and glob.has_magic(str(path))):
        return Parquet(path=path, holdout=0)
    if not os.path.isdir(path):
        found = "is an archive: unpack it" if path.suffix in ARCHIVES else "is a file of another kind"
        raise UserError(f"{path} {found if exists else 'does not exist'}; expected {accepted}")
    if (path / "manifest.json").is_file():
        raise UserError(f"{path} holds latents, which a tokenizer must decode first; expected {accepted}")
    if (path / "config.yaml").is_file():
        raise UserError(f"{path} holds a model or a run, not images; expected {accepted}")
    parquet = not has_images(path) and has_parquet(path)
    return Parquet(path=path, holdout=0) if parquet else Folder(path=path, holdout=0)


DATASETS = {
    "digits": _digits,
    "cifar10": _cifar10,
    "folder": _folder,
    "parquet": _parquet,
    "tar": tar_source,
    "hf": hub_source,
    "npz": _npz,
}
