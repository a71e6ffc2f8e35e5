"""``noise_fd``: Frechet distance of reconstructions decoded from noised continuous latents, over a grid of levels.

What :mod:`robustok.metrics.pfid` is to tokens: the images are encoded once, each cell of the grid adds Gaussian
noise to the latents, decodes and compares with the *original* images. It is no pFID, which replaces tokens by codes.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustok.config import Config
from robustok.errors import UserError
from robustok.metrics.frechet import GaussianStatistics
from robustok.metrics.pfid import PerturbedSummary, distances, over_seeds
from robustok.randomness import image_draws
from robustok.types import FeatureExtractor


class NoiseGrid(Config):
    """Standard deviations of Gaussian noise, relative to the latents' own."""

    name: Literal["noise"] = "noise"
    levels: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (0.1, 0.2, 0.3, 0.4, 0.5), min_length=1, description="noise, in standard deviations of the latents per channel"
    )


@dataclass(frozen=True)
class NoiseCell:
    """One cell of ``noise_fd``.

    Attributes:
        level: standard deviation of the noise, as a multiple of the latents' own in each channel.
        value: Frechet distance of the reconstructions to the reference, mean over seeds.
        standard_error: of ``value`` over seeds; None for one seed.
    """

    level: float
    value: float
    standard_error: float | None = None


def noise_frechet(
    grid: NoiseGrid,
    latents: Tensor,
    decode: Callable[[Tensor], Tensor],
    extractor: FeatureExtractor,
    reference: GaussianStatistics,
    *,
    scale: Tensor | None = None,
    seeds: Sequence[int] = (0,),
    batch_size: int = 64,
    rank: int = 0,
    processes: int = 1,
    sum_over_processes: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PerturbedSummary:
    """Add noise of standard deviation level x scale to the latents of all images, decode and measure.

    The noise of an image depends on the seed, the level and its place in the set alone. Scaled by the latents' own
    spread, their units do not matter: latents normalised or not give the same distances.

    Args:
        grid: which levels.
        latents: (N, L, D) float of all images, in every process.
        decode: latents (n, L, D) to pixels (n, 3, H, W) uint8. Called without gradients.
        extractor: the feature space.
        reference: statistics of the original images in that space.
        scale: (D,) standard deviation of each channel; None takes :func:`latent_scale` of these latents.
        seeds: of the noise; several give standard errors.
        batch_size: images decoded at once.
        rank: this process; it takes every ``processes``-th image.
        processes: how many share the work.
        sum_over_processes: adds up a float64 tensor over all processes; needed with more than one.
        progress: called after each cell with (cells done, all cells).

    Returns:
        The summary, whose cells are each a :class:`NoiseCell`.

    Raises:
        UserError: latents that are no finite (N, L, D) floats, fewer than two images, or no seeds.
    """
    started = time.perf_counter()
    scale = latent_scale(latents) if scale is None else scale
    cells = [NoiseCell(level, math.nan) for level in grid.levels]
    noisy = [partial(noised_latents, latents, scale, cell.level, seed) for seed, cell in product(seeds, cells)]
    values = distances(
        noisy, len(latents), decode, extractor, reference, batch_size, rank, processes, sum_over_processes, progress
    )
    name = grid.name if grid == NoiseGrid() else f"{grid.name}-custom"
    return over_seeds(cells, values, name, len(latents), seeds, started)


def latent_scale(latents: Tensor) -> Tensor:
    """Standard deviation of each channel of latents (N, L, D) over all images and positions: (D,) float64, unbiased.

    Raises:
        UserError: no floats of this shape, fewer than two vectors, or values that are not finite.
    """
    if latents.ndim != 3 or not latents.is_floating_point() or latents.shape[0] * latents.shape[1] < 2:
        found = f"{latents.dtype} of shape {tuple(latents.shape)}"
        raise UserError(f"got latents {found}, expected floats (N, L, D); for tokens measure pFID instead")
    count, chunks = latents.shape[0] * latents.shape[1], latents.flatten(0, 1).split(2**20)  # float64 a part at a time
    mean = sum(chunk.double().sum(dim=0) for chunk in chunks) / count  # (D,)
    variance = sum((chunk.double() - mean).square().sum(dim=0) for chunk in chunks) / (count - 1)  # (D,)
    if not torch.isfinite(variance).all():
        raise UserError("got latents that are not finite, expected numbers; look for broken images or weights")
    return variance.sqrt()


def noised_latents(latents: Tensor, scale: Tensor, level: float, seed: int, indices: Tensor) -> Tensor:
    """The latents (n, L, D) of the images at ``indices`` (n,), with the noise of one level and seed added."""
    noise = image_draws(torch.randn, f"noise_fd {seed} {float(level)}", indices, tuple(latents.shape[1:]))  # (n, L, D)
    return latents[indices] + (level * scale.to(latents)) * noise.to(latents)
