"""The `encode` command: images to a cache of latents, once, so that generators train on latents instead of images."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice, tee
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor

from robustok.config import Config
from robustok.console import track
from robustok.data.buckets import bucket_name, open_buckets, shares
from robustok.data.crops import enlarged, five_crops
from robustok.data.dataset import Batch, Draw, ImageDataset, open_images
from robustok.data.latent_cache import (
    check_space,
    create_cache,
    missing_shards,
    shard_rows,
    write_shard,
)
from robustok.data.loader import Workers, batches_of
from robustok.data.manifest import LatentType, Manifest, read_manifest
from robustok.data.pixels import from_pixels
from robustok.data.sources import Data
from robustok.devices import start_accelerator
from robustok.errors import UserError
from robustok.files import inside, locked, writing
from robustok.precision import DESCRIPTION, Precision, at_precision, cast_weights
from robustok.randomness import seeded
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.training.inputs import image_digest
from robustok.types import Tokenizer

BATCH = 64  # records at a time
SHARDS, SHARD_MULTIPLE, LEAST_SHARD, MOST_SHARD = 128, 256, 512, 10_000
VARIANTS = {"center": 1, "center-flip": 2, "ten": 10}  # records of an image


class CacheSettings(Config):
    """How a cache of latents is computed and stored."""

    batch_size: int | None = Field(
        None,
        ge=1,
        description="records computed at a time; null: 64, and on a GPU as many samples of a generator of tokens as a "
        "third of its free memory holds, up to 512",
    )
    shard_size: int | None = Field(
        None,
        ge=1,
        description="records in a shard; null: a 128th of all, but 512 to 10,000, so that no process is idle for long",
    )
    precision: Precision = Field("float32", description=f"of products and convolutions: {DESCRIPTION}")
    dtype: LatentType = Field("float32", description="type of continuous latents on disk")


def chosen_shard_size(settings: CacheSettings, count: int, out: Path | None = None) -> int:
    """Records in a shard of a cache of ``count``; whatever the settings do not say is as in a cache that is there."""
    if settings.shard_size is not None:
        return settings.shard_size
    if out is not None and any(out.glob("shard-*.safetensors")) and (out / "manifest.json").exists():
        return read_manifest(out).shard_size
    even = -(-count // (SHARDS * SHARD_MULTIPLE)) * SHARD_MULTIPLE
    return min(max(even, LEAST_SHARD), MOST_SHARD)


class EncodeRun(Config):
    """Encode a data set, in float32 by default: bf16 changes about one token in a hundred."""

    out: Path = Field(description="folder of the cache; an unfinished one is completed")
    tokenizer: Path = Field(description="tokenizer snapshot, or run folder")
    data: Data = Field(description="images to encode")
    split: Literal["train", "test"] = Field("train", description="split of the data")
    crops: Literal["center", "center-flip", "ten"] = Field(
        "center",
        description="records of each image: its centre crop; that and its mirror image; or ten-crop, for training "
        "generators only: corners and middle of a centre crop a tenth larger, each also mirrored",
    )
    count: int | None = Field(
        None,
        ge=1,
        description="encode only so many images, a random subset, as pairs need it; unlike data.limit it does not "
        "change the data set; null, or more than there are, is all",
    )
    seed: int = Field(0, ge=0, description="seed of that subset")
    cache: CacheSettings = CacheSettings()
    workers: Workers = None

    @property
    def variants(self) -> int:
        """Records of an image, which are neighbours in the cache."""
        return VARIANTS[self.crops]


def encode(run: EncodeRun) -> Path:
    """Encode a data set to a cache of latents, with ``data.buckets`` to one for each; a second call completes them.

    Returns:
        The folder of the cache, or caches.

    Raises:
        UserError: tokenizer or data are not usable, or the folder holds other latents.
    """
    accelerator = start_accelerator()
    tokenizer = load_tokenizer(run.tokenizer).to(accelerator.device)
    space = encoder_digest(tokenizer)
    if not run.data.buckets:
        # The data's fingerprint depends on the crop size, so post-training never takes ten-crop for its centre crops.
        size = enlarged(tokenizer.image_size) if run.crops == "ten" else tokenizer.image_size
        _encode(run, open_images(run.data, size, run.split), tokenizer, space, accelerator)
        return run.out
    if run.crops != "center":
        raise UserError(f"data.buckets has centre crops; set crops=center, not crops={run.crops}")
    buckets = open_buckets(run.data, tokenizer, run.split)
    sizes = [len(data) for data in buckets]
    for data, count in zip(buckets, shares(min(run.count or sum(sizes), sum(sizes)), sizes), strict=True):
        own = run.model_copy(update={"out": run.out / bucket_name(data.shape), "count": count})
        _encode(own, data, tokenizer, space, accelerator)
    return run.out


def _encode(run: EncodeRun, data: ImageDataset, tokenizer: Tokenizer, space: str, accelerator: Accelerator) -> None:
    """Encode images of one size to a cache; ``space`` is the digest of the latent space."""
    size, variants = tokenizer.image_size, run.variants
    encode_images, shape = tokenizer.encode, tokenizer.latent_shape
    if run.data.buckets:
        height, width = (side // tokenizer.factor for side in data.shape)
        encode_images, shape = tokenizer.encode_grid, (height, width, shape[1])
    data.check_labels()
    chosen = np.sort(random_subset(len(data), run.count, run.seed))  # indices of the images that are encoded
    source = {"made_by": "encode", "data": data.describe(), "crops": run.crops, "precision": run.cache.precision}
    source |= {"images": image_digest(data)} | ({"seed": run.seed} if len(chosen) < len(data) else {})
    manifest = Manifest(
        kind=tokenizer.kind,
        latent_shape=shape,
        codebook_size=len(tokenizer.codebook) if tokenizer.kind == "discrete" else None,
        classes=len(data.classes),
        class_names=data.classes,
        count=len(chosen) * variants,
        shard_size=chosen_shard_size(run.cache, len(chosen) * variants, run.out),
        tokenizer=space,
        data=data.fingerprint,
        source=source,
        dtype=run.cache.dtype,
    )

    cast_weights(tokenizer, run.cache.precision)  # after its digest

    def read_ahead(stream: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, Batch]]:
        """Record numbers with their images, each of which is decoded once for all its records."""
        records, draws = tee(stream)
        images = (chosen[np.unique(r // variants)] for r in draws)
        # With seeds, which here draw nothing, a broken image is replaced by the next good one.
        images = (Draw(indices, np.zeros(len(indices), dtype=np.int64)) for indices in images)
        return zip(records, batches_of(data, images, run.workers, accelerator.device), strict=True)

    def make(drawn: tuple[np.ndarray, Batch]) -> dict[str, Tensor]:
        records, batch = drawn
        image, variant = (torch.from_numpy(x) for x in np.divmod(records, variants))
        rows = image - image[0]  # of the batch
        # As LatentRecords counts them.
        crops, flips = (variant % 5 + 1, variant // 5) if run.crops == "ten" else (variant * 0, variant)
        pixels = batch.pixels
        pixels = five_crops(pixels, size)[rows, crops - 1] if run.crops == "ten" else pixels[rows]  # (n, 3, H, W)
        pixels = torch.where(flips.bool().to(pixels.device)[:, None, None, None], pixels.flip(-1), pixels)
        with at_precision(accelerator.device, run.cache.precision):
            latents = encode_images(from_pixels(pixels))
        labels, indices = batch.labels[rows], batch.indices[rows]
        seeds = torch.zeros_like(indices)
        fields = dict(latents=latents, labels=labels, indices=indices, seeds=seeds, flips=flips)
        return fields | ({"crops": crops} if run.crops == "ten" else {})

    fill_cache(run.out, manifest, make, run.cache.batch_size or BATCH, accelerator, "encode", read_ahead)


def random_subset(size: int, count: int | None, seed: int) -> np.ndarray:
    """``count`` of the numbers below ``size`` in random order: (count,) int64; all where count is None or more."""
    return torch.randperm(size, generator=seeded(seed)).numpy()[:count]


@torch.no_grad()
def fill_cache(
    out: Path,
    manifest: Manifest,
    make: Callable[[Any], Mapping[str, Tensor]],
    batch_size: int,
    accelerator: Accelerator,
    description: str,
    prepare: Callable[[Iterator[np.ndarray]], Iterator[Any]] = iter,
) -> None:
    """Write the missing shards of a cache, each process its own.

    Args:
        out: folder.
        manifest: description of the cache.
        make: record numbers (n,), or what ``prepare`` returns for them, to the fields of these records.
        batch_size: records at a time.
        accelerator: decides which shards this process writes.
        description: of the progress bar.
        prepare: turns the stream of missing record numbers into the inputs of ``make``; may work ahead.

    Raises:
        UserError: the folder holds other latents, or the disk has less space than the missing shards need.
    """
    lock = ExitStack()
    if accelerator.is_main_process:
        check_space(inside(out), manifest, description)
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        lock.enter_context(locked(out))
        create_cache(out, manifest)
    accelerator.wait_for_everyone()
    missing = missing_shards(out, accelerator.process_index, accelerator.num_processes)

    def batches(k: int) -> list[np.ndarray]:
        rows = np.asarray(shard_rows(manifest, k))
        return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]

    prepared = prepare(records for k in missing for records in batches(k))
    total = sum(len(batches(k)) for k in missing)
    bar = track(range(total), f"{description} {out.name}", accelerator.is_main_process)
    with lock:
        for k in missing:
            parts = [make(next(prepared)) for _ in islice(bar, len(batches(k)))]
            write_shard(out, k, {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]})
        next(bar, None)  # closes the progress bar
        accelerator.wait_for_everyone()
