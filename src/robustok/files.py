"""Files and folders that are written whole or not at all, digests, and errors on one line."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from robustok.errors import FileError, UserError

IMAGE_SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF"}
IMAGE_SUFFIXES |= {".tif": "TIFF", ".tiff": "TIFF", ".ppm": "PPM", ".pgm": "PPM"}  # suffix -> format's name in Pillow
# For Image.open, which otherwise goes by the content and, say, starts Ghostscript for PostScript in a file x.png.
IMAGE_FORMATS = tuple(dict.fromkeys(IMAGE_SUFFIXES.values()))

# Digests


def tensor_digest(tensors: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits of a SHA-256 over the names, shapes, types and bytes of tensors, sorted by name."""
    import torch  # here, because the report writes files and starts without torch

    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def bytes_digest(content: bytes, digits: int = 12) -> str:
    """The first hexadecimal digits of the content's SHA-256."""
    return hashlib.sha256(content).hexdigest()[:digits]


# Errors


def one_line(error: object, limit: int | None = None) -> str:
    """The message of an error on one line, cut to ``limit`` characters; the error's type if it has no message."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def reason(error: BaseException) -> str:
    """What the operating system said, without number and path."""
    return getattr(error, "strerror", None) or one_line(error)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Context in which a failure to write ``path`` becomes a UserError.

    Raises:
        UserError: the disk is full, or the path cannot be written.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors wraps the errors of the operating system
        raise UserError(
            f"cannot write {path}: {reason(error)}; free some space or choose another out=PATH and run the same "
            "command again (the last good state is kept)"
        ) from None


# Reading


def regular_file(path: str | Path) -> Path:
    """The path, ``~`` expanded, of a file that can be read. Every file of other people is opened through this.

    Raises:
        FileError: it is missing, a folder, a FIFO (which would wait for ever) or a device, or may not be read.
    """
    try:
        path = Path(path).expanduser()
        mode = path.stat().st_mode
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a zero byte; RuntimeError: ~nosuchuser
        raise FileError(f"cannot read {path}: {reason(error)}; give the path of a file") from None
    if not stat.S_ISREG(mode):
        raise FileError(f"cannot read {path}: it is a {kind(mode)}; give the path of a file")
    if not os.access(path, os.R_OK):
        raise FileError(f"cannot read {path}: {os.strerror(errno.EACCES)}; ask its owner to let you read it")
    return path


def kind(mode: int) -> str:
    """What a path is, by its ``st_mode``."""
    names = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return names.get(stat.S_IFMT(mode), "device")


# Writing


def temporary_path(path: Path) -> Path:
    """Where :func:`atomic_file` and :func:`atomic_folder` write before they rename."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def atomic_file(path: str | Path, shared: bool = False) -> Iterator[Path]:
    """Context: write to a temporary file, which is flushed to the disk and then renamed to ``path``.

    Readers see the old file or the whole new one, even after a crash. The parent folder is created.

    Args:
        path: the file to write.
        shared: several processes may write this file at the same time, so each has a temporary file of its own.

    Raises:
        UserError: the disk is full, or the path cannot be written; an old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") if shared else temporary_path(path)
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def write_file(path: str | Path, content: bytes | str, shared: bool = False) -> None:
    """Write a whole file as :func:`atomic_file` does; text is encoded as UTF-8."""
    with atomic_file(path, shared) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Context: fill a temporary folder, whose files are flushed to the disk before it is renamed to ``path``.

    Raises:
        UserError: the disk is full, or the path cannot be written; an old folder is untouched.
    """
    path = Path(path)
    temporary = temporary_path(path)
    with writing(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            replace_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def replace_folder(source: Path, target: Path) -> None:
    """Rename a folder, over an existing one if need be."""
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        source.rename(target)
        shutil.rmtree(old)
    else:
        source.rename(target)


def append_line(file: str | Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line.

    Raises:
        UserError: the disk is full, or the file cannot be written.
    """
    with writing(file), open(file, "a") as handle:
        handle.write(json.dumps(record) + "\n")
