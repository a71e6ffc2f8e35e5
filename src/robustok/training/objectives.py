"""Objectives of post-training: which latents the decoder learns from, and with which images it is compared.

An objective is a function that returns :class:`Examples`, one batch a step. The loss is the same for all: pixel and
perceptual terms between decoded images and their targets, and the adversarial term against real images. ``objective``
mixes them: each has a share of every batch.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from robustok.config import Config
from robustok.data.dataset import ImageDataset
from robustok.data.latent_cache import LatentCache, LatentRecords, training_latents
from robustok.data.latent_checks import check_cache, check_center_crops, check_free_samples, check_real_latents
from robustok.data.loader import training_batches
from robustok.devices import autocast, rank_rows, to_device
from robustok.errors import UserError
from robustok.metrics.noise import latent_scale
from robustok.randomness import step_rng
from robustok.tokenizers.perturbation import apply_draw, draw_perturbation, nearest_codes
from robustok.types import Batch, Tokenizer

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
        latents: to decode, tokens (N, L) or vectors (N, L, D).
        targets: images (N, 3, H, W) that the decoded ones are compared with.
        real: real images (N, 3, H, W), for the discriminator.
        parts: rows of each objective.
    """

    latents: Tensor
    targets: Tensor
    real: Tensor
    parts: tuple[Part, ...] = field(default=())


class Steps(NamedTuple):
    """The batches of a process, in the order in which ``training_latents`` and ``training_batches`` take them."""

    global_batch: int
    seed: int
    first: int
    count: int
    rank: int
    world: int


@dataclass(frozen=True)
class Material:
    """What objectives are made of.

    Attributes:
        tokenizer: the original one, frozen, on the device of the training.
        data: the real images.
        caches: of latents, by the setting that names them: ``pairs``, ``latents``, ``samples``.
        noise: for ``noise``.
        precision: of decoding.
    """

    tokenizer: Tokenizer
    data: ImageDataset
    caches: Mapping[str, LatentCache]
    noise: LatentNoise
    precision: str

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


def paired(material: Material, steps: Steps) -> Iterator[Examples]:
    """Mixtures of real latents and a generator's samples, compared with the real images (the paper)."""
    return _compared_with_images(material, material.caches["pairs"], steps)


def clean(material: Material, steps: Steps) -> Iterator[Examples]:
    """The control: latents of real images, compared with these images. The same as pairs with sigma = 1."""
    return _compared_with_images(material, material.caches["latents"], steps)


def noise(material: Material, steps: Steps) -> Iterator[Examples]:
    """Latents of real images with noise, compared with these images. Needs no generator."""
    add = _token_noise(material) if material.tokenizer.kind == "discrete" else _gaussian_noise(material)
    rows = rank_rows(steps.global_batch, steps.rank, steps.world)

    def examples(step: int, clear: Examples) -> Examples:
        rng = step_rng(steps.seed, step, "latent noise")  # for the global batch, of which the process takes its rows
        return replace(clear, latents=add(clear.latents, steps.global_batch, rows, rng))

    return map(examples, count(steps.first), clean(material, steps))


def free(material: Material, steps: Steps) -> Iterator[Examples]:
    """Free samples of a generator, compared with what the original decoder makes of them.

    They have no real images. The adversarial term makes them more like real ones, and the comparison, here called
    consistency, keeps what they show.
    """

    def examples(samples: LatentRecords, images: Batch) -> Examples:
        latents = to_device(samples.latents, material.device)
        return Examples(latents, material.decode(latents), images.images.to(material.device))

    return map(examples, training_latents(material.caches["samples"], *steps), training_batches(material.data, *steps))


OBJECTIVES: dict[str, tuple[Callable[[Material, Steps], Iterator[Examples]], str]] = {
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
    """The caches that objectives need.

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


def _compared_with_images(material: Material, cache: LatentCache, steps: Steps) -> Iterator[Examples]:
    def examples(batch: LatentRecords) -> Examples:
        images = real_images(material.data, batch).to(material.device)
        return Examples(to_device(batch.latents, material.device), images, images)

    return map(examples, training_latents(cache, *steps))


def real_images(data: ImageDataset, records: LatentRecords) -> Tensor:
    """The real images (N, 3, H, W) of records, mirrored if they were encoded mirrored.

    A broken image is replaced by the next readable one, as at encoding.
    """
    images = data.read(records.indices, seeds=np.zeros(len(records.indices), dtype=np.int64)).images
    return torch.where(records.flips.bool()[:, None, None, None], images.flip(-1), images)


NoiseAdder = Callable[[Tensor, int, slice, torch.Generator], Tensor]


def _token_noise(material: Material) -> NoiseAdder:
    codebook, settings = material.tokenizer.codebook, material.noise
    levels = getattr(material.tokenizer, "code_levels", None)
    strength = min(len(codebook), max(2, round(settings.share * len(codebook))))
    near = nearest_codes(codebook, strength, include_self=True, levels=levels)

    def add(tokens: Tensor, batch: int, rows: slice, rng: torch.Generator) -> Tensor:
        draw = draw_perturbation(batch, tokens.shape[1], settings.rate, 1.0, rng).rows(rows.start, rows.stop)
        return apply_draw(tokens, near, draw)

    return add


def _gaussian_noise(material: Material) -> NoiseAdder:
    scale = latent_scale(material.caches["latents"].read(slice(0, 4096)).latents).float().to(material.device)  # (D,)

    def add(latents: Tensor, batch: int, rows: slice, rng: torch.Generator) -> Tensor:
        levels = material.noise.level * torch.rand(batch, 1, 1, generator=rng)[rows]
        noise = torch.randn(batch, *latents.shape[1:], generator=rng)[rows]
        return latents + scale * to_device(levels * noise, latents.device)

    return add


# Mixtures of objectives


def mixture(
    material: Material, objective: Mapping[str, float], consistency: float, steps: Steps, parts: int = 1
) -> Iterator[Examples]:
    """Batches in which each objective has its share of the rows, one after the other.

    Args:
        material: what they are made of.
        objective: weights, of which the shares are made.
        consistency: weight of the comparison of ``free``, as a multiple of that of the other objectives.
        steps: which batches.
        parts: of the gradient accumulation; shares are rounded to rows that divide among them.

    Raises:
        UserError: an objective without rows; as ``training_latents``.
    """
    sizes = rows_of(objective, steps.global_batch, steps.world * parts)
    streams = [OBJECTIVES[name][0](material, steps._replace(global_batch=size)) for name, size in sizes.items()]
    found, start = [], 0
    for name, size in sizes.items():
        rows, weight = slice(start, start := start + size // steps.world), size / steps.global_batch
        found.append(Part(name, rows, weight * (consistency if name == "free" else 1.0)))

    def joined(*examples: Examples) -> Examples:
        columns = ([getattr(one, name) for one in examples] for name in ("latents", "targets", "real"))
        return Examples(*(c[0] if len(c) == 1 else torch.cat(c) for c in columns), tuple(found))

    return map(joined, *streams)


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
