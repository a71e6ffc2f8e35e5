"""Tar files that are read where they are: an index of their members, and runs of images as blocks."""

import io
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from robustok.data.folders import LeftOut
from robustok.data.remote_files import RemoteFile, RemoteStream, read_range
from robustok.data.streaming import Remote, StreamedImages, block_cache, indexed
from robustok.data.tar_files import CLASS, JSON, TEXT, Members, index_tar, members_of
from robustok.files import bytes_digest

BUFFER = 2**23  # bytes that are read at a time for the index
RUN_IMAGES, RUN_BYTES, GAP = 128, 2**25, 2**20  # most of a block: images, bytes, and bytes between two images


def index_remote_tars(
    files: Sequence[RemoteFile], data: Remote, left: LeftOut, wanted: set[str]
) -> tuple[Members, list[dict[str, str]]]:
    """Find the images in remote tar files, as ``tar_files.index_tars`` does, by reading through each file once.

    Args:
        files: the tar files.
        data: settings of the cache, in which the index is kept.
        left: counts what is left out.
        wanted: suffixes of the texts that are returned.

    Raises:
        UserError: a file cannot be read, is no tar file, is compressed, ends early or is damaged.
    """
    paths = indexed(files, data.cache_folder / "index", "json", _read_index, "reading through tar files")
    found = [json.loads(path.read_bytes()) for path in paths]
    for one in found:
        for why, names in one["left"].items():
            left[why].update(names)
    members, texts = members_of([file.address for file in files], [one["images"] for one in found])
    return members, [{key: text for key, text in one.items() if key in wanted} for one in texts]


def _read_index(file: RemoteFile) -> bytes:
    left: LeftOut = defaultdict(Counter)
    with io.BufferedReader(RemoteStream(file), BUFFER) as stream:
        images = index_tar(stream, file.address, left, {CLASS, JSON, TEXT})
    return json.dumps({"images": images, "left": left}).encode()


@dataclass(frozen=True)
class _Runs:
    """Images that lie one behind the other in a tar file, with no more than ``GAP`` between them.

    Attributes:
        files: the tar files.
        tar: (N,) which of them, of each image.
        offset: (N,) first byte of each image.
        size: (N,) bytes of each image.
        starts: (B + 1,) first image of each run.
    """

    files: Sequence[RemoteFile]
    tar: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    starts: np.ndarray

    def fetch(self, block: int) -> list[bytes]:
        """The bytes of the images of a run."""
        rows = slice(*self.starts[block : block + 2].tolist())
        starts, ends = self.offset[rows].tolist(), (self.offset[rows] + self.size[rows]).tolist()
        content = read_range(self.files[self.tar[rows.start]], starts[0], ends[-1])
        return [content[start - starts[0] : end - starts[0]] for start, end in zip(starts, ends, strict=True)]


def streamed_members(members: Members, files: Sequence[RemoteFile], data: Remote) -> StreamedImages:
    """The images of remote tar files.

    Raises:
        UserError: the cache is too small.
    """
    starts, end = [0], 0
    for row, (tar, offset, size) in enumerate(zip(members.tar, members.offset, members.size, strict=True)):
        first = starts[-1]
        if row and (
            tar != members.tar[first]
            or not 0 <= offset - end <= GAP
            or row - first == RUN_IMAGES
            or offset + size - members.offset[first] > RUN_BYTES
        ):
            starts.append(row)
        end = offset + size
    starts = np.array([*starts, len(members)])
    sizes = np.add.reduceat(members.size, starts[:-1])
    runs = _Runs(files, members.tar, members.offset, members.size, starts)
    names = [
        bytes_digest(f"{files[members.tar[row]].digest} {members.offset[row]} {after - row}".encode(), 20)
        for row, after in pairwise(starts)
    ]
    return StreamedImages(runs.fetch, starts, names, block_cache(data, sizes, len(members)))
