"""The keys and values that attention has computed, kept while tokens are sampled one after another."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """What the attention of a new position reads of a cache.

    Attributes:
        position: (1,) int64, index of the new position.
        end: positions that are read, filled or not.
        mask: (1, end) bool, whether a position is filled; None where all are, so that ``position`` is ``end - 1``.
    """

    position: Tensor
    end: int
    mask: Tensor | None = None


class KeyValueCache:
    """Keys and values of one attention layer, in memory that is allocated once.

    Concatenation would copy all earlier positions at every step, which is quadratic traffic.

    Args:
        shape: (R, heads, capacity, head width).
        dtype: of keys and values.
        device: where attention is computed.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    def append(self, keys: Tensor, values: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """Store the keys and values (R, heads, 1, head width) of a new position; returns those that it attends to."""
        for memory, new in ((self.keys, keys), (self.values, values)):
            if window.mask is None:
                memory[:, :, window.end - 1 : window.end] = new
            else:
                memory.index_copy_(2, window.position, new)
        return self.keys[:, :, : window.end], self.values[:, :, : window.end]
