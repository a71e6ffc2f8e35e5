"""Digests of what a training reads, so that it is resumed with the same, wherever that lies by then."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from robustok.config import Config
from robustok.data.dataset import Draw, ImageDataset
from robustok.data.latent_cache import LatentCache, caches_in
from robustok.errors import UserError
from robustok.files import bytes_digest
from robustok.runs import paths_in
from robustok.snapshots import resolve, split_scale

IMAGES, RECORDS = 256, 1024  # of large sets only so many, evenly spread, are read for the digest


def may_change(run: Config) -> set[str]:
    """Settings that may change on resume: a path where the content is the same, ``steps`` where the schedule is."""
    return {"steps", *paths_in(run)} - {"continue_from"}  # which only counts at the start


def input_digests(run: Config, *data: ImageDataset) -> dict[str, str]:
    """Digest of the images and of every other file and folder in the settings, by the name of the setting.

    Args:
        run: settings of a training.
        data: its images, whose settings begin with ``data.``; of buckets all.
    """
    keys = [key for key in may_change(run) - {"steps", "out"} if not key.startswith("data.")]
    paths = paths_in(run)
    return {key: path_digest(paths[key]) for key in keys} | ({"data": _joined(map(image_digest, data))} if data else {})


def image_digest(data: ImageDataset) -> str:
    """Of the names and sizes of all files, all labels, and the pixels: of all images in memory, else of some.

    Of images that are downloaded when they are read, their stamp is in the place of pixels.
    """
    sha = hashlib.sha256(data.fingerprint.encode())
    sha.update(data.labels.astype("<i8").tobytes())
    if data.blocks is not None:
        sha.update(data.stamp.encode())
        return sha.hexdigest()[:16]
    every = 1 if data.in_memory else -(-len(data) // IMAGES)
    indices = np.arange(0, len(data), every)
    for start in range(0, len(indices), IMAGES):
        sha.update(data[Draw(indices[start : start + IMAGES])].pixels.numpy())
    return sha.hexdigest()[:16]


def latent_digest(cache: LatentCache) -> str:
    """Of the description of a cache but its provenance, which names folders, and of its records, or some of them."""
    manifest = {key: value for key, value in cache.manifest.plain().items() if key not in ("source", "shard_size")}
    sha = hashlib.sha256(json.dumps(manifest).encode())
    for value in vars(cache.read(slice(None, None, -(-len(cache) // RECORDS)))).values():
        sha.update(value.numpy())
    return sha.hexdigest()[:16]


def path_digest(path: Path) -> str:
    """Of a file, a cache of latents (those of buckets), or the weights of a snapshot; of anything else its path."""
    if (caches_in(path)[0] / "manifest.json").is_file():
        return _joined(latent_digest(LatentCache(cache)) for cache in caches_in(path))
    try:
        file = path if path.is_file() else resolve(path) / "model.safetensors"
    except UserError:  # a download, or what the training reports as missing
        return str(path)
    scale = split_scale(path)[1]  # of a delta
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16] + ("" if scale is None else f"@{scale:g}")


def _joined(digests: Iterable[str]) -> str:
    """One digest of several; a single one is itself."""
    first, *others = digests
    return bytes_digest(" ".join([first, *others]).encode(), 16) if others else first
