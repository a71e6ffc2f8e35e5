"""Files of object stores and the Hub (s3://, gs://, hf://, ...), copied once to this machine, through fsspec."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robustok.console import note
from robustok.errors import UserError
from robustok.files import bytes_digest, one_line, temporary_path

_ADDRESS = re.compile(r"([a-z][a-z0-9]+):/+(.*)")  # pathlib makes s3:/bucket of s3://bucket
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def address_of(path: str | Path) -> str | None:
    """The address that a path is, such as s3://bucket/0001.tar; None for a path on this machine."""
    found = _ADDRESS.fullmatch(Path(path).as_posix())
    return f"{found[1]}://{found[2]}" if found else None


def expand(path: str) -> Iterator[str]:
    """The paths that ``train-{000..146}.tar`` stands for, as in bash."""
    found = _RANGE.search(path)
    if found is None:
        yield path
        return
    first, last = map(int, found.groups())
    for number in range(first, last + 1):
        yield from expand(f"{path[: found.start()]}{number:0{len(found[1])}d}{path[found.end() :]}")


def local_copies(address: str, suffix: str, cache: Path) -> Path:
    """Copy the files at an address, which may hold {000..146} or be a glob or a folder; those that are there are kept.

    Args:
        address: such as ``s3://bucket/train-{000..146}.tar``.
        suffix: of the files in a folder.
        cache: folder of all copies.

    Returns:
        The folder of these copies.

    Raises:
        UserError: no network, no access, no package for this store, or no such files.
    """
    import fsspec
    from filelock import FileLock

    folder = cache / bytes_digest(address.encode())
    try:
        files = fsspec.url_to_fs(address)[0]
        plain = (fsspec.url_to_fs(path)[1] for path in expand(address))
        found = sorted({one for path in plain for one in _matching(files, path, suffix)})
        if not found:
            raise UserError(f"no {suffix} files at {address}; give the address of a file, a folder or a glob")
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{folder.name}.lock"):  # of several processes one copies
            for number, path in enumerate(found):
                # A name of its own for each, which keeps the words that say its split.
                file = folder / re.sub(r"[^\w.-]+", "_", path.removeprefix(os.path.dirname(found[0]) + "/"))
                if not file.exists() or files.size(path) != file.stat().st_size:
                    note(f"copying {path} to {file} ({number + 1} of {len(found)})")
                    _copy(files, path, file)
    except UserError:
        raise
    except Exception as error:  # of many libraries
        raise UserError(
            f"cannot read {address} ({type(error).__name__}: {one_line(error, 200)}); check the address, the network "
            "and your credentials for it, or copy the files and give their folder"
        ) from None
    return folder


def _copy(files: Any, path: str, file: Path) -> None:
    """Copy a file; under its own name there is never a part of it."""
    size, temporary = files.size(path), temporary_path(file)
    file.parent.mkdir(exist_ok=True)
    files.get_file(path, str(temporary))
    if size is not None and temporary.stat().st_size != size:
        raise OSError(f"{path} has {size} bytes and {temporary.stat().st_size} came")
    os.replace(temporary, file)


def _matching(files: Any, path: str, suffix: str) -> list[str]:
    if "*" in path or "?" in path:
        return files.glob(path)
    if path.endswith(suffix):
        return [path]
    return [one for one in files.find(path) if one.endswith(suffix)]
