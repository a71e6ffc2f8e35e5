"""``noise_fd``: Frechet distance of reconstructions decoded from noised continuous latents, over a grid of levels.

The images are encoded once; each cell of the grid adds Gaussian noise to the latents, decodes and compares with the
*original* images. It is not pFID, which replaces tokens by other codes.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from robustok.config import Config
from robustok.errors import UserError
from robustok.metrics.frechet import Estimate
from robustok.metrics.grid import GridDistance
from robustok.randomness import image_draws


class NoiseGrid(Config):
    """Standard deviations of Gaussian noise, relative to that of the latents."""

    name: Literal["noise"] = "noise"
    levels: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (0.1, 0.2, 0.3, 0.4, 0.5), min_length=1, description="noise, in standard deviations of the latents per channel"
    )


class CalibratedNoiseGrid(NoiseGrid):
    """The levels, among those given, whose latents look most like a generator's."""

    name: Literal["calibrated"] = "calibrated"
    levels: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        tuple(i / 10 for i in range(1, 11)), min_length=1, description="levels to choose from"
    )
    keep: int = Field(5, ge=1, description="number of levels that are kept")


AnyNoiseGrid = Annotated[NoiseGrid | CalibratedNoiseGrid, Field(discriminator="name")]


@dataclass(frozen=True)
class NoiseCell:
    """One cell of ``noise_fd``.

    Attributes:
        level: standard deviation of the noise, as a multiple of that of the latents in each channel.
        value: Frechet distance of the reconstructions to the reference, mean over seeds.
        standard_error: of ``value`` over seeds; None for one seed.
        mmd: of a calibrated grid, squared MMD between generated latents and those with this noise.
    """

    level: float
    value: float = math.nan
    standard_error: float | None = None
    mmd: Estimate | None = None

    @property
    def noise(self) -> tuple[float]:
        """The level."""
        return (self.level,)


@dataclass(frozen=True, kw_only=True)
class NoiseFD(GridDistance):
    """``noise_fd``: noise of standard deviation level x scale is added to the latents (N, L, D) of all images.

    The scale is that of the latents, so their units do not matter: latents normalised or not give the same distances.

    Attributes:
        grid: levels.
    """

    grid: AnyNoiseGrid

    @property
    def protocol(self) -> str:
        """``noise`` or ``noise-calibrated``, and then ``-custom`` for other than the default settings."""
        name = "noise-calibrated" if isinstance(self.grid, CalibratedNoiseGrid) else "noise"
        return name if self.grid == type(self.grid)() else f"{name}-custom"

    @cached_property
    def scale(self) -> Tensor:
        """See :func:`latent_scale`."""
        return latent_scale(self.latents)

    def cells(self) -> list[NoiseCell]:
        """Every level.

        Raises:
            UserError: latents that are not finite floats (N, L, D).
        """
        _ = self.scale
        return [NoiseCell(level) for level in self.grid.levels]

    def noisy(self, cell: NoiseCell, seed: int, indices: Tensor) -> Tensor:
        """Latents with noise (n, L, D), see :func:`noised_latents`."""
        return noised_latents(self.latents, self.scale, cell.level, seed, indices)

    def vectors(self, latents: Tensor) -> Tensor:
        """Latents (n, L, D), each channel in its standard deviations, so that their units do not matter."""
        return latents.to(self.device) / torch.where(self.scale > 0, self.scale, 1).to(self.device, latents.dtype)


def latent_scale(latents: Tensor) -> Tensor:
    """Standard deviation of each channel of latents (N, L, D) over all images and positions: (D,) float64, unbiased.

    Latents may be on a grid, (N, rows, columns, D).

    Raises:
        UserError: no floats of this shape, fewer than two vectors, or values that are not finite.
    """
    if latents.ndim == 4:
        latents = latents.flatten(1, 2)  # (N, L, D)
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
