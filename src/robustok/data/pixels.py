"""The only conversions between images, float32 in [-1, 1], and pixels, uint8."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robustok.errors import UserError
from robustok.files import atomic_file


def to_pixels(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) float in [-1, 1] to pixels uint8: trunc(clamp(127.5 x + 128, 0, 255)).

    Raises:
        UserError: the images hold NaN, which has no pixel value.
    """
    if images.isnan().any():
        bad = int(images.isnan().flatten(1).any(1).sum())
        raise UserError(
            f"{bad} of {len(images)} images hold NaN, expected numbers in [-1, 1]; use an earlier snapshot of the model"
        )
    return _nearest_pixels(images)


def rounded(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) as they are in a PNG file. Unlike ``to_pixels`` it does not look for NaN on a device."""
    return from_pixels(_nearest_pixels(images))


def _nearest_pixels(images: Tensor) -> Tensor:
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def unrounded_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] to the range of pixels, [0, 255], with gradients; undoes ``from_pixels``."""
    return 127.5 * images + 127.5


def from_pixels(pixels: Tensor) -> Tensor:
    """Pixels uint8 of any shape to images float32 in [-1, 1]; ``to_pixels`` gives the same pixels back."""
    return pixels.to(torch.float32, copy=True).div_(127.5).sub_(1)  # in place, to save memory traffic


def sheet_of(images: Tensor) -> np.ndarray:
    """A grid of images (rows, columns, 3, H, W) in [-1, 1] as one picture (rows * H, columns * W, 3) uint8."""
    rows, columns, _, height, width = images.shape
    pixels = to_pixels(images.flatten(0, 1)).view(rows, columns, 3, height, width)
    return pixels.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3).cpu().numpy()


def save_picture(path: str | Path, images: Tensor) -> None:
    """Write a grid of images (rows, columns, 3, H, W) in [-1, 1] as PNG.

    Raises:
        UserError: the disk is full, or the file cannot be written.
    """
    sheet = sheet_of(images)
    with atomic_file(path) as temporary:
        Image.fromarray(sheet).save(temporary, "PNG")
