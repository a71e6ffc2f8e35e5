"""Frechet distance between Gaussians fitted to two sets of features, from statistics in float64 that add up.

d(a, b) = |mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2), covariances S divided by N - 1.
With Inception features it is FID; with others it carries their name.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robustok.errors import UserError
from robustok.metrics.processes import Processes

# Rows turned into float64 at a time, so that 50,000 features take no second copy of twice their size.
ROWS = 4096


class GaussianStatistics:
    """Count, mean and scatter of features: all that a Frechet distance needs of a set.

    Features are centred as they arrive (Chan, Golub and LeVeque 1983). Sums of raw squares would lose the variance of
    features far from zero, and give a variance to constant ones.

    Attributes:
        count: N; None where only the moments are known, as in files without a count.
        mean: (F,) float64, zeros before the first feature.
        scatter: (F, F) float64, the sum of (x - mean) (x - mean)^T.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count: int | None = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, features: Tensor) -> "GaussianStatistics":
        """The statistics of one set of features (N, F)."""
        statistics = cls(features.shape[-1], features.device)
        statistics.update(features)
        return statistics

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor, count: int | None) -> "GaussianStatistics":
        """Statistics of a known mean (F,) and unbiased covariance (F, F), ``count`` None where it is unknown."""
        statistics = cls(len(mean), mean.device)
        statistics.count, statistics.mean = count, mean.double().clone()
        statistics.scatter = covariance.double() * (1 if count is None else count - 1)
        return statistics

    def update(self, features: Tensor) -> None:
        """Add features (n, F) of any floating type, in place.

        Raises:
            UserError: another F, features that are not finite in float32, or moments of an unknown count.
        """
        self._need(0)
        check_features(features, self.dim)
        for block in features.detach().split(ROWS) if len(features) else ():
            centred = block.to(self.mean)
            mean = centred.mean(dim=0)
            centred = centred - mean
            self.scatter.addmm_(centred.T, centred)
            total, shift = self.count + len(block), mean - self.mean
            self.scatter.addr_(shift, shift, alpha=self.count * len(block) / total)
            self.mean, self.count = self.mean + shift * (len(block) / total), total

    @property
    def dim(self) -> int:
        """F."""
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        """(F, F) float64, unbiased.

        Raises:
            UserError: fewer than two features.
        """
        if self.count is None:
            return self.scatter
        self._need(2)
        return self.scatter / (self.count - 1)

    def as_tensor(self) -> Tensor:
        """Count, sum of x and sum of x x^T as one vector (1 + F + F^2,) float64, which adds up over processes.

        Raises:
            UserError: moments of an unknown count.
        """
        self._need(0)
        outer = self.scatter.addr(self.mean, self.mean, alpha=self.count)
        return torch.cat([self.mean.new_tensor([self.count]), self.count * self.mean, outer.flatten()])

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "GaussianStatistics":
        """Undo :meth:`as_tensor`."""
        dim = (math.isqrt(4 * len(tensor) - 3) - 1) // 2
        statistics = cls(dim, tensor.device)
        statistics.count = round(tensor[0].item())
        if statistics.count:
            statistics.mean = tensor[1 : 1 + dim].double() / statistics.count
            outer = tensor[1 + dim :].double().view(dim, dim)
            statistics.scatter = outer.addr(statistics.mean, statistics.mean, alpha=-statistics.count)
        return statistics

    def summed(self, processes: Processes) -> "GaussianStatistics":
        """The statistics of the features of all processes."""
        return self.from_tensor(processes.add(self.as_tensor())) if processes.world > 1 else self

    def _need(self, count: int) -> None:
        if self.count is None:
            raise UserError("these statistics come without their number of images; pass count=NUMBER with them")
        if self.count < count:
            raise UserError(f"got features of {self.count} images, need at least {count}; evaluate more images")


def check_varied(statistics: GaussianStatistics, what: str = "the reference") -> None:
    """Refuse a reference whose features are all alike, in which every set of images would be perfect.

    Raises:
        UserError: no feature varies.
    """
    if not statistics.covariance.diagonal().max() > 0:
        raise UserError(
            f"all images of {what} have the same features, so that nothing can be measured; give an extractor with "
            "trained weights, and images that differ"
        )


def covariance_factor(statistics: GaussianStatistics) -> Tensor:
    """A (F, r) float64 with A A^T the covariance, of rank r: what :func:`frechet_distance` can keep of a reference.

    By Cholesky, and where the covariance is singular or nearly so by its eigenvectors, in which noise can be left out.
    Large directions come first: eigenvalue solvers then find small eigenvalues of A^T S A as exactly as large ones.
    """
    covariance = statistics.covariance
    order = covariance.diagonal().argsort(descending=True)
    noise = len(covariance) * torch.finfo(torch.float64).eps
    lower, failed = torch.linalg.cholesky_ex(covariance[order][:, order])
    if not failed and lower.diagonal().square().min() > noise * covariance.diagonal().max():
        factor = torch.empty_like(lower)
        factor[order] = lower
        return factor
    values, vectors = _eigenvectors(covariance)
    # Directions without variance hold rounding errors of either sign, whose square roots would not be small.
    kept = values > values[-1].clamp(min=0) * noise
    return (vectors[:, kept] * values[kept].sqrt()).flip(1)


def factor_of_features(features: Tensor) -> Tensor:
    """A (F, N) float64 with A A^T the covariance of features (N, F): the centred features, no eigenvectors needed.

    Smaller than :func:`covariance_factor` where there are fewer images than features.

    Raises:
        UserError: fewer than two images.
    """
    if len(features) < 2:
        raise UserError(f"got features of {len(features)} images, need at least 2; evaluate more images")
    return (features.double() - features.mean(dim=0, dtype=torch.float64)).T / math.sqrt(len(features) - 1)


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics, factor: Tensor | None = None) -> float:
    """Squared Frechet (2-Wasserstein) distance between the Gaussians of two sets; what the field calls FID.

    tr (S_a S_b)^(1/2) is the sum of the square roots of the eigenvalues of A^T S_a A with S_b = A A^T: symmetric, so
    never complex, and exact enough for singular covariances, where ``scipy.linalg.sqrtm`` is not.

    Args:
        a: the set to evaluate.
        b: the reference.
        factor: :func:`covariance_factor` of ``b``, kept from an earlier call; most of the time where it is singular.

    Returns:
        The distance, at least 0.

    Raises:
        UserError: features of different length, or fewer than two images on either side.
    """
    if a.dim != b.dim:
        raise UserError(f"got features of length {a.dim} and {b.dim}, expected equal; use one extractor for both sets")
    device = a.mean.device
    covariance, reference = a.covariance, b.covariance.to(device)
    factor = (covariance_factor(b) if factor is None else factor).to(device)
    values = _eigenvalues(factor.T @ covariance @ factor)
    if a.count is not None:
        values = values[-(a.count - 1) :]  # N images span N - 1 directions; in the others there is only rounding
    root = values.clamp(min=0).sqrt().sum()
    shift = (a.mean - b.mean.to(device)).square().sum()
    return max(0.0, (shift + covariance.trace() + reference.trace() - 2 * root).item())


def frechet_bias(statistics: GaussianStatistics) -> float:
    """The mean distance of N images to their *own* distribution, to first order in 1/N: the bias c/N of a distance.

    c = 5/4 tr S + 1/2 sum_ij l_i l_j / (l_i + l_j) with the eigenvalues l of S. Good for N well above F.
    A reference of M images adds c/M of its own.

    Raises:
        UserError: fewer than two images, or an unknown number of them.
    """
    statistics._need(2)
    values = _eigenvalues(statistics.covariance).clamp(min=0)
    sums = values[:, None] + values[None, :]
    pairs = torch.where(sums > 0, values[:, None] * values[None, :] / sums, 0.0).sum()
    return ((1.25 * values.sum() + 0.5 * pairs) / statistics.count).item()


def small_sample_note(samples: int, bias: float, dim: int, paired: bool = False) -> str | None:
    """The note beside an FID of few samples; None from 50,000 on, the number of published values.

    Args:
        samples: N.
        bias: :func:`frechet_bias` of the set.
        dim: F, below which the estimate of the bias is rough.
        paired: whether the set was made from the images of its reference.
    """
    if samples >= 50_000:
        return None
    note = f"FID of {samples} samples: biased upward by about c/N = {bias:.3g}"
    if paired:
        note += " if the reference were other images; less, because these are reconstructions of it"
    if samples < dim:
        note += f"; fewer samples than the {dim} features, so that c/N itself is rough"
    return note + "; compare only with values of as many samples"


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error.

    Attributes:
        value: mean over independent sets, or the value on the whole set.
        standard_error: of ``value``; None where it is not known.
    """

    value: float
    standard_error: float | None = None


def mean_and_standard_error(values: Sequence[float]) -> Estimate:
    """Mean over independent sets (seeds, disjoint sample sets) and sd / sqrt(number of sets); no error for one set.

    Raises:
        UserError: no values.
    """
    if not values:
        raise UserError("got no values to average, expected at least one")
    if len(values) == 1:
        return Estimate(float(values[0]))
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))))


def delete_half_error(
    features: Tensor, metric: Callable[[Tensor], float], rng: torch.Generator, repeats: int = 10
) -> Estimate:
    """A metric on one set of features and its standard error from random halves drawn *without* replacement.

    The delete-d jackknife with d = N/2: the spread of the metric over halves estimates its spread over whole sets.
    Drawing with replacement would double images and shift a Frechet distance by as much as its own size. With ten
    halves the error itself is known to a quarter.

    Args:
        features: (N, F).
        metric: features (n, F) to a number.
        rng: draws the halves.
        repeats: number of halves, at least 2.

    Raises:
        UserError: fewer than four features, or fewer than two halves.
    """
    if len(features) < 4:
        raise UserError(f"got {len(features)} features, need at least 4 for the error of a half; evaluate more images")
    if repeats < 2:
        raise UserError(f"got repeats={repeats}, a standard error takes at least 2 halves; give a larger number")
    halves = [torch.randperm(len(features), generator=rng)[: len(features) // 2] for _ in range(repeats)]
    values = [metric(features[half.to(features.device)]) for half in halves]
    return Estimate(metric(features), float(np.std(values, ddof=1)))


def check_features(features: Tensor, dim: int) -> None:
    """Refuse features of another length than ``dim`` or with values that are not finite in float32.

    Raises:
        UserError: such features.
    """
    if features.ndim != 2 or features.shape[1] != dim:
        raise UserError(f"got features {tuple(features.shape)}, expected (N, {dim}); use one extractor for both sets")
    finite = torch.isfinite(features.float())  # squares of what float32 does not hold would overflow float64
    if not finite.all():
        broken = (~finite).any(dim=1).sum().item()
        raise UserError(f"{broken} of {len(features)} features are not finite; look for broken images or weights")


def _eigenvalues(covariance: Tensor) -> Tensor:
    """Of a symmetric positive semidefinite matrix, the largest last."""
    try:
        return torch.linalg.eigvalsh(covariance)
    except torch.linalg.LinAlgError:  # the solver may give up on many equal eigenvalues; this slower one does not
        return torch.linalg.svdvals(covariance).flip(0)


def _eigenvectors(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the largest last, and eigenvectors in the columns."""
    try:
        return torch.linalg.eigh(covariance)
    except torch.linalg.LinAlgError:
        vectors, values, _ = torch.linalg.svd(covariance)
        return values.flip(0), vectors.flip(1)
