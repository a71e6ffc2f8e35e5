"""What a cache of latents says about itself in ``manifest.json``."""

import json
import math
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
import torch
from pydantic import ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError, model_validator

from robustok.errors import UserError
from robustok.files import one_line, regular_file

LatentType = Literal["float32", "float16", "bfloat16"]


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Manifest:
    """Description and provenance of a cache.

    Attributes:
        kind: "discrete" (tokens) or "continuous".
        latent_shape: (L, D), latents per image and their width; (rows, columns, D) of images that may not be square.
        codebook_size: K; None if continuous.
        classes: number of classes; labels are 0..classes-1.
        count: records in the whole cache.
        shard_size: records in a shard; the last one may hold fewer.
        tokenizer: digest of the tokenizer that made or will decode the latents; None where unknown.
        data: fingerprint of the data set behind ``indices``; None for free samples.
        source: provenance: sigma, sampling, seed, digest of the generator, crop.
        dtype: stored type of continuous latents, which are float32 when read. The largest float16 is 65504.
        class_names: in the order of their numbers; None where unknown, as in caches of before.
    """

    kind: Literal["discrete", "continuous"]
    latent_shape: Annotated[tuple[PositiveInt, ...], Field(min_length=2, max_length=3)]
    codebook_size: Annotated[int, Field(ge=1, le=2**31)] | None
    classes: Annotated[int, Field(ge=1, le=10**6)]
    count: PositiveInt
    shard_size: PositiveInt
    tokenizer: str | None
    data: str | None = None
    source: dict[str, Any] = field(default_factory=dict)
    dtype: LatentType = "float32"
    class_names: list[str] | None = None

    @model_validator(mode="after")
    def _size_of_tokens_only(self) -> Self:
        if (self.kind == "discrete") != (self.codebook_size is not None):
            raise ValueError(f"a cache of {self.kind} latents with codebook_size {self.codebook_size}")
        if self.kind == "discrete" and len(self.latent_shape) > 2:
            raise ValueError("a cache of tokens with rows and columns")
        return self

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of latents that keep them, those of a bucket; None of others, which are row by row."""
        return self.latent_shape[:2] if len(self.latent_shape) == 3 else None

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_size)

    @property
    def latent_type(self) -> torch.dtype:
        """Stored type of the latents; tokens are uint16 if they fit."""
        if self.codebook_size is None:
            return getattr(torch, self.dtype)
        return torch.uint16 if self.codebook_size <= 65536 else torch.int32

    @property
    def record_bytes(self) -> int:
        """Stored bytes of a record: latents, label, index, seed and flip."""
        numbers = self.latent_shape if self.codebook_size is None else self.latent_shape[:1]
        return math.prod(numbers) * self.latent_type.itemsize + 21

    def plain(self) -> dict[str, Any]:
        """The manifest as it reads back from JSON."""
        return json.loads(json.dumps(asdict(self)))


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the cache in a folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = Path(path) / "manifest.json"
    if not file.exists():
        raise UserError(
            f"no latents cache at {path} (there is no {file.name}); give the folder that encoding or pair-making wrote"
        )
    content = regular_file(file).read_bytes()
    try:
        return TypeAdapter(Manifest).validate_json(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))} = {str(first['input'])[:40]}: {first['msg']}"
    except (ValueError, RecursionError) as error:
        reason = one_line(error, 200)
    known = ", ".join(f.name for f in fields(Manifest))
    raise UserError(f"{file} is no manifest ({reason}); expected a JSON object with {known}; remove the cache")
