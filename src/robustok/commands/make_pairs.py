"""The `make-pairs` command: real latents mixed with samples of a generator, for post-training."""

import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field, model_validator
from torch import Tensor

from robustok.commands.encode import BATCH, fill_cache, random_subset
from robustok.commands.generate import (
    SampleCacheSettings,
    latent_shape_of,
    licence_of,
    load_for_sampling,
    manifest_of,
    record_fields,
    samples_at_once,
    sampling_of,
)
from robustok.config import Config, plain
from robustok.data.buckets import shares
from robustok.data.captions import caption_digest
from robustok.data.labels import check_same_classes
from robustok.data.latent_cache import LatentCache, caches_in
from robustok.data.latent_checks import check_cache, check_center_crops, check_real_latents
from robustok.data.pixels import from_pixels, to_pixels
from robustok.devices import start_accelerator
from robustok.files import tensor_digest
from robustok.generators import SamplingConfig, check_kind, check_sampling
from robustok.generators.pipeline import PipelineGenerator
from robustok.precision import at_precision, cast_weights
from robustok.randomness import bucket_seed, image_rngs
from robustok.snapshots import read_header
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.training.inputs import latent_digest
from robustok.types import Generator, Tokenizer

CHECKED = 512  # latents with which a generator's latent statistics are compared


class MakePairsRun(Config):
    """Mix real latents with samples of the generator."""

    out: Path = Field(description="folder of the cache of pairs; an unfinished one is completed")
    generator: Path = Field(description="generator snapshot, or run folder")
    latents: Path = Field(
        description="cache of the real images' latents, made by `robustok encode`; or folder of those of its buckets"
    )
    sigma: float = Field(
        0.9,
        ge=0,
        le=1,
        description="share of the real latents that is kept (diffusion: by sampling.strategy); 1 is the control",
    )
    count: int | None = Field(
        200_000,
        ge=1,
        description="number of pairs, a random subset of the latents; null, or more than there are, is all",
    )
    mode: Literal["direct", "reencoded"] = Field(
        "direct",
        description="direct: the mixture itself; reencoded: decoded to uint8 and encoded again (the authors)",
    )
    tokenizer: Path | None = Field(None, description="needed for mode=reencoded")
    sampling: SamplingConfig | None = Field(None, description="null takes the settings stored with the generator")
    seed: int = Field(0, ge=0, description="seed of the subset and of every sample")
    cache: SampleCacheSettings = SampleCacheSettings()

    @model_validator(mode="after")
    def _reencoding_needs_a_tokenizer(self) -> "MakePairsRun":
        if self.mode == "reencoded" and self.tokenizer is None:
            raise ValueError("reencoded needs the tokenizer that decodes and encodes again; set tokenizer=PATH")
        return self


def make_pairs(run: MakePairsRun) -> Path:
    """Make the latents that post-training decodes; each has the index of the real image it is compared with.

    Latents of several buckets give a cache for each, which share ``count`` in proportion.

    Returns:
        The folder of the cache, or caches.

    Raises:
        UserError: generator, latents and tokenizer do not belong together, or the folder holds other latents.
    """
    accelerator = start_accelerator()
    generator = load_for_sampling(run.generator, run.cache, accelerator.device)
    sampling = run.sampling or generator.sampling
    check_sampling(generator.config.name, sampling)
    known = read_header(run.generator).get("class_names")
    if known is None and isinstance(generator, PipelineGenerator):
        known = [caption_digest(prompt) for prompt in generator.prompts[:-1]]  # without that of null_label
    tokenizer = load_tokenizer(run.tokenizer).to(accelerator.device) if run.mode == "reencoded" else None
    caches = [LatentCache(path) for path in caches_in(run.latents)]
    samplings = [sampling_of(cache, generator, sampling) for cache in caches]
    for cache, own in zip(caches, samplings, strict=True):
        check_center_crops(cache)
        check_real_latents(cache)
        check_kind(generator.config.name, cache.manifest.kind, str(run.latents))
        check_cache(cache, generator.latent_space, latent_shape_of(generator, own), generator.codebook_size)
        check_same_classes(known, cache.manifest.class_names, str(run.generator), str(run.latents))
        if tokenizer is not None:
            check_cache(cache, encoder_digest(tokenizer))
    sizes = [len(cache) for cache in caches]
    counts = shares(min(run.count or sum(sizes), sum(sizes)), sizes)
    rows = [random_subset(size, count, run.seed) for size, count in zip(sizes, counts, strict=True)]
    if isinstance(generator, PipelineGenerator) and run.sigma < 1:
        labels = np.concatenate([cache.labels[some] for cache, some in zip(caches, rows, strict=True)])
        with accelerator.main_process_first():
            generator.embed(torch.from_numpy(labels))
    digest = tensor_digest(generator.state_dict())  # of the weights before they are cast
    for i, (cache, some, own) in enumerate(zip(caches, rows, samplings, strict=True)):
        out = run.out / cache.path.relative_to(run.latents)
        own_run = run.model_copy(update={"out": out, "seed": bucket_seed(run.seed, i), "sampling": own})
        _make_pairs(own_run, cache, some, generator, digest, tokenizer, accelerator)
    return run.out


def _make_pairs(
    run: MakePairsRun,
    cache: LatentCache,
    rows: np.ndarray,
    generator: Generator,
    digest: str,
    tokenizer: Tokenizer | None,
    accelerator: Accelerator,
) -> None:
    """Make the pairs of these rows of a cache; ``digest`` is of the generator's weights."""
    sampling = run.sampling

    def make(records: np.ndarray) -> dict[str, Tensor]:
        real = cache.read(rows[records])
        rngs = image_rngs(run.seed, records.tolist())
        with at_precision(accelerator.device, run.cache.precision):
            latents = generator.generate(real.labels, sampling, rngs, real.latents, run.sigma)
            if tokenizer is not None:
                again = torch.cat([reencode(tokenizer, part) for part in latents.split(BATCH)])
                latents = again.view(latents.shape)  # (N, L) or (N, L, D), or (N, rows, columns, D)
        return record_fields(latents, real.labels, real.indices, records) | {"flips": real.flips}

    source = {
        "made_by": "make-pairs",
        "sigma": run.sigma,
        "mode": run.mode,
        "seed": run.seed,
        "sampling": plain(sampling),
        "generator": digest,
        "precision": run.cache.precision,
        "split": cache.manifest.source.get("data"),
        "latents": latent_digest(cache),
        **generator.mixture_details(sampling, run.sigma),
        **licence_of(run.generator),
    }
    if generator.kind == "continuous":
        for problem in generator.check(cache.read(rows[:CHECKED]).latents):
            warnings.warn(problem, stacklevel=1)
    names = cache.manifest.class_names
    manifest = manifest_of(generator, sampling, run.cache, run.out, len(rows), cache.manifest.data, source, names)
    for model in filter(None, (generator, tokenizer)):
        cast_weights(model, run.cache.precision)  # after their digests
    fill_cache(run.out, manifest, make, samples_at_once(generator, run.cache, sampling), accelerator, "make-pairs")


def reencode(tokenizer: Tokenizer, latents: Tensor) -> Tensor:
    """Decode latents, round to uint8 as a PNG would, and encode again, as the authors do."""
    return tokenizer.encode(from_pixels(to_pixels(tokenizer.decode(latents))))
