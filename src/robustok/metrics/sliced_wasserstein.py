"""Sliced Wasserstein distance between two sets of features: they are compared as they are, not as Gaussians.

Source: Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures"; on Inception features it is the
distance of MIND (arXiv 2605.06797). Its error falls with the number of images whatever the number of features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from robustok.errors import UserError
from robustok.metrics.frechet import check_features

DIRECTIONS = 64  # projected and sorted at once


def sliced_wasserstein(features: Tensor, reference: Tensor, rng: torch.Generator, projections: int = 1000) -> float:
    """Mean over random directions u of the squared 2-Wasserstein distance between the projections of two sets on u.

    On a line that is the integral of the squared difference of the quantile functions, which are steps: it is exact for
    sets of different size. Squared, as the Frechet distance is; sets that differ by a shift s have |s|^2 / F.

    Args:
        features: (N, F).
        reference: (M, F).
        rng: draws the directions, uniform on the sphere.
        projections: number of directions.

    Raises:
        UserError: features of different length or not finite, or an empty set.
    """
    for checked in (reference, features):
        check_features(checked, reference.shape[-1])
    if not len(features) or not len(reference):
        raise UserError("got a set without images, need at least one on either side; evaluate more images")
    directions = F.normalize(torch.randn(projections, reference.shape[-1], generator=rng, dtype=torch.float64))
    left, right, widths = _steps(len(features), len(reference))
    x, y, total = features.double(), reference.double(), 0.0
    for some in directions.to(x.device).split(DIRECTIONS):
        a, b = (some @ side.T for side in (x, y))  # (d, N), (d, M)
        gaps = a.sort(dim=1).values[:, left] - b.sort(dim=1).values[:, right]  # (d, steps)
        total += (gaps.square() @ widths.to(gaps)).sum().item()
    return total / projections


def _steps(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """The steps of two quantile functions together: ranks (s,) in sets of n and m, and widths (s,) that sum to one."""
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()  # (s,), in units of 1 / (n m)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return starts // m, starts // n, (ends - starts).double() / (n * m)
