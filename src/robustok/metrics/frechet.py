"""Frechet distance between Gaussians fitted to two sets of features, from additive statistics in float64.

d(a, b) = |mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2), covariances S divided by N - 1.
With Inception features it is FID; with others it carries their name.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from robustok.types import UserError


class GaussianStatistics:
    """Count, sum and sum of outer products of features: enough for their mean and covariance, and additive over sets.

    Attributes:
        count: N, features seen.
        sum: (F,) float64.
        outer: (F, F) float64, the sum of x x^T.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, features: Tensor) -> "GaussianStatistics":
        """The statistics of one set of features (N, F)."""
        statistics = cls(features.shape[-1], features.device)
        statistics.update(features)
        return statistics

    def update(self, features: Tensor) -> None:
        """Add features (n, F) of any floating type, in place.

        Raises:
            UserError: another F, or features that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise UserError(
                f"got features {tuple(features.shape)}, expected (N, {self.dim}); use one extractor for both sets"
            )
        if not torch.isfinite(features).all():
            broken = (~torch.isfinite(features)).any(dim=1).sum().item()
            raise UserError(f"{broken} of {len(features)} features are not finite; look for broken images or weights")
        features = features.detach().to(self.sum)
        self.count += len(features)
        self.sum += features.sum(dim=0)
        self.outer += features.T @ features

    def merge(self, other: "GaussianStatistics") -> "GaussianStatistics":
        """The statistics of both sets together, as new statistics."""
        _same_space(self, other)
        return GaussianStatistics.from_tensor(self.as_tensor() + other.as_tensor().to(self.sum.device))

    @property
    def dim(self) -> int:
        """F."""
        return len(self.sum)

    @property
    def mean(self) -> Tensor:
        """(F,) float64.

        Raises:
            UserError: no features were seen.
        """
        self._need(1)
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """(F, F) float64, unbiased.

        Raises:
            UserError: fewer than two features were seen.
        """
        self._need(2)
        return (self.outer - torch.outer(self.sum, self.sum) / self.count) / (self.count - 1)

    def as_tensor(self) -> Tensor:
        """All of it as one vector (1 + F + F^2,) float64; these vectors add up over batches and processes."""
        return torch.cat([self.sum.new_tensor([self.count]), self.sum, self.outer.flatten()])

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "GaussianStatistics":
        """Undo :meth:`as_tensor`."""
        statistics = cls((math.isqrt(4 * len(tensor) - 3) - 1) // 2, tensor.device)
        statistics.count = round(tensor[0].item())
        statistics.sum = tensor[1 : 1 + statistics.dim].clone()
        statistics.outer = tensor[1 + statistics.dim :].view(statistics.dim, statistics.dim).clone()
        return statistics

    def _need(self, count: int) -> None:
        if self.count < count:
            raise UserError(f"got features of {self.count} images, need at least {count}; evaluate more images")


def covariance_factor(statistics: GaussianStatistics) -> Tensor:
    """A (F, r) float64 with A A^T the covariance, of rank r: what :func:`frechet_distance` can keep of a reference."""
    values, vectors = torch.linalg.eigh(statistics.covariance)
    # Directions without variance hold rounding errors of either sign, whose square roots would not be small.
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics, factor: Tensor | None = None) -> float:
    """Squared Frechet (2-Wasserstein) distance between the Gaussians of two sets; what the field calls FID.

    tr (S_a S_b)^(1/2) is the sum of the square roots of the eigenvalues of A^T S_a A with S_b = A A^T: symmetric, so
    never complex, and exact enough for fewer images than features, where ``scipy.linalg.sqrtm`` is not.

    Args:
        a: the set to judge.
        b: the reference.
        factor: :func:`covariance_factor` of ``b``, kept from an earlier call.

    Returns:
        The distance, at least 0.

    Raises:
        UserError: features of different length, or fewer than two images on either side.
    """
    _same_space(a, b)
    device = a.sum.device
    covariance, reference = a.covariance, b.covariance.to(device)
    factor = (covariance_factor(b) if factor is None else factor).to(device)
    root = torch.linalg.eigvalsh(factor.T @ covariance @ factor).clamp(min=0).sqrt().sum()
    shift = (a.mean - b.mean.to(device)).square().sum()
    return max(0.0, (shift + covariance.trace() + reference.trace() - 2 * root).item())


def frechet_bias(statistics: GaussianStatistics) -> float:
    """How far N images of the *same* law lie from it on average, to first order in 1/N: the floor c/N under a distance.

    c = 5/4 tr S + 1/2 sum_ij l_i l_j / (l_i + l_j) with the eigenvalues l of S. Good for N well above F.
    A reference of M images adds c/M of its own.
    """
    values = torch.linalg.eigvalsh(statistics.covariance).clamp(min=0)
    sums = values[:, None] + values[None, :]
    pairs = torch.where(sums > 0, values[:, None] * values[None, :] / sums, 0.0).sum()
    return ((1.25 * values.sum() + 0.5 * pairs) / statistics.count).item()


def small_sample_note(samples: int, bias: float, dim: int, paired: bool = False) -> str | None:
    """What to keep in mind about an FID of few samples; None from 50,000 on, the number of published values.

    Args:
        samples: N.
        bias: :func:`frechet_bias` of the set.
        dim: F, below which the bias is poorly known itself.
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


def save_statistics(statistics: GaussianStatistics, path: str | Path, name: str) -> None:
    """Write ``mu`` and ``sigma`` (ADM's keys), ``count`` and the extractor's ``name`` as one .npz file."""
    arrays = {"mu": statistics.mean.cpu().numpy(), "sigma": statistics.covariance.cpu().numpy()}
    with Path(path).open("wb") as file:  # given a path, numpy would add a suffix of its own
        np.savez(file, **arrays, count=np.int64(statistics.count), name=np.str_(name))


def load_statistics(path: str | Path, name: str | None = None, count: int | None = None) -> GaussianStatistics:
    """Read what :func:`save_statistics` wrote, or a reference file of ADM.

    Args:
        path: .npz file with ``mu`` (F,) and ``sigma`` (F, F).
        name: extractor in use; a file that names another one is refused.
        count: images behind a file that does not say, as ADM's do not (1,281,167 for all of ImageNet's training set).

    Raises:
        UserError: unreadable, keys missing, features of another extractor, or the count is not known.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("mu", "sigma", "count", "name") if key in file.files}
        mean, covariance = (torch.from_numpy(arrays[key].astype(np.float64)) for key in ("mu", "sigma"))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, BadZipFile) as error:
        raise UserError(f"{path} holds no statistics ({error}); give an .npz file with the keys mu and sigma") from None
    found = str(arrays.get("name", name))
    if name is not None and found != name:
        raise UserError(f"{path} holds statistics of {found} features, expected {name}; compute them again")
    count = int(arrays["count"]) if "count" in arrays else count
    if count is None:
        raise UserError(f"{path} does not say how many images it stands for; pass count=NUMBER")
    if covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: sigma is {tuple(covariance.shape)}, expected {(len(mean), len(mean))} to go with mu")
    statistics = GaussianStatistics(len(mean))
    statistics.count, statistics.sum = count, count * mean
    statistics.outer = (count - 1) * covariance + count * torch.outer(mean, mean)
    return statistics


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error.

    Attributes:
        value: mean over independent sets, or the value on the whole set.
        standard_error: of ``value``; None where one set says nothing about it.
    """

    value: float
    standard_error: float | None


def mean_and_standard_error(values: Sequence[float]) -> Estimate:
    """Mean over independent sets (seeds, disjoint sample sets) and sd / sqrt(number of sets); no error for one set.

    Raises:
        UserError: no values.
    """
    if not values:
        raise UserError("got no values to average, expected at least one")
    if len(values) == 1:
        return Estimate(float(values[0]), None)
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))))


def delete_half_error(
    features: Tensor, metric: Callable[[Tensor], float], rng: torch.Generator, repeats: int = 20
) -> Estimate:
    """A metric on one set of features and its standard error from random halves drawn *without* replacement.

    The delete-d jackknife with d = N/2: the spread of the metric over halves estimates its spread over whole sets.
    Drawing with replacement would double images and shift a Frechet distance by as much as its own size.

    Args:
        features: (N, F).
        metric: features (n, F) to a number.
        rng: draws the halves.
        repeats: number of halves, at least 2.

    Raises:
        UserError: fewer than four features.
    """
    if len(features) < 4:
        raise UserError(f"got {len(features)} features, need at least 4 for the error of a half; evaluate more images")
    halves = [torch.randperm(len(features), generator=rng)[: len(features) // 2] for _ in range(repeats)]
    return Estimate(metric(features), float(np.std([metric(features[half]) for half in halves], ddof=1)))


def _same_space(a: GaussianStatistics, b: GaussianStatistics) -> None:
    if a.dim != b.dim:
        raise UserError(f"got features of length {a.dim} and {b.dim}, expected equal; use one extractor for both sets")
