"""Held-out samples and images, on which decoders are compared during training, never for a result.

Generated latents say how good a decoder is at what it is trained for, real images what that costs.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.config import Config
from robustok.console import note
from robustok.data.dataset import ImageDataset, open_images
from robustok.data.latent_cache import LatentCache
from robustok.data.latent_checks import check_cache, check_free_samples
from robustok.data.loader import batches_in_order
from robustok.data.pixels import from_pixels, to_pixels
from robustok.data.sources import Data
from robustok.errors import UserError
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.metrics.frechet import GaussianStatistics, covariance_factor, frechet_distance
from robustok.metrics.grid import decoded_statistics
from robustok.metrics.lpips import BACKBONES, LPIPS
from robustok.metrics.pixels import capped_psnr
from robustok.metrics.processes import ALONE, Processes
from robustok.tokenizers import encoder_digest
from robustok.types import FeatureExtractor, Tokenizer

IMAGES = 2_500  # held-out real images whose reconstructions are measured
MEMORY = 2 * 10**9  # bytes that these images may take; of 1024x1024 pixels 635 do
BATCH_PIXELS = 64 * 256**2  # pixels of the images decoded at a time


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
        workers: processes that decode images.

    Attributes:
        samples: number of samples in a set.
        extractor: name of the feature space.

    Raises:
        UserError: no samples, those of another tokenizer, or fewer than two a set.
    """

    def __init__(
        self,
        config: HeldOut,
        tokenizer: nn.Module,
        data: ImageDataset,
        device: torch.device,
        sets: int = 1,
        workers: int | None = 0,
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
        self._batch = batch_of(data.shape)
        self._reference = real_statistics(data, [self._extract], device, workers=workers)[0]
        self._factor = covariance_factor(self._reference)

    def decoder(self, tokenizer: nn.Module) -> Callable[[Tensor], Tensor]:
        """The decoder of a tokenizer, on the device of the computation."""
        return tokenizer.to(self._device).decode

    @torch.no_grad()
    def __call__(self, decode: Callable[[Tensor], Tensor]) -> list[float]:
        """The distance of each set, decoded by ``decode``, a function of latents."""
        images = lambda part: to_pixels(decode(part.to(self._device)))  # noqa: E731
        found = (decoded_statistics(latents, images, self._extract, self._batch) for latents in self._sets)
        return [frechet_distance(statistics, self._reference, self._factor) for statistics in found]


class ReconstructionScore:
    """What a decoder does to real images that nothing was trained on: the price of better samples.

    Args:
        extractor: feature space of rFD; None leaves it out.
        tokenizer: one with the encoder of all decoders, on the device of the computation.
        data: the images.
        count: how many of them, fewer where they would take more than ``MEMORY``.
        workers: processes that decode images.
    """

    def __init__(
        self,
        extractor: ExtractorConfig | None,
        tokenizer: Tokenizer,
        data: ImageDataset,
        count: int = IMAGES,
        workers: int | None = 0,
    ) -> None:
        self._device = next(tokenizer.parameters()).device
        self._extract = None if extractor is None else load_extractor(extractor, self._device)
        self._lpips = _lpips(data.image_size, self._device)
        self._batches: list[tuple[Tensor, Tensor]] = []  # pixels and latents
        self._real = None if self._extract is None else GaussianStatistics(self._extract.dim)
        left = min(count, max(2, MEMORY // (3 * math.prod(data.shape))))
        for batch in batches_in_order(data, batch_of(data.shape), workers=workers, device=self._device):
            pixels = batch.pixels[:left]
            with torch.no_grad():
                self._batches.append((pixels.cpu(), tokenizer.encode(from_pixels(pixels)).cpu()))
            if self._real is not None:
                self._real.update(self._extract(pixels).cpu())
            if (left := left - len(pixels)) <= 0:
                break

    @torch.no_grad()
    def __call__(self, decode: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """``psnr`` in dB, with an extractor ``rfd``, and ``lpips_alex`` where its weights are at hand."""
        statistics = None if self._extract is None else GaussianStatistics(self._extract.dim)
        pairs: dict[str, list[Tensor]] = {"psnr": [], "lpips_alex": []}
        for real, latents in self._batches:
            pixels = to_pixels(decode(latents.to(self._device)))
            if statistics is not None:
                statistics.update(self._extract(pixels).cpu())
            pairs["psnr"].append(capped_psnr(pixels.cpu(), real))
            if self._lpips is not None:
                pairs["lpips_alex"].append(self._lpips(pixels, real).cpu())
        means = {name: torch.cat(values).mean().item() for name, values in pairs.items() if values}
        return means if statistics is None else {"rfd": frechet_distance(statistics, self._real), **means}


def reconstruction_score(
    data: Data,
    tokenizer: Tokenizer,
    extractor: ExtractorConfig | None,
    limited: bool,
    count: int = IMAGES,
    workers: int | None = 0,
) -> ReconstructionScore | None:
    """The score on the test split of a data set; None, with a note, where it has too few images.

    Raises:
        UserError: too few images, where decoders are ``limited`` by their score.
    """
    try:
        images = held_out_images(data, tokenizer.image_size)
    except UserError as error:
        if limited:
            raise
        note(f"rFD and PSNR are left out: {error}", "yellow")
        return None
    return ReconstructionScore(extractor, tokenizer, images, count, workers)


def held_out_images(data: Data, image_size: int) -> ImageDataset:
    """The real images by which reconstructions are measured.

    Raises:
        UserError: there are fewer than two.
    """
    images = open_images(data, image_size, split="test")
    if len(images) < 2:
        raise UserError(
            f"{images.describe()} is too few images to measure reconstructions; raise data.holdout, or drop "
            "max_reconstruction_loss"
        )
    return images


def batch_of(shape: tuple[int, int]) -> int:
    """How many images (H, W) are decoded at a time."""
    return max(1, min(64, BATCH_PIXELS // math.prod(shape)))


def _lpips(image_size: int, device: torch.device) -> LPIPS | None:
    """LPIPS, if its weights are in torch.hub's cache and the images are large enough."""
    least, url = BACKBONES["alex"].least, BACKBONES["alex"].url
    if image_size < least:
        note(f"LPIPS is left out: it needs images of {least} pixels a side")
    elif not (Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name).exists():
        note(f"LPIPS is left out: its weights are not in {torch.hub.get_dir()}/checkpoints, from {url}")
    else:
        try:
            return LPIPS(device=device)
        except UserError as error:
            note(f"LPIPS is left out: {error}")
    return None


def real_statistics(
    data: ImageDataset,
    extractors: Sequence[FeatureExtractor],
    device: torch.device,
    processes: Processes = ALONE,
    workers: int | None = 0,
) -> list[GaussianStatistics]:
    """Statistics of all real images in each feature space, the images shared by the processes."""
    found = [GaussianStatistics(extract.dim) for extract in extractors]
    for batch in batches_in_order(data, 64, processes.rank, processes.world, workers, device):
        for extract, statistics in zip(extractors, found, strict=True):
            statistics.update(extract(batch.pixels).cpu())
    return [statistics.summed(processes) for statistics in found]
