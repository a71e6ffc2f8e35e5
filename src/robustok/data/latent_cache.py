"""The on-disk cache of latents: a folder with ``manifest.json``, ``shard-00000.safetensors`` and so on.

A cache holds the latents of a data set, or what a generator made. ``indices`` point into the data set: with its images
the latents of a generator are the pairs of post-training. Shards are written whole or not at all, so a killed run
continues with ``missing_shards``.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from robustok.config import differences
from robustok.console import note
from robustok.data.manifest import Manifest, read_manifest
from robustok.errors import UserError
from robustok.files import load_tensors, one_line, regular_file, temporary_path, write_file

LARGE = 10**8  # bytes from which on the size of a cache is printed
OPTIONAL = {"flips", "crops"}  # fields of a shard that are 0 if they are not stored
DAMAGED = (SafetensorError, OSError, RuntimeError, TypeError, ValueError, OverflowError)  # what reading a shard raises


@dataclass(frozen=True)
class LatentRecords:
    """Latents with their labels and provenance.

    Attributes:
        latents: tokens (N, L) int64, or (N, L, D) float32, of buckets (N, rows, columns, D).
        labels: (N,) int64.
        indices: (N,) int64, index in the data set; -1 for free samples.
        seeds: (N,) int64, seed of each record's sampling or augmentation.
        flips: (N,) uint8, 1 if the image was mirrored before it was encoded.
        crops: (N,) uint8, 0 for the centre crop, 1 to 5 for those of ten-crop in the order of ``crops.five_crops``.
    """

    latents: Tensor
    labels: Tensor
    indices: Tensor
    seeds: Tensor
    flips: Tensor
    crops: Tensor


# Writing


def create_cache(path: str | Path, manifest: Manifest) -> None:
    """Start a cache, or continue one that has the same manifest.

    Args:
        path: folder.
        manifest: description of the cache.

    Raises:
        UserError: the folder holds another cache (the fields that differ are named), or cannot be written.
    """
    path = Path(path)
    if not any(path.glob("shard-*.safetensors")):  # nothing of an earlier command is there but perhaps its manifest
        write_file(path / "manifest.json", json.dumps(manifest.plain(), indent=2))
    elif not (path / "manifest.json").exists():
        raise UserError(
            f"{path} holds shards of unknown origin and no manifest.json; choose another folder or remove them"
        )
    elif different := differences(_identity(found := read_manifest(path)), _identity(manifest, found)):
        raise UserError(
            f"{path} holds other latents ({'; '.join(different)}); choose another folder or remove this one"
        )


def _identity(manifest: Manifest, other: Manifest | None = None) -> dict[str, Any]:
    """The manifest without words such as the path of the images: their folder may move, ``data`` is their digest.

    Also without the digests of inputs that the other one, of an earlier version, lacks.
    """
    whole = {key: value for key, value in manifest.plain().items() if key != "class_names"}
    dropped = {"data", "split", "licence"}
    dropped |= set() if other is None else {"images", "latents"} - other.source.keys()
    return whole | {"source": {key: value for key, value in whole["source"].items() if key not in dropped}}


def check_space(path: Path, manifest: Manifest, made_by: str) -> None:
    """Print the disk space that the missing shards of a cache need if it is large.

    Args:
        path: folder of the cache; it need not exist.
        manifest: description of the cache.
        made_by: name of the command, for the printed line.

    Raises:
        UserError: the disk has less.
    """
    records = manifest.count - len(_present(path, manifest)) * manifest.shard_size
    if records <= 0:
        return
    folder = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    need, free = records * manifest.record_bytes, shutil.disk_usage(folder).free
    if need >= LARGE:
        size = f"{need / 1e9:.3g} GB in {path} ({free / 1e9:.3g} GB are free)"
        note(f"{made_by}: {records:,} records of {manifest.record_bytes:,} bytes, {size}")
    if need > free:
        raise UserError(
            f"{path} needs {need / 1e9:.3g} GB for {records:,} records, {free / 1e9:.3g} GB are free; free some space, "
            "choose another out=FOLDER, or lower count"
        )


def missing_shards(path: str | Path, rank: int = 0, world: int = 1) -> list[int]:
    """The shards k with k % world == rank that are not yet written, or cut off. Removes what a killed run left."""
    path, manifest = Path(path), read_manifest(path)
    present = {k for k in _present(path, manifest) if k % world != rank or _whole(_shard_path(path, k))}
    missing = [k for k in range(rank, manifest.shards, world) if k not in present]
    for k in missing:  # of this rank only: another one may be writing
        temporary_path(_shard_path(path, k)).unlink(missing_ok=True)
    return missing


def _whole(file: Path) -> bool:
    """Whether a shard is what was written; one that is not, as after an interrupted copy, is noted."""
    file = regular_file(file)
    try:
        _load(file)
    except DAMAGED as error:
        note(f"{file} is damaged ({one_line(error, 200)}) and made again", "yellow")
        return False
    return True


def shard_rows(manifest: Manifest, k: int) -> range:
    """The rows of shard ``k`` in the whole cache."""
    return range(k * manifest.shard_size, min((k + 1) * manifest.shard_size, manifest.count))


def write_shard(path: str | Path, k: int, arrays: Mapping[str, np.ndarray | Tensor]) -> None:
    """Check a shard and write it, whole or not at all.

    Args:
        path: folder of the cache.
        k: number of the shard.
        arrays: ``latents`` (n, L) integers or (n, L, D) floats, ``labels``, ``indices``, ``seeds`` (n,), optionally
            ``flips`` and ``crops`` (n,), where n is ``len(shard_rows(manifest, k))``.

    Raises:
        UserError: a field is missing or contradicts the manifest in shape, type or range; the disk is full.
    """
    manifest = read_manifest(path)
    arrays = {name: _numpy(value) if isinstance(value, Tensor) else np.asarray(value) for name, value in arrays.items()}
    where = f"shard {k} of {path}"
    expected = {"latents", "labels", "indices", "seeds"}
    if not expected <= arrays.keys() <= expected | OPTIONAL:
        raise UserError(
            f"{where} has the fields {sorted(arrays)}; expected {sorted(expected)}, perhaps {sorted(OPTIONAL)}"
        )
    _check_fields(arrays, manifest, len(shard_rows(manifest, k)), where)
    _check_latents(arrays["latents"], manifest, where)
    types = {"latents": manifest.latent_type, "labels": torch.int32} | dict.fromkeys(OPTIONAL, torch.uint8)
    # Copies: safetensors refuses tensors that share memory.
    stored = {name: torch.tensor(value, dtype=types.get(name, torch.int64)) for name, value in arrays.items()}
    if manifest.kind == "continuous" and not stored["latents"].isfinite().all():
        raise UserError(f"latents of {where} are too large for {manifest.dtype}; store them as float32 or bfloat16")
    write_file(_shard_path(path, k), save(stored, {"crc32": _checksum(stored)}))


# Reading


def caches_in(path: str | Path) -> list[Path]:
    """The caches in a folder: those of its buckets, in folders named HEIGHTxWIDTH, or the folder itself."""
    path = Path(path)
    if (path / "manifest.json").exists():
        return [path]
    return sorted(file.parent for file in path.glob("[0-9]*x[0-9]*/manifest.json")) or [path]


class LatentCache:
    """A complete cache. Shards are mapped into memory: the system loads what is read and drops it when memory is short.

    Attributes:
        path: its folder.
        manifest: its description.

    Raises:
        UserError: the cache is missing, incomplete or damaged.
    """

    def __init__(self, path: str | Path):
        self.path, self.manifest = Path(path), read_manifest(path)
        shards, present = self.manifest.shards, _present(self.path, self.manifest)
        if len(present) < shards:
            raise UserError(
                f"{path} lacks {shards - len(present)} of {shards} shards, "
                f"first shard {next(k for k in count() if k not in present)}; run the command that makes it again"
            )
        self._shards = [self._map(k) for k in range(shards)]
        types = {str(shard["latents"].dtype) for shard in self._shards}
        if len(types) > 1:
            raise UserError(f"shards of {path} store latents as {' and '.join(sorted(types))}; make the cache again")

    def __getstate__(self) -> dict[str, Any]:
        """Data workers map the files themselves, unchecked: they were checked here."""
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        files = (regular_file(_shard_path(self.path, k)) for k in range(self.manifest.shards))
        self._shards = [self._arrays(load_tensors(file), k) for k, file in enumerate(files)]

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def labels(self) -> np.ndarray:
        """All labels, (N,) int64."""
        return np.concatenate([shard["labels"] for shard in self._shards]).astype(np.int64)

    @property
    def indices(self) -> np.ndarray:
        """All indices in the data set, (N,) int64."""
        return np.concatenate([shard["indices"] for shard in self._shards])

    def read(self, rows: slice | Sequence[int] | np.ndarray | Tensor) -> LatentRecords:
        """Records by their rows, in the given order.

        Raises:
            IndexError: a row is outside 0..N-1.
            UserError: a token is not in the codebook, or a latent is not finite.
        """
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of a cache with {len(self)} records")
        found = self._gather(rows)
        if found["latents"].dtype == np.int16:  # the bits of bfloat16, which numpy does not know
            found["latents"] = torch.from_numpy(found["latents"]).view(torch.bfloat16).float().numpy()
        _check_latents(found["latents"], self.manifest, str(self.path))
        types = dict.fromkeys(OPTIONAL, np.uint8)
        if self.manifest.kind == "continuous":
            types["latents"] = np.float32
        return LatentRecords(
            **{name: torch.from_numpy(v.astype(types.get(name, np.int64), copy=False)) for name, v in found.items()}
        )

    def _gather(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """All fields of these rows, read shard by shard."""
        stored = {f.name: self._shards[0][f.name] for f in fields(LatentRecords)}
        values = {name: np.empty((len(rows), *first.shape[1:]), first.dtype) for name, first in stored.items()}
        shards, within = np.divmod(rows, self.manifest.shard_size)
        order = shards.argsort(kind="stable")
        for some in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1) if len(rows) else ():
            shard = self._shards[shards[some[0]]]  # all rows of one shard
            for name, value in values.items():
                value[some] = shard[name][within[some]]
        return values

    def _map(self, k: int) -> dict[str, np.ndarray]:
        path, remedy = regular_file(_shard_path(self.path, k)), "remove it and run the command that makes it again"
        try:
            shard = self._arrays(_load(path), k)
        except DAMAGED as error:
            raise UserError(f"{path} is damaged ({one_line(error, 200)}); {remedy}") from None
        names = [f.name for f in fields(LatentRecords)]
        if lacking := [name for name in names if name not in shard]:
            raise UserError(f"{path} lacks {', '.join(lacking)}; {remedy}")
        shard = {name: shard[name] for name in names}
        _check_fields(shard, self.manifest, len(shard_rows(self.manifest, k)), str(path), remedy)
        return shard

    def _arrays(self, tensors: Mapping[str, Tensor], k: int) -> dict[str, np.ndarray]:
        """The fields of a shard as arrays in the same memory, with those that are 0 unless they are stored."""
        bits = {torch.bfloat16: torch.int16}
        zeros = np.zeros(len(shard_rows(self.manifest, k)), dtype=np.uint8)
        shard = {name: tensor.view(bits.get(tensor.dtype, tensor.dtype)).numpy() for name, tensor in tensors.items()}
        return dict.fromkeys(OPTIONAL, zeros) | shard


def _load(file: Path) -> dict[str, Tensor]:
    """The tensors of a shard, mapped into memory, once they are known to be those that were written."""
    tensors = load_tensors(file)
    _check_content(file, file.stat().st_mtime_ns)
    return tensors


@cache
def _check_content(file: Path, _changed: int) -> None:
    """Compare a shard with its checksum, once for each state of the file. Shards of before have none."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    if header.get("__metadata__", {}).get("crc32") not in (None, _checksum(load_tensors(file))):
        raise ValueError("its checksum is another one")


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of the bytes of tensors, sorted by name: a flipped bit always changes it."""
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy(), found)
    return f"{found:08x}"


def _present(path: Path, manifest: Manifest) -> set[int]:
    """The shards that are written. The work is bounded by the files there are, whatever the manifest says."""
    names = os.listdir(path) if path.is_dir() else []
    numbers = (int(found[1]) for name in names if (found := re.fullmatch(r"shard-([0-9]{5,18})\.safetensors", name)))
    return {k for k in numbers if k < manifest.shards}


def _check_fields(
    shard: Mapping[str, np.ndarray], manifest: Manifest, rows: int, where: str, remedy: str = "correct them"
) -> None:
    """Compare shapes, types and labels of a shard with the manifest."""
    discrete = manifest.kind == "discrete"
    shape = (rows, *(manifest.latent_shape[:1] if discrete else manifest.latent_shape))
    for name, value in shard.items():
        wanted, kinds = (shape, "iu" if discrete else "f") if name == "latents" else ((rows,), "iu")
        bits = value.dtype == np.int16 and manifest.latent_type == torch.bfloat16  # which numpy does not know
        if value.shape != wanted or not (value.dtype.kind in kinds or bits):
            kind = "integers" if "i" in kinds else "floats"
            raise UserError(f"{name} of {where} are {value.dtype} {value.shape}; expected {kind} {wanted}; {remedy}")
    labels = shard["labels"]
    if not 0 <= labels.min() <= labels.max() < manifest.classes:
        found = f"{labels.min()} to {labels.max()}"
        raise UserError(f"labels of {where} are {found}, expected 0 to {manifest.classes - 1}; {remedy}")


def _check_latents(latents: np.ndarray, manifest: Manifest, where: str) -> None:
    if manifest.kind == "continuous":
        if not np.isfinite(latents).all():
            raise UserError(f"latents of {where} are not all finite numbers; make them again with another snapshot")
    elif latents.size and not 0 <= latents.min() <= latents.max() < manifest.codebook_size:
        raise UserError(
            f"tokens of {where} are {latents.min()} to {latents.max()}, "
            f"expected 0 to {manifest.codebook_size - 1}; make them again with this tokenizer"
        )


def _numpy(values: Tensor) -> np.ndarray:
    """A tensor as an array; bfloat16, which numpy does not know, as float32."""
    return (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()


def _shard_path(path: str | Path, k: int) -> Path:
    return Path(path) / f"shard-{k:05d}.safetensors"
