"""States for resume: trees of tensors and scalars, gathered from the processes that share them, ready for disk."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


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
