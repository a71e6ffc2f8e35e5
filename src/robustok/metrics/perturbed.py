"""pFID: Frechet distance of reconstructions decoded from perturbed tokens, over a grid of rates and strengths.

All images are perturbed (proportion 1) and judged against the *original* images. rate is the paper's alpha, the share
of an image's tokens that is replaced; strength is its delta, how many nearest codes a replacement is drawn from. The
images are encoded once; each cell of the grid perturbs the cached tokens, decodes and measures.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustok.config import Config
from robustok.metrics.frechet import GaussianStatistics, covariance_factor, frechet_distance
from robustok.tokenizers.perturbation import perturb
from robustok.types import FeatureExtractor, UserError

Rate = Annotated[float, Field(ge=0, le=1)]

# The paper's strengths by codebook size, and the shares of K that stand in for sizes it does not name.
PUBLISHED_RATES = (0.9, 0.8, 0.7, 0.6, 0.5)
PUBLISHED_STRENGTHS = {16384: (200, 280, 360), 8192: (100, 140, 180), 4096: (50, 70, 90), 1024: (10, 15, 20)}
PUBLISHED_SHARES = (0.0122, 0.0171, 0.0220)


class RelativeGrid(Config):
    """Strengths as shares of the codebook, so that codebooks of different size meet equal relative strength."""

    name: Literal["relative"] = "relative"
    rates: tuple[Rate, ...] = Field((0.1, 0.25, 0.5, 1.0), min_length=1, description="shares of an image's tokens")
    shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.01, 0.025, 0.05, 0.1), min_length=1, description="strengths as shares of the codebook size; at least 2 codes"
    )

    def strengths(self, codebook_size: int) -> tuple[int, ...]:
        """Strengths in codes, increasing; shares that round to the same number count once."""
        return tuple(sorted({max(2, _round(share * codebook_size)) for share in self.shares}))


class PublishedGrid(Config):
    """The 15 cells reported from the paper: five rates, three strengths that depend on the codebook size."""

    name: Literal["published"] = "published"

    @property
    def rates(self) -> tuple[float, ...]:
        """Shares of an image's tokens."""
        return PUBLISHED_RATES

    def strengths(self, codebook_size: int) -> tuple[int, ...]:
        """The paper's strengths, or round(c K) for a size it does not name, at least 1 and strictly increasing."""
        if codebook_size in PUBLISHED_STRENGTHS:
            return PUBLISHED_STRENGTHS[codebook_size]
        strengths: list[int] = []
        for share in PUBLISHED_SHARES:
            strengths.append(max(strengths[-1] + 1 if strengths else 1, _round(share * codebook_size)))
        return tuple(strengths)


class ExplicitGrid(Config):
    """Rates and strengths of the user's own choice."""

    name: Literal["explicit"] = "explicit"
    rates: tuple[Rate, ...] = Field(min_length=1, description="shares of an image's tokens")
    codes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        min_length=1, description="strengths: numbers of nearest codes"
    )

    def strengths(self, codebook_size: int) -> tuple[int, ...]:
        """The strengths as given."""
        return self.codes


PerturbedGrid = Annotated[RelativeGrid | PublishedGrid | ExplicitGrid, Field(discriminator="name")]


@dataclass(frozen=True)
class PerturbedCell:
    """One cell of pFID.

    Attributes:
        rate: share of each image's tokens that was replaced.
        strength: number of nearest codes each replacement was drawn from.
        value: Frechet distance of the reconstructions to the reference.
    """

    rate: float
    strength: int
    value: float


@dataclass(frozen=True)
class PerturbedSummary:
    """pFID of one tokenizer.

    Attributes:
        cells: every cell of the grid.
        mean: their mean, which is what is called pFID.
        geometric_mean: their geometric mean, in which the strongest cells do not outweigh all others.
    """

    cells: tuple[PerturbedCell, ...]
    mean: float
    geometric_mean: float


def perturbed_cells(
    grid: PerturbedGrid,
    tokens: Tensor,
    neighbours: Tensor,
    decode: Callable[[Tensor], Tensor],
    extractor: FeatureExtractor,
    reference: GaussianStatistics,
    seed: int,
    batch_size: int = 64,
    rank: int = 0,
    processes: int = 1,
    sum_over_processes: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[PerturbedCell]:
    """Measure every cell of the grid.

    The noise of an image depends on the seed, the cell, and its place in a set of that many images: it is the same for
    every tokenizer with as many tokens and codes, and for every batch size and number of processes.

    Args:
        grid: which rates and strengths.
        tokens: (N, L) int64 of all images, in every process.
        neighbours: (K, at least the largest strength) int64, nearest first, from ``nearest_codes``.
        decode: tokens (n, L) to pixels (n, 3, H, W) uint8.
        extractor: the feature space.
        reference: of the original images, in that space.
        seed: of the noise.
        batch_size: images decoded at once.
        rank: this process; it takes every ``processes``-th image.
        processes: how many share the work.
        sum_over_processes: adds up a float64 tensor over all processes; needed with more than one.
        progress: called after each cell with (cells done, all cells).

    Raises:
        UserError: a strength beyond the neighbours given, or fewer than two images.
    """
    strengths = grid.strengths(len(neighbours))
    if max(strengths) > neighbours.shape[1]:
        raise UserError(
            f"pFID grid {grid.name!r} asks for {max(strengths)} nearest codes, there are {neighbours.shape[1]} "
            f"in a codebook of {len(neighbours)}; give smaller strengths or a larger table of neighbours"
        )
    factor = covariance_factor(reference)
    cells: list[PerturbedCell] = []
    pairs = list(product(grid.rates, strengths))
    for rate, strength in pairs:
        # All processes draw for all images and then keep their own: tokens are small, and nothing depends on the split.
        noisy = perturb(tokens, neighbours[:, :strength], rate, 1.0, cell_rng(seed, rate, strength))  # (N, L)
        statistics = decoded_statistics(noisy[rank::processes], decode, extractor, batch_size)
        if sum_over_processes is not None:
            statistics = GaussianStatistics.from_tensor(sum_over_processes(statistics.as_tensor()))
        cells.append(PerturbedCell(rate, strength, frechet_distance(statistics, reference, factor)))
        if progress is not None:
            progress(len(cells), len(pairs))
    return cells


def decoded_statistics(
    tokens: Tensor, decode: Callable[[Tensor], Tensor], extractor: FeatureExtractor, batch_size: int = 64
) -> GaussianStatistics:
    """Statistics of the images that tokens (N, L) decode to: of unperturbed tokens, the rFID side of the comparison."""
    statistics = GaussianStatistics(extractor.dim)
    for batch in tokens.split(batch_size):
        statistics.update(extractor(decode(batch)))
    return statistics


def cell_rng(seed: int, rate: float, strength: int) -> torch.Generator:
    """The random generator of a cell: the same in every grid that holds it, unrelated to those of others."""
    digest = hashlib.sha256(f"pfid {seed} {float(rate)} {strength}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def summarise(cells: Sequence[PerturbedCell]) -> PerturbedSummary:
    """Mean and geometric mean of at least one cell."""
    values = [cell.value for cell in cells]
    logs = [math.log(value) if value > 0 else -math.inf for value in values]
    return PerturbedSummary(tuple(cells), sum(values) / len(values), math.exp(sum(logs) / len(logs)))


def _round(value: float) -> int:
    """To the nearest integer, halves upward; the small number keeps 0.025 * 100 = 2.5 a half whatever its last bit."""
    return math.floor(value + 0.5 + 1e-9)
