"""Kernel distance (KID): an unbiased squared MMD, the number to trust where images are few.

KID's kernel is k(x, y) = (x.y / F + 1)^3; a Gaussian one is here for latents. All images at once; the usual procedure
averages 100 subsets of 1,000 and prints their spread, which is not a standard error.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from robustok.errors import UserError
from robustok.metrics.frechet import Estimate, check_features

Kernel = Callable[[Tensor, Tensor], Tensor]


def cubic(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel (..., n, m) of x (..., n, F) and y (..., m, F)."""
    return (x @ y.mT / x.shape[-1] + 1).pow(3)


def kernel_distance(features: Tensor, reference: Tensor, kernel: Kernel = cubic) -> Estimate:
    """KID of two sets of features by the full-sample U-statistic, with a jackknife standard error.

    The U-statistic leaves out k(x_i, x_i), so it is unbiased at every size and may be negative for equal distributions.
    The error is the two-sample delete-one jackknife, exact from the row sums of the kernel matrices: with D_i the
    statistic without image i, variance = (n-1)/n sum_i (D_i - mean)^2, summed over both sets. On average it is too
    large rather than too small (Efron and Stein 1981).

    Args:
        features: (N, F), N >= 3.
        reference: (M, F), M >= 3.
        kernel: function of x (..., n, F) and y (..., m, F) with values (..., n, m).

    Raises:
        UserError: features of different length or not finite, or fewer than three images.
    """
    for checked in (reference, features):
        check_features(checked, reference.shape[-1])
    n, m = len(features), len(reference)
    if min(n, m) < 3:
        raise UserError(
            f"got features of {min(n, m)} images, need at least 3 for a kernel distance; evaluate more images"
        )
    x, y = features.double(), reference.double()
    xx, yy = (_sums(z, z, kernel)[0] - kernel(z[:, None], z[:, None])[:, 0, 0] for z in (x, y))  # (N,), (M,)
    xy, yx = _sums(x, y, kernel)  # (N,), (M,)
    within_x, within_y, across = xx.sum(), yy.sum(), xy.sum()
    value = within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * across / (n * m)
    # Without image i the sums lose its row and its column.
    less_x = (within_x - 2 * xx) / ((n - 1) * (n - 2)) - 2 * (across - xy) / ((n - 1) * m)  # (N,)
    less_y = (within_y - 2 * yy) / ((m - 1) * (m - 2)) - 2 * (across - yx) / (n * (m - 1))  # (M,)
    variance = (n - 1) / n * _squares(less_x) + (m - 1) / m * _squares(less_y)
    return Estimate(value.item(), math.sqrt(variance.item()))


def gaussian(x: Tensor, y: Tensor, bandwidth: float, parts: int = 1) -> Tensor:
    """exp(-|x - y|^2 / bandwidth^2), or its mean over equal parts of x and y.

    Args:
        x: (..., n, F).
        y: (..., m, F).
        bandwidth: above 0.
        parts: must divide F.

    Returns:
        (..., n, m).
    """
    pairs = zip(x.chunk(parts, dim=-1), y.chunk(parts, dim=-1), strict=True)
    return sum((-_squared_distances(a, b) / bandwidth**2).exp() for a, b in pairs) / parts


def median_distance(features: Tensor, parts: int = 1) -> float:
    """The median Euclidean distance of two different rows of (N, F), or of parts of them: the usual bandwidth.

    Equal ones are left out: tokens often are. NaN if all are.
    """
    upper = torch.triu_indices(len(features), len(features), 1)
    found = torch.cat([_squared_distances(x, x)[*upper] for x in features.double().chunk(parts, dim=-1)])
    return found[found > 0].median().sqrt().item()


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    squares = x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :]
    return (squares - 2 * x @ y.mT).clamp(min=0)


def _sums(x: Tensor, y: Tensor, kernel: Kernel, rows: int = 1024) -> tuple[Tensor, Tensor]:
    """The row sums (N,) and column sums (M,) of k(x_i, y_j), a block of rows at a time: the whole would take 20 GB."""
    rows_of_x, columns = [], torch.zeros_like(y[:, 0])
    for block in x.split(rows):
        values = kernel(block, y)  # (n, M)
        rows_of_x.append(values.sum(dim=1))
        columns += values.sum(dim=0)
    return torch.cat(rows_of_x), columns


def _squares(values: Tensor) -> Tensor:
    return (values - values.mean()).square().sum()
