"""The Frechet distance between decoded samples of a generator and real images, as a term of the loss.

A batch is too small for a covariance, so the distance is that of running moments, and its gradient reaches the decoder
through the batch. A decoder can overfit the space it is trained in: give several, evaluate in another.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from robustok.config import Config
from robustok.errors import UserError
from robustok.losses.semantic import gather_with_gradient
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.metrics.frechet import GaussianStatistics, check_varied, covariance_factor
from robustok.precision import exact_float32
from robustok.types import FeatureExtractor

# The extractors' differentiable functions of images (N, 3, H, W) in [-1, 1].
DIFFERENTIABLE: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "classifier": lambda extractor: extractor.classifier.features,
    "cifar-resnet": lambda extractor: extractor.network.features,
    "inception": lambda extractor: extractor.from_images,
    "dinov2": lambda extractor: extractor.from_images,
}


class FrechetConfig(Config):
    """The Frechet term, for objective ``free``."""

    weight: float = Field(0.0, ge=0, description="weight of the mean over the feature spaces; 0 is off")
    decay: float = Field(
        0.99, ge=0, lt=1, description="decay of the running moments of the decoded samples; 0 takes the batch alone"
    )
    extractors: list[ExtractorConfig] = Field(
        [], description="feature spaces, each with the settings of extractor; none of them that of held_out"
    )

    @model_validator(mode="after")
    def _spaces_fit(self) -> "FrechetConfig":
        if self.weight and not self.extractors:
            raise ValueError("frechet.weight needs feature spaces; set frechet.extractors=[{name: ..., path: ...}]")
        return self


class RunningDistance:
    """Frechet distance between real features and running moments of others, as a share of the real variance.

    Exponential averages and not a queue: they need F^2 numbers whatever their length, and forget without a jump.

    Args:
        real: of the real features, F of them.

    Attributes:
        moments: mean (F,) and mean of x x^T (F, F) of the features minus the real mean, float64.
    """

    def __init__(self, real: GaussianStatistics) -> None:
        self.real, self.center, self.variance = real, real.mean, real.covariance.trace()
        self._factor = covariance_factor(real)  # (F, r)
        self.moments = torch.zeros_like(real.mean), torch.zeros_like(real.scatter)

    def update(self, features: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Let features (N, F) count by this share, and what came before by the rest; returns their own moments."""
        centred = features.to(self.center) - self.center
        own = centred.mean(0), centred.T @ centred / len(centred)
        self.moments = tuple(before.lerp(now.detach(), share) for before, now in zip(self.moments, own, strict=True))
        return own

    def __call__(self, features: Tensor, share: float) -> Tensor:
        """Update by features (N, F); the distance, a scalar float64, with its gradient by the features.

        The gradient is the one by the moments of all samples, applied to those of the batch. So its size does not
        depend on ``share``. With ``share`` 1 it is the gradient of the distance of the batch.
        """
        own = self.update(features, share)
        distance, *gradients = self._distance_and_gradients()
        linear = sum((gradient * moment).sum() for gradient, moment in zip(gradients, own, strict=True))
        return (distance + linear - linear.detach()) / self.variance

    def _distance_and_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """The distance of the running moments, and its gradients by both of them.

        With S_real = A A^T, tr (S S_real)^(1/2) is the sum of the square roots of the eigenvalues of A^T S A, and has
        the gradient A (A^T S A)^(-1/2) A^T / 2 by S. Autograd through an eigenvalue solver would divide by differences
        of eigenvalues; this divides by their square roots, kept from zero.
        """
        mean, second = self.moments
        covariance = second - torch.outer(mean, mean)
        inner = self._factor.T @ covariance @ self._factor
        if not inner.isfinite().all():  # the caller reports a loss that is not finite
            return inner.sum() * torch.nan, torch.zeros_like(mean), torch.zeros_like(second)
        values, vectors = torch.linalg.eigh(inner)
        noise = len(values) * torch.finfo(values.dtype).eps * values[-1].clamp(min=torch.finfo(values.dtype).tiny)
        roots = values.clamp(min=noise).sqrt()
        sides = self._factor @ vectors  # (F, r)
        by_second = torch.eye(len(mean), dtype=mean.dtype, device=mean.device) - (sides / roots) @ sides.T
        distance = mean.square().sum() + covariance.trace() + self.variance - 2 * values.clamp(min=0).sqrt().sum()
        return distance.clamp(min=0), 2 * (mean - by_second @ mean), by_second


class FrechetTerm:
    """The term over all feature spaces. It has to be started, or loaded from a state of the same images and spaces.

    Args:
        config: weight, decay and feature spaces.
        device: where to compute.
        evaluator: name of the feature space by which snapshots are chosen.
        data: fingerprint of the real images.

    Attributes:
        extractors: one for each space.

    Raises:
        UserError: weights are missing or damaged, a space is given twice, or is that of the evaluator.
    """

    def __init__(self, config: FrechetConfig, device: torch.device, evaluator: str | None, data: str) -> None:
        self.config, self.device, self.data = config, device, data
        self.extractors: list[FeatureExtractor] = [load_extractor(one, device) for one in config.extractors]
        names = [extractor.name for extractor in self.extractors]
        if evaluator is not None and evaluator.removesuffix("-bf16") in (name.removesuffix("-bf16") for name in names):
            raise UserError(
                f"frechet.extractors and held_out.extractor are the same feature space, {evaluator}: what is trained "
                "on cannot evaluate; give another one to either"
            )
        if len(set(names)) < len(names):
            raise UserError(f"frechet.extractors has the same feature space twice: {', '.join(names)}; drop one")
        self._distances: dict[str, RunningDistance] = {}

    @property
    def started(self) -> bool:
        """Whether the moments are known."""
        return bool(self._distances)

    def start(self, real: Sequence[GaussianStatistics], decoded: Iterable[Tensor]) -> None:
        """Set the moments: of the real images in each space, and of the untouched decoder's images.

        Args:
            real: of each space.
            decoded: batches of images (N, 3, H, W) in [-1, 1], of which each counts the same.

        Raises:
            UserError: the features of all real images are alike.
        """
        for statistics in real:
            check_varied(statistics)
        names = (extractor.name for extractor in self.extractors)
        self._distances = {n: RunningDistance(_on(self.device, s)) for n, s in zip(names, real, strict=True)}
        with torch.no_grad():
            for count, images in enumerate(decoded, start=1):
                for distance, features in self._features(images):
                    distance.update(features, 1 / count)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Terms for decoded samples (N, 3, H, W) of this process, one for each space; updates the moments."""
        share, weight = 1 - self.config.decay, self.config.weight / len(self.extractors)
        names = (extractor.name for extractor in self.extractors)
        return {
            f"frechet_{name}": weight * distance(features, share).float()
            for name, (distance, features) in zip(names, self._features(images), strict=True)
        }

    def state(self) -> dict[str, Any]:
        """The moments, real and running."""
        found = {
            name: {"count": d.real.count, "real": d.center, "scatter": d.real.scatter, "running": d.moments}
            for name, d in self._distances.items()
        }
        return {"frechet": {"data": self.data, "spaces": found}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state`; a state without them, of other images or other spaces leaves the term not started."""
        saved = state.get("frechet", {"data": None})
        if saved["data"] != self.data or list(saved["spaces"]) != [one.name for one in self.extractors]:
            return
        for name, space in saved["spaces"].items():
            real = GaussianStatistics(len(space["real"]))
            real.count, real.mean, real.scatter = space["count"], space["real"], space["scatter"]
            self._distances[name] = RunningDistance(_on(self.device, real))
            self._distances[name].moments = tuple(moment.to(self.device) for moment in space["running"])

    def _features(self, images: Tensor) -> list[tuple[RunningDistance, Tensor]]:
        """Each space's distance and features (world * N, F) of the images of all processes."""
        with exact_float32(images.device):
            networks = [DIFFERENTIABLE[c.name](e) for c, e in zip(self.config.extractors, self.extractors, strict=True)]
            # Clamped as they are evaluated, for each space anew: the spaces are differentiated one by one.
            found = [gather_with_gradient(features(images.float().clamp(-1, 1))) for features in networks]
        return list(zip(self._distances.values(), found, strict=True))


def _on(device: torch.device, statistics: GaussianStatistics) -> GaussianStatistics:
    """The statistics on a device."""
    statistics.mean, statistics.scatter = statistics.mean.to(device), statistics.scatter.to(device)
    return statistics
