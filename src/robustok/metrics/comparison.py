"""Metrics of two sets of images in one feature space, from the features of every image computed once.

Each metric is a function of a :class:`Comparison`; :data:`robustok.metrics.METRICS` lists them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from robustok.config import Config
from robustok.errors import UserError
from robustok.metrics.frechet import (
    Estimate,
    GaussianStatistics,
    delete_half_error,
    frechet_bias,
    frechet_distance,
    small_sample_note,
)
from robustok.metrics.inception_score import inception_score
from robustok.metrics.kernel import kernel_distance
from robustok.metrics.manifold import DistanceDtype, PrecisionRecall, precision_recall
from robustok.metrics.reference import Reference
from robustok.metrics.sliced_wasserstein import sliced_wasserstein
from robustok.metrics.small_samples import frechet_error, frechet_infinity
from robustok.randomness import seeded

REFERENCE_IMAGES = 10_000  # of the reference, evenly spread, for metrics that need single features; ADM's number
INFINITY_IMAGES = 10_000  # the fewest that gfid_infinity takes


class ComparisonConfig(Config):
    """Choices in how sets of images are compared."""

    halves: int = Field(
        0,
        ge=0,
        le=1000,
        description="random halves for the standard errors of rFID and of one set's gFID; 10 suffice",
    )
    distance_dtype: DistanceDtype = Field("float64", description="distances of precision and recall; float16 is ADM's")
    shuffle: bool = Field(True, description="shuffle images before the splits of the Inception Score; ADM does not")
    projections: int = Field(1000, ge=1, description="random directions of sliced_wasserstein")


@dataclass(frozen=True)
class Score:
    """A number with the settings and sizes that it depends on, which are written beside it."""

    estimate: Estimate
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Two sets of images in one feature space.

    Attributes:
        fake: the set to evaluate.
        real: the reference.
        config: choices.
        seed: of the halves and of the shuffle.
        inception: whether the features are Inception's, for which the bias of a small set is known.
        paired: whether image i of ``fake`` was made from image i of ``real``.
        validation: real images that trained nothing, where a metric compares with them too.
        device: where single features are compared, a block at a time.
    """

    fake: Reference
    real: Reference
    config: ComparisonConfig = field(default_factory=ComparisonConfig)
    seed: int = 0
    inception: bool = False
    paired: bool = False
    validation: Reference | None = None
    device: torch.device | str = "cpu"

    def rng(self) -> torch.Generator:
        """A random generator, seeded anew for each metric."""
        return seeded(self.seed)

    @cached_property
    def some_real(self) -> Tensor:
        """Features of at most 10,000 real images.

        Raises:
            UserError: the reference has none.
        """
        if self.real.features is None:
            raise UserError(
                f"{self.real.describe()}: no features of single images, which kid, sliced_wasserstein, precision and "
                "recall need; give the images themselves as reference, or leave these metrics out"
            )
        return self.real.features[:: -(-len(self.real.features) // REFERENCE_IMAGES)]

    @cached_property
    def precision_recall(self) -> PrecisionRecall:
        """Both at once, because they share their distances."""
        real, fake = self.some_real.to(self.device), self.fake.features.to(self.device)
        return precision_recall(real=real, fake=fake, distance_dtype=self.config.distance_dtype)

    @cached_property
    def distance(self) -> float:
        """Frechet distance."""
        return frechet_distance(self.fake.statistics, self.real.statistics, self.real.factor)

    def bias(self, statistics: GaussianStatistics) -> dict[str, Any]:
        """The bias of a Frechet distance of so many images and, for FID of few images, a note."""
        bias = frechet_bias(statistics)
        note = small_sample_note(statistics.count, bias, statistics.dim, self.paired) if self.inception else None
        return {"bias": bias} | ({"note": note} if note else {})


def rfid(sets: Comparison) -> Score:
    """Frechet distance of reconstructions, with the standard error over halves of the pairs."""
    details, error = sets.bias(sets.real.statistics), paired_error(sets)
    if error is not None:
        details["standard_error_from"] = f"{sets.config.halves} random halves of pairs"
    return Score(Estimate(sets.distance, error), details)


def gfid(sets: Comparison) -> Score:
    """Frechet distance, with the standard error over halves of the pairs or of the images."""
    fake, real, halves, details = sets.fake, sets.real, sets.config.halves, {}
    if (error := paired_error(sets)) is not None:
        estimate = Estimate(sets.distance, error)
        details = {"standard_error_from": f"{halves} random halves of pairs"}
    elif halves:
        estimate = frechet_error(fake.features, real.statistics, rng=sets.rng(), repeats=halves, factor=real.factor)
        details = {"standard_error_from": f"{halves} random halves"}
    else:
        estimate = Estimate(sets.distance)
    return Score(estimate, details | sets.bias(fake.statistics))


def gfid_validation(sets: Comparison) -> Score:
    """:func:`gfid` with the validation images as reference."""
    found = gfid(replace(sets, real=sets.validation, paired=False))
    return Score(found.estimate, found.details | {"reference": sets.validation.data})


def frechet_ratio(distances: Sequence[float], normalisers: Sequence[float]) -> float:
    """FDr-k: the mean over k feature spaces of the Frechet distance of samples, in units of that of validation images.

    Args:
        distances: of the samples to the reference in each space.
        normalisers: the same of the validation images.
    """
    return sum(d / n for d, n in zip(distances, normalisers, strict=True)) / len(distances)


def gfid_infinity(sets: Comparison) -> Score | None:
    """Frechet distance extrapolated to infinitely many images; None for fewer than 10,000."""
    if sets.fake.count < INFINITY_IMAGES:
        return None
    line = frechet_infinity(sets.fake.features, sets.real.statistics, rng=sets.rng(), factor=sets.real.factor)
    return Score(line.estimate, {"sizes": list(line.sizes), "slope": line.slope})


def sfid(sets: Comparison) -> Score:
    """Frechet distance of spatial features."""
    real = sets.real
    if real.spatial is None:
        raise UserError(f"{real.describe()}: no spatial features; sFID needs mu_s and sigma_s, or leave sfid out")
    value = frechet_distance(sets.fake.spatial, real.spatial, real.spatial_factor)
    return Score(Estimate(value), {"features": "mixed_6/conv, 7 channels, 17 x 17"})


def kid(sets: Comparison) -> Score:
    """Kernel distance. It is unbiased at every size and its cost is quadratic: a part of the reference is enough."""
    real, fake = sets.some_real.to(sets.device), sets.fake.features.to(sets.device)
    return Score(kernel_distance(fake, real), {"reference_samples": len(sets.some_real)})


def sliced(sets: Comparison) -> Score:
    """Sliced Wasserstein distance, of the features themselves: a part of the reference is enough, as for KID."""
    value = sliced_wasserstein(sets.fake.features, sets.some_real, sets.rng(), sets.config.projections)
    details = {"projections": sets.config.projections, "order": 2, "reference_samples": len(sets.some_real)}
    return Score(Estimate(value), details)


def precision(sets: Comparison) -> Score:
    """Share of generated images within the real manifold."""
    return _of_manifolds(sets, sets.precision_recall.precision)


def recall(sets: Comparison) -> Score:
    """Share of real images within the generated manifold."""
    return _of_manifolds(sets, sets.precision_recall.recall)


def inception(sets: Comparison) -> Score:
    """Inception Score, which needs no reference."""
    score = inception_score(sets.fake.logits, rng=sets.rng(), shuffle=sets.config.shuffle)
    spread = {"splits": score.splits, "standard_deviation_over_splits": score.standard_deviation}
    return Score(Estimate(score.mean), spread | {"shuffled": sets.config.shuffle})


def paired_error(sets: Comparison) -> float | None:
    """Standard error of the Frechet distance of images that were made from those of the reference.

    The halves are drawn of pairs: an image and what was made from it vary together, and most of that cancels. None
    without halves or pairs, or without the features of every image.
    """
    fake, real = sets.fake.features, sets.real.features
    if not (sets.config.halves and sets.paired) or fake is None or real is None or len(fake) != len(real):
        return None

    def distance(pairs: Tensor) -> float:
        return frechet_distance(*(GaussianStatistics.of(side) for side in pairs.split(fake.shape[1], dim=1)))

    return delete_half_error(torch.cat([fake, real], dim=1), distance, sets.rng(), sets.config.halves).standard_error


def _of_manifolds(sets: Comparison, value: float) -> Score:
    details = {"k": sets.precision_recall.k, "distance_dtype": sets.config.distance_dtype}
    return Score(Estimate(value), details | {"reference_samples": len(sets.some_real)})
