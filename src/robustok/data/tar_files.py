"""Images in tar files, as webdataset has them: an index of their positions, and reading by row.

    0001.jpg 0001.cls  0002.jpg 0002.cls  ...           a file for each part of a sample, in any order
    0001.jpg 0001.json                                  columns in JSON
    n01440764/x.JPEG                                    classes as folders
    n01440764.tar n01443537.tar ...                     tar files in a tar file, a class each, as of ImageNet

The headers are read once. An image is then a piece of a file, which any process reads in any order, so that trainings
resume exactly. Nothing is unpacked to the disk, and members that hold pickles are never opened.
"""

import json
import os
import tarfile
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from robustok.data.folders import LeftOut
from robustok.data.image_file import open_image
from robustok.data.labels import LABEL_COLUMNS
from robustok.errors import UserError, printable
from robustok.files import IMAGE_SUFFIXES, bytes_digest, one_line, regular_file

TARS = (".tar",)
CLASS, JSON, TEXT = "cls", "json", "txt"  # suffixes of a sample's label, columns and caption
PICKLES = {"pyd", "pkl", "pickle", "pth", "pt", "npy", "npz"}
LARGEST_TEXT = 2**20  # bytes of a label, of columns or of a caption


@dataclass(frozen=True)
class Members:
    """The images in tar files.

    Attributes:
        tars: paths of the files.
        tar: (N,) int32, which of them.
        offset: (N,) int64, first byte of the image in it.
        size: (N,) int64, bytes.
        names: of the images in their files.
    """

    tars: list[str]
    tar: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class _Sample:
    """What a tar file holds under one name: the image's position, and its texts by suffix."""

    image: tuple[int, int, str] | None = None  # offset, size, name
    texts: dict[str, str] = field(default_factory=dict)


def index_tars(files: list[Path], left: LeftOut, wanted: set[str]) -> tuple[Members, list[dict[str, str]]]:
    """Find the images in tar files by their headers.

    Args:
        files: the tar files.
        left: counts what is left out.
        wanted: suffixes of the texts that are read.

    Returns:
        The images, and the texts of each by suffix.

    Raises:
        UserError: a file is no tar file, is compressed, ends early or is damaged.
    """
    found = []
    for file in files:
        with regular_file(file).open("rb") as stream:
            found.append(index_tar(stream, str(file), left, wanted))
    return members_of(list(map(str, files)), found)


def members_of(tars: list[str], found: list[list["Entry"]]) -> tuple[Members, list[dict[str, str]]]:
    """The images of several tar files, and the texts of each, from the entries of each file."""
    entries = [entry for one in found for entry in one]
    tar = np.repeat(np.arange(len(tars), dtype=np.int32), list(map(len, found)))
    offset, size = (np.array([entry[i] for entry in entries], np.int64) for i in range(2))
    return Members(tars, tar, offset, size, [entry[2] for entry in entries]), [entry[3] for entry in entries]


Entry = tuple[int, int, str, dict[str, str]]  # of an image: first byte, bytes, name and texts by suffix


def index_tar(stream: BinaryIO, where: str, left: LeftOut, wanted: set[str]) -> list[Entry]:
    """The images in a tar file, as :func:`index_tars` finds them; what is not needed of it is not read."""
    samples: dict[str, _Sample] = defaultdict(_Sample)
    for prefix, member in _members(stream, where, stream.seek(0, os.SEEK_END)):
        _note(samples, stream, prefix, member, left, wanted)
    for sample in samples.values():
        if sample.image is None:
            left["samples without an image"].update(list(sample.texts))
    return [
        (*sample.image, {key: text for key, text in sample.texts.items() if key in wanted})
        for sample in samples.values()
        if sample.image is not None
    ]


def _note(
    samples: dict[str, _Sample],
    stream: BinaryIO,
    prefix: str,
    member: tarfile.TarInfo,
    left: LeftOut,
    wanted: set[str],
) -> None:
    """Add a member to the sample that it belongs to, or to what is left out."""
    path = PurePosixPath(prefix, member.name.removeprefix("./"))
    stem, _, suffix = path.name.partition(".")
    last = path.suffix.lower()
    if path.name.startswith("."):
        left["hidden files"][path.name] += 1
    elif not member.isreg() or member.issparse():
        left["links and the like"][path.name] += 1
    elif last.removeprefix(".") in PICKLES:
        left["members that may hold pickles, which are never opened"][path.name] += 1
    elif last in IMAGE_SUFFIXES:
        key = str(path.with_name(stem))
        if samples[key].image is None:
            samples[key].image = (member.offset_data, member.size, str(path))
        else:
            left["further images of a sample"][path.name] += 1
    elif suffix in (CLASS, JSON, TEXT):
        text = _text(stream, member.offset_data, member.size) if suffix in wanted else ""
        samples[str(path.with_name(stem))].texts[suffix] = text
    else:
        left["files of other kinds"][last or path.name] += 1


def _members(
    stream: BinaryIO, file: str, end: int, start: int = 0, prefix: str = ""
) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The members of a tar file of ``end`` bytes, with the folder that tar files in it are: its name without suffix."""
    stream.seek(start)
    where = f"{file}{f' in its member {prefix}.tar' if prefix else ''}"
    count = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                count += 1
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError("unexpected end of data")
                if member.isreg() and not prefix and member.name.lower().endswith(TARS):
                    position = stream.tell()
                    yield from _members(stream, file, end, member.offset_data, PurePosixPath(member.name).stem)
                    stream.seek(position)
                elif not member.isdir():
                    yield prefix, member
                archive.members.clear()  # of a million members only one is kept
            mark = archive.offset
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        head = _read_at(stream, start, 6)
        packed = head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
        if count:
            raise UserError(
                f"{where} ends early, after {count} members ({one_line(error, 80)}); copy it again"
            ) from None
        kind = "is compressed, so nothing in it can be found; unpack it to a plain .tar" if packed else "is no tar file"
        raise UserError(f"{where} {kind} ({one_line(error, 80)})") from None
    block = _read_at(stream, mark, tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise UserError(f"{where} is damaged after {count} members, at byte {mark:,}; copy it again")
    if not block:
        warnings.warn(f"{where} has no end mark, as if it had been cut off after {count} members", stacklevel=2)


def _read_at(stream: BinaryIO, position: int, size: int) -> bytes:
    stream.seek(position)
    return stream.read(size)


def _text(stream: BinaryIO, offset: int, size: int) -> str:
    content = _read_at(stream, offset, min(size, LARGEST_TEXT))
    return content.decode("utf-8-sig", "replace").strip()


# Labels and captions


def labels_of(members: Members, texts: list[dict[str, str]], column: str | None) -> tuple[list[Any], str]:
    """The label of each image, and what gave it: ``.cls``, a column of ``.json``, else the folder that it is in.

    Raises:
        UserError: an image has no label and others have one, or there is no such column.
    """
    if column is None and any(CLASS in one for one in texts):
        return _all([one.get(CLASS) for one in texts], members, f".{CLASS}"), f"labels from .{CLASS}"
    rows = [_columns(one, members, i) for i, one in enumerate(texts)]
    known = dict.fromkeys(name for row in rows for name in row)
    if column is not None and column not in known:
        raise UserError(f"{members.tars[0]}: no .json in it has {column}; its columns are {', '.join(known) or 'none'}")
    column = column or next((name for name in LABEL_COLUMNS if name in known), None)
    if column is not None:
        return _all([row.get(column) for row in rows], members, f"{column} in .json"), f"labels from {column} in .json"
    folders = [PurePosixPath(name).parent.name for name in members.names]
    return (folders, "classes from folders") if len(set(folders)) > 1 else ([0] * len(folders), "no labels")


def captions_of(members: Members, texts: list[dict[str, str]], setting: str) -> list[str | None]:
    """The caption of each image: ``txt``, or a column of ``.json``; None where there is none."""
    if setting == TEXT:
        return [one.get(TEXT) for one in texts]
    return [_columns(one, members, i).get(setting) for i, one in enumerate(texts)]


def _columns(texts: dict[str, str], members: Members, row: int) -> dict[str, Any]:
    if JSON not in texts:
        return {}
    try:
        found = json.loads(texts[JSON])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"the .json of {where_member(members, row)} holds no JSON object; make the file again")
    return found


def _all(labels: list[Any], members: Members, what: str) -> list[Any]:
    missing = [row for row, label in enumerate(labels) if label is None]
    if missing:
        raise UserError(
            f"{len(missing):,} of {len(labels):,} images have no label in {what}, such as "
            f"{where_member(members, missing[0])}; give all of them one, or name another column with data.label=COLUMN"
        )
    return labels


def identity_of(members: Members, sizes: Sequence[int]) -> str:
    """Digest of the names and sizes of files, in bytes, and images."""
    sha = [f"{Path(file).name} {size}" for file, size in zip(members.tars, sizes, strict=True)]
    sha += [bytes_digest(members.size.tobytes()), bytes_digest("\n".join(members.names).encode("utf-8", "replace"))]
    return bytes_digest("\n".join(sha).encode("utf-8", "surrogateescape"))


# Reading by row


def open_member(members: Members, row: int) -> Image.Image:
    """The image of a row.

    Raises:
        OSError: it is no image.
    """
    file = _opened(members.tars[members.tar[row]], os.getpid())
    return open_image(os.pread(file.descriptor, int(members.size[row]), int(members.offset[row])))


def where_member(members: Members, row: int) -> str:
    """File and name in it, for messages."""
    return printable(f"{members.tars[members.tar[row]]}: {members.names[row]}")


class _File:
    """A file that is open for reading, until it is forgotten."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if "descriptor" in vars(self):
            os.close(self.descriptor)


@lru_cache(maxsize=256)
def _opened(path: str, _process: int) -> _File:
    """The open file. Forked processes have their own."""
    return _File(path)
