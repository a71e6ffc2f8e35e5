"""The `generate` command: samples of a generator to a cache of latents, and to images.

Record i has its own random numbers, so it does not depend on the batch size or the number of processes.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from robustok.commands.encode import BATCH, CacheSettings, chosen_shard_size, fill_cache
from robustok.commands.image_files import write_images
from robustok.config import Config, plain
from robustok.data.latent_cache import LatentCache
from robustok.data.latent_checks import check_squares
from robustok.data.manifest import Manifest
from robustok.devices import start_accelerator
from robustok.errors import UserError
from robustok.files import tensor_digest
from robustok.generators import SamplingConfig, check_sampling, load_generator
from robustok.generators.pipeline import PipelineGenerator
from robustok.generators.tokens import TokenGenerator
from robustok.precision import at_precision, cast_weights
from robustok.randomness import image_rngs
from robustok.snapshots import read_header
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.types import Generator

LARGE_BATCHES = (512, 256, 128)  # of tokens on a GPU


class SampleCacheSettings(CacheSettings):
    """How a cache of samples is computed and stored."""

    compile: bool = Field(
        False, description="compile the sampling step of a token generator; no gain on a CPU, where it needs g++"
    )


class GenerateRun(Config):
    """Sample latents, class-balanced: record i has class i modulo the number of classes."""

    out: Path = Field(description="folder of the cache of latents; an unfinished one is completed")
    generator: Path = Field(description="generator snapshot, or run folder")
    count: int = Field(50_000, ge=1, description="number of samples")
    classes: list[int] | None = Field(None, description="only these classes; null is all")
    sampling: SamplingConfig | None = Field(None, description="null takes the settings stored with the generator")
    seed: int = Field(0, ge=0, description="seed; sample i depends on the seed and i alone")
    tokenizer: Path | None = Field(None, description="decode with this tokenizer and write images too")
    images: Literal["none", "npz", "png"] = Field(
        "none", description="npz: one ADM-style samples.npz (arr_0, labels in arr_1); png: a folder of files"
    )
    cache: SampleCacheSettings = SampleCacheSettings()

    @model_validator(mode="after")
    def _images_need_a_tokenizer(self) -> "GenerateRun":
        if (self.images == "none") != (self.tokenizer is None):
            raise ValueError("images and tokenizer go together: set both (images=npz tokenizer=PATH) or neither")
        return self


def generate(run: GenerateRun, generator: Generator | None = None) -> Path:
    """Sample latents into a cache, and images if asked for.

    Args:
        run: settings.
        generator: that of the settings, if it is loaded already.

    Returns:
        The folder of the cache.

    Raises:
        UserError: generator, classes or tokenizer do not fit, or the folder holds other latents.
    """
    accelerator = start_accelerator()
    generator = generator or load_for_sampling(run.generator, run.cache, accelerator.device)
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
            f"{run.tokenizer} is not the tokenizer whose latents {run.generator} models; "
            "give that one, or a post-trained one of it"
        )
    wanted = torch.tensor(run.classes or list(range(generator.classes)))
    if isinstance(generator, PipelineGenerator):
        with accelerator.main_process_first():
            generator.embed(wanted[: run.count])

    def make(records: np.ndarray) -> dict[str, Tensor]:
        labels = wanted[records % len(wanted)]
        with at_precision(accelerator.device, run.cache.precision):
            latents = generator.generate(labels, sampling, image_rngs(run.seed, records.tolist()))
        return record_fields(latents, labels, indices=torch.full((len(records),), -1), records=records)

    source = {
        "made_by": "generate",
        "sigma": 0.0,
        "seed": run.seed,
        "sampling": plain(sampling),
        "precision": run.cache.precision,
        "generator": tensor_digest(generator.state_dict()),
        "classes": run.classes,
        **licence_of(run.generator),
    }
    names = read_header(run.generator).get("class_names")
    manifest = manifest_of(generator, sampling, run.cache, run.out, run.count, None, source, names)
    cast_weights(generator, run.cache.precision)  # after its digest
    fill_cache(run.out, manifest, make, samples_at_once(generator, run.cache, sampling), accelerator, "generate")
    if tokenizer is not None:
        write_images(run.out, tokenizer, run.images, run.cache.batch_size or BATCH, accelerator, run.cache.precision)
    return run.out


def licence_of(generator: Path) -> dict[str, str]:
    """Of a generator's latents, the part of the source on its licence, which decoders trained on them inherit."""
    licence = read_header(generator).get("licence")
    return {"licence": licence} if licence else {}


def load_for_sampling(path: str | Path, settings: SampleCacheSettings, device: torch.device) -> Generator:
    """Load a generator on a device, with its sampling step compiled if the settings ask for it.

    Raises:
        UserError: no generator, or its sampling step cannot be compiled.
    """
    generator = load_generator(path).to(device)
    if settings.compile:
        generator.compile_sampling()
    return generator


def samples_at_once(generator: Generator, settings: SampleCacheSettings, sampling: Config) -> int:
    """The batch size: of the settings, or what suits generator and device.

    A GPU takes about as long for a token of few images as for one of many. What limits their number is the memory of
    keys and values.
    """
    if settings.batch_size is not None:
        return settings.batch_size
    if not isinstance(generator, TokenGenerator) or not next(generator.parameters()).is_cuda:
        return BATCH
    device = next(generator.parameters()).device
    with at_precision(device, settings.precision):
        fitting = torch.cuda.mem_get_info(device)[0] // 3 // generator.cache_bytes(sampling)
    return next((size for size in LARGE_BATCHES if size <= fitting), BATCH)


def record_fields(latents: Tensor, labels: Tensor, indices: Tensor, records: np.ndarray) -> dict[str, Tensor]:
    """The fields of these records of a latent cache; the seed of a record is its number."""
    return {
        "latents": latents,
        "labels": labels,
        "indices": indices,
        "seeds": torch.from_numpy(records.astype(np.int64)),
    }


def sampling_of(cache: LatentCache, generator: Generator, sampling: Config) -> Config:
    """The sampling settings for mixtures with latents of a cache: at their size, if they are of a bucket.

    Raises:
        UserError: they are, and the generator is no pipeline; or the settings have another size.
    """
    if not isinstance(generator, PipelineGenerator):
        check_squares(cache, f"generator {generator.config.name}")
        return sampling
    if sampling.height is not None:
        raise UserError("mixtures have the size of their images; drop sampling.height and sampling.width")
    grid = cache.manifest.grid
    height, width = (None, None) if grid is None else (side * generator.factor for side in grid)
    return sampling.model_copy(update={"height": height, "width": width})


def latent_shape_of(generator: Generator, sampling: Config) -> tuple[int, ...]:
    """Shape of the latents of an image, which for pipelines depends on the size in the sampling settings."""
    return generator.shape_of(sampling) if isinstance(generator, PipelineGenerator) else generator.latent_shape


def manifest_of(
    generator: Generator,
    sampling: Config,
    settings: CacheSettings,
    out: Path,
    count: int,
    data: str | None,
    source: dict[str, Any],
    class_names: list[str] | None = None,
) -> Manifest:
    """The manifest of a cache of a generator's latents in the folder ``out``."""
    return Manifest(
        kind=generator.kind,
        latent_shape=latent_shape_of(generator, sampling),
        codebook_size=generator.codebook_size,
        classes=generator.classes,
        count=count,
        shard_size=chosen_shard_size(settings, count, out),
        tokenizer=generator.latent_space,
        data=data,
        source=source,
        dtype=settings.dtype,
        class_names=class_names,
    )
