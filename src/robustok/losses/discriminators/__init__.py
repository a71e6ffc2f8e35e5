"""Discriminators of images: a trainable network, which but for ``patch`` takes features of a frozen one.

One family a file; a new one adds a line to ``DISCRIMINATORS``.
"""

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from robustok.config import validate
from robustok.errors import UserError
from robustok.losses.discriminators.augmentation import augment, augmentation_draw
from robustok.losses.discriminators.dino import DinoConfig, DinoHeads, load_backbone, load_heads
from robustok.losses.discriminators.patch import PatchConfig, PatchDiscriminator
from robustok.losses.discriminators.resnet import ResNetConfig, ResNetFeatures, ResNetHeads

__all__ = [
    "DISCRIMINATORS",
    "DinoConfig",
    "DinoHeads",
    "DiscriminatorConfig",
    "PatchConfig",
    "PatchDiscriminator",
    "ResNetConfig",
    "ResNetHeads",
    "augment",
    "augmentation_draw",
    "carried_config",
    "frozen_features",
    "load_heads",
]

DISCRIMINATORS = {
    "patch": (PatchDiscriminator, PatchConfig),
    "dino": (DinoHeads, DinoConfig),
    "cifar-resnet": (ResNetHeads, ResNetConfig),
}
DiscriminatorConfig = Annotated[PatchConfig | DinoConfig | ResNetConfig, Field(discriminator="name")]


def frozen_features(
    config: PatchConfig | DinoConfig | ResNetConfig, device: torch.device
) -> Callable[[Tensor, torch.Generator], Tensor]:
    """The frozen part: function of images (N, 3, H, W) and the random numbers of its crop to the network's input.

    A patch discriminator takes the images themselves.

    Raises:
        UserError: pretrained weights cannot be had.
    """
    if config.name == "dino":
        return load_backbone(config).to(device)
    if config.name == "cifar-resnet":
        return ResNetFeatures(config).to(device)
    return lambda images, rng: images


def carried_config(
    settings: dict[str, Any], fresh: PatchConfig | DinoConfig | ResNetConfig, source: str
) -> PatchConfig | DinoConfig | ResNetConfig:
    """Settings of the discriminator that a snapshot holds.

    Args:
        settings: from the snapshot's header.
        fresh: the run's own settings. Their file of backbone weights is used: that of the snapshot may be missing here.
        source: of the settings, for the error.

    Raises:
        UserError: unknown kind or settings.
    """
    if settings.get("name") not in DISCRIMINATORS:
        raise UserError(f"{source}: unknown discriminator {settings.get('name')!r}; known: {', '.join(DISCRIMINATORS)}")
    config = validate(DISCRIMINATORS[settings["name"]][1], settings, source=source)
    if config.name == fresh.name != "patch" and fresh.weights is not None:
        config = config.model_copy(update={"weights": fresh.weights})
    return config
