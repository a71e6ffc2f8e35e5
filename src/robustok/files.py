"""Files and folders that are written whole or not at all, digests, and errors on one line."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from robustok.errors import UserError

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


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Context in which a failure to write ``path`` becomes a UserError.

    Raises:
        UserError: the disk is full, or the path cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps the errors of the operating system
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(
            f"cannot write {path}: {reason}; free some space or choose another out=PATH and run the same command "
            "again (the last good state is kept)"
        ) from None


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
