"""pFID: Frechet distance of reconstructions decoded from perturbed tokens, over a grid of rates and strengths.

All images are perturbed (proportion 1) and judged against the *original* images. rate is the paper's alpha, the share
of an image's tokens that is replaced; strength is its delta, how many nearest codes a replacement is drawn from. The
images are encoded once; each cell of the grid perturbs the cached tokens, decodes and measures. Continuous latents have
no such tokens: what stands in for it there is another quantity under another name, in ``noise.py``.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustok.config import Config
from robustok.errors import UserError
from robustok.metrics.codebook import count_tokens
from robustok.metrics.frechet import GaussianStatistics, covariance_factor, frechet_distance, mean_and_standard_error
from robustok.randomness import image_draws
from robustok.tokenizers.perturbation import PerturbationDraw, apply_draw, nearest_codes
from robustok.types import FeatureExtractor

Rate = Annotated[float, Field(ge=0, le=1)]

# The paper's grid, all in one place: arXiv 2509.12474. For other codebooks see PublishedGrid.strengths.
PUBLISHED_RATES = (0.9, 0.8, 0.7, 0.6, 0.5)
PUBLISHED_STRENGTHS = {16384: (200, 280, 360), 8192: (100, 140, 180), 4096: (50, 70, 90), 1024: (10, 15, 20)}
PUBLISHED_IMAGES = 50_000  # the validation set of ImageNet


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
        """Three strengths in codes, increasing.

        For 16,384, 8,192, 4,096 and 1,024 codes they are the paper's. The paper names no other size; for those they are
        the strengths of 16,384 codes in proportion, 200, 280 and 360 times K / 16,384, rounded (halves upward), at
        least 2 and each at least one more than the last: 6, 9 and 11 for 512 codes, 2, 3 and 4 for 128 and fewer.
        Such values go by the protocol ``published-scaled`` and have no published counterpart.
        """
        if codebook_size in PUBLISHED_STRENGTHS:
            return PUBLISHED_STRENGTHS[codebook_size]
        strengths: list[int] = []
        for strength in PUBLISHED_STRENGTHS[16384]:
            least = strengths[-1] + 1 if strengths else 2
            strengths.append(max(least, _round(strength * codebook_size / 16384)))
        return tuple(strengths)


class PublishedFastGrid(Config):
    """Five of the 15 published cells: every rate at the middle strength. A stand-in while one works, not for tables.

    The three strengths are equally spaced, so these five have the mean of all 15 exactly wherever the distance is
    linear in the strength, with any offset and slope at each rate: only curvature along the strength is lost. Five
    cells of mixed strengths would be off for slopes that differ between rates too. As a third of the draws is averaged,
    the standard error over seeds is about sqrt(3) times larger.
    """

    name: Literal["published-fast"] = "published-fast"

    @property
    def rates(self) -> tuple[float, ...]:
        """Shares of an image's tokens."""
        return PUBLISHED_RATES

    def strengths(self, codebook_size: int) -> tuple[int, ...]:
        """The middle one of the published strengths, or of those that :class:`PublishedGrid` derives."""
        return PublishedGrid().strengths(codebook_size)[1:2]


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


PerturbedGrid = Annotated[RelativeGrid | PublishedGrid | PublishedFastGrid | ExplicitGrid, Field(discriminator="name")]


def perturbed_protocol(
    grid: PerturbedGrid, codebook_size: int, include_self: bool = False, images: int | None = None
) -> dict[str, Any]:
    """What a value of pFID depends on besides data and features, to be written beside it; ``protocol`` names it.

    ``published`` is the paper's grid and nothing else: ``-scaled`` marks a codebook size that the paper does not name,
    ``-fast`` five of its cells, ``-with-self`` tokens that may stay what they are, ``@N`` fewer images than 50,000.
    A relative grid with other rates or shares than the default ones is ``relative-custom``.
    """
    name = grid.name
    if name.startswith("published"):
        name += "" if codebook_size in PUBLISHED_STRENGTHS else "-scaled"
    elif isinstance(grid, RelativeGrid) and grid != RelativeGrid():
        name += "-custom"
    name += "-with-self" if include_self else ""
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
        strength: number of nearest codes each replacement was drawn from.
        value: Frechet distance of the reconstructions to the reference, mean over seeds.
        standard_error: of ``value`` over seeds; None for one seed.
    """

    rate: float
    strength: int
    value: float
    standard_error: float | None = None


@dataclass(frozen=True)
class PerturbedSummary:
    """pFID of one tokenizer.

    Attributes:
        cells: every cell of the grid.
        mean: their mean, which is what is called pFID.
        geometric_mean: their geometric mean, in which the strongest cells do not outweigh all others.
        standard_error: of ``mean`` over seeds; None for one seed.
        geometric_standard_error: of ``geometric_mean`` over seeds; None for one seed.
        protocol: its name, see :func:`perturbed_protocol`.
        images: N.
        seeds: of the perturbations.
        seconds: wall time of all cells and seeds, decoding and features included, encoding not.
    """

    cells: tuple[PerturbedCell, ...]
    mean: float
    geometric_mean: float
    standard_error: float | None = None
    geometric_standard_error: float | None = None
    protocol: str = ""
    images: int = 0
    seeds: tuple[int, ...] = ()
    seconds: float = field(default=math.nan, compare=False)

    @property
    def seconds_per_cell(self) -> float:
        """Wall time of one cell with one seed."""
        return self.seconds / (len(self.cells) * max(1, len(self.seeds)))


def perturbed_frechet(
    grid: PerturbedGrid,
    tokens: Tensor,
    codebook: Tensor,
    decode: Callable[[Tensor], Tensor],
    extractor: FeatureExtractor,
    reference: GaussianStatistics,
    *,
    seeds: Sequence[int] = (0,),
    include_self: bool = False,
    batch_size: int = 64,
    rank: int = 0,
    processes: int = 1,
    sum_over_processes: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PerturbedSummary:
    """pFID: perturb the tokens of all images, decode, and measure the distance to the original images.

    Costs one decoding of all images a cell and seed, and no encoding. The noise of an image depends on the seed, the
    cell and its place in the set alone: it is the same for every tokenizer with as many tokens, for a part of the set,
    for every batch size and number of processes.

    Args:
        grid: which rates and strengths.
        tokens: (N, L) int64 of all images, in every process.
        codebook: (K, D) in the geometry in which neighbours are meant.
        decode: tokens (n, L) to pixels (n, 3, H, W) uint8. Called without gradients.
        extractor: the feature space.
        reference: statistics of the original images in that space.
        seeds: of the perturbations; several give standard errors.
        include_self: whether a token counts among its own neighbours and may stay what it is, as in the released
            code: then a share rate (1 - 1 / strength) of the tokens changes, else exactly round(rate x L) an image.
        batch_size: images decoded at once.
        rank: this process; it takes every ``processes``-th image.
        processes: how many share the work.
        sum_over_processes: adds up a float64 tensor over all processes; needed with more than one.
        progress: called after each cell with (cells done, all cells).

    Raises:
        UserError: fewer neighbours than the grid asks for, a strength of 1 with ``include_self``, tokens outside the
            codebook, fewer than two images, or no seeds.
    """
    started = time.perf_counter()
    count_tokens(tokens, len(codebook))  # refuses those of another codebook
    strengths = grid.strengths(len(codebook))
    if include_self and min(strengths) < 2:
        raise UserError(
            "pFID with include_self and a strength of 1 replaces every token by itself; use strengths from 2"
        )
    neighbours = nearest_codes(codebook, max(strengths), include_self).to(tokens.device)  # (K, S)
    cells = [PerturbedCell(rate, strength, math.nan) for rate, strength in product(grid.rates, strengths)]
    noisy = [
        partial(perturbed_tokens, tokens, neighbours[:, : cell.strength], cell.rate, seed)
        for seed, cell in product(seeds, cells)
    ]
    values = distances(
        noisy, len(tokens), decode, extractor, reference, batch_size, rank, processes, sum_over_processes, progress
    )
    protocol = perturbed_protocol(grid, len(codebook), include_self, len(tokens))["protocol"]
    return over_seeds(cells, values, protocol, len(tokens), seeds, started)


def distances(
    noisy: Sequence[Callable[[Tensor], Tensor]],
    count: int,
    decode: Callable[[Tensor], Tensor],
    extractor: FeatureExtractor,
    reference: GaussianStatistics,
    batch_size: int = 64,
    rank: int = 0,
    processes: int = 1,
    sum_over_processes: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """The Frechet distance to the reference of each of several noisy versions of a set of ``count`` images.

    A version takes places (n,) int64 in the set to the latents of these images, which are then decoded. For the other
    arguments see :func:`perturbed_frechet`.
    """
    factor = covariance_factor(reference)  # costs as much as a distance, and is the same for all
    own = torch.arange(rank, count, processes)
    values: list[float] = []
    for version in noisy:
        statistics = GaussianStatistics(extractor.dim)
        with torch.no_grad():
            for indices in own.split(batch_size) if len(own) else ():
                statistics.update(extractor(decode(version(indices))))
        if sum_over_processes is not None:
            statistics = GaussianStatistics.from_tensor(sum_over_processes(statistics.as_tensor()))
        values.append(frechet_distance(statistics, reference, factor))
        if progress is not None:
            progress(len(values), len(noisy))
    return values


def decoded_statistics(
    tokens: Tensor, decode: Callable[[Tensor], Tensor], extractor: FeatureExtractor, batch_size: int = 64
) -> GaussianStatistics:
    """Statistics of the images that tokens (N, L) decode to: of unperturbed tokens, the rFID side of the comparison."""
    statistics = GaussianStatistics(extractor.dim)
    for batch in tokens.split(batch_size):
        statistics.update(extractor(decode(batch)))
    return statistics


def perturbed_tokens(tokens: Tensor, neighbours: Tensor, rate: float, seed: int, indices: Tensor) -> Tensor:
    """The tokens (n, L) of the images at ``indices`` (n,), as the cell (rate, strength) of one seed decodes them.

    In each image round(rate x L) tokens give way to one of their neighbours (K, strength), each with equal chance.
    """
    length, strength = tokens.shape[1], neighbours.shape[1]
    draws = image_draws(torch.rand, f"pfid {seed} {float(rate)} {strength}", indices, (2, length))  # (n, 2, L)
    positions = draws[:, 0].argsort(dim=1).argsort(dim=1) < round(rate * length)  # (n, L)
    draw = PerturbationDraw(torch.ones(len(indices), dtype=torch.bool), positions, draws[:, 1])
    return apply_draw(tokens[indices], neighbours, draw.to(tokens.device))


def over_seeds(
    cells: Sequence[Any], values: Sequence[float], protocol: str, images: int, seeds: Sequence[int], started: float
) -> PerturbedSummary:
    """Summarise values of all cells for each seed in turn, measured since ``started`` on the performance counter."""
    count, found = len(cells), []
    runs = [
        summarise([replace(cell, value=value) for cell, value in zip(cells, values[i : i + count], strict=True)])
        for i in range(0, len(values), count)
    ]
    means = mean_and_standard_error([run.mean for run in runs])
    geometric = mean_and_standard_error([run.geometric_mean for run in runs])
    for i, cell in enumerate(cells):
        over = mean_and_standard_error([run.cells[i].value for run in runs])
        found.append(replace(cell, value=over.value, standard_error=over.standard_error))
    return PerturbedSummary(
        tuple(found), means.value, geometric.value, means.standard_error, geometric.standard_error,
        protocol, images, tuple(seeds), time.perf_counter() - started,
    )  # fmt: skip


def summarise(cells: Sequence[PerturbedCell]) -> PerturbedSummary:
    """Mean and geometric mean of at least one cell."""
    values = [cell.value for cell in cells]
    logs = [math.log(value) if value > 0 else -math.inf for value in values]
    return PerturbedSummary(tuple(cells), sum(values) / len(values), math.exp(sum(logs) / len(logs)))


def _round(value: float) -> int:
    """To the nearest integer, halves upward; the small number keeps 0.025 * 100 = 2.5 a half whatever its last bit."""
    return math.floor(value + 0.5 + 1e-9)
