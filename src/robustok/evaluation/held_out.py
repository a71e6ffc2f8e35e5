"""Held-out samples: generated latents on which decoders are compared during training, never for a result."""

from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.config import Config
from robustok.data.dataset import ImageDataset
from robustok.data.latent_cache import LatentCache, check_cache
from robustok.data.loader import batches_in_order
from robustok.data.pixels import to_pixels
from robustok.errors import UserError
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.metrics.frechet import GaussianStatistics, covariance_factor, frechet_distance
from robustok.metrics.pfid import decoded_statistics
from robustok.tokenizers import encoder_digest


class HeldOut(Config):
    """Free samples on which the snapshots are scored. Report results on other samples than these."""

    latents: Path | None = Field(
        None, description="cache of free samples, made by `robustok generate`; null only where sigma=auto makes them"
    )
    extractor: ExtractorConfig = Field(description="feature space of the Frechet distance to the real images")


class HeldOutScore:
    """Frechet distances of a decoder's images of held-out samples to real images: the same samples for all decoders.

    Args:
        config: samples and feature space.
        tokenizer: any that shares the latent space.
        data: the real images.
        device: where to compute.
        sets: how many disjoint sets of equal size the samples make; over several, differences have a standard error.

    Attributes:
        samples: number in a set.
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
        self.samples, self.extractor = len(cache) // sets, self._extract.name
        if self.samples < 2:
            raise UserError(f"{config.latents} holds {len(cache)} samples, {sets} sets need at least {2 * sets}")
        # Neighbouring records, because classes take turns: every set has all of them.
        self._sets = [cache.read(slice(i * self.samples, (i + 1) * self.samples)).latents for i in range(sets)]
        self._reference = GaussianStatistics(self._extract.dim)
        for batch in batches_in_order(data, batch_size=64):
            self._reference.update(self._extract(to_pixels(batch.images).to(device)).cpu())
        self._factor = covariance_factor(self._reference)

    def decoder(self, tokenizer: nn.Module) -> Callable[[Tensor], Tensor]:
        """The decoder of a tokenizer, brought to the evaluator's device."""
        return tokenizer.to(self._device).decode

    @torch.no_grad()
    def __call__(self, decode: Callable[[Tensor], Tensor]) -> list[float]:
        """The distance of each set, decoded by a function of latents."""
        images = lambda part: to_pixels(decode(part.to(self._device)))  # noqa: E731
        found = (decoded_statistics(latents, images, self._extract) for latents in self._sets)
        return [frechet_distance(statistics, self._reference, self._factor) for statistics in found]
