"""Held-out samples: generated latents on which decoders are compared during training, never for a result."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.config import Config
from robustok.data.dataset import ImageDataset
from robustok.data.latent_cache import LatentCache
from robustok.data.latent_checks import check_cache, check_free_samples
from robustok.data.loader import batches_in_order
from robustok.data.pixels import to_pixels
from robustok.errors import UserError
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.metrics.frechet import GaussianStatistics, covariance_factor, frechet_distance
from robustok.metrics.pfid import decoded_statistics
from robustok.metrics.processes import ALONE, Processes
from robustok.tokenizers import encoder_digest
from robustok.types import FeatureExtractor


class HeldOut(Config):
    """Free samples on which snapshots are compared. Results to report need other samples."""

    latents: Path | None = Field(
        None, description="cache of free samples, made by `robustok generate`; null only where sigma=auto makes them"
    )
    extractor: ExtractorConfig = Field(description="feature space of the Frechet distance to the real images")


class HeldOutScore:
    """Validation score of a decoder: Frechet distance of its images of held-out samples to the real images.

    Args:
        config: samples and feature space.
        tokenizer: one with the latent space of the samples.
        data: the real images.
        device: device of the computation.
        sets: number of disjoint sets of equal size; over several, differences have a standard error.

    Attributes:
        samples: number of samples in a set.
        extractor: name of the feature space.

    Raises:
        UserError: no samples, those of another tokenizer, or fewer than two a set.
    """

    def __init__(
        self, config: HeldOut, tokenizer: nn.Module, data: ImageDataset, device: torch.device, sets: int = 1
    ) -> None:
        if config.latents is None:
            raise UserError("held_out.latents is missing; give a cache of free samples, made by `robustok generate`")
        self._extract, self._device = load_extractor(config.extractor, device), device
        cache = LatentCache(config.latents)
        check_cache(cache, encoder_digest(tokenizer))
        check_free_samples(cache)
        self.samples, self.extractor = len(cache) // sets, self._extract.name
        if self.samples < 2:
            raise UserError(f"{config.latents} holds {len(cache)} samples, {sets} sets need at least {2 * sets}")
        # A set is a run of neighbouring records, whose classes cycle, so every set has all classes.
        self._sets = [cache.read(slice(i * self.samples, (i + 1) * self.samples)).latents for i in range(sets)]
        self._reference = real_statistics(data, [self._extract], device)[0]
        self._factor = covariance_factor(self._reference)

    def decoder(self, tokenizer: nn.Module) -> Callable[[Tensor], Tensor]:
        """The decoder of a tokenizer, on the device of the computation."""
        return tokenizer.to(self._device).decode

    @torch.no_grad()
    def __call__(self, decode: Callable[[Tensor], Tensor]) -> list[float]:
        """The distance of each set, decoded by ``decode``, a function of latents."""
        images = lambda part: to_pixels(decode(part.to(self._device)))  # noqa: E731
        found = (decoded_statistics(latents, images, self._extract) for latents in self._sets)
        return [frechet_distance(statistics, self._reference, self._factor) for statistics in found]


def real_statistics(
    data: ImageDataset,
    extractors: Sequence[FeatureExtractor],
    device: torch.device,
    processes: Processes = ALONE,
    workers: int = 0,
) -> list[GaussianStatistics]:
    """Statistics of all real images in each feature space, the images shared by the processes."""
    found = [GaussianStatistics(extract.dim) for extract in extractors]
    for batch in batches_in_order(data, 64, processes.rank, processes.world, workers):
        pixels = to_pixels(batch.images).to(device)
        for extract, statistics in zip(extractors, found, strict=True):
            statistics.update(extract(pixels).cpu())
    return [statistics.summed(processes) for statistics in found]
