"""Which noise makes the latents of real images look most like a generator's, by the maximum mean discrepancy (MMD).

The squared MMD is the unbiased one of :func:`robustok.metrics.kernel.kernel_distance`. A sample is an image; the kernel
of two images is the mean over positions of exp(-|x - y|^2 / h^2), x and y their latents there. h is the median distance
of different latents at the same position of two images, generated and real without noise: the same for all candidates,
as are the images. A kernel of all latents of an image at once finds a known perturbation less often: in so many
dimensions all images are about equally far.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from robustok.errors import UserError
from robustok.metrics.frechet import Estimate
from robustok.metrics.kernel import gaussian, kernel_distance, median_distance

IMAGES = 1_000  # on either side
DISTANCES = 2**24  # of which the median is taken


@dataclass(frozen=True)
class Calibration:
    """A grid chosen among candidates.

    Attributes:
        cells: those that are kept, in the order of the candidates, with their ``mmd``.
        candidates: all cells, with their ``mmd``.
        unperturbed: squared MMD between generated latents and those of real images without noise.
        bandwidth: h of the kernel.
        images: numbers of generated and of real images.
    """

    cells: tuple[Any, ...]
    candidates: tuple[Any, ...]
    unperturbed: Estimate
    bandwidth: float
    images: tuple[int, int]

    def details(self) -> dict[str, Any]:
        """What is written beside values of this grid; a candidate is its noise, squared MMD and standard error."""
        rows = [[*cell.noise, cell.mmd.value, cell.mmd.standard_error] for cell in self.candidates]
        return {
            "mmd_kernel": "exp(-|x - y|^2 / h^2), h the median distance, mean over positions",
            "mmd_bandwidth": self.bandwidth,
            "mmd_images": list(self.images),
            "mmd_unperturbed": self.unperturbed.value,
            "mmd_candidates": rows,
        }


def calibrate(
    candidates: Sequence[Any],
    keep: int,
    generated: Tensor,
    latents: Tensor,
    noisy: Callable[[Any, Tensor], Tensor],
    vectors: Callable[[Tensor], Tensor],
) -> Calibration:
    """Keep the cells whose noise makes latents of real images look most like generated ones.

    Args:
        candidates: cells, dataclasses with ``mmd``.
        keep: how many are kept, those of the lowest MMD, the earlier ones on ties.
        generated: latents of a generator.
        latents: those of real images.
        noisy: the latents of the images at some indices (n,), with the noise of a cell.
        vectors: latents of n images to (n, L, D), on the device that is to compute.

    Raises:
        UserError: fewer candidates than are kept; latents of another shape; fewer than three images.
    """
    if keep > len(candidates):
        raise UserError(f"keep is {keep}, there are {len(candidates)} cells to choose from; lower keep or give more")
    if generated.shape[1:] != latents.shape[1:]:
        shapes = f"{tuple(generated.shape)} and {tuple(latents.shape)}"
        raise UserError(f"got generated and real latents {shapes}, expected those of one tokenizer")
    fakes, indices = (torch.arange(n)[:: -(-n // IMAGES)] for n in (len(generated), len(latents)))
    fake, real = vectors(generated[fakes]).flatten(1), vectors(latents[indices]).flatten(1)  # (n, L D), (m, L D)
    length, both = latents.shape[1], torch.cat([fake, real])
    bandwidth = median_distance(both[:: math.ceil(len(both) / (2 * DISTANCES / length) ** 0.5)], length)
    if not bandwidth > 0:
        raise UserError("got images whose latents are all the same, expected different ones; look at the tokenizer")
    kernel = partial(gaussian, bandwidth=bandwidth, parts=length)
    found = []
    for cell in candidates:
        moved = vectors(noisy(cell, indices)).flatten(1)  # (m, L D)
        found.append(replace(cell, mmd=kernel_distance(moved, fake, kernel)))
    best = sorted(range(len(found)), key=lambda i: found[i].mmd.value)[:keep]
    return Calibration(
        cells=tuple(found[i] for i in sorted(best)),
        candidates=tuple(found),
        unperturbed=kernel_distance(real, fake, kernel),
        bandwidth=bandwidth,
        images=(len(fakes), len(indices)),
    )
