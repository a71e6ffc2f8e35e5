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
from robustok.data.buckets import open_buckets, shares
from robustok.data.dataset import ImageDataset
from robustok.data.latent_cache import LatentCache, caches_in
from robustok.data.latent_checks import check_cache, check_free_samples
from robustok.data.loader import batches_in_order
from robustok.data.pixels import from_pixels, to_pixels
from robustok.data.sources import Data
from robustok.errors import UserError
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.metrics.frechet import GaussianStatistics, frechet_distance
from robustok.metrics.grid import decoded_statistics
from robustok.metrics.lpips import BACKBONES, LPIPS
from robustok.metrics.pixels import capped_psnr
from robustok.metrics.processes import ALONE, Processes
from robustok.metrics.reference import Reference, cached_reference
from robustok.precision import exact_float32
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
    cache: Path | None = Field(
        None, description="folder for the statistics of the real images, as that of evaluate; null: in the run folder"
    )


class HeldOutScore:
    """Validation score of a decoder: Frechet distance of its images of held-out samples to the real images.

    Args:
        config: samples and feature space.
        tokenizer: one with the latent space of the samples.
        buckets: the real images, of one size each; a single one where all have the same.
        device: device of the computation.
        sets: number of disjoint sets of equal size; over several, differences have a standard error.
        workers: processes that decode images.
        processes: which share the images and the samples: all of them make the score, and call it.
        cache: folder for the statistics of the real images, which all processes share; None keeps none.

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
        buckets: Sequence[ImageDataset],
        device: torch.device,
        sets: int = 1,
        workers: int | None = 0,
        processes: Processes = ALONE,
        cache: Path | None = None,
    ) -> None:
        if config.latents is None:
            raise UserError("held_out.latents is missing; give a cache of free samples, made by `robustok generate`")
        self._extract, self._device, self._processes = load_extractor(config.extractor, device), device, processes
        caches = [LatentCache(path) for path in caches_in(config.latents)]
        for latents in caches:
            check_cache(latents, encoder_digest(tokenizer))
            check_free_samples(latents)
        sizes = [len(latents) // sets for latents in caches]  # of each bucket in a set
        self.samples, self.extractor = sum(sizes), self._extract.name
        if self.samples < 2:
            found = sum(map(len, caches))
            raise UserError(f"{config.latents} holds {found} samples, {sets} sets need at least {2 * sets}")
        # A set is a run of neighbouring records of each bucket, whose classes cycle, so every set has all classes.
        self._sets = [
            [
                latents.read(slice(i * size + processes.rank, (i + 1) * size, processes.world)).latents
                for latents, size in zip(caches, sizes, strict=True)
            ]
            for i in range(sets)
        ]
        self._batch = min(batch_of(data.shape) for data in buckets)
        self._real: Reference | None = None
        self._make_real = lambda: _cached_statistics(buckets, self._extract, device, processes, workers, cache)

    def decoder(self, tokenizer: nn.Module) -> Callable[[Tensor], Tensor]:
        """The decoder of a tokenizer, on the device of the computation."""
        return tokenizer.to(self._device).decode

    @torch.no_grad()
    def __call__(self, decode: Callable[[Tensor], Tensor]) -> list[float]:
        """The distance of each set, decoded by ``decode``, a function of latents; the same in every process."""
        images = lambda part: _pixels(decode, part, self._device)  # noqa: E731
        statistics = (decoded_statistics(latents, images, self._extract, self._batch) for latents in self._sets)
        found = (part.summed(self._processes) for part in statistics)
        real = self._real = self._real or self._make_real()  # when the first score needs them
        distances = [frechet_distance(statistics, real.statistics, real.factor) for statistics in found]
        return self._processes.of_the_first(distances)


class ReconstructionScore:
    """What a decoder does to real images that nothing was trained on: the price of better samples.

    Args:
        extractor: feature space of rFD; None leaves it out.
        tokenizer: one with the encoder of all decoders, on the device of the computation.
        buckets: the images, of one size each; a single one where all have the same.
        count: how many of them, fewer where they would take more than ``MEMORY``.
        workers: processes that decode images.
        processes: which share the images: all of them make the score, and call it.
    """

    def __init__(
        self,
        extractor: ExtractorConfig | None,
        tokenizer: Tokenizer,
        buckets: Sequence[ImageDataset],
        count: int = IMAGES,
        workers: int | None = 0,
        processes: Processes = ALONE,
    ) -> None:
        self._processes = processes
        self._device = next(tokenizer.parameters()).device
        self._extract = None if extractor is None else load_extractor(extractor, self._device)
        self._lpips = _lpips(min(side for data in buckets for side in data.shape), self._device)
        if processes.add(torch.tensor([self._lpips is None], dtype=torch.float64)).item():
            self._lpips = None  # in all processes or in none
        self._batches: list[tuple[Tensor, Tensor]] = []  # pixels and latents
        real = None if self._extract is None else GaussianStatistics(self._extract.dim)
        sizes = [len(data) for data in buckets]
        largest = max(math.prod(data.shape) for data in buckets)
        count = min(count, sum(sizes), max(2, MEMORY // (3 * largest)))
        encode = getattr(tokenizer, "encode_grid", tokenizer.encode)
        for data, share in zip(buckets, shares(count, sizes), strict=True):
            left, size = -(-(share - processes.rank) // processes.world), batch_of(data.shape)
            for batch in batches_in_order(data, size, processes.rank, processes.world, workers, self._device):
                if left <= 0:
                    break
                pixels = batch.pixels[:left]
                with torch.no_grad(), exact_float32(self._device):
                    self._batches.append((pixels.cpu(), encode(from_pixels(pixels)).cpu()))
                if real is not None:
                    real.update(self._extract(pixels).cpu())
                left -= len(pixels)
        self._real = None if real is None else real.summed(processes)

    @torch.no_grad()
    def __call__(self, decode: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """``psnr`` in dB, with an extractor ``rfd``, and ``lpips_alex`` where its weights are at hand.

        The same in every process.
        """
        statistics = None if self._extract is None else GaussianStatistics(self._extract.dim)
        pairs: dict[str, list[Tensor]] = {"psnr": []} | ({} if self._lpips is None else {"lpips_alex": []})
        for real, latents in self._batches:
            pixels = _pixels(decode, latents, self._device)
            if statistics is not None:
                statistics.update(self._extract(pixels).cpu())
            pairs["psnr"].append(capped_psnr(pixels.cpu(), real))
            if self._lpips is not None:
                pairs["lpips_alex"].append(self._lpips(pixels, real).cpu())
        values = [torch.cat([torch.zeros(0), *parts]).double() for parts in pairs.values()]
        sums = torch.stack([*(part.sum() for part in values), torch.tensor(float(len(values[0])))])
        *totals, count = self._processes.add(sums).tolist()
        found = {name: total / count for name, total in zip(pairs, totals, strict=True)}
        if statistics is not None:
            found = {"rfd": frechet_distance(statistics.summed(self._processes), self._real)} | found
        return dict(zip(found, self._processes.of_the_first([*found.values()]), strict=True))


def reconstruction_score(
    data: Data,
    tokenizer: Tokenizer,
    extractor: ExtractorConfig | None,
    limited: bool,
    count: int = IMAGES,
    workers: int | None = 0,
    processes: Processes = ALONE,
) -> ReconstructionScore | None:
    """The score on the test split of a data set; None, with a note, where it has too few images.

    All processes make it, and call it.

    Raises:
        UserError: too few images, where decoders are ``limited`` by their score.
    """
    try:
        images = held_out_images(data, tokenizer)
    except UserError as error:
        if limited:
            raise
        note(f"rFD and PSNR are left out: {error}", "yellow")
        return None
    return ReconstructionScore(extractor, tokenizer, images, count, workers, processes)


def held_out_images(data: Data, tokenizer: Tokenizer) -> list[ImageDataset]:
    """The real images by which reconstructions are measured, of one size each.

    Raises:
        UserError: there are fewer than two.
    """
    buckets = open_buckets(data, tokenizer, split="test")
    if sum(map(len, buckets)) < 2:
        raise UserError(
            f"{buckets[0].describe()} is too few images to measure reconstructions; raise data.holdout, or drop "
            "max_reconstruction_loss"
        )
    return buckets


def _pixels(decode: Callable[[Tensor], Tensor], latents: Tensor, device: torch.device) -> Tensor:
    """Decoded latents as pixels (N, 3, H, W), exact whatever the training's precision is."""
    with exact_float32(device):
        return to_pixels(decode(latents.to(device)))


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


def _cached_statistics(
    buckets: Sequence[ImageDataset],
    extract: FeatureExtractor,
    device: torch.device,
    processes: Processes,
    workers: int | None,
    folder: Path | None,
) -> Reference:
    """Statistics of all real images, which `evaluate` with the same ``cache`` would find too."""
    made: list[Reference] = []

    def make() -> Reference:
        made.append(Reference(real_statistics(buckets, [extract], device, processes, workers)[0]))
        return made[0]

    if folder is None:
        return make()
    count, write = sum(len(data) - len(data.broken) for data in buckets), processes.rank == 0
    words, stamp = "; ".join(data.describe() for data in buckets), buckets[0].stamp  # of all files of the source
    try:
        return cached_reference(folder, extract.name, words, count, make, (), write, stamp)
    except UserError:
        if not made or made[0].count == count:
            raise
        return made[0]  # images that cannot be read were left out: not kept


def real_statistics(
    buckets: Sequence[ImageDataset],
    extractors: Sequence[FeatureExtractor],
    device: torch.device,
    processes: Processes = ALONE,
    workers: int | None = 0,
) -> list[GaussianStatistics]:
    """Statistics of all real images in each feature space, the images shared by the processes."""
    found = [GaussianStatistics(extract.dim) for extract in extractors]
    for data in buckets:
        for batch in batches_in_order(data, 64, processes.rank, processes.world, workers, device):
            for extract, statistics in zip(extractors, found, strict=True):
                statistics.update(extract(batch.pixels).cpu())
    return [statistics.summed(processes) for statistics in found]
