"""A batch of images whose tokens are being sampled: all that a step reads and writes, and the draw of a token.

A compiled step needs shapes and addresses that do not change, and a GPU should not wait for the host. So the step
counts itself, on the device, and a compiled one samples the next batch in the memory of the last one.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from robustok.devices import to_device
from robustok.generators.key_value_cache import KeyValueCache, Window
from robustok.generators.sampling import Sampling, draw_tokens, guidance_scales, guide

CACHE_LENGTHS = 4  # that a compiled step chooses from; each is a graph of its own
MULTIPLE = 8  # of the lengths, as fused attention wants its masks


class TokenBatch:
    """Memory for N images, which are R rows of the transformer: with guidance 2N, the second half without a class.

    Args:
        count: N.
        length: L, tokens of an image.
        first: position of the sequence whose output is the first token.
        rows: R.
        heads: number and width of the heads of keys and values.
        depth: number of attention layers.
        dtype: of keys and values.
        device: of everything.
        static: for a compiled step: attention reads one of a few lengths of the cache, and masks what is not filled.

    Attributes:
        tokens: (N, L) int64, those sampled so far.
        uniforms: (N, L) float32 in [0, 1), one for each draw.
        kept: (N, L) int64, tokens of real images to keep; -1 where one is to be drawn.
        scales: (L,) float64, of the guidance.
        position: (1,) int64, the next position of the sequence.
        conditions: what the family computes from the labels once.
        ahead: what it has computed for some positions ahead.
        logits: None, or (N, L, K), where the guided logits are recorded.
    """

    def __init__(
        self, *, count: int, length: int, first: int, rows: int, heads: tuple[int, int], depth: int,
        dtype: torch.dtype, device: torch.device, static: bool,
    ) -> None:  # fmt: skip
        self.count, self.length, self.first, self.rows, self.static = count, length, first, rows, static
        self.dtype, self.device = dtype, device
        self.lengths = cache_lengths(first + length) if static else [first + length]
        shape = (rows, heads[0], self.lengths[-1], heads[1])
        self.caches = [KeyValueCache(shape, dtype, device) for _ in range(depth)]
        self.tokens, self.kept = (torch.zeros(count, length, dtype=torch.int64, device=device) for _ in range(2))
        self.uniforms = torch.zeros(count, length, device=device)
        self.scales = torch.zeros(length, dtype=torch.float64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.conditions: list[Tensor] = []
        self.ahead: list[Tensor] | None = None
        self.logits: Tensor | None = None
        self.sampling = Sampling()
        if static:
            caches = [memory for cache in self.caches for memory in (cache.keys, cache.values)]
            _fix(*caches, self.tokens, self.kept, self.uniforms, self.scales, self.position)

    def fits(self, other: dict) -> bool:
        """Whether this is memory for such a batch, or for a larger one."""
        found = (self.rows // max(1, self.count), self.dtype, self.device)
        wanted = (other["rows"] // max(1, other["count"]), other["dtype"], other["device"])
        return self.static and found == wanted and self.count >= other["count"]

    def start(self, sampling: Sampling, uniforms: Tensor, kept: Tensor) -> None:
        """Forget what was sampled; take new numbers (n, L) and kept tokens (n, L) of n <= N images."""
        self.sampling = sampling
        if self.static:
            for cache in self.caches:  # the values too: a NaN would pass through the mask
                cache.keys.zero_()
                cache.values.zero_()
        self.position.zero_()
        self.uniforms[: len(uniforms)] = uniforms
        self.kept[: len(kept)] = kept
        self.scales.copy_(to_device(guidance_scales(self.length, sampling), self.scales.device))

    def hold(self, conditions: Sequence[Tensor]) -> None:
        """Keep what the family computed from the labels, in the memory of the last batch if there is one."""
        if self.static and self.conditions:
            for memory, new in zip(self.conditions, conditions, strict=True):
                memory.copy_(new)
            return
        self.conditions = [c.clone() for c in conditions] if self.static else list(conditions)
        if self.static:
            _fix(*self.conditions)

    def end(self, position: int) -> int:
        """How much of the cache attention reads at a position."""
        return next(length for length in self.lengths if length > position) if self.static else position + 1

    def window(self, end: int) -> Window:
        """What attention reads at the present position."""
        filled = torch.arange(end, device=self.position.device)[None] <= self.position if self.static else None
        return Window(self.position, end, filled)  # (1, end)

    def previous(self) -> Tensor:
        """The last token of each row (R, 1)."""
        tokens = self.tokens.index_select(1, self.position - self.first - 1)  # (N, 1)
        return tokens.repeat(self.rows // max(1, self.count), 1)

    def draw(self, logits: Tensor) -> Tensor:
        """Guide the logits (R, K) of the present position, truncate, draw the next token of each image (N,), go on."""
        step = self.position - self.first
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # guidance amplifies rounding
        if self.sampling.guided:
            scale = self.scales.index_select(0, step).to(logits.dtype)
            logits = guide(logits[: self.count], logits[self.count :], scale)  # (N, K)
        if self.logits is not None:
            self.logits.index_copy_(1, step, logits[:, None])
        drawn = draw_tokens(logits, self.uniforms.index_select(1, step)[:, 0], self.sampling)
        kept = self.kept.index_select(1, step)[:, 0]
        drawn = torch.where(kept < 0, drawn, kept)
        self.tokens.index_copy_(1, step, drawn[:, None])
        self.position += 1
        return drawn


def cache_lengths(capacity: int) -> list[int]:
    """Lengths of a static cache up to at least ``capacity``, evenly spaced."""
    share = math.ceil(capacity / CACHE_LENGTHS / MULTIPLE) * MULTIPLE
    most = math.ceil(capacity / MULTIPLE) * MULTIPLE
    return [min(share * i, most) for i in range(1, math.ceil(most / share) + 1)]


def _fix(*memory: Tensor) -> None:
    """A CUDA graph then writes to this memory, and reads it, without a copy."""
    for tensor in memory:
        torch._dynamo.mark_static_address(tensor)
