"""What a training step keeps for its backward pass, counted on fake tensors: they have a shape and take no memory.

Counted and not derived: every storage that autograd saves in a forward pass, weights aside. So it holds for any model,
with fused attention as GPUs have it. Masks of dropout come on top (a byte for each of their numbers); so do the
gradients on their way back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from robustok.training.prepared import blocks_of

SAMPLES = 97  # a prime: what has a multiple of that many numbers is of the samples, the rest are weights in bf16


@dataclass(frozen=True)
class Activations:
    """Bytes kept for the backward pass.

    Attributes:
        sample: for every sample.
        checkpointed: the same if the model's blocks keep their inputs alone; with what one block keeps at a time.
        fixed: whatever the number of samples: weights in the autocast dtype, for the most part.
    """

    sample: int
    checkpointed: int
    fixed: int


def count_activations(
    build: Callable[[], nn.Module], forward: Callable[[nn.Module, int], Any], precision: str
) -> Activations:
    """Count what a forward pass keeps.

    Args:
        build: makes the model.
        forward: runs the model on this many samples.
        precision: "bf16" for autocast, else "float32".
    """
    with torch.device("meta"):
        model = build().eval()  # attention with dropout is fused on GPUs, not here
    storages: dict[int, Any] = {}  # those that are kept; holding them, so that no address is used twice
    inside: dict[int, list[int]] = {}  # block to those kept inside it
    current: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in storages:
            storages[storage._cdata] = storage
            if current:
                inside.setdefault(current[-1], []).append(storage._cdata)
        return tensor

    def counted(call: Callable[..., Any], block: int, *inputs: Any) -> Any:
        for x in inputs:
            if isinstance(x, Tensor):
                note(x)  # before the block: kept in any case
        current.append(block)
        output = call(*inputs)
        current.pop()
        return output

    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        for i, block in enumerate(blocks_of(model)):
            block.forward = partial(counted, block.forward, i)
        with saved_tensors_hooks(note, lambda x: x), torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
            forward(model, SAMPLES)
    sizes = {key: storage.nbytes() for key, storage in storages.items()}
    of_samples = {key: size for key, size in sizes.items() if size % SAMPLES == 0}
    blocks = [sum(of_samples.get(key, 0) for key in kept) for kept in inside.values()]
    total = sum(of_samples.values())
    return Activations(
        sample=total // SAMPLES,
        checkpointed=(total - sum(blocks) + max(blocks, default=0)) // SAMPLES,
        fixed=sum(sizes.values()) - total,
    )
