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
from robustok.metrics.features.cifar_resnet import load_cifar_resnet
from robustok.metrics.features.classifier import load_classifier
from robustok.precision import Precision, cast_weights

# Classifiers whose feature maps are a perceptual space: how to load them, and from what.
CLASSIFIERS = {
    "classifier": (load_classifier, "the folder of a saved classifier"),
    "cifar-resnet": (load_cifar_resnet, "a file of akamaster/pytorch_resnet_cifar10"),
}


class ReconstructionConfig(Config):
    """How reconstructions are compared with images."""

    pixel: Literal["l1", "l2"] = Field("l2", description="pixel loss, mean over all elements")
    pixel_weight: float = Field(1.0, ge=0, description="weight of the pixel loss")
    perceptual: Literal["none", "lpips", "classifier", "cifar-resnet"] = Field(
        "lpips",
        description="lpips: VGG features, needs the extra robustok[lpips]; classifier: a small one trained on the "
        "data; cifar-resnet: a public classifier of CIFAR-10",
    )
    perceptual_weight: float = Field(1.0, ge=0, description="weight of the perceptual loss")
    perceptual_weights: str | None = Field(
        None,
        description="lpips: local file of VGG weights; classifier: folder of a saved one; cifar-resnet: file of "
        "akamaster/pytorch_resnet_cifar10",
    )
    perceptual_linear: str | None = Field(
        None, description="lpips: file of its linear layers, weights/v0.1/vgg.pth; null: that of the lpips package"
    )


def pixel_loss(kind: Literal["l1", "l2"], images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean absolute or squared difference of images (N, 3, H, W)."""
    difference = reconstructions.float() - images
    return difference.abs().mean() if kind == "l1" else difference.square().mean()


class ReconstructionTerms:
    """Pixel and perceptual terms between images and reconstructions, weighted.

    Args:
        config: weights and networks.
        device: where they are computed.
        precision: of the training under whose autocast they are; weights of frozen networks are rounded once.

    Raises:
        UserError: the perceptual network's weights are missing.
    """

    def __init__(self, config: ReconstructionConfig, device: torch.device, precision: Precision = "float32") -> None:
        self.config = config
        self.perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
        if config.perceptual == "lpips" and config.perceptual_weight:
            self.perceptual = LPIPSLoss(config.perceptual_weights, precision, config.perceptual_linear).to(device)
        elif config.perceptual != "none" and config.perceptual_weight:
            load, what = CLASSIFIERS[config.perceptual]
            if config.perceptual_weights is None:
                raise UserError(
                    f"reconstruction.perceptual={config.perceptual} needs reconstruction.perceptual_weights, {what}"
                )
            classifier = load(Path(config.perceptual_weights)).to(device)
            classifier = cast_weights(classifier.eval().requires_grad_(False), precision)
            self.perceptual = lambda a, b: perceptual_loss(classifier.feature_maps, a, b)

    def __call__(self, images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """Terms for images and reconstructions (N, 3, H, W)."""
        terms = {"pixel": self.config.pixel_weight * pixel_loss(self.config.pixel, images, reconstructions)}
        if self.perceptual is not None:
            terms["perceptual"] = self.config.perceptual_weight * self.perceptual(images, reconstructions)
        return terms
