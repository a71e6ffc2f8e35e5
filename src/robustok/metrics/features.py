"""Pixels to features: the spaces in which distances between sets of images are measured.

An extractor is anything that satisfies :class:`robustok.types.FeatureExtractor`. Its name carries a digest of its
weights and goes with every number. It takes uint8 pixels and nothing else, so that no float image slips into a metric.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from robustok.classifier import load_classifier
from robustok.config import Config
from robustok.images import from_pixels
from robustok.metrics.dinov2 import DINOV2_MODEL, DINOv2Extractor
from robustok.metrics.guards import check_pixels, exact_float32
from robustok.metrics.inception import SPATIAL_DIM, InceptionExtractor, InceptionFeatures, Precision
from robustok.types import FeatureExtractor, UserError

__all__ = [
    "SPATIAL_DIM",
    "ClassifierExtractor",
    "DINOv2Extractor",
    "ExtractorConfig",
    "InceptionExtractor",
    "InceptionFeatures",
    "check_pixels",
    "compute_features",
    "exact_float32",
    "load_extractor",
]


class ClassifierExtractor:
    """The penultimate features of a classifier, in float32, in evaluation mode and without gradients.

    Distances in this space are reported under its name, for example ``classifier-64-3f9a12bc``, never as plain "FID".

    Args:
        classifier: a network with ``features(images) -> (N, F)`` and ``digest``, such as
            :class:`robustok.classifier.SmallClassifier`.

    Attributes:
        name: ``classifier-F-DIGEST``.
        dim: F.
    """

    def __init__(self, classifier: nn.Module):
        self.classifier = classifier
        self.device = next(classifier.parameters()).device
        self.dim = self._features(torch.zeros(1, 3, 32, 32, device=self.device)).shape[1]
        self.name = f"classifier-{self.dim}-{classifier.digest}"

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) uint8 to features (N, F) float32, on the device of the classifier.

        Raises:
            UserError: the pixels are not uint8 or not of this shape.
        """
        check_pixels(pixels)
        return self._features(from_pixels(pixels.to(self.device)))

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        self.classifier.eval()
        with exact_float32(self.device):
            return self.classifier.features(images).float()


def compute_features(extractor: FeatureExtractor, pixel_batches: Iterable[Tensor]) -> Tensor:
    """Features (N, F) float32 on the CPU of all images of an iterable of pixels (n, 3, H, W) uint8.

    It keeps every feature, for metrics that compare images one by one; a Frechet distance needs no more than
    :class:`robustok.metrics.frechet.GaussianStatistics`, batch by batch.

    Raises:
        UserError: the iterable holds no batch.
    """
    features = [extractor(pixels).cpu() for pixels in pixel_batches]
    if not features:
        raise UserError("got no images to compute features of, expected at least one batch; check the data set")
    return torch.cat(features)  # (N, F)


class ExtractorConfig(Config):
    """The feature space of a Frechet distance."""

    name: Literal["classifier", "inception", "dinov2"] = Field(
        "classifier",
        description="a small classifier of images of the domain, the Inception network of FID, or DINOv2 for FD-DINOv2",
    )
    path: Path | None = Field(
        None,
        description="classifier: its folder (`robustok train-classifier` makes one); "
        "inception, dinov2: file of weights, by default the official one",
    )
    precision: Precision = Field(
        "float32",
        description="inception: bf16 is faster where hardware multiplies it, for trends; both sides need the same",
    )
    model: str = Field(DINOV2_MODEL, description="dinov2: timm model name")

    @model_validator(mode="after")
    def _settings_belong_to_the_name(self) -> "ExtractorConfig":
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
    return ClassifierExtractor(load_classifier(config.path, device))
