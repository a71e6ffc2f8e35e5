"""Pixels to features: the spaces in which distances between sets of images are measured.

An extractor is anything that satisfies :class:`robustok.types.FeatureExtractor`. It takes uint8 pixels only. Its name
has a digest of its weights and is written beside every number.
"""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator

from robustok.config import Config
from robustok.metrics.features.cifar_resnet import CifarResNetExtractor
from robustok.metrics.features.classifier import ClassifierExtractor, load_classifier
from robustok.metrics.features.dinov2 import DINOV2_MODEL, DINOv2Extractor
from robustok.metrics.features.inception import InceptionExtractor
from robustok.precision import Precision
from robustok.types import FeatureExtractor


class ExtractorConfig(Config):
    """The feature space of a Frechet distance."""

    name: Literal["classifier", "cifar-resnet", "inception", "dinov2"] = Field(
        "classifier",
        description="a small classifier of images of the domain, a public CIFAR-10 ResNet, the Inception network "
        "of FID, or DINOv2 for FD-DINOv2",
    )
    path: Path | None = Field(
        None,
        description="classifier: its folder (`robustok train-classifier` makes one); cifar-resnet: file of weights; "
        "inception, dinov2: file of weights, by default the official one",
    )
    precision: Precision = Field(
        "float32",
        description="inception: tf32 and bf16 are faster where hardware has them, for trends; both sides need the same",
    )
    model: str = Field(DINOV2_MODEL, description="dinov2: timm model name")

    @model_validator(mode="after")
    def _settings_belong_to_the_name(self) -> "ExtractorConfig":
        if self.name == "cifar-resnet" and self.path is None:
            raise ValueError("cifar-resnet needs extractor.path, a file of akamaster/pytorch_resnet_cifar10")
        if self.name == "classifier" and self.path is None:
            raise ValueError("a classifier needs extractor.path, its folder; or set extractor.name=inception")
        if self.name != "inception" and self.precision != "float32":
            raise ValueError(f"extractor.precision={self.precision} needs extractor.name=inception; or drop it")
        if self.name != "dinov2" and self.model != DINOV2_MODEL:
            raise ValueError(f"extractor.model={self.model} needs extractor.name=dinov2; or drop it")
        return self


def load_extractor(config: ExtractorConfig, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The extractor of a configuration.

    Raises:
        UserError: its weights are missing or damaged.
    """
    if config.name == "inception":
        return InceptionExtractor(config.path, device, config.precision)
    if config.name == "dinov2":
        return DINOv2Extractor(config.path, device, config.model)
    if config.name == "cifar-resnet":
        return CifarResNetExtractor(config.path, device)
    return ClassifierExtractor(load_classifier(config.path, device))
