"""Frechet distances of finitely many images: their standard error, and their limit for infinitely many.

The bias is :func:`robustok.metrics.frechet.frechet_bias`.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from robustok.errors import UserError
from robustok.metrics.frechet import (
    Estimate,
    GaussianStatistics,
    check_features,
    covariance_factor,
    delete_half_error,
    factor_of_features,
    frechet_distance,
)


def frechet_error(
    features: Tensor,
    reference: GaussianStatistics,
    *,
    rng: torch.Generator,
    repeats: int = 10,
    factor: Tensor | None = None,
) -> Estimate:
    """The Frechet distance of a set to a fixed reference, with its standard error from :func:`delete_half_error`.

    It is the error for other samples of the same model. It does not include the bias (:func:`frechet_bias`), which is
    often larger, nor the choice of the reference. Each half costs one eigenvalue problem, of the size of the half or F,
    whichever is smaller.

    Args:
        features: (N, F) of the set to evaluate.
        reference: its statistics, decomposed once for all halves.
        rng: draws the halves.
        repeats: number of halves, at least 2.
        factor: :func:`covariance_factor` of ``reference``, kept from an earlier call.

    Raises:
        UserError: as :func:`frechet_distance` and :func:`delete_half_error` do.
    """
    check_features(features, reference.dim)
    if factor is None and len(features) // 2 >= reference.dim:
        factor = covariance_factor(reference)

    def distance(some: Tensor) -> float:
        statistics = GaussianStatistics.of(some)
        if len(some) < reference.dim:  # symmetric in the two sets: the smaller factor makes the smaller problem
            return frechet_distance(reference, statistics, factor_of_features(some))
        return frechet_distance(statistics, reference, factor)

    return delete_half_error(features, distance, rng, repeats)


@dataclass(frozen=True)
class FrechetInfinity:
    """A Frechet distance extrapolated to infinitely many images, with what it depends on.

    Attributes:
        estimate: the distance where 1/N = 0. It has no standard error: that of the fitted line is a third of
            the true one. Take several independent sets, or :func:`frechet_error` of the whole set as a lower bound.
        slope: of the line, the set's own c of the bias c/N.
        sizes: N of each point of the line, the last one all images.
        distances: the distance of each point.
    """

    estimate: Estimate
    slope: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def frechet_infinity(
    features: Tensor,
    reference: GaussianStatistics,
    *,
    rng: torch.Generator,
    sizes: int = 6,
    smallest: int = 5_000,
    factor: Tensor | None = None,
) -> FrechetInfinity:
    """FID-infinity: the Frechet distance as a line in 1/N, where 1/N = 0 (Chong and Forsyth 2020).

    The points are evenly spaced numbers of images from ``smallest`` to all, each set a part of the next: the images are
    shuffled once, without replacement, and counted once. That is no less exact than sets drawn one by one.

    Args:
        features: (N, F) of the set to evaluate.
        reference: its statistics; the bias of a finite reference stays in the value.
        rng: shuffles the images.
        sizes: number of points, at least 2.
        smallest: images of the first point. The distance is a line in 1/N only for N well above F: for Inception's
            2,048 features, 5,000 miss by 0.1, 2,500 by 0.5.
        factor: :func:`covariance_factor` of ``reference``, kept from an earlier call.

    Raises:
        UserError: fewer than twice ``smallest`` images, fewer than two points, or as :func:`frechet_distance` does.
    """
    if len(features) < 2 * smallest:
        raise UserError(
            f"got {len(features)} images, need {2 * smallest} for FID-infinity: a line in 1/N that starts below "
            f"{smallest} or spans less is off by more than the bias it removes; use more images, or kernel_distance"
        )
    if sizes < 2 or smallest < 2:
        raise UserError(f"got sizes={sizes} and smallest={smallest}, a line needs at least 2 points of 2 images")
    factor = covariance_factor(reference) if factor is None else factor
    order = torch.randperm(len(features), generator=rng).to(features.device)
    counts = torch.linspace(smallest, len(features), sizes, dtype=torch.float64).round().long().tolist()
    statistics, distances = GaussianStatistics(features.shape[1], features.device), []
    for before, count in pairwise([0, *counts]):
        statistics.update(features[order[before:count]])
        distances.append(frechet_distance(statistics, reference, factor))
    slope, value = np.polyfit(1 / np.array(counts), np.array(distances), deg=1)
    return FrechetInfinity(Estimate(float(value), None), float(slope), tuple(counts), tuple(distances))
