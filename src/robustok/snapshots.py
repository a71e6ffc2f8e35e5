"""Snapshots, the models that users load and share: a folder with configuration, weights and model card; no pickle.

    snapshot/00010000/
      config.yaml          kind, name, settings, step, provenance
      model.safetensors    EMA weights
      README.md            model card

The same layout is uploaded to the Hugging Face Hub. A path may be the snapshot itself, or a run folder, of which the
best snapshot is taken, else the newest; or ``hf://ORG/NAME``. A delta holds only the difference to another snapshot;
``@0.5`` after its path scales the difference.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from pydantic import ConfigDict, Field, FiniteFloat, PositiveInt
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from robustok.config import Config, read_yaml, validate
from robustok.errors import UserError, printable
from robustok.files import atomic_folder, load_tensors, one_line, regular_file
from robustok.hub import download_snapshot, hub_address, is_remote
from robustok.model_card import model_card

Module = TypeVar("Module", bound=nn.Module)


class DeltaHeader(Config):
    """What a snapshot says about the difference that it holds."""

    model_config = ConfigDict(extra="allow", strict=True)

    base: str = Field(description="path of the original, seen from the snapshot, or hf://ORG/NAME")
    digest: str = Field(description="digest of the original's weights")
    rank: PositiveInt | None = Field(None, description="rank of a LoRA; null is the whole difference")
    relative_error: FiniteFloat = Field(ge=0, description="error of rank and rounding; 0 is exact")


class ModelHeader(Config):
    """The settings of a network in a snapshot, of which its family checks the others."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str = Field(default="", description="the family")


class Header(Config):
    """What code reads in the config.yaml of a snapshot; it may hold more."""

    model_config = ConfigDict(extra="allow", strict=True)

    kind: str = ""
    config: ModelHeader = ModelHeader()
    step: int | None = None
    licence: str | None = None
    latent_space: str | None = None
    source: dict[str, Any] = Field({})
    post_trained: dict[str, Any] | None = None
    protocol: dict[str, Any] = Field({})
    held_out: dict[str, FiniteFloat] = Field({})
    guides: list[str] = Field([])
    discriminator: ModelHeader = ModelHeader()
    delta: DeltaHeader | None = None
    # Of generators.
    latent_shape: list[PositiveInt] = Field([1, 1], min_length=2, max_length=2)
    codebook_size: PositiveInt | None = None
    classes: PositiveInt = 1
    class_names: list[str] | None = None
    sampling: dict[str, Any] | None = None


@dataclass(frozen=True)
class Snapshot:
    """A snapshot read from disk.

    Attributes:
        path: its folder.
        header: content of config.yaml: ``kind``, ``config`` and provenance.
        weights: name to tensor, on the CPU.
    """

    path: Path
    header: dict[str, Any]
    weights: dict[str, Tensor]


def write_snapshot(
    path: str | Path,
    header: dict[str, Any],
    weights: Mapping[str, Tensor],
    extra: Mapping[str, Mapping[str, Tensor]],
    once: bool = False,
) -> None:
    """Write a snapshot, whole or not at all.

    Args:
        path: the folder; replaced if it exists, unless ``once``.
        header: content of config.yaml: at least ``kind`` and ``config``. Of weights of other projects, ``source`` has
            the ``file`` they came from, the ``part`` of it and the ``family``; ``trained_on`` says so in prose.
        weights: tensors of the model by name.
        extra: further files by name, such as ``discriminator``, with which post-training goes on.
        once: a folder that is there already stays, and must hold the same, as from the same command before.

    Raises:
        UserError: the disk is full or not writable; a weight is not finite; with ``once``, the folder holds something
            else.
    """
    for name, tensors in {"model": weights, **extra}.items():
        remedy = "nothing is written: train again from step 0, with a lower learning_rate or with clip_norm"
        check_finite_weights(tensors, f"{path}/{name}.safetensors", remedy)
    with atomic_folder(path, once) as folder:
        (folder / "config.yaml").write_text(yaml.safe_dump(header, sort_keys=False))
        (folder / "README.md").write_text(printable(model_card(header)), "utf-8")
        for name, tensors in {"model": weights, **extra}.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / f"{name}.safetensors")


def read_snapshot(path: str | Path, kind: str) -> Snapshot:
    """Read a snapshot of the given kind.

    Raises:
        UserError: it is missing, incomplete, damaged or of another kind; a weight is not finite.
    """
    folder, header = resolve(path), read_header(path)
    if header.get("kind") != kind:
        raise UserError(
            f"{folder} is a snapshot of a {header.get('kind', 'model of unknown kind')}, expected a {kind}; "
            "give another path"
        )
    if not isinstance(header.get("config"), dict):
        raise UserError(f"{folder}/config.yaml lacks the settings of the {kind} under 'config'; copy or train it again")
    weights = read_weights(folder / "model.safetensors")
    check_finite_weights(weights, folder / "model.safetensors")
    return Snapshot(folder, header, weights)


def read_header(path: str | Path) -> dict[str, Any]:
    """The config.yaml of a snapshot, without its weights.

    Raises:
        UserError: it is missing or damaged, or a field has another type than :class:`Header` says.
    """
    file = resolve(path) / "config.yaml"
    header = read_yaml(file)
    validate(Header, header, source=str(file))
    if "delta" in header:
        scale, rank = split_scale(path)[1], header["delta"].get("rank")
        delta = {"delta": f"rank {rank}" if rank else "whole", "delta_scale": 1.0 if scale is None else scale}
        header["post_trained"] = (header.get("post_trained") or {}) | delta
    return header


def split_scale(path: str | Path) -> tuple[Path, float | None]:
    """A path without its ``@SCALE``, and the scale of the delta there; None if the path has none.

    Raises:
        UserError: the scale is not finite.
    """
    folder, at, number = str(path).rpartition("@")
    if not at or Path(path).exists():
        return Path(path), None
    try:
        scale = float(number)
    except ValueError:
        return Path(path), None
    if not math.isfinite(scale):
        raise UserError(f"{path}: the scale {number} is no finite number; give one such as {folder}@0.5")
    return Path(folder), scale


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: it is missing or damaged.
    """
    if not Path(file).exists():
        raise UserError(f"{file} is missing; the snapshot is incomplete, copy the whole folder")
    file = regular_file(file)
    try:
        return load_tensors(file)
    except Exception as error:  # safetensors raises its own, undocumented types
        reason = one_line(error, 200)
        raise UserError(f"{file} cannot be read as safetensors ({reason}); copy or train it again") from None


def check_finite_weights(
    weights: Mapping[str, Tensor], source: object, remedy: str = "copy it again, or make it anew"
) -> None:
    """Refuse weights that are not all finite: what is computed with them is NaN, or finite and wrong.

    Args:
        weights: name to tensor; those that are no floats are not looked at.
        source: named in the error, such as the file.
        remedy: ends the error.

    Raises:
        UserError: names the first tensor that holds NaN or an infinite number.
    """
    for name, tensor in weights.items():
        numbers = tensor.float() if tensor.itemsize == 1 else tensor  # isfinite does not know all 8-bit floats
        if tensor.is_floating_point() and not numbers.isfinite().all():
            raise UserError(f"{source}: {name} holds NaN or infinite numbers; {remedy}")


def read_extra(path: str | Path, *names: str) -> dict[str, dict[str, Tensor]]:
    """The files NAME.safetensors that a snapshot has beside its weights, as ``write_snapshot`` takes them.

    Raises:
        UserError: the snapshot is missing, a file is damaged, or a weight is not finite.
    """
    folder = resolve(path)
    files = {name: folder / f"{name}.safetensors" for name in names}
    found = {name: read_weights(file) for name, file in files.items() if file.exists()}
    for name, weights in found.items():
        check_finite_weights(weights, files[name])
    return found


def resolve(path: str | Path) -> Path:
    """The snapshot folder at a path: itself, the best of a run folder (the newest, if none was evaluated), a download.

    Raises:
        UserError: there is none.
    """
    path, _ = split_scale(path)
    if is_remote(path):
        return download_snapshot(hub_address(path))
    if (path / "model.safetensors").exists():
        return path
    if (path / "snapshot").is_dir():
        os.scandir(path / "snapshot").close()  # glob would find nothing in a folder that may not be read
    found = [file.parent for file in path.glob("snapshot/*/model.safetensors")]
    found = [p for p in found if p.name == "best" or re.fullmatch("[0-9]+", p.name)]
    if not found:
        raise UserError(f"{path} holds no snapshot; give a run folder with snapshot/STEP/, or such a folder itself")
    return max(found, key=lambda p: (p.name == "best", int(p.name) if p.name != "best" else 0))


def build(make: Callable[[], Module], snapshot: Snapshot) -> Module:
    """Make the model of a snapshot and load its weights, strictly.

    An outline without memory is compared with the weights first: a configuration that asks for a giant is refused
    before anything is allocated.

    Args:
        make: makes the model.
        snapshot: its configuration and weights.

    Raises:
        UserError: names or shapes do not fit the configuration, or no model can be made of it.
    """
    _check_fit(outline_for(make, snapshot.weights, f"{snapshot.path / 'config.yaml'} asks for"), snapshot)
    module = make()
    module.load_state_dict(snapshot.weights)
    return module


def outline_for(make: Callable[[], Module], weights: Mapping[str, Tensor], who: str) -> Module:
    """The :func:`outline_of` a model that is to have these weights; refused if it is far larger."""
    numbers = sum(tensor.numel() for tensor in weights.values())
    limit = f"the {numbers:,} numbers in its weights; correct it, or copy or train it again"
    # A few are made only to be replaced, so more are allowed at first.
    return outline_of(make, 4 * len(weights) + 1000, 4 * numbers + 10**6, who, limit)


def outline_of(make: Callable[[], Module], tensors: int, numbers: int, who: str, limit: str) -> Module:
    """A model on the device "meta", where tensors have shapes and take no memory.

    Args:
        make: makes the model.
        tensors: how many tensors are made at most.
        numbers: how many numbers these hold together at most.
        who: begins the error, such as "config.yaml asks for".
        limit: ends the error: where the two limits come from, and what to do.

    Raises:
        UserError: the model is far larger than this, or cannot be made.
    """
    left = {"tensors": tensors, "numbers": numbers, "modules": 100 * tensors}

    def count(_module: nn.Module, _name: str, added: nn.Parameter | nn.Module | None) -> None:
        sizes = {"tensors": 1, "numbers": added.numel()} if isinstance(added, Tensor) else {"modules": 1}
        for what, size in sizes.items():
            left[what] -= size
        if min(left.values()) < 0:
            raise UserError(f"{who} a model larger than {limit}")

    hooks = register_module_parameter_registration_hook(count), register_module_module_registration_hook(count)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return make()
    except UserError:
        raise
    except Exception as error:  # sizes that are no sizes can raise nearly anything
        raise UserError(f"{who} a model that cannot be made ({one_line(error, 200)}); correct it") from None
    finally:
        for hook in hooks:
            hook.remove()


def _check_fit(module: nn.Module, snapshot: Snapshot) -> None:
    """Compare names and shapes of the weights with those of the model, which may be an outline.

    Raises:
        UserError: lists up to three problems.
    """
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in snapshot.weights.items()}
    problems = [f"missing {n}" for n in own.keys() - given.keys()] + [
        f"unexpected {n}" for n in given.keys() - own.keys()
    ]
    problems += [f"{n} is {given[n]}, expected {own[n]}" for n in own.keys() & given.keys() if own[n] != given[n]]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{snapshot.path}: weights do not fit its config.yaml: {'; '.join(sorted(problems)[:3])}{more}")
