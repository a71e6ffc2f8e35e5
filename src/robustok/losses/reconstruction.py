"""Pixel and perceptual terms between images and reconstructions."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from robustok.config import Config
from robustok.errors import UserError
from robustok.losses.perceptual import LPIPSLoss, perceptual_loss
from robustok.metrics.features.classifier import load_classifier


class ReconstructionConfig(Config):
    """How reconstructions are compared with images."""

    pixel: Literal["l1", "l2"] = Field("l2", description="pixel loss, mean over all elements")
    pixel_weight: float = Field(1.0, ge=0, description="weight of the pixel loss")
    perceptual: Literal["none", "lpips", "classifier"] = Field(
        "lpips",
        description="lpips: VGG features, needs the extra robustok[lpips]; classifier: a small one trained on the data",
    )
    perceptual_weight: float = Field(1.0, ge=0, description="weight of the perceptual loss")
    perceptual_weights: str | None = Field(
        None, description="local file of VGG weights for lpips, or folder of a saved classifier"
    )


def pixel_loss(kind: Literal["l1", "l2"], images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean absolute or squared difference of images (N, 3, H, W)."""
    difference = reconstructions.float() - images
    return difference.abs().mean() if kind == "l1" else difference.square().mean()


class ReconstructionTerms:
    """Pixel and perceptual terms between images and reconstructions, weighted.

    Raises:
        UserError: the perceptual network's weights are missing.
    """

    def __init__(self, config: ReconstructionConfig, device: torch.device) -> None:
        self.config = config
        self.perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
        if config.perceptual == "lpips" and config.perceptual_weight:
            self.perceptual = LPIPSLoss(config.perceptual_weights).to(device)
        elif config.perceptual == "classifier" and config.perceptual_weight:
            if config.perceptual_weights is None:
                raise UserError(
                    "reconstruction.perceptual=classifier needs reconstruction.perceptual_weights, "
                    "the folder of a saved classifier"
                )
            classifier = load_classifier(Path(config.perceptual_weights)).to(device).eval().requires_grad_(False)
            self.perceptual = lambda a, b: perceptual_loss(classifier.feature_maps, a, b)

    def __call__(self, images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """Terms for images and reconstructions (N, 3, H, W)."""
        terms = {"pixel": self.config.pixel_weight * pixel_loss(self.config.pixel, images, reconstructions)}
        if self.perceptual is not None:
            terms["perceptual"] = self.config.perceptual_weight * self.perceptual(images, reconstructions)
        return terms
