"""Snapshots: what users load. A folder with configuration, weights and a model card; no trainer needed, no pickle.

    snapshot/00010000/
      config.yaml          kind, name, settings, step, provenance
      model.safetensors    EMA weights
      README.md            model card

The same layout is uploaded to the Hugging Face Hub. A path may name the snapshot itself, or a run folder, whose
newest one is taken. Behind that of a delta, which holds but a difference, ``@0.5`` says how much of it counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from robustok.config import read_yaml
from robustok.errors import UserError
from robustok.files import atomic_folder
from robustok.model_card import model_card


@dataclass(frozen=True)
class Snapshot:
    """A snapshot read from disk.

    Attributes:
        path: its folder.
        header: config.yaml: ``kind``, ``config`` and provenance.
        weights: name to tensor, on the CPU.
    """

    path: Path
    header: dict[str, Any]
    weights: dict[str, Tensor]


def write_snapshot(
    path: Path, header: dict[str, Any], weights: Mapping[str, Tensor], extra: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write a snapshot so that a reader sees all of it or nothing.

    Args:
        path: folder to make; replaced if it exists.
        header: what config.yaml holds; ``kind`` and ``config`` at least.
        weights: the model.
        extra: further files by name, such as ``discriminator``, which post-training carries over.

    Raises:
        UserError: the disk is full or not writable.
    """
    with atomic_folder(path) as folder:
        (folder / "config.yaml").write_text(yaml.safe_dump(header, sort_keys=False))
        (folder / "README.md").write_text(model_card(header))
        for name, tensors in {"model": weights, **extra}.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / f"{name}.safetensors")


def read_snapshot(path: str | Path, kind: str) -> Snapshot:
    """Read a snapshot of the given kind.

    Raises:
        UserError: there is none, it is incomplete, damaged or of another kind.
    """
    folder, header = resolve(path), read_header(path)
    if header.get("kind") != kind:
        raise UserError(
            f"{folder} is a snapshot of a {header.get('kind', 'model of unknown kind')}, expected a {kind}; "
            "give another path"
        )
    if not isinstance(header.get("config"), dict):
        raise UserError(f"{folder}/config.yaml lacks the settings of the {kind} under 'config'; copy or train it again")
    return Snapshot(folder, header, read_weights(folder / "model.safetensors"))


def read_header(path: str | Path) -> dict[str, Any]:
    """The config.yaml of a snapshot, without its weights.

    Raises:
        UserError: there is none, or it is damaged.
    """
    header = read_yaml(resolve(path) / "config.yaml")
    if "delta" in header:
        strength, rank = split_scale(path)[1], header["delta"].get("rank")
        facts = {"delta": f"rank {rank}" if rank else "whole", "delta_scale": 1.0 if strength is None else strength}
        header["post_trained"] = (header.get("post_trained") or {}) | facts
    return header


def split_scale(path: str | Path) -> tuple[Path, float | None]:
    """A path and what stands behind its ``@``: how much of a delta counts, None where nothing is said."""
    folder, at, number = str(path).rpartition("@")
    if not at or Path(path).exists():
        return Path(path), None
    try:
        return Path(folder), float(number)
    except ValueError:
        return Path(path), None


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: missing or damaged.
    """
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file} is missing; the snapshot is incomplete, copy the whole folder") from None
    except Exception as error:  # safetensors raises its own, undocumented types
        raise UserError(f"{file} cannot be read as safetensors ({error}); copy or train it again") from None


def read_extra(path: str | Path, *names: str) -> dict[str, dict[str, Tensor]]:
    """Those of the files NAME.safetensors that a snapshot has beside its weights, as ``write_snapshot`` takes them.

    Raises:
        UserError: no snapshot, or a damaged file.
    """
    folder = resolve(path)
    files = {name: folder / f"{name}.safetensors" for name in names}
    return {name: read_weights(file) for name, file in files.items() if file.exists()}


def resolve(path: str | Path) -> Path:
    """The snapshot folder that a path means: itself, or the best of a run folder (the newest, where none was scored).

    Raises:
        UserError: nothing of the kind is there.
    """
    path, _ = split_scale(path)
    if (path / "model.safetensors").exists():
        return path
    found = sorted(p for p in path.glob("snapshot/[0-9b]*") if (p / "model.safetensors").exists())  # "best" sorts last
    if not found:
        raise UserError(f"{path} holds no snapshot; give a run folder with snapshot/STEP/, or such a folder itself")
    return found[-1]


def load_weights(module: nn.Module, snapshot: Snapshot) -> None:
    """Load the weights strictly.

    Raises:
        UserError: names and shapes do not agree with the configuration.
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
    module.load_state_dict(snapshot.weights)
