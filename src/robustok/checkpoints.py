"""Checkpoints of other projects, read without executing anything in them.

Of a pickle, only tensors and plain containers are loaded; any other object that it names becomes an empty stub. So the
arguments and optimiser states beside the weights need none of the project's packages, and malicious code never runs.
"""

import io
import json
import pickle
import re
import tarfile
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from robustok.errors import UserError
from robustok.files import atomic_file, one_line, regular_file
from robustok.hub import HUB_STEMS, download, is_remote
from robustok.snapshots import read_weights

# Keys of the state dict in a checkpoint. The first is preferred, but before all of them one with the word "ema" in it.
WRAPPERS = ("ema", "model", "module", "state_dict", "model_state_dict", "net", "generator", "params", "network")
OTHERS = re.compile("disc|critic|optim|sched|scaler", re.IGNORECASE)  # in keys of what is no model
# What DistributedDataParallel, torch.compile and classes around the model put before every name.
PREFIXES = ("module.", "_orig_mod.", "model.", "ema_model.", "net.", "generator.")
ARCHIVE, OLD_FILE = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # first bytes of PyTorch files


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from disk.

    Attributes:
        weights: tensors by name, on the CPU.
        part: which part of the file they are, such as "ema", "model" or "flat state dict".
        config: configuration of the model, from the file or a JSON file beside it; empty if there is none.
        discriminator: tensors by name of a discriminator in the file; None if there is none.
        source: the file, for errors.
    """

    weights: dict[str, Tensor]
    part: str
    config: dict[str, Any] = field(default_factory=dict)
    discriminator: dict[str, Tensor] | None = None
    source: str = "the weights"


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint without executing anything in it.

    The metadata of a safetensors file may list the tensors of the model (``state_keys``) and have its configuration
    (``config``), both as JSON. So may a JSON file of the same name beside any file (``state_dict_keys``, ``config``).
    Beside ``model.safetensors`` and the other names of the Hub, ``config.json`` is the configuration.

    Args:
        path: a .pt, .bin, .ckpt or .safetensors file, or ``hf://ORG/REPO/FILE`` on the Hugging Face Hub.

    Raises:
        UserError: missing, damaged, of another format, or without tensors by name.
    """
    path = regular_file(download(path) if is_remote(path) else path)
    safe = path.suffix == ".safetensors"
    checkpoint = choose_weights(read_weights(path) if safe else _read_pickle(path), str(path))
    keys, config = _metadata(path) if safe else (None, None)
    beside_keys, beside_config = _metadata_beside(path)
    if keys := keys or beside_keys:
        chosen = {name: checkpoint.weights[name] for name in keys if name in checkpoint.weights}
        checkpoint = replace(checkpoint, weights=chosen)  # loading reports missing names
    return replace(checkpoint, config=config or beside_config or {})


def _read_pickle(path: Path) -> Any:
    """The content of a PyTorch file: a zip archive, or a plain pickle as before 2020."""
    with path.open("rb") as handle:
        head = handle.read(len(OLD_FILE))
    archive = head.startswith(ARCHIVE) and zipfile.is_zipfile(path)
    if not archive and head != OLD_FILE:
        raise UserError(f"{path} is cut off, or neither a PyTorch file nor named .safetensors; download it again")
    reader = types.SimpleNamespace(Unpickler=_Unpickler, load=_load, __name__="robustok.checkpoints")
    try:
        if not archive and tarfile.is_tarfile(path):  # its first member may have the name OLD_FILE
            raise UserError(f"{path} is a tar archive, which is never unpacked; give the .pt or .safetensors file")
        if archive and any(name.endswith("constants.pkl") for name in _names(path)):  # TorchScript, which contains code
            raise UserError(f"{path} is a TorchScript program; give the checkpoint with a state dict")
        # torch would unpack an old file on disk if it is a tar, but not one in memory.
        source = path if archive else io.BytesIO(path.read_bytes())
        return torch.load(source, map_location="cpu", pickle_module=reader, weights_only=False, mmap=archive)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = one_line(error, 200)
        raise UserError(f"{path} cannot be read as a PyTorch checkpoint ({reason}); download it again") from None


def _names(path: Path) -> list[str]:
    """Names in a zip archive as Python and as torch read it: of a forged archive they may differ."""
    with zipfile.ZipFile(path) as file:
        names = file.namelist()
    try:
        return names + torch._C.PyTorchFileReader(str(path)).get_all_records()
    except RuntimeError:  # torch.load reports it
        return names


def _metadata(path: Path) -> tuple[list[str] | None, dict[str, Any] | None]:
    """Names of the model's tensors and its configuration, from the metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    try:
        keys, config = (json.loads(metadata[key]) if key in metadata else None for key in ("state_keys", "config"))
        return _names_of(keys), _of_type(config, dict)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: its metadata state_keys or config are no JSON; save it again without them") from None


def _metadata_beside(path: Path) -> tuple[list[str] | None, dict[str, Any] | None]:
    """The same from a JSON file beside the weights."""
    file = file_beside(path)
    if file is None:
        return None, None
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{file}, the configuration beside the weights, is no JSON; correct or move it") from None
    content = _of_type(content, dict) or {}
    return _names_of(content.get("state_dict_keys")), _of_type(content.get("config", content), dict)


def file_beside(path: str | Path) -> Path | None:
    """The JSON file beside weights on disk with the model's configuration, if there is one."""
    path = Path(path)
    names = [path.with_suffix(".json"), *([path.with_name("config.json")] if path.stem in HUB_STEMS else [])]
    return next((name for name in names if name.is_file()), None)


def _names_of(value: Any) -> list[str] | None:
    """A list of names, or None if the value is anything else."""
    return value if isinstance(value, list) and all(isinstance(name, str) for name in value) else None


def _of_type(value: Any, kind: type) -> Any:
    return value if isinstance(value, kind) else None


def choose_weights(content: Any, source: str) -> Checkpoint:
    """The state dict in the content of a checkpoint: averaged weights, else the model's, else all of it.

    Raises:
        UserError: no mapping of names to tensors, or several with names that do not say which is the model's.
    """
    discriminator = _tensors_of(content.get("discriminator")) if isinstance(content, Mapping) else None
    try:
        found = _find(content, source, {})
    except RecursionError:  # thousands of mappings in each other
        found = None
    if found is None:
        raise UserError(
            f"{source} holds no state dict; expected tensors by name, or such a mapping as 'ema' or 'model'"
        )
    parts, weights = found
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{source}: {name!r} is a {type(value).__name__}, expected tensors by name")
    part = " of ".join(reversed(parts)) or "flat state dict"
    return Checkpoint(_bare_names(weights), part, discriminator=discriminator, source=source)


def _find(content: Any, source: str, seen: dict[int, Any]) -> tuple[list[str], Mapping[Any, Any]] | None:
    """The keys that lead to the model's state dict, outermost first, and what is there; None if there is none.

    Args:
        content: a checkpoint or a part of it.
        source: named in the error.
        seen: what was found in parts by their ``id``: one may hold itself, or be there many times.
    """
    if not isinstance(content, Mapping) or id(content) in seen:
        return seen.get(id(content))
    seen[id(content)] = None
    inside = {
        key: found
        for key, value in content.items()
        if isinstance(key, str) and not OTHERS.search(key) and (found := _find(value, source, seen))
    }
    averaged = [key for key in inside if "ema" in re.split("[^a-z]+", key.lower())]
    ranked = [key for key in (WRAPPERS[0], *averaged, *WRAPPERS[1:]) if key in inside]
    if not ranked and any(isinstance(value, Tensor) for value in content.values()):
        seen[id(content)] = [], content
    elif ranked or len(inside) == 1:
        key = next(iter(ranked or inside))
        seen[id(content)] = [key, *inside[key][0]], inside[key][1]
    elif inside:
        raise UserError(
            f"{source} holds several state dicts: {', '.join(sorted(inside)[:5])}; save the model's as 'model'"
        )
    return seen[id(content)]


def _tensors_of(content: Any) -> dict[str, Tensor] | None:
    """Tensors by name, or None if the content is anything else."""
    if not isinstance(content, Mapping) or not content:
        return None
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        return None
    return _bare_names(content)


def _bare_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers of the model put before all of them, in any order of wrapping."""
    while prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in weights)), None):
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return dict(weights)


def write_checkpoint(path: str | Path, weights: dict[str, Tensor], once: bool = False) -> Path:
    """Write a safetensors file, whole or not at all; with ``once``, a file that is there already must hold the same.

    Raises:
        UserError: another suffix, or the file cannot be written, or holds something else.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"out={path} must end in .safetensors; torch.save its load_file() where a .pt is needed")
    with atomic_file(path, once=once) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)
    return path


# The restricted unpickler


class _Stub:
    """In place of an object of a class, or the result of a function, that a pickle names; neither is called."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Stub":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Ignore the items of a list; pickle calls this for lists of ruamel's own class in saved arguments."""

    extend = append


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """As ``torch._utils._rebuild_tensor_v2``, without gradients and hooks."""
    empty = torch.empty(0, dtype=storage.dtype)
    return empty.set_(storage._untyped_storage, offset, size, stride)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


class _Function:
    """A function that a pickle can call but not change; of a plain one, the opcode BUILD sets the attributes."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it sets {name} of a function")


ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_parameter),
    ("torch", "Size"): tuple,
}


class _Unpickler(pickle.Unpickler):
    """Loads tensors and plain containers; every other name becomes a stub, so nothing in the file is ever called."""

    def find_class(self, module: str, name: str) -> Any:
        """The allowed object of that name, else a stub. torch resolves storage types itself."""
        return ALLOWED.get((module, name), _Stub)

    def __setattr__(self, name: str, value: Any) -> None:
        """Restrict the ``persistent_load`` that torch sets: for "module", it would compare and write source files."""
        if name == "persistent_load":
            load = value

            def value(key: Any) -> Any:
                if not (isinstance(key, tuple) and key and key[0] in ("storage", b"storage")):
                    raise pickle.UnpicklingError("it refers to something other than the storage of a tensor")
                return load(key)

        super().__setattr__(name, value)


def _load(file: Any, **options: Any) -> Any:
    """As ``pickle.load``, which torch calls for old files, with the same restrictions."""
    return _Unpickler(file, **options).load()
