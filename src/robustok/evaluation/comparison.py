"""Two sets of images in one feature space to every number that compares them. Each image is described once."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from robustok.errors import UserError
from robustok.metrics.features.inception import SPATIAL_DIM
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
from robustok.metrics.manifold import precision_recall
from robustok.metrics.reference import Reference
from robustok.metrics.small_samples import frechet_error, frechet_infinity
from robustok.types import FeatureExtractor

ONE_BY_ONE = {"kid", "precision", "recall", "gfid_infinity"}  # need every image's features, not just their moments
OF_INCEPTION = {"sfid", "inception_score"}  # need more than the pool features
COMPARED = {"gfid"} | ONE_BY_ONE | OF_INCEPTION
REFERENCE_IMAGES = 10_000  # of the reference, evenly spread, in metrics that take images one by one; ADM's number
INFINITY_IMAGES = 10_000  # the fewest that gfid_infinity takes


@dataclass(frozen=True)
class Processes:
    """How a set of images is shared: this process takes every ``world``-th one, beginning with ``rank``.

    Attributes:
        rank: number of this process.
        world: number of processes.
        add: adds up a float64 tensor over all processes.
        gather: a list of every process to the list of all their entries; the same in every process.
    """

    rank: int = 0
    world: int = 1
    add: Callable[[Tensor], Tensor] = lambda tensor: tensor
    gather: Callable[[list], list] = lambda parts: parts

    def in_order(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Rows (N, ...) of all processes in the order of the set, from pairs of places (n,) and rows (n, ...).

        Raises:
            UserError: no process has any.
        """
        parts = self.gather(list(parts))
        if not parts:
            raise UserError("got no images to evaluate, expected at least one; check the data set")
        places = torch.cat([places for places, _ in parts])
        return torch.cat([rows for _, rows in parts])[places.argsort()]


class FeatureCollector:
    """Collects the images of a set in a feature space, batch by batch, and no more of them than its metrics need.

    Args:
        extractor: the feature space.
        metrics: names of what will be computed.
        every: keep the features of every so many images only, where features are kept at all.
    """

    def __init__(self, extractor: FeatureExtractor, metrics: Collection[str], every: int = 1) -> None:
        self.extractor, self.metrics, self.every = extractor, set(metrics), every
        self.statistics = GaussianStatistics(extractor.dim)
        self.spatial = GaussianStatistics(SPATIAL_DIM) if "sfid" in self.metrics else None
        self.features: list[tuple[Tensor, Tensor]] = []
        self.logits: list[tuple[Tensor, Tensor]] = []

    def update(self, indices: Tensor, pixels: Tensor) -> None:
        """Add images: their places (n,) in the set and pixels (n, 3, H, W) uint8."""
        if OF_INCEPTION & self.metrics:
            found = self.extractor.features(pixels)
            pool = found.pool.cpu()
            if "inception_score" in self.metrics:
                self.logits.append((indices, found.logits.cpu()))
            if self.spatial is not None:
                self.spatial.update(found.spatial.cpu())
        else:
            pool = self.extractor(pixels).cpu()
        self.statistics.update(pool)
        if self.keeps_features:
            kept = indices % self.every == 0
            if kept.any():
                self.features.append((indices[kept], pool[kept]))

    @property
    def keeps_features(self) -> bool:
        """Whether a metric needs the features one by one."""
        return bool((ONE_BY_ONE | {"errors"}) & self.metrics)

    def finish(self, data: str, processes: Processes) -> Reference:
        """The whole set, of all processes."""
        sums = [None if s is None else _add(s, processes) for s in (self.statistics, self.spatial)]
        features = processes.in_order(self.features) if self.keeps_features else None
        logits = processes.in_order(self.logits) if "inception_score" in self.metrics else None
        return Reference(sums[0], self.extractor.name, data, features, sums[1], logits)


@dataclass(frozen=True)
class Comparison:
    """How sets are compared; what is not said here is said in the metrics' own modules.

    Attributes:
        metrics: names of what is computed.
        halves: random halves behind the standard error of a Frechet distance; 0 for none.
        distance_dtype: of the distances of precision and recall; ADM's evaluator takes float16.
        shuffle: whether the Inception Score shuffles the images before it splits them; ADM's evaluator does not.
        seed: of the halves and of the shuffle.
        inception: whether the features are Inception's, whose small-sample bias is known.
        paired: whether image i of one set was made from image i of the other.
    """

    metrics: Collection[str]
    halves: int = 0
    distance_dtype: Literal["float64", "float32", "float16"] = "float64"
    shuffle: bool = True
    seed: int = 0
    inception: bool = False
    paired: bool = False

    def rng(self) -> torch.Generator:
        """The random generator of one metric, always from its beginning."""
        return torch.Generator().manual_seed(self.seed)


def compare(fake: Reference, real: Reference, how: Comparison) -> dict[str, tuple[Estimate, dict[str, Any]]]:
    """Every metric that was asked for, with the facts that it depends on.

    Raises:
        UserError: the reference lacks what a metric needs, or the sets are too small.
    """
    wanted, found = set(how.metrics), {}
    if "gfid" in wanted:
        whole = real.features is not None and len(real.features) == fake.count
        if how.halves and how.paired and fake.features is not None and whole:
            value = frechet_distance(fake.statistics, real.statistics, real.factor)
            estimate = Estimate(value, paired_error(fake.features, real.features, how.halves, how.rng()))
            error = {"standard_error_from": f"{how.halves} random halves of pairs"}
        elif how.halves and fake.features is not None:
            estimate = frechet_error(
                fake.features, real.statistics, rng=how.rng(), repeats=how.halves, factor=real.factor
            )
            error = {"standard_error_from": f"{how.halves} random halves"}
        else:
            estimate, error = Estimate(frechet_distance(fake.statistics, real.statistics, real.factor), None), {}
        found["gfid"] = estimate, error | bias_facts(fake.statistics, how.inception, how.paired)
    if "gfid_infinity" in wanted and fake.count >= INFINITY_IMAGES:
        line = frechet_infinity(fake.features, real.statistics, rng=how.rng(), factor=real.factor)
        found["gfid_infinity"] = line.estimate, {"sizes": list(line.sizes), "slope": line.slope}
    if "sfid" in wanted:
        if real.spatial is None:
            raise UserError(f"{real.describe()}: no spatial features; sFID needs mu_s and sigma_s, or leave sfid out")
        value = frechet_distance(fake.spatial, real.spatial, real.spatial_factor)
        found["sfid"] = Estimate(value, None), {"features": "mixed_6/conv, 7 channels, 17 x 17"}
    if wanted & {"kid", "precision", "recall"}:
        some = _some_features(real)
        sizes = {"reference_samples": len(some)}
        if "kid" in wanted:  # unbiased at every size, and quadratic in it: a part of a large reference is as good
            found["kid"] = kernel_distance(fake.features, some), sizes
        if wanted & {"precision", "recall"}:
            both = precision_recall(real=some, fake=fake.features, distance_dtype=how.distance_dtype)
            for name in sorted(wanted & {"precision", "recall"}):
                facts = {"k": both.k, "distance_dtype": how.distance_dtype} | sizes
                found[name] = Estimate(getattr(both, name), None), facts
    if "inception_score" in wanted:
        score = inception_score(fake.logits, rng=how.rng(), shuffle=how.shuffle)
        spread = {"splits": score.splits, "standard_deviation_over_splits": score.standard_deviation}
        found["inception_score"] = Estimate(score.mean, None), spread | {"shuffled": how.shuffle}
    return found


def paired_error(fake: Tensor, real: Tensor, halves: int, rng: torch.Generator) -> float:
    """Standard error of a Frechet distance between images made from others and these, features (N, F) each.

    Halves are drawn of pairs: an image and what was made of it vary together, and most of that cancels.
    """

    def distance(pairs: Tensor) -> float:
        return frechet_distance(*(GaussianStatistics.of(side) for side in pairs.split(fake.shape[1], dim=1)))

    return delete_half_error(torch.cat([fake, real], dim=1), distance, rng, halves).standard_error


def bias_facts(statistics: GaussianStatistics, inception: bool, paired: bool = False) -> dict[str, Any]:
    """The bias of a Frechet distance of so many images and, for FID, what it means."""
    bias = frechet_bias(statistics)
    note = small_sample_note(statistics.count, bias, statistics.dim, paired) if inception else None
    return {"bias": bias} | ({"note": note} if note else {})


def _some_features(real: Reference) -> Tensor:
    if real.features is None:
        raise UserError(
            f"{real.describe()}: no features of single images, which kid, precision and recall need; give the images "
            "themselves as reference, or leave these metrics out"
        )
    return real.features[:: -(-len(real.features) // REFERENCE_IMAGES)]


def _add(statistics: GaussianStatistics, processes: Processes) -> GaussianStatistics:
    return GaussianStatistics.from_tensor(processes.add(statistics.as_tensor())) if processes.world > 1 else statistics
