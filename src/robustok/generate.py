"""The verbs `generate` (free samples) and `make-pairs` (samples mixed with real latents, for post-training).

Both write caches of latents. Record i has its own random numbers, so it is the same whatever the batch size or the
processes.
"""

import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from robustok.config import Config, plain
from robustok.encode import fill_cache, random_subset
from robustok.generators import SamplingConfig, check_kind, check_sampling, load_generator
from robustok.generators.sampling import image_rngs
from robustok.image_files import write_images
from robustok.images import from_pixels, to_pixels
from robustok.latents import LatentCache, LatentType, Manifest, check_cache, check_center_crops
from robustok.snapshots import digest
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.training.loop import autocast, start_accelerator
from robustok.types import Generator, Tokenizer, UserError

CHECKED = 512  # latents against which a generator's latent statistics are held


class GenerateRun(Config):
    """Sample latents, class-balanced: record i has class i modulo the number of classes."""

    out: Path = Field(description="folder of the cache of latents; an unfinished one is completed")
    generator: Path = Field(description="generator snapshot, or run folder")
    count: int = Field(50_000, ge=1, description="number of samples")
    classes: list[int] | None = Field(None, description="only these classes; null is all")
    sampling: SamplingConfig | None = Field(None, description="null takes the settings stored with the generator")
    seed: int = Field(0, ge=0, description="seed; sample i depends on it and on i alone")
    tokenizer: Path | None = Field(None, description="decode with this tokenizer and write images too")
    images: Literal["none", "npz", "png"] = Field(
        "none", description="npz: one ADM-style samples.npz (arr_0, labels in arr_1); png: a folder of files"
    )
    batch_size: int = Field(64, ge=1, description="samples at a time")
    shard_size: int = Field(10_000, ge=1, description="records in a shard")
    precision: Literal["auto", "bf16", "float32"] = Field("float32", description="autocast dtype")
    compile: bool = Field(
        False, description="compile the sampling step of a token generator; no gain on a CPU, where it needs g++"
    )
    latent_dtype: LatentType = Field("float32", description="type of continuous latents on disk")

    @model_validator(mode="after")
    def _images_need_a_tokenizer(self) -> "GenerateRun":
        if (self.images == "none") != (self.tokenizer is None):
            raise ValueError("images and tokenizer go together: set both (images=npz tokenizer=PATH) or neither")
        return self


class MakePairsRun(Config):
    """Mix real latents with samples of the generator."""

    out: Path = Field(description="folder of the cache of pairs; an unfinished one is completed")
    generator: Path = Field(description="generator snapshot, or run folder")
    latents: Path = Field(description="cache of the real images' latents, made by `robustok encode`")
    preservation: float = Field(
        0.9,
        ge=0,
        le=1,
        description="share of the real latents that is kept (sigma; diffusion: by sampling.strategy); 1 is the control",
    )
    count: int | None = Field(
        200_000,
        ge=1,
        description="number of pairs, a random subset of the latents; null, or more than there are, is all",
    )
    mode: Literal["generated", "reencoded"] = Field(
        "generated",
        description="generated: the mixture itself; reencoded: decoded to uint8 and encoded again (release)",
    )
    tokenizer: Path | None = Field(None, description="needed for mode=reencoded")
    sampling: SamplingConfig | None = Field(None, description="null takes the settings stored with the generator")
    seed: int = Field(0, ge=0, description="seed of the subset and of every sample")
    batch_size: int = Field(64, ge=1, description="samples at a time")
    shard_size: int = Field(10_000, ge=1, description="records in a shard")
    precision: Literal["auto", "bf16", "float32"] = Field("float32", description="autocast dtype")
    compile: bool = Field(
        False, description="compile the sampling step of a token generator; no gain on a CPU, where it needs g++"
    )
    latent_dtype: LatentType = Field("float32", description="type of continuous latents on disk")

    @model_validator(mode="after")
    def _reencoding_needs_a_tokenizer(self) -> "MakePairsRun":
        if self.mode == "reencoded" and self.tokenizer is None:
            raise ValueError("reencoded needs the tokenizer that decodes and encodes again; set tokenizer=PATH")
        return self


def generate(run: GenerateRun) -> Path:
    """Sample latents into a cache, and images if asked for.

    Returns:
        The folder of the cache.

    Raises:
        UserError: generator, classes or tokenizer do not fit, or the folder holds other latents.
    """
    accelerator = start_accelerator()
    generator = _load_generator(run, accelerator.device)
    sampling = run.sampling or generator.sampling
    check_sampling(generator.config.name, sampling)
    wrong = [c for c in run.classes or [] if not 0 <= c < generator.classes]
    if wrong:
        raise UserError(
            f"class {wrong[0]} is not among the generator's classes 0 to {generator.classes - 1}; "
            "set classes=[...] or null"
        )
    tokenizer = load_tokenizer(run.tokenizer).to(accelerator.device) if run.tokenizer else None
    if tokenizer is not None and encoder_digest(tokenizer) != generator.latent_space:
        raise UserError(
            f"{run.tokenizer} is not the tokenizer whose tokens {run.generator} models; "
            "give that one, or its post-trained self"
        )
    wanted = torch.tensor(run.classes or list(range(generator.classes)))

    def make(records: np.ndarray) -> dict[str, Tensor]:
        labels = wanted[records % len(wanted)]
        with autocast(accelerator.device, run.precision):
            latents = generator.generate(labels, sampling, image_rngs(run.seed, records.tolist()))
        return _fields(latents, labels, indices=torch.full((len(records),), -1), records=records)

    source = {
        "made_by": "generate",
        "sigma": 0.0,
        "seed": run.seed,
        "sampling": plain(sampling),
        "precision": run.precision,
    }
    source |= {"generator": digest(generator.state_dict()), "classes": run.classes}
    fill_cache(
        run.out,
        _manifest(generator, run, run.count, None, source),
        make,
        run.batch_size,
        accelerator,
        "generate",
    )
    if tokenizer is not None:
        write_images(run.out, tokenizer, run.images, run.batch_size, accelerator)
    return run.out


def make_pairs(run: MakePairsRun) -> Path:
    """Make the latents that post-training decodes; each names the real image it must become.

    Returns:
        The folder of the cache.

    Raises:
        UserError: generator, latents and tokenizer do not belong together, or the folder holds other latents.
    """
    accelerator = start_accelerator()
    generator = _load_generator(run, accelerator.device)
    cache = LatentCache(run.latents)
    check_center_crops(cache)
    check_kind(generator.config.name, cache.manifest.kind, str(run.latents))
    check_cache(cache, generator.latent_space, generator.latent_shape, generator.codebook_size)
    tokenizer = load_tokenizer(run.tokenizer).to(accelerator.device) if run.mode == "reencoded" else None
    if tokenizer is not None:
        check_cache(cache, encoder_digest(tokenizer))
    sampling = run.sampling or generator.sampling
    check_sampling(generator.config.name, sampling)
    rows = random_subset(len(cache), run.count, run.seed)

    def make(records: np.ndarray) -> dict[str, Tensor]:
        real = cache.read(rows[records])
        rngs = image_rngs(run.seed, records.tolist())
        with autocast(accelerator.device, run.precision):
            latents = generator.generate(real.labels, sampling, rngs, real.latents, run.preservation)
            if tokenizer is not None:
                latents = reencode(tokenizer, latents)
        return _fields(latents, real.labels, real.indices, records) | {"flips": real.flips}

    source = {
        "made_by": "make-pairs",
        "sigma": run.preservation,
        "mode": run.mode,
        "seed": run.seed,
        "sampling": plain(sampling),
    }
    source |= {
        "generator": digest(generator.state_dict()),
        "precision": run.precision,
        "split": cache.manifest.source.get("data"),
    }
    if cache.manifest.kind == "continuous":
        source |= generator.preservation_facts(sampling, run.preservation)
        for problem in generator.check(cache.read(rows[:CHECKED]).latents):
            warnings.warn(problem, stacklevel=1)
    manifest = _manifest(generator, run, len(rows), cache.manifest.data, source)
    fill_cache(run.out, manifest, make, run.batch_size, accelerator, "make-pairs")
    return run.out


def reencode(tokenizer: Tokenizer, latents: Tensor) -> Tensor:
    """Decode latents, round to uint8 as a PNG would, and encode again (the released procedure)."""
    return tokenizer.encode(from_pixels(to_pixels(tokenizer.decode(latents))))


def _load_generator(run: GenerateRun | MakePairsRun, device: torch.device) -> Generator:
    generator = load_generator(run.generator).to(device)
    if run.compile:
        if generator.codebook_size is None:
            raise UserError(f"compile=true is for generators of tokens, {run.generator} is none; set compile=false")
        generator.compile_sampling()
    return generator


def _fields(latents: Tensor, labels: Tensor, indices: Tensor, records: np.ndarray) -> dict[str, Tensor]:
    return {
        "latents": latents,
        "labels": labels,
        "indices": indices,
        "seeds": torch.from_numpy(records.astype(np.int64)),
    }


def _manifest(
    generator: Generator, run: GenerateRun | MakePairsRun, count: int, data: str | None, source: dict
) -> Manifest:
    return Manifest(
        kind="discrete" if generator.codebook_size else "continuous",
        latent_shape=generator.latent_shape,
        codebook_size=generator.codebook_size,
        classes=generator.classes,
        count=count,
        shard_size=run.shard_size,
        tokenizer=generator.latent_space,
        data=data,
        source=source,
        dtype=run.latent_dtype,
    )
