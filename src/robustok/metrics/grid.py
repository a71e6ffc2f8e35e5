"""Frechet distances of images decoded from noisy latents over a grid of noise: what pFID and ``noise_fd`` share."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from robustok.errors import UserError
from robustok.metrics.calibration import Calibration, calibrate
from robustok.metrics.frechet import (
    Estimate,
    GaussianStatistics,
    covariance_factor,
    frechet_distance,
    mean_and_standard_error,
)
from robustok.metrics.processes import ALONE, Processes
from robustok.types import FeatureExtractor


@dataclass(frozen=True)
class GridSummary:
    """pFID, or ``noise_fd``, of one tokenizer.

    Attributes:
        cells: every cell of the grid, with ``value`` and ``standard_error``.
        mean: over cells, with its standard error over seeds; pFID is this number.
        geometric_mean: the same; in it the strongest cells do not outweigh all others.
        protocol: its name, for pFID from :func:`perturbed_protocol`.
        images: N.
        seeds: of the noise.
        seconds: wall time of all cells and seeds, with decoding and features, without encoding.
        calibration: how the cells were chosen, if they were.
    """

    cells: tuple[Any, ...]
    mean: Estimate
    geometric_mean: Estimate
    protocol: str
    images: int
    seeds: tuple[int, ...]
    seconds: float = field(compare=False)
    calibration: Calibration | None = None


@dataclass(frozen=True, kw_only=True)
class GridDistance(ABC):
    """Frechet distances between images decoded from noisy latents and the original images, over a grid of noise.

    Each cell costs one decoding of all images for each seed, and no encoding. The noise of an image depends on the
    seed, the cell and the index of the image alone: it is the same for every tokenizer with as many latents, for a part
    of the set, for every batch size and number of processes.

    Attributes:
        grid: what the cells are made of.
        latents: of all N images, the same in every process: tokens (N, L) int64, or (N, L, D) float.
        decode: latents of n images to pixels (n, 3, H, W) uint8. Called without gradients.
        extractor: the feature space.
        reference: statistics of the original images in that space.
        seeds: of the noise; several give standard errors.
        batch_size: images decoded at once.
        processes: how the images are shared.
        generated: latents of a generator, which choose the cells of a calibrated grid.
        device: where these are compared.
        progress: called after each cell with (cells done, all cells), where a cell counts once for each seed.
    """

    grid: Any
    latents: Tensor
    decode: Callable[[Tensor], Tensor]
    extractor: FeatureExtractor
    reference: GaussianStatistics
    seeds: Sequence[int] = (0,)
    batch_size: int = 64
    processes: Processes = ALONE
    generated: Tensor | None = None
    device: torch.device | str = "cpu"
    progress: Callable[[int, int], None] | None = None

    @property
    @abstractmethod
    def protocol(self) -> str:
        """Names the grid in results."""

    @abstractmethod
    def cells(self) -> list[Any]:
        """The cells of the grid, without values.

        Raises:
            UserError: latents or settings that do not belong together.
        """

    @abstractmethod
    def noisy(self, cell: Any, seed: int, indices: Tensor) -> Tensor:
        """The latents of the images at ``indices`` (n,) with the noise of one cell and seed."""

    @abstractmethod
    def vectors(self, latents: Tensor) -> Tensor:
        """Latents of n images as (n, L, D) on ``device``."""

    def calibration(self) -> Calibration:
        """Choose among the cells, with the noise of the first seed.

        Raises:
            UserError: no generated latents; as :meth:`cells` and :func:`robustok.metrics.calibration.calibrate`.
        """
        cells = self.cells()
        if self.generated is None:
            raise UserError("a calibrated grid is chosen by a generator's latents; give generated")
        noisy = lambda cell, indices: self.noisy(cell, self.seeds[0], indices)  # noqa: E731
        return calibrate(cells, self.grid.keep, self.generated, self.latents, noisy, self.vectors)

    def run(self) -> GridSummary:
        """Measure every cell with every seed.

        Raises:
            UserError: as :meth:`cells` and :meth:`calibration`; fewer than two images, or no seeds.
        """
        started = time.perf_counter()
        calibration = self.calibration() if self.grid.name == "calibrated" else None
        cells = self.cells() if calibration is None else calibration.cells
        factor = covariance_factor(self.reference)  # costs as much as a distance, and is the same for all
        values: list[float] = []
        for seed, cell in product(self.seeds, cells):
            values.append(frechet_distance(self._statistics(cell, seed), self.reference, factor))
            if self.progress is not None:
                self.progress(len(values), len(self.seeds) * len(cells))
        rows = [values[i : i + len(cells)] for i in range(0, len(values), len(cells))]  # (seeds, cells)
        mean = mean_and_standard_error([sum(row) / len(row) for row in rows])
        geometric = mean_and_standard_error([geometric_mean(row) for row in rows])
        found = []
        for cell, column in zip(cells, zip(*rows, strict=True), strict=True):
            over_seeds = mean_and_standard_error(column)
            found.append(replace(cell, value=over_seeds.value, standard_error=over_seeds.standard_error))
        seconds, images = time.perf_counter() - started, len(self.latents)
        seeds = tuple(self.seeds)
        return GridSummary(tuple(found), mean, geometric, self.protocol, images, seeds, seconds, calibration)

    @torch.no_grad()
    def _statistics(self, cell: Any, seed: int) -> GaussianStatistics:
        statistics = GaussianStatistics(self.extractor.dim)
        for indices in self.processes.batches(len(self.latents), self.batch_size):
            statistics.update(self.extractor(self.decode(self.noisy(cell, seed, indices))))
        return statistics.summed(self.processes)


def decoded_statistics(
    latents: Sequence[Tensor], decode: Callable[[Tensor], Tensor], extractor: FeatureExtractor, batch_size: int = 64
) -> GaussianStatistics:
    """Statistics of the images that latents decode to, tensors (N, L) or (N, L, D) of one size each, all together."""
    statistics = GaussianStatistics(extractor.dim)
    for same in latents:
        for batch in same.split(batch_size) if len(same) else ():
            statistics.update(extractor(decode(batch)))
    return statistics


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean of at least one value; 0 if one of them is 0."""
    logs = [math.log(value) if value > 0 else -math.inf for value in values]
    return math.exp(sum(logs) / len(logs))
