"""The `encode` verb: images to a cache of latents, once, so that generators train on integers instead of images."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor

from robustok.config import Config
from robustok.images import Data, open_images
from robustok.latents import Manifest, create_cache, missing_shards, shard_rows, write_shard
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.training.loop import autocast, start_accelerator, track


class EncodeRun(Config):
    """Encode a data set. Centre crops, in float32 by default: bf16 changes about one token in a hundred."""

    out: Path = Field(description="folder of the cache; an unfinished one is completed")
    tokenizer: Path = Field(description="tokenizer snapshot, or run folder")
    data: Data = Field(description="images to encode")
    split: Literal["train", "test"] = Field("train", description="split of the data")
    flip: bool = Field(False, description="encode each image a second time, mirrored")
    batch_size: int = Field(64, ge=1, description="images at a time")
    shard_size: int = Field(10_000, ge=1, description="records in a shard")
    precision: Literal["auto", "bf16", "float32"] = Field("float32", description="autocast dtype")


def encode(run: EncodeRun) -> Path:
    """Encode a data set to a cache of latents; a second call completes what the first left.

    Returns:
        The folder of the cache.

    Raises:
        UserError: tokenizer or data are not usable, or the folder holds other latents.
    """
    accelerator = start_accelerator()
    tokenizer = load_tokenizer(run.tokenizer).to(accelerator.device)
    data = open_images(run.data, tokenizer.image_size, run.split)
    manifest = Manifest(
        kind=tokenizer.kind,
        latent_shape=tokenizer.latent_shape,
        codebook_size=len(tokenizer.codebook) if tokenizer.kind == "discrete" else None,
        classes=len(data.classes),
        count=len(data) * (1 + run.flip),
        shard_size=run.shard_size,
        tokenizer=encoder_digest(tokenizer),
        data=data.fingerprint,
        source={"made_by": "encode", "data": data.describe(), "flip": run.flip, "precision": run.precision},
    )

    def make(records: np.ndarray) -> dict[str, Tensor]:
        flips = torch.from_numpy((records >= len(data)).astype(np.uint8))  # the second half is mirrored
        # With seeds a broken image is replaced by the next good one, so that the cache has no holes.
        batch = data.read(records % len(data), seeds=np.zeros(len(records), dtype=np.int64))
        images = torch.where(flips.bool()[:, None, None, None], batch.images.flip(-1), batch.images)  # (n, 3, H, W)
        with autocast(accelerator.device, run.precision):
            latents = tokenizer.encode(images.to(accelerator.device))
        return {
            "latents": latents,
            "labels": batch.labels,
            "indices": batch.indices,
            "seeds": batch.indices * 0,
            "flips": flips,
        }

    fill_cache(run.out, manifest, make, run.batch_size, accelerator, "encode")
    return run.out


@torch.no_grad()
def fill_cache(
    out: Path,
    manifest: Manifest,
    make: Callable[[np.ndarray], Mapping[str, Tensor]],
    batch_size: int,
    accelerator: Accelerator,
    description: str,
) -> None:
    """Write the missing shards of a cache, each process its own.

    Args:
        out: folder.
        manifest: what the cache holds.
        make: record numbers (n,) to the fields of these records.
        batch_size: records at a time.
        accelerator: which shards are this process's.
        description: of the progress bar.
    """
    if accelerator.is_main_process:
        create_cache(out, manifest)
    accelerator.wait_for_everyone()
    for k in missing_shards(out, accelerator.process_index, accelerator.num_processes):
        rows = np.asarray(shard_rows(manifest, k))
        starts = range(0, -(-len(rows) // batch_size))
        show = f"{description} {out.name} {k + 1}/{manifest.shards}"
        parts = [
            make(rows[i * batch_size : (i + 1) * batch_size]) for i in track(starts, show, accelerator.is_main_process)
        ]
        write_shard(out, k, {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]})
    accelerator.wait_for_everyone()
