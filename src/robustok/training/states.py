"""States for resume: trees of tensors and scalars, gathered from the processes that share them, ready for disk."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def pack(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a tree of dicts, lists and scalars into ``tensors``; return the rest, ready for JSON."""
    if isinstance(tree, Tensor):
        # a clone: safetensors refuses tensors that share memory, as tied or sliced weights do
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return {"__tensor__": name}
    if isinstance(tree, Mapping):
        return {"__dict__": [[key, pack(value, f"{name}/{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return [pack(value, f"{name}/{i}", tensors) for i, value in enumerate(tree)]
    return tree


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo :func:`pack`."""
    if isinstance(tree, list):
        return [unpack(value, tensors) for value in tree]
    if isinstance(tree, dict) and "__tensor__" in tree:
        return tensors[tree["__tensor__"]]
    if isinstance(tree, dict) and "__dict__" in tree:
        return {key: unpack(value, tensors) for key, value in tree["__dict__"]}
    return tree


def whole(tree: Any, keep: bool = True) -> Any:
    """The tree with its shards gathered from all processes, all of which must call this.

    Args:
        tree: dicts, lists, tensors and scalars, as a ``state_dict`` has them.
        keep: whether this process needs the result; others help to gather and forget it, tensor by tensor.
    """
    if isinstance(tree, DTensor):
        full = tree.detach().full_tensor()
        return full.cpu() if keep else None
    if isinstance(tree, Mapping):
        return {key: whole(value, keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [whole(value, keep) for value in tree]
    return tree


def load_module(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole weights into a module whose parameters may be shards."""
    own = module.state_dict()
    module.load_state_dict({name: _shard_like(own.get(name), value) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a whole state into an optimiser whose parameters may be shards."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {name: _shard_like(parameters[index], value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})


def _shard_like(reference: Tensor | None, value: Any) -> Any:
    """This process's shard of ``value`` if ``reference`` is one of the same tensor; scalars (steps) stay whole."""
    if isinstance(reference, DTensor) and isinstance(value, Tensor) and value.shape == reference.shape:
        return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)
    return value
