"""Files of other people, files and folders that are written whole or not at all, digests, and errors on one line."""

import errno
import filecmp
import hashlib
import json
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from robustok.errors import FileError, UserError

IMAGE_SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF"}
IMAGE_SUFFIXES |= {".tif": "TIFF", ".tiff": "TIFF", ".ppm": "PPM", ".pgm": "PPM", ".jpe": "JPEG", ".jfif": "JPEG"}
IMAGE_SUFFIXES |= {".jp2": "JPEG2000", ".avif": "AVIF", ".tga": "TGA"}  # suffix -> format's name in Pillow
# For Image.open, which otherwise goes by the content and, say, starts Ghostscript for PostScript in a file x.png.
IMAGE_FORMATS = tuple(dict.fromkeys(IMAGE_SUFFIXES.values()))

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins where git-lfs keeps its content elsewhere
LOCK = ".lock"  # name of the file in a folder that is being written

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
        code = getattr(error, "errno", None)
        remedy = "choose another out=PATH and run the same command again (the last good state is kept)"
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = f"ask its owner to let you write there or {remedy}"
        elif code not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EISDIR, errno.EEXIST):
            remedy = f"free some space or {remedy}"
        raise UserError(f"cannot write {path}: {reason(error)}; {remedy}") from None


# Reading


def regular_file(path: str | Path) -> Path:
    """The path, ``~`` expanded, of a file that can be read. Every file of other people is opened through this.

    Raises:
        FileError: it is missing, a folder, a FIFO (which would wait for ever) or a device, or may not be read.
    """
    if problem := unreadable(path):
        raise FileError(f"cannot read {path}: {problem}; give the path of a file that you may read")
    return Path(path).expanduser()


def unreadable(path: str | Path) -> str:
    """Why this is no file that can be read, such as "it is a FIFO"; "" if it is one."""
    try:
        path = Path(path).expanduser()
        found = path.stat()
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a zero byte; RuntimeError: ~nosuchuser
        return reason(error)
    if not stat.S_ISREG(found.st_mode):
        return f"it is a {kind(found.st_mode)}"
    if not os.access(path, os.R_OK):
        return os.strerror(errno.EACCES)
    pointer = found.st_size < 1024 and path.read_bytes().startswith(LFS_POINTER)
    return "it is a git-lfs pointer without the content, which `git lfs pull` in its folder fetches" if pointer else ""


def load_tensors(file: str | Path) -> dict[str, Any]:
    """The tensors of a safetensors file; those at a path that is not UTF-8, which safetensors cannot map, are read."""
    from safetensors.torch import load, load_file  # here, because the report reads files and starts without torch

    try:
        os.fspath(file).encode()
    except UnicodeEncodeError:
        return load(Path(file).read_bytes())
    return load_file(file)


def kind(mode: int) -> str:
    """What a path is, by its ``st_mode``."""
    names = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return names.get(stat.S_IFMT(mode), "device")


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        UserError: it is missing, cannot be read, or is no JSON object.
    """
    if not file.exists():
        raise UserError(f"{file} is missing; copy the whole folder")
    try:
        content = json.loads(regular_file(file).read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({one_line(error, 200)}); copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object; copy it again")
    return content


def json_lines(text: str) -> tuple[list[dict[str, Any]], list[int]]:
    """The JSON objects of a text, one a line, and the numbers of other lines, as a killed process leaves them."""
    records, broken = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            record = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            broken.append(number)
        elif record:
            records.append(record)
    return records, broken


# Writing


def inside(folder: str | Path, *names: str, but: str | None = None) -> Path:
    """The path of these names in a folder, from which no link leads out: what is written to it stays in the folder.

    The folder itself may be a link. Links in the path, and in the folder at the path, may lead to other places in it.
    Below the folder ``but`` links are not looked at: another program keeps it, which links to its own logs.

    Raises:
        UserError: there is a link to somewhere else, as in a folder of somebody else.
    """
    root, path = os.path.realpath(folder), Path(folder, *names)
    for link in (path, *_links(path, but)):
        # One with the name of a temporary file is removed before anything is written.
        if not is_temporary(link) and not Path(os.path.realpath(link)).is_relative_to(root):
            raise UserError(
                f"{link} is a link to a place outside of {folder}, where nothing is read or written; remove it, or "
                "choose another out=PATH"
            )
    return path


def _links(folder: Path, but: str | None = None) -> Iterator[Path]:
    """All links in a folder. Its listing says what they are, so that no other file is looked at: it may hold many."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield Path(entry.path)
            elif entry.is_dir() and entry.name != but:
                yield from _links(Path(entry.path))


def temporary_path(path: Path) -> Path:
    """Where :func:`atomic_file` and :func:`atomic_folder` write before they rename."""
    return path.with_name(f".{path.name}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether this is a file or folder of ours that a killed process left, and no content of the folder."""
    return path.name == LOCK or (path.name.startswith(".") and path.suffix in (".tmp", ".old"))


def clean(folder: Path) -> None:
    """Remove what a killed process left in a folder to which only this process writes.

    A folder that was about to be replaced has its name again, if its successor did not get it. A link of such a name
    is not ours, and is removed: it may lead out of the folder.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        target, ours = folder / path.name[1:].removesuffix(".old"), path.is_dir() and not path.is_symlink()
        if path.suffix == ".old" and is_temporary(path) and ours and not os.path.lexists(target):
            path.rename(target)
        elif path.name != LOCK and is_temporary(path):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, but not what the link leads to; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: str | Path, shared: bool = False, once: bool = False) -> Iterator[Path]:
    """Context: write to a temporary file, which is flushed to the disk and then renamed to ``path``.

    Readers see the old file or the whole new one, even after a crash. The parent folder is created. A link at ``path``
    is replaced; the file that it leads to stays as it was.

    Args:
        path: the file to write.
        shared: several processes may write this file at the same time, so each has a temporary file of its own.
        once: a file that is there already stays. If it has the same content, the command was run before.

    Raises:
        UserError: the disk is full, or the path cannot be written, or is no file; with ``once``, it has another
            content. An old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") if shared else temporary_path(path)
    with writing(path):
        _check_replaceable(path, stat.S_IFREG)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove(temporary)
            temporary.touch(exist_ok=False)  # so no link is followed
            mode = temporary.stat().st_mode  # that of the umask, which some libraries ignore
            yield temporary
            _finish(temporary, mode)
            if once and path.exists():
                _check_same(temporary, path)
                temporary.unlink()
            else:
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
def atomic_folder(path: str | Path, once: bool = False) -> Iterator[Path]:
    """Context: fill a temporary folder, whose files are flushed to the disk before it is renamed to ``path``.

    Args:
        path: the folder to write.
        once: a folder that is there already stays. If it has the same content, the command was run before.

    Raises:
        UserError: the disk is full, or the path cannot be written, or is no folder; with ``once``, it has another
            content. An old folder is untouched.
    """
    path = Path(path)
    temporary = temporary_path(path)
    with writing(path):
        _check_replaceable(path, stat.S_IFDIR)
        try:
            remove(temporary)
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _finish(file, temporary.stat().st_mode & 0o666)
            if once and path.exists():
                _check_same(temporary, path)
                remove(temporary)
            else:
                replace_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _check_same(made: Path, found: Path) -> None:
    """Refuse what was made unless it is there already, to the byte."""
    if not _same(made, found):
        raise UserError(f"{found} exists and holds something else; choose another out=PATH or remove it first")


def _same(made: Path, found: Path) -> bool:
    """Whether two files, or all files in two folders, have the same content."""
    if not made.is_dir():
        return found.is_file() and filecmp.cmp(made, found, shallow=False)
    names = sorted(os.listdir(made))
    return found.is_dir() and names == sorted(os.listdir(found)) and all(_same(made / n, found / n) for n in names)


def _check_replaceable(path: Path, wanted: int) -> None:
    """Refuse to put a file in place of a device, a FIFO or a folder, or a folder in place of a file."""
    with suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if stat.S_IFMT(mode) != wanted:
            raise UserError(f"cannot write {path}: it is a {kind(mode)}, no {kind(wanted)}; choose another out=PATH")


def _finish(file: Path, mode: int) -> None:
    """Give a written file its mode, and flush it to the disk."""
    file.chmod(stat.S_IMODE(mode))
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def replace_folder(source: Path, target: Path) -> None:
    """Rename a folder, over an existing one if need be."""
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        remove(old)
        target.rename(old)
        source.rename(target)
        remove(old)
    else:
        source.rename(target)


def append_line(file: str | Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line. After half a line of a killed process, a new one begins, with a warning.

    Raises:
        UserError: the disk is full, or the file cannot be written, or is no file.
    """
    file, torn = Path(file), False
    with writing(file):
        _check_replaceable(file, stat.S_IFREG)
        with file.open("a+b") as handle:
            if handle.tell():
                handle.seek(-1, os.SEEK_END)
                torn = handle.read() != b"\n"
            handle.write(b"\n" * torn + json.dumps(record).encode() + b"\n")
    if torn:
        warnings.warn(
            f"{file} ended in half a line, as of a killed process; what follows begins a new one", stacklevel=2
        )


def check_appendable(file: Path) -> None:
    """Refuse a file to which :func:`append_line` could not append, before the work whose results it would hold.

    Raises:
        UserError: it cannot be written, or is no file.
    """
    there = next(path for path in (file, *file.absolute().parents) if os.path.lexists(path))
    with writing(file):
        _check_replaceable(there, stat.S_IFREG if there == file else stat.S_IFDIR)
        if not os.access(there, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Context in which this process alone writes to a folder, which exists. The lock ends with the process, too.

    Where the file system or the platform has no locks, there is none.

    Raises:
        UserError: another process has the lock.
    """
    file = Path(folder) / LOCK
    descriptor = _lock(file)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                file.unlink()
            os.close(descriptor)


def _lock(file: Path) -> int | None:
    """The open lock file; None where there are no locks."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        return None
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError:  # of a folder that cannot be written, its writers will tell
            return None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, it is not inherited by data workers
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                raise UserError(
                    f"another process is writing to {file.parent}; wait until it ends, or choose another out=FOLDER"
                ) from None
            if error.errno != errno.ENOENT:
                os.close(descriptor)
                return None
        os.close(descriptor)  # the one that had the lock has just removed the file
