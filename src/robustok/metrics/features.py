"""Pixels to features: the spaces in which distances between sets of images are measured.

An extractor is anything that satisfies :class:`robustok.types.FeatureExtractor`. Its name carries a digest of its
weights and goes with every number. It takes uint8 pixels and nothing else, so that no float image slips into a metric.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.classifier import load_classifier
from robustok.config import Config
from robustok.images import from_pixels
from robustok.types import FeatureExtractor, UserError


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
        # Autocast or TF32, switched on for training, would move the features by more than a good tokenizer does.
        with (
            torch.autocast(self.device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            return self.classifier.features(images).float()


def compute_features(extractor: FeatureExtractor, pixel_batches: Iterable[Tensor]) -> Tensor:
    """Features (N, F) float32 on the CPU of all images of an iterable of pixels (n, 3, H, W) uint8.

    Raises:
        UserError: the iterable holds no batch.
    """
    features = [extractor(pixels).cpu() for pixels in pixel_batches]
    if not features:
        raise UserError("got no images to compute features of, expected at least one batch; check the data set")
    return torch.cat(features)  # (N, F)


def check_pixels(pixels: Tensor) -> None:
    """Refuse anything but pixels (N, 3, H, W) uint8.

    Raises:
        UserError: another shape or type.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        found = f"{tuple(pixels.shape)} {pixels.dtype}"
        raise UserError(f"got {found}, metrics take pixels (N, 3, H, W) torch.uint8; convert with images.to_pixels")


class ExtractorConfig(Config):
    """The feature space of a Frechet distance."""

    name: Literal["classifier"] = Field("classifier", description="a small classifier of images of the domain")
    path: Path = Field(description="folder of the saved classifier (`robustok train-classifier` makes one)")


def load_extractor(config: ExtractorConfig, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The extractor of a configuration.

    Raises:
        UserError: its weights are missing or damaged.
    """
    return ClassifierExtractor(load_classifier(config.path, device))
