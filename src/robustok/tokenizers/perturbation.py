"""Latent perturbation: replace a share of an image's tokens by near neighbours in the codebook.

Pure functions of tokens and a codebook, for every discrete tokenizer, in training and in pFID. The paper's letters:
``rate`` is alpha (share of an image's tokens), ``proportion`` is beta (share of the batch's images), ``strength`` is
delta (how many nearest codes a replacement is drawn from). Source: arXiv 2509.12474, section on latent perturbation.
Where the authors' code differs, :class:`PerturbationConfig` has a setting.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from robustok.config import Config
from robustok.devices import to_device
from robustok.errors import UserError
from robustok.precision import exact_float32
from robustok.tokenizers.levels import GridNeighbours

Selection = Literal["exact", "bernoulli"]
ImageSelection = Literal["stochastic", "floor"]


class PerturbationConfig(Config):
    """Latent perturbation during main training. Defaults follow the paper."""

    rate: float = Field(1.0, ge=0, le=1, description="share of a chosen image's tokens that is replaced (alpha)")
    proportion: float = Field(
        0.1, ge=0, le=1, description="share of the images of a batch that is perturbed (beta); 0 is off"
    )
    strength: int = Field(
        100, ge=0, description="replacements are drawn from this many nearest codes (delta); 0 is off"
    )
    anneal_start: int = Field(0, ge=0, description="step at which rate and strength start to fall")
    anneal_end: int = Field(0, ge=0, description="step at which they reach end_ratio; 0 means no annealing")
    end_ratio: float = Field(0.5, ge=0, le=1, description="rate and strength at the end, as a share of the start")
    selection: Selection = Field(
        "exact",
        description="exact: round(rate x L) tokens an image; bernoulli: each by chance (authors' code)",
    )
    image_selection: ImageSelection = Field(
        "stochastic",
        description="stochastic: random images, fractions rounded at random; floor: the first int(beta x N) (authors)",
    )
    neighbour_of: Literal["code", "feature"] = Field(
        "code", description="neighbours of the token's code, or of the feature (authors' code)"
    )
    include_self: bool = Field(True, description="whether a token is among its own neighbours, as in the paper")
    semantic_on: Literal["clean", "perturbed"] = Field(
        "clean", description="latents in the semantic loss (authors' code: perturbed)"
    )

    @model_validator(mode="after")
    def _annealing_ends_after_its_start(self) -> "PerturbationConfig":
        if self.anneal_end and self.anneal_end < self.anneal_start:
            raise ValueError(
                f"anneal_end {self.anneal_end} is before anneal_start {self.anneal_start}; raise it or set 0"
            )
        return self

    def at(self, step: int) -> tuple[float, int]:
        """Annealed (rate, strength) at a training step: linear from 1 to ``end_ratio``, constant before and after."""
        ratio = annealing_ratio(step, self.anneal_start, self.anneal_end, self.end_ratio)
        return ratio * self.rate, int(ratio * self.strength)

    @property
    def active(self) -> bool:
        """Whether anything is ever perturbed."""
        return self.rate > 0 and self.proportion > 0 and self.strength > 0


def annealing_ratio(step: int, start: int, end: int, end_ratio: float) -> float:
    """1 up to ``start``, linear to ``end_ratio`` at ``end``, constant afterwards; ``end`` 0 means always 1.

    The authors' ramp, ``1 - fraction * end_ratio``, jumps unless end_ratio is 0.5; this one does not.
    """
    if not end or step <= start:
        return 1.0
    if step >= end:
        return end_ratio
    return 1.0 + (end_ratio - 1.0) * (step - start) / (end - start)


@dataclass(frozen=True)
class PerturbationDraw:
    """The random numbers of one perturbation, drawn for a whole batch of which every process takes its rows.

    They stay on the CPU: to learn from a mask on a GPU how many tokens are replaced, the CPU would have to wait for it.

    Attributes:
        images: (N,) bool, which images are perturbed.
        positions: (N, L) bool, which tokens of them are replaced.
        ranks: (N, L) uniform in [0, 1): which of the neighbours a replacement is.
    """

    images: Tensor
    positions: Tensor
    ranks: Tensor

    def rows(self, start: int, stop: int) -> "PerturbationDraw":
        """The draw for images ``start`` to ``stop`` of the batch."""
        return PerturbationDraw(self.images[start:stop], self.positions[start:stop], self.ranks[start:stop])

    @property
    def mask(self) -> Tensor:
        """(N, L) bool: tokens that are replaced."""
        return self.positions & self.images[:, None]  # (N, L)

    def replaced(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The M tokens that are replaced, on a device: their indices (M,) among all N x L, and their ranks (M,)."""
        at = self.mask.flatten().nonzero()[:, 0]  # (M,)
        return to_device(at, device), to_device(self.ranks.flatten()[at], device)


def draw_perturbation(
    count: int,
    length: int,
    rate: float,
    proportion: float,
    rng: torch.Generator,
    selection: Selection = "exact",
    image_selection: ImageSelection = "stochastic",
) -> PerturbationDraw:
    """Choose images and tokens to perturb.

    Args:
        count: N, images in the batch.
        length: L, tokens an image.
        rate: share of an image's tokens, in [0, 1]. ``exact`` replaces round(rate x L) tokens of each chosen image,
            ``bernoulli`` each token with probability ``rate``.
        proportion: share of images, in [0, 1]. ``stochastic`` takes floor(proportion x N) random images and one more
            with the probability of the fraction left, so that a small batch is still perturbed; ``floor`` takes the
            first ones.
        rng: source of all draws, a CPU generator.
        selection: how tokens are chosen.
        image_selection: how images are chosen.

    Raises:
        UserError: rate or proportion outside [0, 1].
    """
    for name, value in (("rate", rate), ("proportion", proportion)):
        if not 0 <= value <= 1:
            raise UserError(f"perturbation {name} is {value}, expected a share in [0, 1]")
    keys = torch.rand(count, generator=rng)
    extra = torch.rand((), generator=rng).item()
    wanted = proportion * count
    if image_selection == "stochastic":
        # The small number: 0.3 * 10 = 3.0000000000000004 must never become four images.
        whole = math.floor(wanted + 1e-9)
        images = _smallest(keys[None], whole + int(extra < wanted - whole - 1e-9))[0]  # (N,)
    else:
        images = torch.arange(count) < int(wanted)  # (N,)
    draws = torch.rand((count, length), generator=rng)
    positions = _smallest(draws, round(rate * length)) if selection == "exact" else draws < rate  # (N, L)
    return PerturbationDraw(images, positions, torch.rand((count, length), generator=rng))


def _smallest(keys: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` smallest keys in each row: a uniform choice without replacement."""
    mask = torch.zeros_like(keys, dtype=torch.bool)
    return mask.scatter_(1, keys.argsort(dim=1)[:, :count], True)


def nearest_codes(
    codebook: Tensor, strength: int, include_self: bool = False, levels: Sequence[int] | None = None
) -> Tensor | GridNeighbours:
    """The ``strength`` nearest codes of every code, nearest first.

    Args:
        codebook: (K, D) in the geometry in which neighbours are meant.
        strength: delta >= 0, number of neighbours.
        include_self: count the code itself as its own first neighbour, as in the paper.
        levels: a tokenizer's ``code_levels``.

    Returns:
        (K, strength) int64. A smaller strength is a prefix of a larger one. For codes on a grid of levels, in the place
        of a table, what draws from the neighbours of given tokens.

    Raises:
        UserError: more neighbours than codes.
    """
    if levels is not None:
        _check_strength(strength, len(codebook), include_self)
        return GridNeighbours(tuple(levels), strength, include_self)
    own = torch.arange(len(codebook), device=codebook.device)
    return nearest_to(codebook, codebook, strength, own=own, include_self=include_self)


def nearest_to(
    queries: Tensor, codebook: Tensor, strength: int, own: Tensor, include_self: bool = False, ordered: bool = True
) -> Tensor:
    """The ``strength`` codes nearest to each query in Euclidean distance.

    Args:
        queries: (M, D) code vectors or features.
        codebook: (K, D).
        strength: delta >= 0.
        own: (M,) int64, the token of each query: left out, or, if ``include_self``, put first.
        include_self: see :func:`nearest_codes`.
        ordered: nearest first; False is faster and enough for a uniform draw.

    Returns:
        (M, strength) int64.

    Raises:
        UserError: more neighbours than codes.
    """
    _check_strength(strength, len(codebook), include_self)
    codebook = codebook.detach().float()
    squares = codebook.square().sum(1)  # (K,)
    found, rows = [], max(1, min(4096, 2**26 // len(codebook)))  # bounds memory at 2^26 distances
    for start in range(0, len(queries), rows):
        chunk = queries[start : start + rows].detach().float()
        with exact_float32(codebook.device):
            distances = torch.addmm(squares, chunk, codebook.T, alpha=-2)  # (m, K), short of the constant |query|^2
        # The rank of the own code is set here: rounding, or a duplicate of it, must not decide it.
        distances.scatter_(1, own[start : start + rows, None], -torch.inf if include_self else torch.inf)
        found.append(distances.topk(strength, largest=False, sorted=ordered).indices)  # (m, strength)
    return torch.cat(found) if found else own.new_empty((0, strength))  # (M, strength)


def _check_strength(strength: int, size: int, include_self: bool) -> None:
    most = size - (not include_self)
    if not 0 <= strength <= most:
        raise UserError(
            f"perturbation strength is {strength}, but a codebook of {size} codes has {most} neighbours for each; "
            "lower strength or enlarge the codebook"
        )


def apply_draw(tokens: Tensor, neighbours: Tensor | GridNeighbours, draw: PerturbationDraw) -> Tensor:
    """Replace the drawn tokens by the drawn neighbours of their codes.

    Args:
        tokens: (N, L) int64.
        neighbours: (K, strength) from :func:`nearest_codes`; with zero columns nothing is replaced.
        draw: which tokens, and which neighbour.

    Returns:
        (N, L) int64.
    """
    strength = neighbours.shape[1]
    if strength == 0:
        return tokens
    at, ranks = draw.replaced(tokens.device)  # (M,)
    own = tokens.flatten()[at]  # (M,)
    if isinstance(neighbours, GridNeighbours):
        return _replace(tokens, at, neighbours.drawn(own, ranks))
    return _replace(tokens, at, neighbours[own, _rank(ranks, strength)])


def _replace(tokens: Tensor, at: Tensor, chosen: Tensor) -> Tensor:
    """Tokens (N, L) with those at the indices (M,) replaced by the chosen ones (M,)."""
    return tokens.flatten().scatter(0, at, chosen).view_as(tokens)


def _rank(uniforms: Tensor, strength: int) -> Tensor:
    # float32 rounding can turn 0.99999997 x strength into strength
    return (uniforms * strength).long().clamp_(max=strength - 1)


def perturb(
    tokens: Tensor,
    neighbours: Tensor | GridNeighbours,
    rate: float,
    proportion: float,
    rng: torch.Generator,
    selection: Selection = "exact",
    image_selection: ImageSelection = "stochastic",
) -> Tensor:
    """Perturb tokens: in a share of the images, replace a share of the tokens by near neighbours of their codes.

    Args:
        tokens: (N, L) int64.
        neighbours: (K, strength) int64 from :func:`nearest_codes`.
        rate: alpha in [0, 1], share of an image's tokens.
        proportion: beta in [0, 1], share of the images; 1 for pFID.
        rng: CPU random generator.
        selection: ``exact`` count (paper) or ``bernoulli`` (authors' code).
        image_selection: ``stochastic`` or ``floor`` (authors' code), see :func:`draw_perturbation`.

    Returns:
        (N, L) int64. rate 0, proportion 0 and strength 0 are identities.
    """
    draw = draw_perturbation(*tokens.shape, rate, proportion, rng, selection, image_selection)
    return apply_draw(tokens, neighbours, draw)


def perturb_latents(
    features: Tensor,
    tokens: Tensor,
    codebook: Tensor,
    draw: PerturbationDraw,
    strength: int,
    config: PerturbationConfig,
    levels: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Perturbation in the training forward of any tokenizer with a codebook, called after its quantiser.

    Neighbours are searched for the drawn tokens only: for all tokens of the batch it would take many times as long.

    Args:
        features: (N, L, D) continuous features, in the geometry of the codebook; gradients pass straight through to
            them.
        tokens: (N, L) int64, their codes.
        codebook: (K, D).
        draw: what to replace.
        strength: delta, already annealed.
        config: ``neighbour_of`` and ``include_self`` are read from it.
        levels: a tokenizer's ``code_levels``; neighbours of features are those in ``codebook`` nevertheless.

    Returns:
        The straight-through vectors (N, L, D) of all tokens, perturbed and not, and their tokens (N, L).
    """
    if strength > 0 and levels is not None and config.neighbour_of == "code":
        tokens = apply_draw(tokens, nearest_codes(codebook, strength, config.include_self, levels), draw)
    elif strength > 0:
        at, ranks = draw.replaced(tokens.device)  # (M,)
        own = tokens.flatten()[at]  # (M,)
        queries = codebook[own] if config.neighbour_of == "code" else features.flatten(0, 1)[at]  # (M, D)
        near = nearest_to(queries, codebook, strength, own, config.include_self, ordered=False)  # (M, strength)
        tokens = _replace(tokens, at, near.gather(1, _rank(ranks, strength)[:, None])[:, 0])
    return straight_through(features, codebook[tokens]), tokens


def straight_through(features: Tensor, vectors: Tensor) -> Tensor:
    """The value of ``vectors`` with the gradient of ``features``, both (N, L, D)."""
    return features + (vectors - features).detach()
