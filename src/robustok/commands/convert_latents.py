"""The `convert-latents` command: pre-computed latents of other projects to a cache, and back.

    robustok convert-latents layout=rar path=tokens.jsonl tokenizer=runs/tokenizer out=runs/latents
    robustok convert-latents layout=lightningdit path=imagenet_vavae tokenizer=runs/vavae out=runs/latents
    robustok convert-latents layout=rar to=export path=runs/latents out=tokens.jsonl

Generators learn from such a cache as from one of `robustok encode`. It is not linked to images, so pairs for
post-training need one of `encode`.
"""

from collections.abc import Iterator
from itertools import tee
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from robustok.commands.encode import fill_cache
from robustok.config import Config
from robustok.data.latent_cache import LatentCache
from robustok.data.manifest import Manifest
from robustok.devices import start_accelerator
from robustok.errors import UserError
from robustok.pretrained.latent_files import LatentFolder, TokenFile, write_latent_folder, write_token_file
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.training.generator import latent_statistics


class ConvertLatentsRun(Config):
    """Latents of another project to a cache, or a cache to its files."""

    layout: Literal["rar", "lightningdit"] = Field(
        description="rar: a file .jsonl with class_id and tokens in each line; lightningdit: a folder of .safetensors "
        "with latents, latents_flip and labels, and perhaps latents_stats.pt"
    )
    path: Path = Field(description="the file or folder; with to=export, our cache")
    out: Path = Field(
        description="folder of the cache; with to=export, the file or folder, which must not hold anything else yet"
    )
    to: Literal["cache", "export"] = Field("cache", description="cache: ours; export: the other project's")
    tokenizer: Path | None = Field(None, description="with to=cache: tokenizer that made the latents")
    classes: int = Field(1000, ge=1, le=10**6, description="with to=cache: number of classes")
    shard_size: int = Field(10_000, ge=1, description="with to=cache: records in a shard")


def convert_latents(run: ConvertLatentsRun) -> Path:
    """Convert pre-computed latents; a second call completes an unfinished cache.

    Returns:
        ``out``.

    Raises:
        UserError: the latents cannot be read, or are not the tokenizer's; ``out`` holds something else, or
            cannot be written.
    """
    return _export(run) if run.to == "export" else _to_cache(run)


def _to_cache(run: ConvertLatentsRun) -> Path:
    if run.tokenizer is None:
        raise UserError("tokenizer is missing; give tokenizer=FOLDER of the one that made the latents")
    tokenizer = load_tokenizer(run.tokenizer)
    if (tokenizer.kind == "discrete") != (run.layout == "rar"):
        raise UserError(f"{run.tokenizer} makes {tokenizer.kind} latents, layout={run.layout} has others; give its own")
    files = TokenFile(run.path) if run.layout == "rar" else LatentFolder(run.path)
    shape = tuple(tokenizer.latent_shape)
    if files.latent_shape != shape[: len(files.latent_shape)]:
        raise UserError(
            f"{run.path} has latents of shape {files.latent_shape}, {run.tokenizer} makes {shape}; give the tokenizer "
            "that made them"
        )
    manifest = Manifest(
        kind=tokenizer.kind,
        latent_shape=shape,
        codebook_size=len(tokenizer.codebook) if tokenizer.kind == "discrete" else None,
        classes=run.classes,
        count=files.count,
        shard_size=run.shard_size,
        tokenizer=encoder_digest(tokenizer),
        data=f"{run.layout}-{files.digest}",  # which no data set has, so it is never paired with images
        source={"made_by": "convert-latents", "data": run.path.name, **files.details},
        dtype=files.dtype,
    )
    each = len(getattr(files, "names", [""]))  # records of an image

    def make(drawn: tuple[np.ndarray, dict[str, Tensor]]) -> dict[str, Any]:
        records, found = drawn
        indices = torch.from_numpy(records // each)
        return found | {"indices": indices, "seeds": torch.zeros_like(indices)}

    def prepare(stream: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        records, draws = tee(stream)
        return zip(records, files.read(draws), strict=True)

    fill_cache(run.out, manifest, make, 1000, start_accelerator(), "convert-latents", prepare)
    return run.out


def _export(run: ConvertLatentsRun) -> Path:
    cache = LatentCache(run.path)
    if run.layout == "rar":
        write_token_file(cache, run.out)
    else:
        mean, std = latent_statistics(cache) if cache.manifest.kind == "continuous" else ([], [])
        write_latent_folder(cache, run.out, {"latent_mean": mean, "latent_std": std})
    return run.out
