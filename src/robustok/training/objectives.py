"""Objectives of post-training: which latents the decoder learns from, and with which images it is compared.

An objective reads and draws the :class:`Inputs` of a step, in data workers if wanted, and makes :class:`Examples` of
them on the device. The loss is the same for all: pixel and perceptual terms between decoded images and their targets,
and the adversarial term against real images. ``objective`` mixes them: each has a share of every batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from robustok.config import Config
from robustok.data.dataset import Draw, ImageDataset, Read
from robustok.data.latent_cache import LatentCache, LatentRecords
from robustok.data.latent_checks import check_cache, check_center_crops, check_free_samples, check_real_latents
from robustok.data.loader import MOST_WORKERS, ahead, worker_count
from robustok.data.order import Blocks, batch_indices, batch_seeds, bucket_steps, shuffle
from robustok.data.pixels import from_pixels
from robustok.devices import rank_rows
from robustok.errors import UserError
from robustok.metrics.noise import latent_scale
from robustok.precision import Precision, autocast
from robustok.randomness import bucket_seed, step_rng
from robustok.tokenizers.perturbation import PerturbationDraw, apply_draw, draw_perturbation, nearest_codes
from robustok.training.latent_crops import WHOLE, Cropping, Cut, join_cuts
from robustok.types import Tokenizer

Weight = Annotated[float, Field(gt=0)]
Objective = Annotated[
    dict[Literal["paired", "free", "noise", "clean"], Weight],
    Field(min_length=1),
    BeforeValidator(lambda value: {value: 1.0} if isinstance(value, str) else value),
]


class LatentNoise(Config):
    """Noise on the latents of real images, for the objective ``noise``."""

    rate: float = Field(0.2, ge=0, le=1, description="tokens: share of an image's tokens that is replaced")
    share: float = Field(
        0.025, gt=0, le=1, description="tokens: replacements are drawn from this share of the codebook, the nearest"
    )
    level: float = Field(
        0.3,
        ge=0,
        description="continuous latents: largest standard deviation of the noise, in those of the latents; the level "
        "of each image is uniform from 0 to this",
    )


@dataclass(frozen=True)
class Part:
    """The examples of one objective in a batch.

    Attributes:
        name: of the objective.
        rows: where they are.
        weight: of their terms: share of the batch, for ``free`` times the weight of the consistency.
    """

    name: str
    rows: slice
    weight: float


@dataclass(frozen=True)
class Examples:
    """What a process learns from in one step, on the device of the training.

    Attributes:
        latents: to decode, tokens (N, L) or vectors (N, L, D), of buckets (N, rows, columns, D).
        targets: images (N, 3, H, W) that the decoded ones are compared with.
        real: real images (N, 3, H, W), for the discriminator.
        parts: rows of each objective.
        cut: where they are in whole images: ``latents`` are windows around what ``targets`` and ``real`` show.
    """

    latents: Tensor
    targets: Tensor
    real: Tensor
    parts: tuple[Part, ...] = field(default=())
    cut: Cut = WHOLE


class Steps(NamedTuple):
    """The batches of a process.

    With ``repeats`` a set smaller than a batch fills it with several epochs, as a bucket of few photographs needs it.
    """

    global_batch: int
    seed: int
    first: int
    count: int
    rank: int
    world: int
    repeats: bool = False

    @property
    def rows(self) -> slice:
        """Those of the process in the global batch."""
        return rank_rows(self.global_batch, self.rank, self.world)

    def records(self, count: int, step: int, blocks: Blocks | None = None) -> np.ndarray:
        """The process's records of a step, out of ``count``, whose images may be downloaded in ``blocks``.

        Raises:
            UserError: there are fewer than the batch has.
        """
        if self.repeats and count < self.global_batch:
            epochs = -(-self.global_batch // count)
            found = [shuffle(count, self.seed, step * epochs + i) for i in range(epochs)]
            return np.concatenate(found)[: self.global_batch][self.rows]
        return batch_indices(count, self.global_batch, self.seed, step, blocks)[self.rows]


class Inputs(NamedTuple):
    """What an objective reads and draws for a step.

    Attributes:
        latents: tokens (N, L) or vectors (N, L, D).
        images: N real images.
        noise: of the latents, for the objective ``noise``.
        cut: crops of the images.
    """

    latents: Tensor
    images: Read
    noise: Any = None
    cut: Cut = WHOLE


class Stream(NamedTuple):
    """An objective's batches.

    Attributes:
        read: the inputs of a step; picklable, for data workers.
        examples: what is made of them on the device.
    """

    read: Callable[[int], Inputs]
    examples: Callable[[Inputs], Examples]


@dataclass(frozen=True)
class Material:
    """What objectives are made of; of one size, so that buckets have one each.

    Attributes:
        tokenizer: the original one, frozen, on the device of the training.
        data: the real images.
        caches: of latents, by the setting that names them: ``pairs``, ``latents``, ``samples``.
        noise: for ``noise``.
        precision: of decoding.
        crops: sizes of crops; None: whole images.
    """

    tokenizer: Tokenizer
    data: ImageDataset
    caches: Mapping[str, LatentCache]
    noise: LatentNoise
    precision: Precision
    crops: Cropping | None = None

    @property
    def device(self) -> torch.device:
        """Device of the training."""
        return next(self.tokenizer.parameters()).device

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, 3, H, W) of the original decoder."""
        with autocast(self.device, self.precision):
            return self.tokenizer.decode(latents).float()


# Objectives


def paired(material: Material, steps: Steps) -> Stream:
    """Mixtures of real latents and a generator's samples, compared with the real images (the paper)."""
    return _compared_with_images(material, material.caches["pairs"], steps)


def clean(material: Material, steps: Steps) -> Stream:
    """The control: latents of real images, compared with these images. The same as pairs with sigma = 1."""
    return _compared_with_images(material, material.caches["latents"], steps)


def noise(material: Material, steps: Steps) -> Stream:
    """Latents of real images with noise, compared with these images. Needs no generator."""
    draw, add = (_token_noise if material.tokenizer.kind == "discrete" else _gaussian_noise)(material, steps)
    clear = _compared_with_images(material, material.caches["latents"], steps, draw)

    def examples(inputs: Inputs) -> Examples:
        return replace(clear.examples(inputs), latents=inputs.cut.latents(add(inputs.latents, inputs.noise)))

    return Stream(clear.read, examples)


def free(material: Material, steps: Steps) -> Stream:
    """Free samples of a generator, compared with what the original decoder makes of them.

    They have no real images. The adversarial term makes them more like real ones, and the comparison, here called
    consistency, keeps what they show.
    """
    data, cache = material.data, material.caches["samples"]
    steps.records(len(data), steps.first)  # raise now rather than at the first step

    def examples(inputs: Inputs) -> Examples:
        cut, latents = inputs.cut, inputs.cut.latents(inputs.latents)
        targets, real = cut.decoded(material.decode(latents)), cut.images(data.to_batch(inputs.images).pixels)
        return Examples(latents, targets, from_pixels(real))

    return Stream(partial(_read_samples, data, cache, steps), examples)


OBJECTIVES: dict[str, tuple[Callable[[Material, Steps], Stream], str]] = {
    "paired": (paired, "pairs"),
    "free": (free, "samples"),
    "noise": (noise, "latents"),
    "clean": (clean, "latents"),
}
"""Each objective with the setting that names its cache of latents."""


def needed_caches(objective: Mapping[str, float]) -> list[str]:
    """The settings that name the caches of these objectives."""
    return list(dict.fromkeys(OBJECTIVES[name][1] for name in objective))


def open_caches(paths: Mapping[str, Path], digest: str) -> dict[str, LatentCache]:
    """The caches that objectives need, of one size.

    Args:
        paths: by the setting that names them.
        digest: of the tokenizer whose latents they are to hold.

    Raises:
        UserError: a cache is missing or damaged, of another tokenizer, or of another kind of latents.
    """
    caches = {name: LatentCache(path) for name, path in paths.items()}
    for name, cache in caches.items():
        check_cache(cache, digest)
        if name == "samples":
            check_free_samples(cache)
        if name == "latents":
            check_real_latents(cache)
            check_center_crops(cache)
    return caches


NoiseDraw = Callable[[int], Any]  # of a step; picklable


def _compared_with_images(
    material: Material, cache: LatentCache, steps: Steps, draw: NoiseDraw | None = None
) -> Stream:
    def examples(inputs: Inputs) -> Examples:
        images = from_pixels(inputs.cut.images(material.data.to_batch(inputs.images).pixels))
        return Examples(inputs.cut.latents(inputs.latents), images, images)

    blocks = material.data.blocks_of(cache.indices)
    return Stream(partial(_read_records, material.data, cache, steps, draw, blocks=blocks), examples)


def _read_records(
    data: ImageDataset,
    cache: LatentCache,
    steps: Steps,
    draw: NoiseDraw | None,
    step: int,
    blocks: Blocks | None = None,
) -> Inputs:
    records = cache.read(steps.records(len(cache), step, blocks))
    return Inputs(records.latents, real_images(data, records), None if draw is None else draw(step))


def _read_samples(data: ImageDataset, cache: LatentCache, steps: Steps, step: int) -> Inputs:
    latents = cache.read(steps.records(len(cache), step)).latents
    seeds = batch_seeds(steps.global_batch, steps.seed, step)[steps.rows]
    return Inputs(latents, data[Draw(steps.records(len(data), step, data.blocks), seeds)])


def real_images(data: ImageDataset, records: LatentRecords) -> Read:
    """The real images of records, mirrored if they were encoded mirrored.

    A broken image is replaced by the next readable one, as at encoding.
    """
    read = data[Draw(records.indices.numpy(), np.zeros(len(records.indices), dtype=np.int64))]
    return read._replace(mirrored=records.flips.bool())


NoiseAdder = Callable[[Tensor, Any], Tensor]  # latents and what was drawn


def _token_noise(material: Material, steps: Steps) -> tuple[NoiseDraw, NoiseAdder]:
    codebook, settings = material.tokenizer.codebook, material.noise
    levels = getattr(material.tokenizer, "code_levels", None)
    strength = min(len(codebook), max(2, round(settings.share * len(codebook))))
    near = nearest_codes(codebook, strength, include_self=True, levels=levels)
    length = material.caches["latents"].manifest.latent_shape[0]
    draw = partial(_draw_replacements, length, settings.rate, steps)
    return draw, lambda tokens, drawn: apply_draw(tokens, near, drawn)


def _draw_replacements(length: int, rate: float, steps: Steps, step: int) -> PerturbationDraw:
    """Drawn for the global batch, of which the process takes its rows."""
    draw = draw_perturbation(steps.global_batch, length, rate, 1.0, step_rng(steps.seed, step, "latent noise"))
    return draw.rows(steps.rows.start, steps.rows.stop)


def _gaussian_noise(material: Material, steps: Steps) -> tuple[NoiseDraw, NoiseAdder]:
    cache = material.caches["latents"]
    scale = latent_scale(cache.read(slice(0, 4096)).latents).float().to(material.device)  # (D,)
    draw = partial(_draw_gaussian, cache.manifest.latent_shape, material.noise.level, steps)
    return draw, lambda latents, drawn: latents + scale * drawn


def _draw_gaussian(shape: tuple[int, ...], level: float, steps: Steps, step: int) -> Tensor:
    """(N, *shape), drawn for the global batch, of which the process takes its rows."""
    rng, batch = step_rng(steps.seed, step, "latent noise"), steps.global_batch
    levels = level * torch.rand(batch, *(1 for _ in shape), generator=rng)[steps.rows]
    return levels * torch.randn(batch, *shape, generator=rng)[steps.rows]


# Mixtures of objectives


def mixture(
    buckets: Sequence[Material],
    objective: Mapping[str, float],
    consistency: float,
    steps: Steps,
    parts: int = 1,
    workers: int | None = 0,
) -> Iterator[Examples]:
    """Batches in which each objective has its share of the rows, one after the other.

    Each batch is of one bucket, drawn in proportion to their records, the same in all processes.

    Args:
        buckets: what they are made of: one material, or one of each size.
        objective: weights, of which the shares are made.
        consistency: weight of the comparison of ``free``, as a multiple of that of the other objectives.
        steps: which batches.
        parts: of the gradient accumulation; shares are rounded to rows that divide among them.
        workers: processes that read ahead; None: as many as help, none where the images are held in memory.

    Raises:
        UserError: an objective without rows, or with more than it has records; ``world`` does not divide the batch.
    """
    sizes = rows_of(objective, steps.global_batch, steps.world * parts)
    repeats = len(buckets) > 1
    own = [steps._replace(seed=bucket_seed(steps.seed, i), repeats=repeats) for i in range(len(buckets))]
    streams = [_streams(material, sizes, one) for material, one in zip(buckets, own, strict=True)]
    found, start = [], 0
    for name, size in sizes.items():
        rows, weight = slice(start, start := start + size // steps.world), size / steps.global_batch
        found.append(Part(name, rows, weight * (consistency if name == "free" else 1.0)))

    def joined(inputs: Sequence[Inputs], bucket: int) -> Examples:
        examples = [stream.examples(one) for stream, one in zip(streams[bucket], inputs, strict=True)]
        columns = ([getattr(one, name) for one in examples] for name in ("latents", "targets", "real"))
        cut = join_cuts([one.cut for one in inputs])
        return Examples(*(c[0] if len(c) == 1 else torch.cat(c) for c in columns), tuple(found), cut)

    workers = worker_count(workers, 0 if all(material.data.in_memory for material in buckets) else MOST_WORKERS)
    read = partial(_read_all, [[stream.read for stream in one] for one in streams])
    records = [len(next(iter(material.caches.values()))) for material in buckets]
    chosen, own_steps = (x[steps.first :] for x in bucket_steps(records, steps.seed, steps.first + steps.count))
    items = list(zip(chosen.tolist(), own_steps.tolist(), strict=True))
    return map(joined, ahead(read, items, workers, buckets[0].device), chosen.tolist())


def _streams(material: Material, sizes: Mapping[str, int], steps: Steps) -> list[Stream]:
    """The batches of each objective, with so many rows, of one bucket."""
    found = []
    for name, size in sizes.items():
        make, cache = OBJECTIVES[name]
        stream = make(material, own := steps._replace(global_batch=size))
        own.records(len(material.caches[cache]), own.first)  # raise now rather than at the first step
        found.append(stream._replace(read=partial(_read_cut, stream.read, material.crops, own, name)))
    return found


def _read_all(reads: Sequence[Sequence[Callable[[int], Inputs]]], item: tuple[int, int]) -> tuple[Inputs, ...]:
    """The inputs of all objectives, of a bucket in its own step."""
    bucket, step = item
    return tuple(read(step) for read in reads[bucket])


def _read_cut(read: Callable[[int], Inputs], crops: Cropping | None, steps: Steps, name: str, step: int) -> Inputs:
    """The inputs of a step with the crops that are drawn of them."""
    cut = WHOLE if crops is None else crops.draw(steps.global_batch, steps.rows, steps.seed, step, name)
    return read(step)._replace(cut=cut)


def rows_of(objective: Mapping[str, float], batch: int, multiple: int = 1) -> dict[str, int]:
    """Rows of each objective in a batch, multiples of ``multiple`` nearest to the weights' shares.

    Raises:
        UserError: an objective has none.
    """
    total, sizes, before = sum(objective.values()), {}, 0
    for name, share in zip(objective, np.cumsum(list(objective.values())) / total, strict=True):
        after = round(share * batch / multiple) * multiple
        sizes[name], before = after - before, after
    if empty := [name for name, size in sizes.items() if not size]:
        raise UserError(
            f"objective {empty[0]} has no rows in a batch of {batch}; raise its weight {objective[empty[0]]} or "
            "batch_size"
        )
    return sizes
