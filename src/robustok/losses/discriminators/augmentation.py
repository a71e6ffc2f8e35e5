"""Differentiable augmentation of the discriminator's input, real images and reconstructions alike."""

import torch
import torch.nn.functional as F
from torch import Tensor

from robustok.devices import to_device


def augmentation_draw(count: int, rng: torch.Generator) -> Tensor:
    """The random numbers of :func:`augment`: (7, N, 1, 1) uniform in [0, 1)."""
    return torch.rand(7, count, 1, 1, generator=rng)


def augment(images: Tensor, draw: Tensor) -> Tensor:
    """Differentiable augmentation: translation, colour and cutout (DiffAug), sized as shares of the image.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        draw: (7, N, 1, 1) from :func:`augmentation_draw`: two for the translation, three for brightness, saturation and
            contrast, two for the cutout's centre.

    Returns:
        (N, 3, H, W).
    """
    images = images.float()
    vertical, horizontal, brightness, saturation, contrast, top, left = to_device(draw, images.device)  # each (N, 1, 1)
    images = _translate(images, vertical, horizontal)
    images = images + (brightness - 0.5)[..., None]
    mean = images.mean(1, keepdim=True)  # (N, 1, H, W)
    images = (images - mean) * (2 * saturation)[..., None] + mean
    mean = images.mean((1, 2, 3), keepdim=True)  # (N, 1, 1, 1)
    images = (images - mean) * (contrast + 0.5)[..., None] + mean
    return _cut_out(images, top, left)


def _translate(images: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """Shift by whole pixels, up to an eighth of the image each way; zeros move in, large draws go up and left."""
    n, _, h, w = images.shape
    reach_h, reach_w = round(h / 8), round(w / 8)
    shift_h = (vertical * (2 * reach_h + 1)).long() - reach_h  # (N, 1, 1)
    shift_w = (horizontal * (2 * reach_w + 1)).long() - reach_w
    rows = torch.arange(h, device=images.device)[None, :, None] + shift_h  # (N, H, 1)
    columns = torch.arange(w, device=images.device)[None, None, :] + shift_w  # (N, 1, W)
    rows = rows.clamp(-1, h) + 1  # a border of zeros one pixel wide catches what lies outside
    columns = columns.clamp(-1, w) + 1
    padded = F.pad(images, (1, 1, 1, 1))  # (N, 3, H + 2, W + 2)
    flat = (rows * (w + 2) + columns).flatten(1)[:, None].expand(-1, 3, -1)  # (N, 3, H * W)
    return padded.flatten(2).gather(2, flat).view(n, 3, h, w)


def _cut_out(images: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Zero a square of a fifth of the image's side around a uniform centre; it may reach over the edge."""
    _, _, h, w = images.shape
    size_h, size_w = max(1, round(h * 0.2)), max(1, round(w * 0.2))
    centre_h = (top * (h + 1 - size_h % 2)).long()  # (N, 1, 1)
    centre_w = (left * (w + 1 - size_w % 2)).long()
    rows = torch.arange(h, device=images.device)[None, :, None] - centre_h + size_h // 2
    columns = torch.arange(w, device=images.device)[None, None, :] - centre_w + size_w // 2
    hole = (rows >= 0) & (rows < size_h) & (columns >= 0) & (columns < size_w)  # (N, H, W)
    return images * ~hole[:, None]
