"""pFID: Frechet distance of reconstructions decoded from perturbed tokens, over a grid of rates and strengths.

All images are perturbed (proportion 1) and compared with the *original* images. rate is the paper's alpha, the share of
an image's tokens that is replaced; strength is its delta, how many nearest codes a replacement is drawn from. The
images are encoded once; each cell of the grid perturbs the cached tokens, decodes and measures. Continuous latents have
no tokens; for them ``noise.py`` defines another metric under another name.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustok.config import Config
from robustok.errors import UserError
from robustok.metrics.codebook import count_tokens
from robustok.metrics.frechet import Estimate
from robustok.metrics.grid import GridDistance
from robustok.randomness import image_draws
from robustok.tokenizers.perturbation import GridNeighbours, PerturbationDraw, apply_draw, nearest_codes

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


class CalibratedGrid(RelativeGrid):
    """The cells, among all rates and shares, whose tokens look most like a generator's.

    So the paper chose three strengths among 150, 200, 280, 360, 400 and 500 of 16,384 codes, which are about the shares
    here.
    """

    name: Literal["calibrated"] = "calibrated"
    rates: tuple[Rate, ...] = Field((0.1, 0.3, 0.5, 0.7, 0.9), min_length=1, description="rates to choose from")
    shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.01, 0.0125, 0.0175, 0.0225, 0.025, 0.03),
        min_length=1,
        description="strengths to choose from, as shares of the codebook size; at least 2 codes",
    )
    keep: int = Field(15, ge=1, description="number of cells that are kept")


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


PerturbedGrid = Annotated[
    RelativeGrid | PublishedGrid | PublishedFastGrid | CalibratedGrid | ExplicitGrid, Field(discriminator="name")
]


def perturbed_protocol(
    grid: PerturbedGrid,
    codebook_size: int,
    include_self: bool = True,
    images: int | None = None,
    levels: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """The settings that a value of pFID depends on, which are written beside it; ``protocol`` names them.

    ``published`` is the paper's grid. ``-scaled`` marks a codebook size that the paper does not have, ``-fast`` five of
    its cells, ``-without-self`` neighbours without the token itself, unlike the paper's, ``@N`` fewer images than
    50,000. A relative grid with other rates or shares than the default ones is ``relative-custom``; in a calibrated one
    they are those to choose from.
    """
    name = grid.name
    if name.startswith("published"):
        name += "" if codebook_size in PUBLISHED_STRENGTHS else "-scaled"
    elif isinstance(grid, RelativeGrid) and grid != type(grid)():
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
    } | ({} if levels is None else {"distance": "levels, ties drawn uniformly", "levels": list(levels)})


@dataclass(frozen=True)
class PerturbedCell:
    """One cell of pFID.

    Attributes:
        rate: share of each image's tokens that was replaced.
        strength: number of nearest codes from which each replacement was drawn.
        value: Frechet distance of the reconstructions to the reference, mean over seeds.
        standard_error: of ``value`` over seeds; None for one seed.
        mmd: of a calibrated grid, squared MMD between generated latents and those with this perturbation.
    """

    rate: float
    strength: int
    value: float = math.nan
    standard_error: float | None = None
    mmd: Estimate | None = None

    @property
    def noise(self) -> tuple[float, int]:
        """Rate and strength."""
        return self.rate, self.strength


@dataclass(frozen=True, kw_only=True)
class PFID(GridDistance):
    """pFID: the tokens of all images are perturbed, decoded and compared with the original images.

    Attributes:
        grid: rates and strengths.
        codebook: (K, D) in the geometry in which neighbours are meant.
        include_self: whether a token counts among its own neighbours and may stay what it is, as in the paper:
            then a share rate (1 - 1 / strength) of the tokens changes, else exactly round(rate x L) of each image.
        levels: a tokenizer's ``code_levels``.
    """

    grid: PerturbedGrid
    codebook: Tensor
    include_self: bool = True
    levels: tuple[int, ...] | None = None

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
        _ = self.neighbours(max(strengths))  # refuses more neighbours than there are
        return [PerturbedCell(*cell) for cell in product(self.grid.rates, strengths)]

    @cached_property
    def _table(self) -> Tensor:
        """The nearest codes (K, S) of each code, as many as the largest strength."""
        most = max(self.grid.strengths(len(self.codebook)))
        return nearest_codes(self.codebook, most, self.include_self).to(self.latents.device)

    def neighbours(self, strength: int) -> Tensor | GridNeighbours:
        """The nearest codes of each code, see :func:`~robustok.tokenizers.perturbation.nearest_codes`."""
        if self.levels is not None:
            return nearest_codes(self.codebook, strength, self.include_self, self.levels)
        return self._table[:, :strength]

    def noisy(self, cell: PerturbedCell, seed: int, indices: Tensor) -> Tensor:
        """Perturbed tokens (n, L), see :func:`perturbed_tokens`."""
        return perturbed_tokens(self.latents, self.neighbours(cell.strength), cell.rate, seed, indices)

    def vectors(self, latents: Tensor) -> Tensor:
        """Code vectors (n, L, D) of tokens (n, L)."""
        return self.codebook.to(self.device)[latents.to(self.device)]


def perturbed_tokens(
    tokens: Tensor, neighbours: Tensor | GridNeighbours, rate: float, seed: int, indices: Tensor
) -> Tensor:
    """The tokens (n, L) of the images at ``indices`` (n,), as the cell (rate, strength) of one seed decodes them.

    In each image round(rate x L) tokens are replaced by one of their neighbours (K, strength), each equally likely.
    """
    length, strength = tokens.shape[1], neighbours.shape[1]
    draws = image_draws(torch.rand, f"pfid {seed} {float(rate)} {strength}", indices, (2, length))  # (n, 2, L)
    positions = draws[:, 0].argsort(dim=1).argsort(dim=1) < round(rate * length)  # (n, L)
    draw = PerturbationDraw(torch.ones(len(indices), dtype=torch.bool), positions, draws[:, 1])
    return apply_draw(tokens[indices], neighbours, draw)


def _round(value: float) -> int:
    """To the nearest integer, halves upward; the small number keeps 0.025 * 100 = 2.5 a half whatever its last bit."""
    return math.floor(value + 0.5 + 1e-9)
