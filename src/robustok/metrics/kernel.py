"""Kernel distance (KID): an unbiased squared MMD, the number to trust where images are few.

Kernel k(x, y) = (x.y / F + 1)^3. All images at once; the usual procedure averages 100 subsets of 1,000 and prints their
spread, which is not a standard error.
"""

import math

import torch
from torch import Tensor

from robustok.errors import UserError
from robustok.metrics.frechet import Estimate, check_features


def kernel_distance(features: Tensor, reference: Tensor) -> Estimate:
    """KID of two sets of features by the full-sample U-statistic, with a jackknife standard error.

    The U-statistic leaves out k(x_i, x_i), so it is unbiased at every size and may be negative for equal distributions.
    The error is the two-sample delete-one jackknife, exact from the row sums of the kernel matrices: with D_i the
    statistic without image i, variance = (n-1)/n sum_i (D_i - mean)^2, summed over both sets. On average it is too
    large rather than too small (Efron and Stein 1981).

    Args:
        features: (N, F), N >= 3.
        reference: (M, F), M >= 3.

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
    xx, yy = _sums(x, x)[0] - _own(x), _sums(y, y)[0] - _own(y)  # (N,), (M,)
    xy, yx = _sums(x, y)  # (N,), (M,)
    within_x, within_y, across = xx.sum(), yy.sum(), xy.sum()
    value = within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * across / (n * m)
    # Without image i the sums lose its row and its column.
    less_x = (within_x - 2 * xx) / ((n - 1) * (n - 2)) - 2 * (across - xy) / ((n - 1) * m)  # (N,)
    less_y = (within_y - 2 * yy) / ((m - 1) * (m - 2)) - 2 * (across - yx) / (n * (m - 1))  # (M,)
    variance = (n - 1) / n * _squares(less_x) + (m - 1) / m * _squares(less_y)
    return Estimate(value.item(), math.sqrt(variance.item()))


def _sums(x: Tensor, y: Tensor, rows: int = 1024) -> tuple[Tensor, Tensor]:
    """The row sums (N,) and column sums (M,) of k(x_i, y_j), a block of rows at a time: the whole would take 20 GB."""
    rows_of_x, columns = [], torch.zeros_like(y[:, 0])
    for block in x.split(rows):
        kernel = ((block @ y.T) / x.shape[1] + 1).pow(3)  # (n, M)
        rows_of_x.append(kernel.sum(dim=1))
        columns += kernel.sum(dim=0)
    return torch.cat(rows_of_x), columns


def _own(x: Tensor) -> Tensor:
    return (x.square().sum(dim=1) / x.shape[1] + 1).pow(3)


def _squares(values: Tensor) -> Tensor:
    return (values - values.mean()).square().sum()
