"""Latents in the files of other projects, read and written: tokens as RAR's, continuous ones as LightningDiT's.

tokens.jsonl         a line for each record: {"class_id": 207, "tokens": [17, 3991, ...]}
latents/             files *.safetensors in the order of their names:
latents and latents_flip (N, D, h, w), not normalised, of images and mirrored ones; labels (N,)
latents/latents_stats.pt    mean and std of each channel, (1, D, 1, 1); may be missing
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from robustok.checkpoints import read_checkpoint
from robustok.data.latent_cache import LatentCache
from robustok.data.manifest import LatentType
from robustok.errors import UserError
from robustok.files import atomic_file, atomic_folder, one_line, regular_file
from robustok.tokenizers.conv import to_grid, to_row

STATISTICS = "latents_stats.pt"
ROWS = 4096  # records read at a time


class TokenFile:
    """RAR's pre-tokenised images.

    Attributes:
        count: number of records.
        latent_shape: (tokens of an image,).
        dtype: of continuous latents.
        digest: of the content.
        details: for the source of a cache.

    Raises:
        UserError: the file cannot be read, or is empty.
    """

    dtype = "float32"

    def __init__(self, path: Path) -> None:
        self.path, self.details, sha = regular_file(path), {}, hashlib.sha256()
        self.count = 0
        with self.path.open("rb") as file:
            for line in file:
                sha.update(line)
                self.count += bool(line.strip())
        self.digest = sha.hexdigest()[:16]
        if not self.count:
            raise UserError(f"{path} is empty; expected lines such as {_LINE}")
        self.latent_shape = tuple(next(self.read(iter([np.arange(1)])))["latents"].shape[1:])

    def read(self, stream: Iterator[np.ndarray]) -> Iterator[dict[str, Tensor]]:
        """Rising record numbers (n,) to the fields of these records: ``latents`` (n, L), ``labels`` and ``flips`` (n,).

        Raises:
            UserError: names a line that is no such record, or has another number of tokens.
        """
        done, length = 0, None
        with self.path.open("rb") as file:
            lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
            for records in stream:
                found = [
                    self._parse(*line) for line in islice(lines, int(records[0]) - done, int(records[-1]) + 1 - done)
                ]
                done, length = int(records[-1]) + 1, length or len(found[0][1])
                if any(len(tokens) != length for _, tokens in found):
                    raise UserError(f"{self.path}: its lines have different numbers of tokens; make the file again")
                labels, tokens = (torch.tensor(part, dtype=torch.int64) for part in zip(*found, strict=True))
                yield {"latents": tokens, "labels": labels, "flips": torch.zeros_like(labels)}

    def _parse(self, number: int, line: bytes) -> tuple[int, list[int]]:
        try:
            record = json.loads(line)
            label, tokens = record["class_id"], record["tokens"]
            if all(type(value) is int and 0 <= value < 2**31 for value in (label, *tokens)) and tokens:
                return label, tokens
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise UserError(f"line {number} of {self.path} is {one_line(line[:40])}..., expected one such as {_LINE}")


_LINE = '{"class_id": 207, "tokens": [17, 3991, ...]}'


class LatentFolder:
    """LightningDiT's cached latents. The records of an image and of the mirrored one are neighbours.

    Attributes:
        count: number of records.
        latent_shape: (L, D).
        dtype: of the latents.
        digest: of labels and first latents.
        details: for the source of a cache.

    Raises:
        UserError: there are no files, they cannot be read, or they do not fit each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        files = [regular_file(file) for file in sorted(path.glob("*.safetensors"))]
        if not files:
            raise UserError(f"{path} has no *.safetensors; give the folder of LightningDiT's latents")
        try:
            self.files = [safe_open(file, "pt") for file in files]
        except Exception as error:  # safetensors raises its own, undocumented types
            raise UserError(f"{path} has a damaged file ({one_line(error, 200)}); copy it again") from None
        keys = {frozenset(file.keys()) for file in self.files}
        if len(keys) > 1 or not {"latents", "labels"} <= min(keys) <= {"latents", "latents_flip", "labels"}:
            found = " and ".join(sorted(", ".join(sorted(held)) for held in keys))[:200]
            raise UserError(f"files of {path} hold {found}; expected latents, latents_flip and labels in all")
        self.names = [name for name in ("latents", "latents_flip") if name in min(keys)]
        shapes = [[file.get_slice(name).get_shape() for name in (*self.names, "labels")] for file in self.files]
        sizes = {tuple(shape[1:]) for *latents, _ in shapes for shape in latents}
        counts = [{shape[0] for shape in of_file} for of_file in shapes]
        if len(sizes) > 1 or len(min(sizes)) != 3 or any(len(count) > 1 for count in counts):
            raise UserError(f"files of {path} hold latents of several shapes, or not (N, D, h, w); make them again")
        depth, height, width = min(sizes)
        self.starts = np.cumsum([0, *(labels[0] for *_, labels in shapes)])  # images before each file, and all of them
        self.latent_shape, self.count = (height * width, depth), int(self.starts[-1]) * len(self.names)
        first = self._images(0, min(int(self.starts[-1]), 8))
        self.dtype = str(first["latents"].dtype).removeprefix("torch.")
        if self.dtype not in get_args(LatentType):
            raise UserError(f"{path} holds latents of {self.dtype}, expected {' or '.join(get_args(LatentType))}")
        sha = hashlib.sha256(first["latents"].float().numpy().tobytes())
        for file in self.files:
            sha.update(file.get_tensor("labels").to(torch.int64).numpy().tobytes())
        self.digest, self.details = sha.hexdigest()[:16], {}
        if (path / STATISTICS).exists():
            self.details = _read_statistics(path / STATISTICS, depth)

    def read(self, stream: Iterator[np.ndarray]) -> Iterator[dict[str, Tensor]]:
        """Record numbers (n,) without gaps to their fields: ``latents`` (n, L, D), ``labels`` and ``flips`` (n,)."""
        each = len(self.names)
        for records in stream:
            first, last = int(records[0]) // each, int(records[-1]) // each + 1
            images, rows = self._images(first, last), torch.from_numpy(records) - first * each
            latents = torch.stack([to_row(images[name]) for name in self.names], 1).flatten(0, 1)  # (n each, L, D)
            yield {"latents": latents[rows], "labels": images["labels"][rows // each].long(), "flips": rows % each}

    def _images(self, first: int, last: int) -> dict[str, Tensor]:
        parts = []
        for file, start, end in zip(self.files, self.starts, self.starts[1:], strict=False):
            if start < last and first < end:
                rows = slice(max(first - int(start), 0), last - int(start))
                parts.append({name: file.get_slice(name)[rows] for name in (*self.names, "labels")})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _read_statistics(file: Path, depth: int) -> dict[str, list[float]]:
    found = read_checkpoint(file).weights
    values = {f"latent_{name}": found[name].double().flatten().tolist() for name in ("mean", "std") if name in found}
    if [len(value) for value in values.values()] != [depth, depth]:
        raise UserError(f"{file} does not hold mean and std of {depth} channels; correct or move it")
    return values


def write_token_file(cache: LatentCache, path: Path) -> None:
    """Write tokens as RAR's: a line of JSON for each record.

    Raises:
        UserError: the cache holds no tokens, or the file cannot be written, or is there with another content.
    """
    if cache.manifest.kind != "discrete":
        raise UserError(f"{cache.path} holds continuous latents, RAR's file tokens; set layout=lightningdit")
    with atomic_file(path, once=True) as temporary, temporary.open("w") as file:
        for start in range(0, len(cache), ROWS):
            records = cache.read(slice(start, start + ROWS))
            for label, tokens in zip(records.labels.tolist(), records.latents.tolist(), strict=True):
                file.write(json.dumps({"class_id": label, "tokens": tokens}) + "\n")


def write_latent_folder(cache: LatentCache, path: Path, statistics: dict[str, Any]) -> None:
    """Write latents as LightningDiT's: a file for each shard, and the statistics ``latent_mean`` and ``latent_std``.

    Raises:
        UserError: tokens, latents of ten crops or without mirrored images, or the folder cannot be written, or is there
            with another content.
    """
    manifest = cache.manifest
    if manifest.kind != "continuous":
        raise UserError(f"{cache.path} holds tokens, LightningDiT's files continuous latents; set layout=rar")
    remedy = "encode with crops=center-flip"
    with atomic_folder(path, once=True) as folder:
        for number, start in enumerate(range(0, len(cache), rows := 2 * manifest.shard_size)):
            records = cache.read(slice(start, start + rows))
            flips = records.flips.tolist()
            if records.crops.any() or flips != [0, 1] * (len(flips) // 2):
                raise UserError(f"{cache.path} does not hold each image and the mirrored one; {remedy}")
            grids = to_grid(records.latents).to(manifest.latent_type)  # (n, D, h, w)
            arrays = {"latents": grids[::2], "latents_flip": grids[1::2], "labels": records.labels[::2]}
            arrays = {name: value.contiguous() for name, value in arrays.items()}
            save_file(arrays, folder / f"latents-{number:05d}.safetensors")
        mean, std = (torch.tensor(statistics[f"latent_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
        torch.save({"mean": mean, "std": std}, folder / STATISTICS)
