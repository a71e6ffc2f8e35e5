"""A convolutional patch discriminator."""

from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from robustok.config import Config
from robustok.devices import layout


class PatchConfig(Config):
    """A convolutional patch discriminator, small enough for 16x16 images."""

    name: Literal["patch"] = "patch"
    width: int = Field(64, ge=1, description="channels of the first layer; doubles at each halving of the resolution")
    depth: int = Field(2, ge=0, description="number of halvings")
    augment: bool = Field(True, description="differentiable augmentation; without it a small data set is memorised")


class PatchDiscriminator(nn.Module):
    """Images to a map of logits. Without batch statistics: an image's logits do not depend on its neighbours."""

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        widths = [config.width * min(2**i, 8) for i in range(config.depth + 1)]
        layers: list[nn.Module] = [spectral_norm(nn.Conv2d(3, widths[0], 3, padding=1)), nn.LeakyReLU(0.2)]
        for a, b in pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        layers += [spectral_norm(nn.Conv2d(widths[-1], widths[-1], 3, padding=1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1))

    def forward(self, *sides: Tensor) -> Tensor:
        """Images of one or more sides, each (N, 3, H, W) in [-1, 1], to logits (sides * N, h * w)."""
        images = torch.cat(sides)  # (sides * N, 3, H, W)
        return self.layers(images.contiguous(memory_format=layout(images.device))).flatten(1)  # (sides * N, h * w)
