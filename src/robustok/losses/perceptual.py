"""Perceptual losses: LPIPS, and the same without learned weights on any network's feature maps."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustok.metrics.lpips import check_sides, load_lpips


def perceptual_loss(maps: Callable[[Tensor], Sequence[Tensor]], images: Tensor, reconstructions: Tensor) -> Tensor:
    """Squared distance of channel-normalised feature maps, mean over positions, sum over layers.

    LPIPS without its learned channel weights, for any network; used with a small classifier on small images.

    Args:
        maps: images (N, 3, H, W) in [-1, 1] to feature maps, each (N, C, h, w).
        images: targets, no gradient.
        reconstructions: (N, 3, H, W).
    """
    with torch.no_grad():
        targets = [F.normalize(m.float(), dim=1) for m in maps(images)]
    found = [F.normalize(m.float(), dim=1) for m in maps(reconstructions)]
    return sum((a - b).square().sum(1).mean() for a, b in zip(targets, found, strict=True))


class LPIPSLoss(nn.Module):
    """LPIPS with VGG-16 from the lpips package, in eval mode (in the authors' code its dropout is on).

    Args:
        weights: local file with torchvision's vgg16 state dict; None uses torchvision's cache or download.

    Raises:
        UserError: the package or the weights are missing; images of fewer than 16 pixels a side.
    """

    REMEDY = "set reconstruction.perceptual=classifier or none"

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self.network, _ = load_lpips("vgg", weights, setting="reconstruction.perceptual_weights")
        self.eval()

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Mean LPIPS of images (N, 3, H, W) in [-1, 1]."""
        check_sides("vgg", images.shape, self.REMEDY)
        return self.network(reconstructions, images).mean()
