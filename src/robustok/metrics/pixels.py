"""Fidelity of reconstructions, image by image: PSNR and SSIM of uint8 pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from robustok.errors import UserError
from robustok.metrics.guards import check_pair


def psnr(pixels: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, data range 255; infinite for equal images.

    The field reports the mean over images of this, not the PSNR of the pooled error, which is lower.

    Args:
        pixels: (N, 3, H, W) uint8.
        reference: (N, 3, H, W) uint8.

    Returns:
        (N,) float64.

    Raises:
        UserError: not uint8 pixels of one shape.
    """
    check_pair(pixels, reference)
    error = (pixels.double() - reference.double()).square().mean(dim=(1, 2, 3))  # (N,)
    return 10 * torch.log10(255**2 / error)


def capped_psnr(pixels: Tensor, reference: Tensor) -> Tensor:
    """:func:`psnr` of at most 100 dB: equal images would make the mean infinite."""
    return psnr(pixels, reference).clamp(max=100)


def ssim(pixels: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image, in [-1, 1] (Wang et al. 2004): Gaussian window 11 of sigma 1.5.

    The mean over channels and positions, borders reflected as in torchmetrics; on [0, 1] with data range 1.

    Args:
        pixels: (N, 3, H, W) uint8, H and W at least 6.
        reference: (N, 3, H, W) uint8.

    Returns:
        (N,) float64.

    Raises:
        UserError: not uint8 pixels of one shape, or too small to reflect.
    """
    check_pair(pixels, reference)
    if min(pixels.shape[2:]) < 6:
        raise UserError(f"got images of {tuple(pixels.shape[2:])} pixels, SSIM needs at least 6x6; leave it out here")
    x, y = pixels.double() / 255, reference.double() / 255
    mean_x, mean_y = _blur(x), _blur(y)  # (N, 3, H, W)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return similarity.mean(dim=(1, 2, 3))  # (N,)


def _blur(images: Tensor, size: int = 11, sigma: float = 1.5) -> Tensor:
    offsets = torch.arange(size, dtype=images.dtype, device=images.device) - (size - 1) / 2
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).view(1, 1, 1, size)
    padded = F.pad(images, (size // 2,) * 4, mode="reflect").flatten(0, 1)[:, None]  # (N * 3, 1, H + 10, W + 10)
    return F.conv2d(F.conv2d(padded, weights), weights.transpose(2, 3)).view(images.shape)  # (N, 3, H, W)
