"""One image file, or its bytes: opened, or an error that says what it is instead."""

from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from robustok.files import IMAGE_FORMATS, LFS_POINTER, regular_file


def open_image(file: str | bytes) -> Image.Image:
    """Open an image from a path or from its bytes; the pixels are read later.

    Raises:
        OSError: it is no image of the formats in ``files.IMAGE_SUFFIXES``, a git-lfs pointer, or cannot be read.
        Image.DecompressionBombError: it has more than 178 million pixels.
    """
    try:
        return Image.open(BytesIO(file) if isinstance(file, bytes) else regular_file(file), formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise UnidentifiedImageError(f"cannot identify image file{instead(file)}") from None


def instead(file: str | Path | bytes) -> str:
    """What a file is that is not what its name says, for error messages; empty if unknown."""
    if not isinstance(file, bytes):
        with open(file, "rb") as stream:
            file = stream.read(len(LFS_POINTER))
    if file.startswith(LFS_POINTER):
        return ", it is a git-lfs pointer in place of the file: run git lfs pull"
    return "" if file else ", it is empty"
