"""What every extractor and every metric of pixels needs: uint8 pixels."""

import torch
from torch import Tensor

from robustok.errors import UserError


def check_pixels(pixels: Tensor) -> None:
    """Refuse anything but pixels (N, 3, H, W) uint8.

    Raises:
        UserError: another shape or type.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        found = f"{tuple(pixels.shape)} {pixels.dtype}"
        raise UserError(f"got {found}, metrics take pixels (N, 3, H, W) torch.uint8; convert with robustok.to_pixels")


def check_pair(pixels: Tensor, reference: Tensor) -> None:
    """Refuse anything but two tensors of pixels (N, 3, H, W) uint8 of one shape.

    Raises:
        UserError: not uint8 pixels, or their shapes differ.
    """
    check_pixels(pixels)
    check_pixels(reference)
    if pixels.shape != reference.shape:
        shapes = f"{tuple(pixels.shape)} and {tuple(reference.shape)}"
        raise UserError(
            f"got pixels {shapes}, expected pairs of equal shape; compare each image with its own reference"
        )
