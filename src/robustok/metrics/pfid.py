"""pFID: Frechet distance of reconstructions decoded from perturbed tokens, over a grid of rates and strengths.

All images are perturbed (proportion 1) and compared with the *original* images. rate is the paper's alpha, the share of
an image's tokens that is replaced; strength is its delta, how many nearest codes a replacement is drawn from. The
images are encoded once; each cell of the grid perturbs the cached tokens, decodes and measures. Continuous latents have
no tokens; for them ``noise.py`` defines another metric under another name.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustok.config import Config
from robustok.errors import UserError
from robustok.metrics.codebook import count_tokens
from robustok.metrics.frechet import (
    Estimate,
    GaussianStatistics,
    covariance_factor,
    frechet_distance,
    mean_and_standard_error,
)
from robustok.metrics.processes import ALONE, Processes
from robustok.randomness import image_draws
from robustok.tokenizers.perturbation import PerturbationDraw, apply_draw, nearest_codes
from robustok.types import FeatureExtractor

Rate = Annotated[float, Field(ge=0, le=1)]

# The paper's grid: arXiv 2509.12474. For other codebooks see PublishedGrid.strengths.
PUBLISHED_RATES = (0.9, 0.8, 0.7, 0.6, 0.5)
PUBLISHED_STRENGTHS = {16384: (200, 280, 360), 8192: (100, 140, 180), 4096: (50, 70, 90), 1024: (10, 15, 20)}
PUBLISHED_IMAGES = 50_000  # the validation set of ImageNet


class RelativeGrid(Config):
    """Strengths as shares of the codebook, so that tokenizers with codebooks of different size can be compared."""

    name: Literal["relative"] = "relative"
    rates: tuple[Rate, ...] = Field((0.1, 0.25, 0.5, 1.0), min_length=1, description="shares of an image's tokens")
    shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.01, 0.025, 0.05, 0.1), min_length=1, description="strengths as shares of the codebook size; at least 2 codes"
    )

    def strengths(self, codebook_size: int) -> tuple[int, ...]:
        """Strengths in codes, increasing; shares that round to the same number count once."""
        return tuple(sorted({max(2, _round(share * codebook_size)) for share in self.shares}))


class PublishedGrid(Config):
    """The 15 cells of the paper: five rates, and three strengths that depend on the codebook size."""

    name: Literal["published"] = "published"

    @property
    def rates(self) -> tuple[float, ...]:
        """Shares of an image's tokens."""
        return PUBLISHED_RATES

    def strengths(self, codebook_size: int) -> tuple[int, ...]:
        """Three strengths in codes, increasing.

        For 16,384, 8,192, 4,096 and 1,024 codes they are the paper's. For other sizes, which the paper does not have,
        they are 200, 280 and 360 times K / 16,384, rounded (halves upward), at least 2 and each at least one more than
        the last: 6, 9 and 11 for 512 codes, 2, 3 and 4 for 128 and fewer. Such values have the protocol
        ``published-scaled`` and no published counterpart.
        """
        if codebook_size in PUBLISHED_STRENGTHS:
            return PUBLISHED_STRENGTHS[codebook_size]
        strengths: list[int] = []
        for strength in PUBLISHED_STRENGTHS[16384]:
            least = strengths[-1] + 1 if strengths else 2
            strengths.append(max(least, _round(strength * codebook_size / 16384)))
        return tuple(strengths)


class PublishedFastGrid(PublishedGrid):
    """Five of the 15 published cells: every rate at the middle strength. For quick checks, not for tables.

    The three strengths are equally spaced, so the mean of these five is that of all 15 wherever the distance is linear
    in the strength. The standard error over seeds is about sqrt(3) times larger, as a third of the draws is averaged.
    """

    name: Literal["published-fast"] = "published-fast"

    def strengths(self, codebook_size: int) -> tuple[int, ...]:
        """The middle one of those of :class:`PublishedGrid`."""
        return super().strengths(codebook_size)[1:2]


class ExplicitGrid(Config):
    """Rates and strengths as given."""

    name: Literal["explicit"] = "explicit"
    rates: tuple[Rate, ...] = Field(min_length=1, description="shares of an image's tokens")
    codes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        min_length=1, description="strengths: numbers of nearest codes"
    )

    def strengths(self, codebook_size: int) -> tuple[int, ...]:
        """The strengths as given."""
        return self.codes


PerturbedGrid = Annotated[RelativeGrid | PublishedGrid | PublishedFastGrid | ExplicitGrid, Field(discriminator="name")]


def perturbed_protocol(
    grid: PerturbedGrid, codebook_size: int, include_self: bool = True, images: int | None = None
) -> dict[str, Any]:
    """The settings that a value of pFID depends on, which are written beside it; ``protocol`` names them.

    ``published`` is the paper's grid. ``-scaled`` marks a codebook size that the paper does not have, ``-fast`` five of
    its cells, ``-without-self`` neighbours without the token itself, unlike the paper's, ``@N`` fewer images than
    50,000. A relative grid with other rates or shares than the default ones is ``relative-custom``.
    """
    name = grid.name
    if name.startswith("published"):
        name += "" if codebook_size in PUBLISHED_STRENGTHS else "-scaled"
    elif isinstance(grid, RelativeGrid) and grid != RelativeGrid():
        name += "-custom"
    name += "" if include_self else "-without-self"
    if grid.name.startswith("published") and images is not None and images < PUBLISHED_IMAGES:
        name += f"@{images}"
    return {
        "protocol": name,
        "grid": grid.name,
        "rates": list(grid.rates),
        "strengths": list(grid.strengths(codebook_size)),
        "codebook_size": codebook_size,
        "proportion": 1.0,
        "neighbour_of": "code",
        "include_self": include_self,
        "selection": "exact",
    }


@dataclass(frozen=True)
class PerturbedCell:
    """One cell of pFID.

    Attributes:
        rate: share of each image's tokens that was replaced.
        strength: number of nearest codes from which each replacement was drawn.
        value: Frechet distance of the reconstructions to the reference, mean over seeds.
        standard_error: of ``value`` over seeds; None for one seed.
    """

    rate: float
    strength: int
    value: float = math.nan
    standard_error: float | None = None


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
    """

    cells: tuple[Any, ...]
    mean: Estimate
    geometric_mean: Estimate
    protocol: str
    images: int
    seeds: tuple[int, ...]
    seconds: float = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class GridDistance(ABC):
    """Frechet distances between images decoded from noisy latents and the original images, over a grid of noise.

    Each cell costs one decoding of all images for each seed, and no encoding. The noise of an image depends on the
    seed, the cell and the index of the image alone: it is the same for every tokenizer with as many latents, for a part
    of the set, for every batch size and number of processes.

    Attributes:
        latents: of all N images, the same in every process: tokens (N, L) int64, or (N, L, D) float.
        decode: latents of n images to pixels (n, 3, H, W) uint8. Called without gradients.
        extractor: the feature space.
        reference: statistics of the original images in that space.
        seeds: of the noise; several give standard errors.
        batch_size: images decoded at once.
        processes: how the images are shared.
        progress: called after each cell with (cells done, all cells), where a cell counts once for each seed.
    """

    latents: Tensor
    decode: Callable[[Tensor], Tensor]
    extractor: FeatureExtractor
    reference: GaussianStatistics
    seeds: Sequence[int] = (0,)
    batch_size: int = 64
    processes: Processes = ALONE
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

    def run(self) -> GridSummary:
        """Measure every cell with every seed.

        Raises:
            UserError: as :meth:`cells`; fewer than two images, or no seeds.
        """
        started, cells = time.perf_counter(), self.cells()
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
        return GridSummary(tuple(found), mean, geometric, self.protocol, images, tuple(self.seeds), seconds)

    @torch.no_grad()
    def _statistics(self, cell: Any, seed: int) -> GaussianStatistics:
        statistics = GaussianStatistics(self.extractor.dim)
        for indices in self.processes.batches(len(self.latents), self.batch_size):
            statistics.update(self.extractor(self.decode(self.noisy(cell, seed, indices))))
        return statistics.summed(self.processes)


@dataclass(frozen=True, kw_only=True)
class PFID(GridDistance):
    """pFID: the tokens of all images are perturbed, decoded and compared with the original images.

    Attributes:
        grid: rates and strengths.
        codebook: (K, D) in the geometry in which neighbours are meant.
        include_self: whether a token counts among its own neighbours and may stay what it is, as in the paper:
            then a share rate (1 - 1 / strength) of the tokens changes, else exactly round(rate x L) of each image.
    """

    grid: PerturbedGrid
    codebook: Tensor
    include_self: bool = True

    @property
    def protocol(self) -> str:
        """See :func:`perturbed_protocol`."""
        return perturbed_protocol(self.grid, len(self.codebook), self.include_self, len(self.latents))["protocol"]

    def cells(self) -> list[PerturbedCell]:
        """Every rate with every strength.

        Raises:
            UserError: tokens outside the codebook, fewer neighbours than the grid asks for, or a strength of 1 with
                ``include_self``.
        """
        count_tokens(self.latents, len(self.codebook))  # refuses those of another codebook
        strengths = self.grid.strengths(len(self.codebook))
        if self.include_self and min(strengths) < 2:
            raise UserError(
                "pFID with include_self and a strength of 1 replaces every token by itself; use strengths from 2"
            )
        _ = self.neighbours  # refuses more neighbours than there are
        return [PerturbedCell(*cell) for cell in product(self.grid.rates, strengths)]

    @cached_property
    def neighbours(self) -> Tensor:
        """The nearest codes (K, S) of each code, as many as the largest strength."""
        most = max(self.grid.strengths(len(self.codebook)))
        return nearest_codes(self.codebook, most, self.include_self).to(self.latents.device)

    def noisy(self, cell: PerturbedCell, seed: int, indices: Tensor) -> Tensor:
        """Perturbed tokens (n, L), see :func:`perturbed_tokens`."""
        return perturbed_tokens(self.latents, self.neighbours[:, : cell.strength], cell.rate, seed, indices)


def decoded_statistics(
    latents: Tensor, decode: Callable[[Tensor], Tensor], extractor: FeatureExtractor, batch_size: int = 64
) -> GaussianStatistics:
    """Statistics of the images that latents (N, L) or (N, L, D) decode to."""
    statistics = GaussianStatistics(extractor.dim)
    for batch in latents.split(batch_size):
        statistics.update(extractor(decode(batch)))
    return statistics


def perturbed_tokens(tokens: Tensor, neighbours: Tensor, rate: float, seed: int, indices: Tensor) -> Tensor:
    """The tokens (n, L) of the images at ``indices`` (n,), as the cell (rate, strength) of one seed decodes them.

    In each image round(rate x L) tokens are replaced by one of their neighbours (K, strength), each equally likely.
    """
    length, strength = tokens.shape[1], neighbours.shape[1]
    draws = image_draws(torch.rand, f"pfid {seed} {float(rate)} {strength}", indices, (2, length))  # (n, 2, L)
    positions = draws[:, 0].argsort(dim=1).argsort(dim=1) < round(rate * length)  # (n, L)
    draw = PerturbationDraw(torch.ones(len(indices), dtype=torch.bool), positions, draws[:, 1])
    return apply_draw(tokens[indices], neighbours, draw.to(tokens.device))


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean of at least one value; 0 if one of them is 0."""
    logs = [math.log(value) if value > 0 else -math.inf for value in values]
    return math.exp(sum(logs) / len(logs))


def _round(value: float) -> int:
    """To the nearest integer, halves upward; the small number keeps 0.025 * 100 = 2.5 a half whatever its last bit."""
    return math.floor(value + 0.5 + 1e-9)
