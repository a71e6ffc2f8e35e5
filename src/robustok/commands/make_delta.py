"""The verb `make-delta`: what post-training changed, as a small snapshot beside the original.

    robustok make-delta tokenizer=runs/tokenizer post_trained=runs/post out=runs/delta rank=16
    robustok generate generator=runs/generator tokenizer=runs/delta@0.5 images=png out=runs/samples

A delta is a tokenizer wherever one is asked for. ``@0.5`` behind its path mixes original and post-trained decoder half
and half; without it the decoder is the post-trained one.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from robustok.config import Config
from robustok.errors import UserError
from robustok.snapshots import read_header, resolve, write_snapshot
from robustok.tokenizers import load_tokenizer
from robustok.tokenizers.deltas import compute_delta


class MakeDeltaRun(Config):
    """Which two tokenizers, and how much of their difference to keep."""

    out: Path = Field(description="folder of the delta; must not exist yet")
    tokenizer: Path = Field(description="the original: tokenizer snapshot, or run folder; the delta needs it in place")
    post_trained: Path = Field(description="what post-training made of it: snapshot, or run folder")
    rank: int | None = Field(None, ge=1, description="rank of a LoRA; null keeps the whole difference")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="float32 without a rank is exact")


@dataclass(frozen=True)
class SavedDelta:
    """What :func:`make_delta` wrote.

    Attributes:
        path: folder of the delta.
        relative_error: what rank and rounding lost, as a share of the difference; 0 is exact.
        delta_bytes: size of its weights.
        tokenizer_bytes: size of the weights of the post-trained snapshot, for comparison.
    """

    path: Path
    relative_error: float
    delta_bytes: int
    tokenizer_bytes: int


def make_delta(run: MakeDeltaRun) -> SavedDelta:
    """Write a snapshot that holds the difference alone and names the original by path and digest.

    Raises:
        UserError: ``out`` exists or cannot be written, or the two are no versions of one tokenizer.
    """
    if run.out.exists():
        raise UserError(f"{run.out} exists; choose another out=FOLDER or remove it first")
    original, post_trained = resolve(run.tokenizer), resolve(run.post_trained)
    delta = compute_delta(
        load_tokenizer(run.tokenizer), load_tokenizer(run.post_trained), run.rank, getattr(torch, run.dtype)
    )
    facts = {"base": os.path.relpath(original, run.out), "digest": delta.base, "rank": run.rank, "dtype": run.dtype}
    header = {key: value for key, value in read_header(post_trained).items() if key != "discriminator"}
    header["delta"] = facts | {"relative_error": delta.relative_error}
    write_snapshot(run.out, header, delta.tensors, {})
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (run.out, post_trained)]
    return SavedDelta(run.out, delta.relative_error, *sizes)
