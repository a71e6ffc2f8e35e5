"""Features of a set of images, collected batch by batch."""

from collections.abc import Collection

from torch import Tensor

from robustok.metrics.features.inception import SPATIAL_DIM, InceptionExtractor
from robustok.metrics.frechet import GaussianStatistics
from robustok.metrics.processes import Processes
from robustok.metrics.reference import Part, Reference
from robustok.types import FeatureExtractor


class FeatureCollector:
    """Computes the features of a set of images and keeps only what its metrics need.

    Args:
        extractor: the feature space.
        parts: what to keep beside mean and covariance: the ``features`` of single images, the moments of the
            ``spatial`` features, the ``logits``; the last two need the Inception network.
        every: keep the features of every so many images only.
    """

    def __init__(
        self, extractor: FeatureExtractor | InceptionExtractor, parts: Collection[Part], every: int = 1
    ) -> None:
        self.extractor, self.parts, self.every = extractor, set(parts), every
        self.statistics = GaussianStatistics(extractor.dim)
        self.spatial = GaussianStatistics(SPATIAL_DIM) if "spatial" in self.parts else None
        self.features: list[tuple[Tensor, Tensor]] = []
        self.logits: list[tuple[Tensor, Tensor]] = []

    def update(self, indices: Tensor, pixels: Tensor) -> None:
        """Add images: their indices (n,) in the set and pixels (n, 3, H, W) uint8."""
        if {"spatial", "logits"} & self.parts:
            found = self.extractor.features(pixels)
            pool = found.pool.cpu()
            if "logits" in self.parts:
                self.logits.append((indices, found.logits.cpu()))
            if self.spatial is not None:
                self.spatial.update(found.spatial.cpu())
        else:
            pool = self.extractor(pixels).cpu()
        self.statistics.update(pool)
        if "features" in self.parts:
            kept = indices % self.every == 0
            if kept.any():
                self.features.append((indices[kept], pool[kept]))

    def finish(self, data: str, processes: Processes) -> Reference:
        """The whole set, of all processes; ``data`` describes the images."""
        return Reference(
            self.statistics.summed(processes),
            self.extractor.name,
            data,
            processes.in_order(self.features) if "features" in self.parts else None,
            self.spatial.summed(processes) if self.spatial is not None else None,
            processes.in_order(self.logits) if "logits" in self.parts else None,
        )
