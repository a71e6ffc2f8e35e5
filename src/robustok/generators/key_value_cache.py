"""The keys and values that attention has computed, kept while tokens are sampled one after another."""

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of one attention layer, in memory that is allocated once.

    Concatenation would copy all earlier positions at every step, which is quadratic traffic.

    Args:
        capacity: the largest number of positions it can hold.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store the keys and values (N, heads, T, head width) of new positions.

        Returns:
            Keys and values of all positions so far as views, and no mask: the new position attends to all of them.
        """
        self._allocate(keys)
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end], None

    def _allocate(self, keys: Tensor) -> bool:
        """Allocate memory for keys like these (autocast decides their dtype); False if it is allocated already."""
        count, heads, _, head_width = keys.shape
        shape = (count, heads, self.capacity, head_width)
        wanted = (shape, keys.dtype, keys.device)
        if self.keys is not None and (self.keys.shape, self.keys.dtype, self.keys.device) == wanted:
            return False
        self.keys = keys.new_zeros(shape)
        self.values = torch.zeros_like(self.keys)
        return True


class StaticCache(KeyValueCache):
    """A cache for a compiled step, whose shapes and addresses must not change: the position is a tensor.

    Attention then computes with the empty positions too and masks them. The first step of a sample must run
    uncompiled, because it allocates the memory.
    """

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store the keys and values (N, heads, 1, head width) of one new position.

        Returns:
            Keys and values of all positions, filled or not, and a mask (1, capacity) of the filled ones.
        """
        if self._allocate(keys):
            self.position = torch.zeros(1, dtype=torch.int64, device=keys.device)
            for memory in (self.keys, self.values, self.position):  # a CUDA graph then writes to it without a copy
                torch._dynamo.mark_static_address(memory)
        self.keys.index_copy_(2, self.position, keys)
        self.values.index_copy_(2, self.position, values)
        filled = torch.arange(self.capacity, device=keys.device)[None] <= self.position  # (1, capacity)
        self.position += 1
        return self.keys, self.values, filled

    def restart(self) -> None:
        """Clear all positions, in the same memory."""
        if self.keys is not None:
            for memory in (self.keys, self.values, self.position):
                memory.zero_()  # the values too: a NaN would pass through the mask
