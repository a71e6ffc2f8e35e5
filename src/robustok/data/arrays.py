"""Arrays of images on disk: ``.npz`` as ADM's evaluation takes them (``arr_0``, uint8 NHWC), and plain ``.npy``.

Fifty thousand images of 256x256 are ten gigabytes, so neither reading nor writing ever holds the whole array: files are
mapped into memory or read image by image, and written batch by batch. Nothing is ever unpickled.
"""

import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from lzma import LZMAError
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO

import numpy as np

from robustok.data.image_file import instead
from robustok.errors import UserError
from robustok.files import IMAGE_SUFFIXES, atomic_file, one_line, regular_file

IMAGES = "arr_0"
LABELS = ("arr_1", "labels")
MAGIC = {"npy": np.lib.format.MAGIC_PREFIX, "npz": b"PK"}
EXPECTED = "expected uint8 pixels (N, H, W, 3)"


@dataclass(frozen=True)
class ImageArray:
    """The location of an array of images. Small and picklable; each data worker opens the file itself.

    Attributes:
        file: path of the .npz or .npy file.
        member: name of the array's file in the .npz; None for .npy.
        start: offset of the first pixel in bytes: in the file, or in the decompressed member if it is compressed.
        compressed: the member must be decompressed from the front, so only passes in order are fast.
        shape: (N, H, W, 3).
        checksum: CRC-32 of the array with its header, the same in .npz and .npy.
    """

    file: str
    member: str | None
    start: int
    compressed: bool
    shape: tuple[int, int, int, int]
    checksum: int

    def read(self, row: int) -> np.ndarray:
        """Pixels (H, W, 3) uint8 of one image.

        Raises:
            UserError: the compressed data are damaged.
        """
        if not self.compressed:
            return _mapped(self)[row]
        size = int(np.prod(self.shape[1:]))
        try:
            stream = _stream(self, os.getpid())
            stream.seek(self.start + row * size)  # forward continues from here; backward decompresses from the front
            content = stream.read(size)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UserError(f"{self.file} is damaged at image {row} ({error}); copy or make it again") from None
        return np.frombuffer(content, dtype=np.uint8).reshape(self.shape[1:])


@lru_cache(maxsize=8)
def _mapped(array: ImageArray) -> np.ndarray:
    return np.memmap(array.file, dtype=np.uint8, mode="r", offset=array.start, shape=array.shape)


@lru_cache(maxsize=2)
def _stream(array: ImageArray, process: int) -> BinaryIO:
    """The open member. Each process has its own, because forked ones would share a position in the file."""
    return zipfile.ZipFile(array.file).open(array.member)


def open_array(file: str | Path) -> tuple[ImageArray, np.ndarray | None]:
    """Find images (and labels, if any) in a .npz or .npy file, without reading them.

    Returns:
        The images, and their labels (N,) int64 where an .npz has them as ``arr_1`` or ``labels``.

    Raises:
        UserError: no such file, cut off, no ``arr_0``, or not uint8 (N, H, W, 3).
    """
    file = regular_file(file)
    try:
        with open(file, "rb") as stream:
            start = stream.read(max(map(len, MAGIC.values())))
            if start.startswith(MAGIC["npy"]):
                return _open_npy(file, stream), None
        if not start.startswith(MAGIC["npz"]):
            what = instead(file) or ", whatever its name"
            raise UserError(f"{file} is neither an .npz nor an .npy file{what}; {EXPECTED} as {IMAGES}")
        with zipfile.ZipFile(file) as archive:
            found = _open_npz(file, archive)
        _check_content(file, file.stat().st_mtime_ns)
        return found
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}; give an .npz or .npy file of images") from None
    except (zipfile.BadZipFile, zlib.error, LZMAError, EOFError, RuntimeError, ValueError, struct.error) as error:
        # RuntimeError: encrypted. ValueError and struct.error: headers that contradict themselves.
        raise UserError(f"{file} is cut off or damaged ({one_line(error)}); copy or make it again") from None


@lru_cache(maxsize=64)
def _check_content(file: Path, _changed: int) -> None:
    """Compare every member with its CRC-32, once for each state of the file: mapped pixels are never compared."""
    with zipfile.ZipFile(file) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"bad CRC-32 of {damaged}")


def _open_npy(file: Path, stream: BinaryIO) -> ImageArray:
    stream.seek(0)
    shape = _checked_shape(stream, str(file))
    start, size = stream.tell(), os.fstat(stream.fileno()).st_size
    _check_length(file, size - start, shape)
    stream.seek(0)
    checksum = 0
    while part := stream.read(1 << 20):
        checksum = zlib.crc32(part, checksum)
    return ImageArray(str(file), None, start, False, shape, checksum)


def _open_npz(file: Path, archive: zipfile.ZipFile) -> tuple[ImageArray, np.ndarray | None]:
    names = {Path(name).stem: name for name in archive.namelist()}
    if IMAGES not in names:
        hint = "; statistics are no images, give them as the reference" if {"mu", "sigma"} <= names.keys() else ""
        if any(Path(name).suffix.lower() in IMAGE_SUFFIXES for name in archive.namelist()):
            raise UserError(f"{file} is a zip archive of images; unpack it and give the folder")
        shown = [*sorted(names)[:5], f"{len(names) - 5} more"] if len(names) > 6 else sorted(names)
        raise UserError(f"{file} holds {', '.join(shown) or 'nothing'}; {EXPECTED} as {IMAGES}{hint}")
    info = archive.getinfo(names[IMAGES])
    with archive.open(info) as stream:
        shape = _checked_shape(stream, f"{IMAGES} of {file}")
        header = stream.tell()
    _check_length(file, info.file_size - header, shape)
    compressed = info.compress_type != zipfile.ZIP_STORED
    start = header if compressed else _content(file, info) + header
    array = ImageArray(str(file), info.filename, start, compressed, shape, info.CRC)
    key = next((key for key in LABELS if key in names), None)
    return array, None if key is None else _labels(file, archive, names[key], shape[0])


def _content(file: Path, info: zipfile.ZipInfo) -> int:
    """Offset of a member's content, after its local header, whose extra field may differ from the directory's."""
    with open(file, "rb") as stream:
        stream.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", stream.read(4))
    return info.header_offset + 30 + name + extra


def _checked_shape(stream: BinaryIO, where: str) -> tuple[int, int, int, int]:
    """The shape in the header of an array of images; leaves the stream at the first pixel."""
    shape, fortran, dtype = _read_header(stream, where)
    if dtype.hasobject:
        raise UserError(f"{where} holds pickled objects, which are never loaded; {EXPECTED}")
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise UserError(f"{where} is {dtype} {shape}{_levels(stream, shape, dtype)}; {EXPECTED}; convert it")
    if fortran:
        raise UserError(f"{where} is in Fortran order; {EXPECTED} in C order; save np.ascontiguousarray of it")
    if min(shape) < 1:
        raise UserError(f"{where} is empty, {shape}; {EXPECTED} with at least one image")
    return shape


def _read_header(stream: BinaryIO, where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        return readers[np.lib.format.read_magic(stream)](stream)
    except (ValueError, KeyError, TypeError, RecursionError, TokenError) as error:  # a header is Python's literals
        raise UserError(f"{where} is no NumPy array ({one_line(error)}); {EXPECTED}") from None


def _levels(stream: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> str:
    """The range of the first values of a float array, for the error message."""
    if dtype.kind != "f":
        return ""
    content = stream.read(min(int(np.prod(shape)), 65536) * dtype.itemsize)
    values = np.frombuffer(content[: len(content) // dtype.itemsize * dtype.itemsize], dtype=dtype)
    return f" with values from {values.min():.3g} to {values.max():.3g}" if values.size else ""


def _check_length(file: Path, found: int, shape: tuple[int, ...]) -> None:
    expected = int(np.prod(shape, dtype=object))
    if found != expected:
        raise UserError(
            f"{file} is cut off or damaged: {found} bytes of pixels, expected {expected} for {shape}; "
            "copy or make it again"
        )


def _labels(file: Path, archive: zipfile.ZipFile, member: str, count: int) -> np.ndarray:
    where = f"{Path(member).stem} of {file}"
    with archive.open(member) as stream:
        shape, _, dtype = _read_header(stream, where)
        if dtype.kind not in "iu" or shape != (count,):
            raise UserError(f"{where} is {dtype} {shape}; expected integer labels ({count},), one for each image")
        content = stream.read(count * dtype.itemsize)
        if len(content) < count * dtype.itemsize:
            raise UserError(f"{where} is cut off: {len(content)} bytes for {count} labels; copy or make it again")
        return np.frombuffer(content, dtype=dtype).astype(np.int64)


def write_npz(
    file: str | Path,
    batches: Iterable[np.ndarray],
    shape: tuple[int, ...],
    labels: np.ndarray,
    others: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write images batch by batch as ADM's samples: ``arr_0`` uint8 (N, H, W, 3) and ``arr_1`` labels (N,) int64.

    The file appears when it is complete. Zip archives hold a checksum, and uncompressed ones can be mapped.

    Args:
        file: where to write.
        batches: pixels (n, H, W, 3) uint8 in order, N of them in all.
        shape: (N, H, W, 3).
        labels: (N,) integers.
        others: further arrays by their names, such as statistics.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
    with atomic_file(file) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        # A ZipInfo has a fixed date: the same images are the same file. Their size is not known beforehand.
        with archive.open(zipfile.ZipInfo(f"{IMAGES}.npy"), "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, header)
            for pixels in batches:
                stream.write(np.ascontiguousarray(pixels))
        for name, array in {LABELS[0]: labels.astype(np.int64), **(others or {})}.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
