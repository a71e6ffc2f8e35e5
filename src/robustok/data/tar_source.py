"""The data set ``tar``: tar files as of webdataset, on this machine or elsewhere."""

import os
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from robustok.data.captions import checked
from robustok.data.folders import Split, describe_left_out
from robustok.data.labels import LabelList, number_labels
from robustok.data.parquet_files import split_files
from robustok.data.remote_files import address_of
from robustok.data.source import Holdout, Source, captioned
from robustok.data.streaming import Remote, copied, streamed_splits
from robustok.data.tar_files import (
    CLASS,
    JSON,
    TARS,
    TEXT,
    captions_of,
    identity_of,
    index_tars,
    labels_of,
    open_member,
    where_member,
)
from robustok.data.tar_stream import index_remote_tars, streamed_members
from robustok.errors import UserError
from robustok.files import bytes_digest


class Tar(Remote):
    """Tar files as of webdataset: ``0001.jpg`` with ``0001.cls``, ``.json`` or ``.txt``; or CLASS/FILE, or CLASS.tar.

    Files with train, val, test and the like in their names or folders are those splits. Images are read in place, by an
    index of their positions; nothing is unpacked, and pickles are never opened.
    """

    name: Literal["tar"] = "tar"
    path: Path = Field(
        description="a file, a folder or a glob, with ranges as train-{000..146}.tar; also s3://, gs://, hf:// and "
        "others of fsspec, of which the files are copied to data.cache once, or streamed"
    )
    holdout: Holdout = 0.1
    labels: Path | None = Field(None, description="file with the labels of images that have none in the tar files")
    label: str | None = Field(
        None, description="column of the labels in .json; null: .cls, else a known column of .json, else the folders"
    )
    captions: str | None = Field(
        None, description="captions in the place of labels, for pipelines: txt, or their column in .json"
    )


def tar_source(data: Tar, split: Split) -> Source:
    """Find the images of a split.

    Raises:
        UserError: there are none, a file is damaged, or labels or captions are missing.
    """
    if data.streaming:
        splits, left = streamed_splits(data, ".tar")
        index = partial(index_remote_tars, data=data, left=left)
    else:
        path = copied(data, ".tar")
        base, splits, left = split_files(path, TARS)
        index = partial(index_tars, left=left)
    where = str(data.path if data.streaming else path)
    whole = len(splits) < 2
    files = next(iter(splits.values())) if whole else splits[split]
    members, texts = index(files, wanted={CLASS, JSON} | ({TEXT} if data.captions else set()))
    if not len(members):
        found = describe_left_out(left) or "nothing"
        raise UserError(f"no images in {members.tars[0]} (found: {found}); expected members such as 0001.jpg")
    if data.labels is not None:
        left["files of other kinds"].pop(data.labels.suffix, None)
    listed = data.labels is not None and (whole or split == "test")
    labels, about = _listed(data, members.names) if listed else labels_of(members, texts, data.label)
    classes = ["all"] if about == "no labels" else None
    if not whole and split == "test" and any(isinstance(label, str) for label in labels):
        train, others = index(splits["train"], wanted={CLASS, JSON})
        classes = number_labels(labels_of(train, others, data.label)[0], where)[1]
    numbers, classes = number_labels(labels, where, classes)
    images = streamed_members(members, files, data) if data.streaming else None
    sizes = [file.size if images else os.path.getsize(file) for file in files]
    source = Source(
        address_of(data.path) or base.resolve().name,
        images.open if images else partial(open_member, members),
        partial(where_member, members),
        numbers,
        classes,
        bytes_digest(f"{identity_of(members, sizes)} {bytes_digest(numbers.tobytes())}".encode()),
        whole,
        files=[] if images else members.tars,
        names=[os.path.splitext(name)[0] for name in members.names],
        about=about,
        left_out=describe_left_out(left),
        blocks=images.blocks if images else None,
        stamp=bytes_digest(" ".join(file.version for file in files).encode(), 16) if images else "",
    )
    if data.captions is None:
        return source
    beside = "a .txt beside it" if data.captions == TEXT else f"{data.captions} in its .json"
    return captioned(source, checked(captions_of(members, texts, data.captions), members.names, beside))


def _listed(data: Tar, names: list[str]) -> tuple[list[Any], str]:
    """The labels in the file that is given, of images by their names."""
    found = LabelList.find([], data.labels, data.label)
    labels = found.of(names)
    if None in labels:
        missing = names[labels.index(None)]
        raise UserError(
            f"{data.labels} has no label for {labels.count(None)} images such as {missing}; list all of them"
        )
    return labels, f"labels from {found.describe()}"
