"""Heads on the feature maps of a frozen, public CIFAR-10 classifier: the paper's discriminator for 32x32 images.

    images -> augmentation -> frozen ResNet -> maps of three stages -> a convolutional head each -> logits

Source: projected discriminators, arXiv 2111.01007. States and snapshots hold the heads only. What evaluates must be
another network than this one.
"""

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from robustok.config import Config
from robustok.metrics.features.cifar_resnet import WIDTHS, load_cifar_resnet

CHANNELS = tuple(width * (WIDTHS[-1] // width) ** 2 for width in WIDTHS)  # of the stages at the last one's resolution


class ResNetConfig(Config):
    """Heads on a frozen ResNet."""

    name: Literal["cifar-resnet"] = "cifar-resnet"
    weights: Path = Field(description="file of akamaster/pytorch_resnet_cifar10")
    width: int = Field(64, ge=1, description="channels of the heads")
    augment: bool = Field(True, description="differentiable augmentation of the images")


class ResNetFeatures(nn.Module):
    """The frozen part.

    Raises:
        UserError: the weights are missing, or of another network.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.network = load_cifar_resnet(config.weights)

    def forward(self, images: Tensor, _rng: torch.Generator | None = None) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to the maps of all stages, (N, 448, H/4, W/4).

        Blocks of 4x4 and 2x2 positions of the first two stages become channels, so nothing is lost.
        """
        first, second, third = self.network.feature_maps(images)
        return torch.cat([F.pixel_unshuffle(first, 4), F.pixel_unshuffle(second, 2), third], 1)


class ResNetHeads(nn.Module):
    """The trainable part: a head for each stage. Without batch statistics."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(channels, config.width, 1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(config.width, config.width, 3, padding=1)),
                nn.LeakyReLU(0.2),
                nn.Conv2d(config.width, 1, 1),
            )
            for channels in CHANNELS
        )

    def forward(self, *sides: Tensor) -> Tensor:
        """Maps of one or more sides, each (N, 448, h, w), to logits (sides * N, 3 * h * w)."""
        stages = torch.cat(sides).split(CHANNELS, dim=1)
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, stages, strict=True)], 1)
