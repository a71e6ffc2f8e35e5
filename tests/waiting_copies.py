"""Counts what makes a host wait for its device on the CPU, where PyTorch's meta device is in place of a GPU."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Copies(TorchDispatchMode):
    """Counts copies from the CPU to the device that make the host wait, by shape."""

    def __init__(self):
        super().__init__()
        self.waiting = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        copy = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        waits = copy and result.is_meta and not (kwargs.get("non_blocking") or args[2:] == (True,))
        if waits and any(isinstance(x, torch.Tensor) and not x.is_meta for x in args):
            self.waiting[tuple(result.shape)] += 1
        return result
