"""Files of object stores and the Hub (s3://, gs://, hf://, ...) through fsspec: copied once, or read in parts."""

import io
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustok.console import note
from robustok.errors import UserError
from robustok.files import bytes_digest, one_line, temporary_path

WAITS = (0, 1, 4, 16)  # seconds before each try to read a part
_REFUSED = {401, 403, 404, 410, 416}  # answers of HTTP that do not change with another try
_VERSIONS = ("blob_id", "ETag", "etag", "md5Hash", "mtime", "created")  # what stores call that which a change changes
_ADDRESS = re.compile(r"([a-z][a-z0-9]+):/+(.*)")  # pathlib makes s3:/bucket of s3://bucket
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class RemoteFile:
    """A file that is read where it is.

    Attributes:
        address: such as ``s3://bucket/0001.tar``.
        size: bytes.
        version: changes when the file is replaced; empty where the store does not say.
    """

    address: str
    size: int
    version: str = ""

    @property
    def name(self) -> str:
        """Its name without folders."""
        return os.path.basename(self.address)

    @property
    def digest(self) -> str:
        """Of address, size and version; another commit of the Hub with the same file has the same one."""
        address = re.sub("@[0-9a-f]{40}/", "/", self.address)
        return bytes_digest(f"{address} {self.size} {self.version}".encode(), 20)


def address_of(path: str | Path) -> str | None:
    """The address that a path is, such as s3://bucket/0001.tar; None for a path on this machine."""
    found = _ADDRESS.fullmatch(Path(path).as_posix())
    return f"{found[1]}://{'/' * (found[1] == 'file')}{found[2]}" if found else None


def expand(path: str) -> Iterator[str]:
    """The paths that ``train-{000..146}.tar`` stands for, as in bash."""
    found = _RANGE.search(path)
    if found is None:
        yield path
        return
    first, last = map(int, found.groups())
    for number in range(first, last + 1):
        yield from expand(f"{path[: found.start()]}{number:0{len(found[1])}d}{path[found.end() :]}")


def remote_files(address: str, suffix: str) -> list[RemoteFile]:
    """The files at an address, which may hold {000..146} or be a glob or a folder, by name.

    Those of a data set of the Hub are of its commit of now, so that they do not change while they are read.

    Args:
        address: such as ``s3://bucket/train-{000..146}.tar``.
        suffix: of the files in a folder.

    Raises:
        UserError: no network, no access, no package for this store, or no such files.
    """
    with reading(address):
        files, found = _find(_at_commit(address), suffix)
        return [_described(files, path, info) for path, info in found.items()]


def _at_commit(address: str) -> str:
    """The address of a data set of the Hub at the commit that its revision has now; others are returned as they are."""
    if not address.startswith("hf://datasets/"):
        return address
    import fsspec
    from huggingface_hub import HfApi

    files, path = fsspec.url_to_fs(address)
    found = files.resolve_path(path)
    commit = HfApi().repo_info(found.repo_id, repo_type="dataset", revision=found.revision).sha
    return f"hf://datasets/{found.repo_id}@{commit}/{found.path_in_repo}"


def described(addresses: Sequence[str]) -> list[RemoteFile]:
    """The files at these addresses, all of one store.

    Raises:
        UserError: as :func:`remote_files`.
    """
    import fsspec

    with reading(addresses[0]):
        files = fsspec.url_to_fs(addresses[0])[0]
        paths = [fsspec.url_to_fs(address)[1] for address in addresses]
        for folder in dict.fromkeys(map(os.path.dirname, paths)):
            files.ls(folder)  # once for all files in it, which the store remembers
        return [_described(files, path, None) for path in paths]


def local_copies(address: str, suffix: str, cache: Path) -> Path:
    """Copy the files at an address; those that are there are kept.

    Args:
        address: as :func:`remote_files` takes it.
        suffix: of the files in a folder.
        cache: folder of all copies.

    Returns:
        The folder of these copies.

    Raises:
        UserError: as :func:`remote_files`.
    """
    from filelock import FileLock

    folder = cache / bytes_digest(address.encode())
    with reading(address):
        files, found = _find(address, suffix)
        folders = f"{os.path.dirname(next(iter(found)))}/"
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{folder.name}.lock"):  # of several processes one copies
            for number, path in enumerate(found):
                # A name of its own for each, which keeps the words that say its split.
                file = folder / re.sub(r"[^\w.-]+", "_", path.removeprefix(folders))
                if not file.exists() or files.size(path) != file.stat().st_size:
                    note(f"copying {path} to {file} ({number + 1} of {len(found)})")
                    _copy(files, path, file)
    return folder


def _copy(files: Any, path: str, file: Path) -> None:
    """Copy a file; under its own name there is never a part of it."""
    size, temporary = files.size(path), temporary_path(file)
    file.parent.mkdir(exist_ok=True)
    files.get_file(path, str(temporary))
    if size is not None and temporary.stat().st_size != size:
        raise OSError(f"{path} has {size} bytes and {temporary.stat().st_size} came")
    os.replace(temporary, file)


def _find(address: str, suffix: str) -> tuple[Any, dict[str, Any]]:
    """The file system, and the paths in it, by name, with what it says of them, or None where it was not asked."""
    import fsspec

    files = fsspec.url_to_fs(address)[0]
    found = {}
    for path in expand(address):
        found |= _matching(files, fsspec.url_to_fs(path)[1], suffix)
    if not found:
        raise UserError(f"no {suffix} files at {address}; give the address of a file, a folder or a glob")
    return files, dict(sorted(found.items()))


def _matching(files: Any, path: str, suffix: str) -> dict[str, Any]:
    if "*" in path or "?" in path:
        return files.glob(path, detail=True)
    if path.endswith(suffix):
        return {path: None}
    return {one: info for one, info in files.find(path, detail=True).items() if one.endswith(suffix)}


def _described(files: Any, path: str, info: Any) -> RemoteFile:
    info = info or files.info(path)
    if not isinstance(info.get("size"), int):
        raise OSError(f"the server does not say how large {path} is, so that no part of it can be read")
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    return RemoteFile(files.unstrip_protocol(path), info["size"], version)


@contextmanager
def reading(address: str) -> Iterator[None]:
    """Context in which a failure to read an address becomes a UserError.

    Raises:
        UserError: no network, no access, or no package for this store.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many libraries
        credentials = "your credentials for it"
        if address.startswith("hf://"):
            credentials = "for a data set that is not public, HF_TOKEN or `hf auth login`"
        raise UserError(
            f"cannot read {address} ({type(error).__name__}: {one_line(error, 200)}); check the address, the network "
            f"and {credentials}, or copy the files and give their folder"
        ) from None


# Parts of files


def read_range(file: RemoteFile, start: int, end: int) -> bytes:
    """The bytes from ``start`` to ``end`` of a file, with a few tries.

    Raises:
        UserError: they cannot be read, or the server only gives whole files.
    """
    with reading(file.address):
        for left, wait in zip(reversed(range(len(WAITS))), WAITS, strict=True):
            time.sleep(wait)
            try:
                return _read_once(file, start, end)
            except UserError:
                raise
            except Exception as error:
                if not left or _status(error) in _REFUSED or isinstance(error, FileNotFoundError | PermissionError):
                    raise
    raise AssertionError("unreachable")


def _read_once(file: RemoteFile, start: int, end: int) -> bytes:
    import fsspec

    files, path = fsspec.url_to_fs(file.address)  # which fsspec keeps for each thread of each process
    with files.open(path, "rb", size=file.size, cache_type="none") as stream:  # without reading ahead
        stream.seek(start)
        content = stream.read(end - start)
    if len(content) > end - start:
        raise UserError(
            f"the server of {file.address} gave {len(content):,} bytes for a part of {end - start:,}, as one that has "
            "only whole files; set data.streaming=false to copy them"
        )
    if len(content) < end - start:
        raise OSError(f"{len(content):,} of {end - start:,} bytes came")
    return content


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", getattr(error, "status", None))


class RemoteStream(io.RawIOBase):
    """A remote file as a stream that fetches what is read, and no more.

    Args:
        file: the file.
    """

    def __init__(self, file: RemoteFile) -> None:
        self.file, self._position = file, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The position of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position, from the start, from where it is, or from the end."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.file.size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as there are bytes; returns how many."""
        end = min(self._position + len(buffer), self.file.size)
        if end <= self._position:
            return 0
        content = read_range(self.file, self._position, end)
        buffer[: len(content)] = content
        self._position = end
        return len(content)
