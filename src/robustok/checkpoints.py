"""Checkpoints in the layouts of others, read without executing anything in them.

A pickle may hold tensors and plain containers; whatever else it names becomes an empty object. So the arguments and
optimiser states beside the weights of a release need none of its packages, and a payload is never called.
"""

import difflib
import os
import pickle
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from robustok.snapshots import read_weights
from robustok.types import UserError


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """Read a checkpoint without executing anything in it.

    Returns:
        The tensors by name; and which part of the file they are, such as "ema", "model" or "flat state dict".

    Raises:
        UserError: missing, damaged, or of another format; holds no tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is no file; give the released .pt, .bin or .safetensors file")
    if path.suffix == ".safetensors":
        return choose_weights(read_weights(path), str(path))
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is cut off, or neither a PyTorch archive nor named .safetensors; download it again")
    reader = types.SimpleNamespace(Unpickler=_Unpickler, __name__="robustok.checkpoints")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("constants.pkl") for name in archive.namelist()):  # TorchScript: holds programs
                raise UserError(f"{path} is a TorchScript program; give the released checkpoint with its state dict")
        content = torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False, mmap=True)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path} cannot be read as a PyTorch checkpoint ({reason}); download it again") from None
    return choose_weights(content, str(path))


def choose_weights(content: Any, source: str) -> tuple[dict[str, Tensor], str]:
    """The state dict in what a checkpoint holds: averaged weights, else the model's, else all of it.

    Returns:
        As :func:`read_checkpoint`.

    Raises:
        UserError: no mapping of names to tensors.
    """
    part = "flat state dict"
    if isinstance(content, Mapping):
        part = next(
            (key for key in ("ema", "model", "module", "state_dict") if isinstance(content.get(key), Mapping)), part
        )
        content = content.get(part, content)
    if not isinstance(content, Mapping) or not content:
        raise UserError(
            f"{source} holds no state dict; expected tensors by name, or such a mapping as 'ema' or 'model'"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{source}: {name!r} is a {type(value).__name__}, expected tensors by name")
    return dict(content), part


def write_checkpoint(path: Path, weights: dict[str, Tensor]) -> Path:
    """Write a safetensors file, all of it or nothing.

    Raises:
        UserError: another suffix, or the file cannot be written.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"out={path} must end in .safetensors; torch.save its load_file() where a .pt is needed")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)
        os.replace(temporary, path)
    except Exception as error:  # safetensors wraps the operating system's errors in its own
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {' '.join(str(error).split())}; free some space or choose another"
        ) from None
    return path


# What weights and a released configuration tell of a model


def flatten_config(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The innermost keys of a released configuration with their values; None says nothing."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten_config(value)
        elif value is not None:
            yield key, value


def settle(facts: dict[str, Any], config: dict[str, Any], names: dict[str, str], **defaults: Any) -> dict[str, Any]:
    """Facts of the weights, completed from the flat configuration, completed from defaults; all under our names.

    Raises:
        UserError: a configured value contradicts a fact, or a key looks like a misspelling.
    """
    known = {**names, **{own: own for own in names.values()}}
    settled = dict(defaults)
    for key, value in config.items():
        if key in known:
            own = known[key]
            if own in facts and facts[own] != value:
                raise UserError(f"config gives {key} = {value!r}, the weights have {facts[own]!r}; correct one of them")
            settled[own] = value
        elif near := difflib.get_close_matches(key, known, n=1, cutoff=0.85):
            raise UserError(f"config: unknown key {key!r}; did you mean {near[0]!r}?")
    return settled | facts


def shape_of(weights: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """Shape of a tensor from which sizes are read."""
    found = tuple(weights[name].shape) if name in weights else None
    if found is None or len(found) != dimensions or 0 in found:
        what = "is missing" if found is None else f"is {found}, expected {dimensions} dimensions"
        raise UserError(f"{name} {what}; is this a checkpoint of another family?")
    return found


def depth_of(weights: Mapping[str, Tensor], prefix: str) -> int:
    """Number of blocks."""
    blocks = {name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)}
    if not blocks:
        raise UserError(f"{prefix}0.* is missing; is this a checkpoint of another family?")
    return len(blocks)


# The restricted unpickler


class _Stub:
    """Stands for an object of a class or the result of a function that a pickle names and we do not call."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Stub":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Released arguments hold lists of a class of their own (ruamel's), which pickle fills by this."""

    extend = append


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """What ``torch._utils._rebuild_tensor_v2`` does, without gradients and hooks."""
    empty = torch.empty(0, dtype=storage.dtype)
    return empty.set_(storage._untyped_storage, offset, size, stride)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): tuple,
}


class _Unpickler(pickle.Unpickler):
    """Makes tensors and plain containers; every other name becomes a stub, so nothing of the file is ever called."""

    def find_class(self, module: str, name: str) -> Any:
        """The allowed object of that name, else a stub. Storage types never come here: torch resolves them itself."""
        return ALLOWED.get((module, name), _Stub)
