"""Perceptual losses: LPIPS, and the same without learned weights on any network's feature maps."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustok.metrics.lpips import check_sides, load_lpips
from robustok.precision import Precision


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
    """LPIPS with VGG-16, without dropout (in the authors' code it is on).

    Args:
        weights: local file with torchvision's vgg16 state dict; None uses torchvision's cache or download.
        precision: of the features; in bf16 they are normalised in bf16, too.
        linear: file of the linear layers; None takes that of the lpips package.

    Raises:
        UserError: the package or the weights are missing; images of fewer than 16 pixels a side.
    """

    REMEDY = "set reconstruction.perceptual=classifier or none"
    SETTINGS = ("reconstruction.perceptual_weights", "reconstruction.perceptual_linear")

    def __init__(
        self, weights: str | None = None, precision: Precision = "float32", linear: str | Path | None = None
    ) -> None:
        super().__init__()
        network, _ = load_lpips("vgg", weights, linear, self.SETTINGS)
        self.network = network.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        self.eval()

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Mean LPIPS of images (N, 3, H, W) in [-1, 1], the first of which get no gradient."""
        check_sides("vgg", images.shape, self.REMEDY)
        return self.network(images, reconstructions).mean()
