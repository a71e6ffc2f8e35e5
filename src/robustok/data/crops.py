"""An image of any mode and size to RGB pixels of one size, as in ADM's evaluation (Dhariwal and Nichol, 2021).

Published FIDs were computed with ADM's centre crop, so every image gives the same pixels here, bit for bit. In three
cases an image viewer shows something else, which ``rgb="viewer"`` gives:

* Transparency: ADM drops the alpha channel; a viewer puts the image on white.
* 16-bit levels: ADM clips them, so that nearly all become white; a viewer scales them to 8 bits.
* EXIF orientation: ADM ignores it; a viewer rotates the photograph.

Float images are refused, and so are images so elongated that scaling up their shorter side would fill the memory.
"""

import warnings
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

RGB = Literal["adm", "viewer"]


def center_crop(image: Image.Image, size: int | tuple[int, int], rgb: RGB = "adm") -> np.ndarray:
    """ADM's centre crop: scale the image until it just covers the crop, and cut the middle.

    Args:
        image: of any mode and any size; smaller ones are enlarged.
        size: height and width of the result in pixels; one number for a square, as ADM has it.
        rgb: how odd images become RGB, see :func:`to_rgb`.

    Returns:
        RGB pixels (H, W, 3) uint8.

    Raises:
        ValueError: the image holds floats, or is too elongated.
    """
    height, width = (size, size) if isinstance(size, int) else size
    image, scaled = _halved(to_rgb(image, rgb), height, width)
    image = image if scaled == image.size else image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.array(image.crop((left, top, left + width, top + height)))


def random_crop(image: Image.Image, size: int, rng: torch.Generator, rgb: RGB = "adm") -> np.ndarray:
    """ADM's random crop: scale the shorter side to size..ceil(size / 0.8), drawn, then cut a random square.

    Only the square is resized. Pillow keeps its corners in float32, so that one level in ten thousand differs by one
    from a square that is cut after resizing.

    Returns:
        RGB pixels (H, W, 3) uint8.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=rng))

    shorter = draw(size, -(-5 * size // 4))
    image, (width, height) = _halved(to_rgb(image, rgb), shorter, shorter)
    left, top = draw(0, width - size), draw(0, height - size)
    left, right = (x * image.width / width for x in (left, left + size))  # in the image before resizing
    top, bottom = (y * image.height / height for y in (top, top + size))
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, (left, top, right, bottom)))


def enlarged(size: int) -> int:
    """Size of the centre crop from which :func:`five_crops` cuts crops of ``size``: 10 % more, 281 for 256."""
    return int(size * 1.1)


def five_crops(images: Tensor, size: int) -> Tensor:
    """The four corners and the centre of each image; with their mirror images these are the ten crops of ten-crop.

    Args:
        images: (N, 3, H, W), for ten-crop with H = W = ``enlarged(size)``.
        size: height and width of a crop.

    Returns:
        (N, 5, 3, size, size): top left, top right, bottom left, bottom right, centre.
    """
    bottom, right = images.shape[-2] - size, images.shape[-1] - size
    corners = ((0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2)))
    return torch.stack([images[..., y : y + size, x : x + size] for y, x in corners], dim=1)


def oriented_size(image: Image.Image, rgb: RGB = "adm") -> tuple[int, int]:
    """Height and width that :func:`to_rgb` will give, without decoding the image."""
    turned = rgb == "viewer" and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # by a quarter
    return image.size if turned else image.size[::-1]


def _halved(image: Image.Image, height: int, width: int) -> tuple[Image.Image, tuple[int, int]]:
    """Halve with a box filter as often as possible; what is left is for bicubic, which alone aliases.

    Returns:
        The image, and the width and height to which it is then resized, the least that cover ``height`` and ``width``.
    """
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = max(width / image.width, height / image.height)
    size = (round(image.width * factor), round(image.height * factor))
    if size[0] * size[1] > 2 * (Image.MAX_IMAGE_PIXELS or 2**31):  # Pillow's own limit for files it opens
        raise ValueError(
            f"an image of {image.width}x{image.height} is too elongated to be scaled to {size[0]}x{size[1]}"
        )
    return image, size


def to_rgb(image: Image.Image, rgb: RGB = "adm") -> Image.Image:
    """Any image as 8-bit RGB.

    Args:
        image: of any mode.
        rgb: "adm" converts as ADM does; "viewer" applies EXIF orientation, scales 16 bits, puts transparency on white.

    Raises:
        ValueError: the image holds floats, whose range is unknown.
    """
    if image.mode == "F":
        raise ValueError("float images have no known range")
    if rgb == "adm":
        if image.mode.startswith("I") and np.asarray(image).max() > 255:
            warnings.warn(
                "images with 16-bit levels become nearly white, as in ADM's evaluation; convert them to 8 bits, or set "
                "data.rgb=viewer where data names them",
                stacklevel=2,
            )
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; "I" is how some formats hand out the same levels
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
