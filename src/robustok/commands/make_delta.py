"""The `make-delta` command: the change that post-training made to a decoder, as a small snapshot.

    robustok make-delta tokenizer=runs/tokenizer post_trained=runs/post out=runs/delta rank=16
    robustok generate generator=runs/generator tokenizer=runs/delta@0.5 images=png out=runs/samples

A delta can be given wherever a tokenizer is expected; it loads the original and adds the difference. ``@0.5`` after its
path adds half of the difference; without it the decoder is the post-trained one.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from robustok.config import Config
from robustok.hub import hub_address, is_remote
from robustok.snapshots import read_header, resolve, write_snapshot
from robustok.tokenizers import load_tokenizer
from robustok.tokenizers.deltas import compute_delta


class MakeDeltaRun(Config):
    """The two tokenizers, and how exactly their difference is stored."""

    out: Path = Field(description="folder of the delta; must not hold anything else yet")
    tokenizer: Path = Field(
        description="the original, which the delta loads from there: snapshot, run folder, hf://ORG/NAME"
    )
    post_trained: Path = Field(description="the post-trained tokenizer: snapshot or run folder")
    rank: int | None = Field(None, ge=1, description="rank of a LoRA; null stores the whole difference")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="float32 without a rank is exact")


@dataclass(frozen=True)
class SavedDelta:
    """What :func:`make_delta` wrote.

    Attributes:
        path: folder of the delta.
        relative_error: norm of the error of rank and rounding, divided by the norm of the difference; 0 is exact.
        delta_bytes: size of its weights.
        tokenizer_bytes: size of the weights of the post-trained snapshot, for comparison.
    """

    path: Path
    relative_error: float
    delta_bytes: int
    tokenizer_bytes: int


def make_delta(run: MakeDeltaRun) -> SavedDelta:
    """Write a snapshot that holds only the difference, and the path and digest of the original.

    Raises:
        UserError: ``out`` holds something else or cannot be written, or the two are not versions of one tokenizer.
    """
    original, post_trained = resolve(run.tokenizer), resolve(run.post_trained)
    delta = compute_delta(
        load_tokenizer(run.tokenizer), load_tokenizer(run.post_trained), run.rank, getattr(torch, run.dtype)
    )
    base = hub_address(run.tokenizer) if is_remote(run.tokenizer) else os.path.relpath(original, run.out)
    entry = {"base": base, "digest": delta.base, "rank": run.rank, "dtype": run.dtype}
    header = {key: value for key, value in read_header(post_trained).items() if key != "discriminator"}
    header["delta"] = entry | {"relative_error": delta.relative_error}
    write_snapshot(run.out, header, delta.tensors, {}, once=True)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (run.out, post_trained)]
    return SavedDelta(run.out, delta.relative_error, *sizes)
