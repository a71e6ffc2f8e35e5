"""Which models in a folder of runs belong together: a post-trained decoder, the untouched one, and a generator."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from robustok.config import read_yaml
from robustok.console import note
from robustok.data.latent_cache import LatentCache
from robustok.data.latent_checks import check_cache, check_real_latents
from robustok.errors import UserError
from robustok.generators import load_generator
from robustok.generators.pipeline import PipelineGenerator
from robustok.snapshots import read_header, resolve
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.tokenizers.deltas import Delta, compute_delta
from robustok.types import Generator, Tokenizer


@dataclass(frozen=True)
class Found:
    """What a folder of runs holds.

    Attributes:
        post_trained: tokenizers with a post-trained decoder, by the names that the app shows.
        tokenizers: the other tokenizers.
        generators: generators.
        caches: caches of latents.
    """

    post_trained: dict[str, Path]
    tokenizers: list[Path]
    generators: list[Path]
    caches: list[Path]


@dataclass(frozen=True)
class Opened:
    """The models of a post-training run.

    Attributes:
        original: the tokenizer with the untouched decoder.
        mixed: another copy of it, whose weights change with the strength.
        delta: what post-training changed.
        generator: whose samples are decoded.
        names: of the classes, or prompts.
        real: latents of real images, for sigma above 0; None if there are none.
    """

    original: Tokenizer
    mixed: Tokenizer
    delta: Delta
    generator: Generator
    names: list[str]
    real: LatentCache | None


def find(root: Path) -> Found:
    """What lies in a folder of runs; snapshots that cannot be read are named and passed over.

    Raises:
        UserError: the folder is missing, or nothing in it was post-trained.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; give path=RUNS, a run folder or a folder of them")
    found = Found({}, [], [], [])
    for folder in _folders(root, found.caches):
        try:
            header = read_header(folder)
        except UserError as error:
            note(f"passed over: {error}", "yellow")
            continue
        if header.get("kind") == "generator":
            found.generators.append(folder)
        elif header.get("kind") == "tokenizer" and header.get("post_trained"):
            found.post_trained[folder.relative_to(root).as_posix() if folder != root else root.name] = folder
        elif header.get("kind") == "tokenizer":
            found.tokenizers.append(folder)
    if not found.post_trained:
        raise UserError(f"{root} holds no post-trained tokenizer; make one with `robustok post-train` or `demo`")
    return found


def _folders(root: Path, caches: list[Path]) -> Iterator[Path]:
    """Folders with a snapshot, in order; those of latents are added to ``caches``."""
    for path, folders, files in os.walk(root):
        folder = Path(path)
        if "manifest.json" in files:
            caches.append(folder)
        if "model.safetensors" in files or "snapshot" in folders:
            yield folder
        folders[:] = sorted(set(folders) - {"snapshot", "state"})


def _named(run: Path, key: str) -> Iterator[Path]:
    """Where the configurations of a run, and of those around it, say that an input is; relative paths from anywhere."""
    for folder in (run, *list(run.absolute().parents)[:2]):
        settings = {}
        with suppress(UserError, OSError):  # no run, or not one of ours
            settings = read_yaml(folder / "config.yaml")
        if isinstance(value := settings.get(key), str):
            yield from (parent / value for parent in (Path(), *folder.absolute().parents))
        yield folder / key


def _first(paths: Iterator[Path], load: Callable[[Path], Any]) -> Any:
    """What loads from the first path from which it does; None if there is none."""
    for path in paths:
        try:
            return load(path)
        except (UserError, OSError):
            continue
    return None


def open_run(run: Path, found: Found, device: torch.device) -> Opened:
    """Load the models of a run: those that it names, or else others of the same latents in the folder.

    Raises:
        UserError: the untouched tokenizer or a generator of its latents is not to be found.
    """
    header, changed = read_header(run), load_tokenizer(run)
    space = header.get("latent_space") or encoder_digest(changed)

    def tokenizer(path: Path) -> Tokenizer:
        loaded = load_tokenizer(path)
        if encoder_digest(loaded) != space:
            raise UserError(f"{path} has other latents")
        return loaded

    def generator(path: Path) -> Generator:
        if read_header(path).get("latent_space") != space:
            raise UserError(f"{path} models other latents")
        return load_generator(path).to(device)

    def latents(path: Path) -> LatentCache:
        cache = LatentCache(path)
        check_cache(cache, space)
        check_real_latents(cache)
        return cache

    base = [resolve(run) / header["delta"]["base"]] if "delta" in header else []
    original = _first(chain(base, _named(run, "tokenizer"), found.tokenizers), tokenizer)
    model = _first(chain(_named(run, "generator"), found.generators), generator)
    if original is None or model is None:
        what = "the tokenizer that was post-trained" if original is None else "a generator of its latents"
        raise UserError(f"{run}: {what} is not to be found; copy its run folder beside this one")
    delta = compute_delta(original, changed)
    real = _first(chain(_named(run, "latents"), found.caches), latents)
    names = real.manifest.class_names if real else None
    if isinstance(model, PipelineGenerator):
        names = model.prompts[:-1]
    names = names or [str(label) for label in range(model.classes)]
    return Opened(original.to(device), deepcopy(original).to(device), delta, model, names, real)
