"""Images of remote files, fetched in blocks when they are opened, and a cache of blocks that never outgrows its limit.

A block is what one request fetches: a row group of parquet, or a run of members of a tar file. The blocks that are in
use lie in a folder, which all data workers and processes of a machine share: of those that want a block one fetches it.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from robustok.console import track
from robustok.data.folders import LeftOut, Split
from robustok.data.image_file import open_image
from robustok.data.order import WINDOW
from robustok.data.parquet_files import divide
from robustok.data.remote_files import RemoteFile, address_of, local_copies, remote_files
from robustok.data.source import DataConfig
from robustok.errors import UserError
from robustok.files import bytes_digest, reason, write_file

LOCKS = 64  # files by which processes agree who fetches a block; blocks share them
CONNECTIONS = 8  # files that are looked into at a time
ENTRY = 8  # bytes of a number in a block's table
REMEDY = "set data.cache to a folder that you can write, on a disk with more space, or lower data.cache_gb"


class Remote(DataConfig):
    """Settings of data sets that may lie elsewhere."""

    streaming: bool = Field(
        False,
        description="read the images of remote files where they are, in blocks, and copy nothing but those in use; "
        f"trainings then shuffle blocks, and images within a window of {WINDOW:,}, and limit keeps whole blocks",
    )
    cache: Path | None = Field(
        None, description="folder for remote files, or blocks of them; by default ~/.cache/robustok/NAME of this kind"
    )
    cache_gb: float = Field(
        10.0, gt=0, description="most gigabytes of blocks in cache with streaming, for all processes of a machine"
    )

    @property
    def cache_folder(self) -> Path:
        """The folder for remote files."""
        return (self.cache or Path("~/.cache/robustok", self.name)).expanduser()


def copied(data: Any, suffix: str) -> Path:
    """The path of files on this machine: those of an address are copied.

    Raises:
        UserError: they cannot be copied.
    """
    address = address_of(data.path)
    return data.path if address is None else local_copies(address, suffix, data.cache_folder)


def streamed_splits(data: Any, suffix: str) -> tuple[dict[Split, list[RemoteFile]], LeftOut]:
    """The files of each split at an address, by their names, as ``parquet_files.split_files`` gives those of a folder.

    Raises:
        UserError: they are on this machine, cannot be listed, or there are none.
    """
    address = address_of(data.path)
    if address is None:
        raise UserError(
            f"data.streaming=true reads remote files, such as hf://datasets/ORG/NAME, and data.path={data.path} is on "
            "this machine; set data.streaming=false, which reads it in place"
        )
    files = {PurePosixPath(one.address): one for one in remote_files(address, suffix)}
    left: LeftOut = defaultdict(Counter)
    base = PurePosixPath(os.path.commonpath([path.parent for path in files]))
    splits = divide(list(files), base, (suffix,), left)
    return {split: [files[path] for path in paths] for split, paths in splits.items()}, left


@dataclass(frozen=True)
class BlockCache:
    """Blocks in a folder. The least recently used ones make room for new ones.

    Attributes:
        folder: the folder, for this alone.
        limit: bytes.
    """

    folder: Path
    limit: int

    def image(self, name: str, position: int, fetch: Callable[[], Sequence[bytes]]) -> bytes:
        """The bytes of one image of a block.

        Args:
            name: of the block.
            position: of the image in it.
            fetch: gets the bytes of all images of the block, if it is not in the folder.

        Raises:
            UserError: the block cannot be fetched or written, or is larger than the limit.
        """
        with _keeping("blocks of images", self.folder):
            if (found := self._read(name, position)) is not None:
                return found
            with self._lock(f"{int(bytes_digest(name.encode()), 16) % LOCKS}"):
                if (found := self._read(name, position)) is None:  # no other process has fetched it meanwhile
                    images = fetch()
                    self._write(name, images)
                    found = images[position]
            return found

    def _read(self, name: str, position: int) -> bytes | None:
        """The bytes of an image; None if the block is not here, or not whole, as a crash of the machine may leave it.

        A block that another process removes just now is read to its end.
        """
        with suppress(FileNotFoundError), open(self.folder / name, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            start, end = np.frombuffer(os.pread(file.fileno(), 2 * ENTRY, ENTRY * position).ljust(2 * ENTRY), "<i8")
            if ENTRY <= start <= end <= size:
                os.utime(file.fileno())  # it was used
                return os.pread(file.fileno(), end - start, start)
        return None

    def _write(self, name: str, images: Sequence[bytes]) -> None:
        """Keep a block: a table of N + 1 positions, then the images."""
        table = np.cumsum([ENTRY * (len(images) + 1), *map(len, images)]).astype("<i8")
        temporary = self.folder / f".{os.getpid()}.tmp"
        with self._lock("write"):
            self._make_room(int(table[-1]))
            with temporary.open("wb") as file:
                file.write(table.tobytes())
                file.writelines(images)
            os.replace(temporary, self.folder / name)

    def _make_room(self, size: int) -> None:
        if size > self.limit:
            raise UserError(
                f"a block of the data has {size / 1e9:.3g} GB and data.cache_gb is {self.limit / 1e9:.3g}; raise it"
            )
        entries = [(entry, entry.stat()) for entry in os.scandir(self.folder) if entry.is_file()]
        used = sum(state.st_size for _, state in entries)
        for entry, state in sorted(entries, key=lambda one: one[1].st_mtime_ns):
            if used + size <= self.limit:
                return
            os.unlink(entry)
            used -= state.st_size

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        from filelock import FileLock

        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / name):
            yield


@contextmanager
def _keeping(what: str, folder: Path) -> Iterator[None]:
    """Context in which a failure to write to the cache becomes a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot keep {what} in {folder} ({reason(error)}); {REMEDY}") from None


@dataclass(frozen=True)
class StreamedImages:
    """Images by row, of blocks.

    Attributes:
        fetch: number of a block -> the bytes of its images; picklable.
        starts: (B + 1,) int64, the first row of each block, and the number of rows.
        names: (B,) of the blocks in the cache: digests of where their bytes come from.
        cache: of blocks.
    """

    fetch: Callable[[int], Sequence[bytes]]
    starts: np.ndarray
    names: Sequence[str]
    cache: BlockCache

    def open(self, row: int) -> Image.Image:
        """The image of a row.

        Raises:
            OSError: it is no image.
            UserError: it cannot be fetched.
        """
        block = int(self.starts.searchsorted(row, "right")) - 1
        position = row - int(self.starts[block])
        return open_image(self.cache.image(self.names[block], position, partial(self.fetch, block)))

    @property
    def blocks(self) -> np.ndarray:
        """The block of each row, (N,) int32."""
        return np.repeat(np.arange(len(self.names), dtype=np.int32), np.diff(self.starts))


def block_cache(data: Remote, sizes: np.ndarray, images: int) -> BlockCache:
    """The cache for blocks of these sizes (B,), in bytes, of so many images.

    Raises:
        UserError: the blocks that a training has in use would not fit.
    """
    limit = int(data.cache_gb * 1e9)
    # Twice the window, because workers read ahead; and what is not images is a thousandth.
    needed = 1.001 * min(sizes.sum(), 2 * WINDOW * sizes.sum() / images + 2 * sizes.max(initial=0))
    if needed > limit:
        raise UserError(
            f"a window of {WINDOW:,} images takes {needed / 1e9:.3g} GB of blocks and data.cache_gb is "
            f"{data.cache_gb:g}; set data.cache_gb={np.ceil(needed / 1e8) / 10:g}, or data.streaming=false"
        )
    return BlockCache(data.cache_folder / "blocks", limit)


def indexed(
    files: Sequence[RemoteFile], folder: Path, kind: str, make: Callable[[RemoteFile], bytes], what: str
) -> list[Path]:
    """An index of each file, which is made once and kept in a folder.

    Args:
        files: the files.
        folder: the folder for indexes.
        kind: of the index, in its name; of other settings there is another.
        make: makes the content of a file's index.
        what: is shown while it is made.

    Raises:
        UserError: a file cannot be read, or the folder not be written.
    """
    from filelock import FileLock

    found = [folder / f"{file.digest}.{kind}" for file in files]
    with _keeping("an index of the data", folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{bytes_digest(' '.join(file.digest for file in files).encode())}.lock")
        lock.acquire()  # of several processes one makes them
    threads = ThreadPoolExecutor(CONNECTIONS)
    try:
        new = [(file, path) for file, path in zip(files, found, strict=True) if not path.exists()]
        made = threads.map(make, [file for file, _ in new])
        for number in track(range(len(new)), what, show=bool(new)):
            write_file(new[number][1], next(made), shared=True)
    finally:
        threads.shutdown(cancel_futures=True)
        lock.release()
    return found
