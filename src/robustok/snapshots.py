"""Snapshots, the models that users load and share: a folder with configuration, weights and model card; no pickle.

    snapshot/00010000/
      config.yaml          kind, name, settings, step, provenance
      model.safetensors    EMA weights
      README.md            model card

The same layout is uploaded to the Hugging Face Hub. A path may be the snapshot itself, or a run folder, of which the
best snapshot is taken, else the newest. A delta holds only the difference to another snapshot; ``@0.5`` after its path
scales the difference.
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
        header: content of config.yaml: ``kind``, ``config`` and provenance.
        weights: name to tensor, on the CPU.
    """

    path: Path
    header: dict[str, Any]
    weights: dict[str, Tensor]


def write_snapshot(
    path: str | Path, header: dict[str, Any], weights: Mapping[str, Tensor], extra: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write a snapshot, whole or not at all.

    Args:
        path: the folder; replaced if it exists.
        header: content of config.yaml: at least ``kind`` and ``config``. Of weights of other projects, ``source`` has
            the ``file`` they came from, the ``part`` of it and the ``family``; ``trained_on`` says so in prose.
        weights: tensors of the model by name.
        extra: further files by name, such as ``discriminator``, with which post-training goes on.

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
        UserError: it is missing, incomplete, damaged or of another kind.
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
        UserError: it is missing or damaged.
    """
    header = read_yaml(resolve(path) / "config.yaml")
    if "delta" in header:
        scale, rank = split_scale(path)[1], header["delta"].get("rank")
        delta = {"delta": f"rank {rank}" if rank else "whole", "delta_scale": 1.0 if scale is None else scale}
        header["post_trained"] = (header.get("post_trained") or {}) | delta
    return header


def split_scale(path: str | Path) -> tuple[Path, float | None]:
    """A path without its ``@SCALE``, and the scale of the delta there; None if the path has none."""
    folder, at, number = str(path).rpartition("@")
    if not at or Path(path).exists():
        return Path(path), None
    try:
        return Path(folder), float(number)
    except ValueError:
        return Path(path), None


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file} is missing; the snapshot is incomplete, copy the whole folder") from None
    except Exception as error:  # safetensors raises its own, undocumented types
        raise UserError(f"{file} cannot be read as safetensors ({error}); copy or train it again") from None


def read_extra(path: str | Path, *names: str) -> dict[str, dict[str, Tensor]]:
    """The files NAME.safetensors that a snapshot has beside its weights, as ``write_snapshot`` takes them.

    Raises:
        UserError: the snapshot is missing, or a file is damaged.
    """
    folder = resolve(path)
    files = {name: folder / f"{name}.safetensors" for name in names}
    return {name: read_weights(file) for name, file in files.items() if file.exists()}


def resolve(path: str | Path) -> Path:
    """The snapshot folder at a path: itself, or the best of a run folder (the newest, if none was evaluated).

    Raises:
        UserError: there is none.
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
        UserError: names or shapes do not fit the configuration.
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
