"""Files that are written whole or not at all, digests, and one-line errors of the file system."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustok.errors import UserError


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hexadecimal digits of a SHA-256 over names, shapes and bytes, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


class atomic_folder:  # noqa: N801  (used as a verb in a with statement)
    """Context: fill a temporary folder that takes its final name only when everything in it is on disk.

    Raises:
        UserError: no space, or not writable; what was there before is untouched.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> Path:
        try:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary.mkdir(parents=True)
        except OSError as error:
            raise disk_error(self.path, error) from None
        return self.temporary

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                for file in (path for path in self.temporary.rglob("*") if path.is_file()):
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
                replace_folder(self.temporary, self.path)
        except OSError as problem:
            error = problem
        if error is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
        # safetensors wraps the operating system's error in its own
        if isinstance(error, OSError) or (error is not None and type(error).__name__ == "SafetensorError"):
            raise disk_error(self.path, error) from None


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


def disk_error(path: Path, error: Exception) -> UserError:
    """The error to raise where ``path`` could not be written."""
    return UserError(
        f"cannot write {path}: {getattr(error, 'strerror', None) or error}; "
        "free some space or choose another out=FOLDER and run the same command again (the last good state is kept)"
    )


def append_line(file: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line."""
    try:
        with file.open("a") as handle:
            handle.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write {file}: {error.strerror}; free some space and run the same command again"
        ) from None
