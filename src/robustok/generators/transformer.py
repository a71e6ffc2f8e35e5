"""What the token transformers share: attention, the static key-value cache, rotary positions, small parts, sampling.

Letters beside those of ``robustok.types``: T positions of a sequence, W width of the transformer.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustok.generators.sampling import Sampling, check_labels, check_preservation, per_image, token_chooser
from robustok.types import UserError

LAYER_NORM_EPSILON = 1e-6
COLUMN_ROWS = 8  # rows from which on `project` pays


class KeyValueCache:
    """Keys and values of one attention layer during sampling, in memory that is allocated once.

    Growing by concatenation would copy the whole past at every step: quadratic traffic for nothing.

    Args:
        capacity: the most positions it will hold.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store the keys and values (N, heads, T, head width) of new positions.

        Returns:
            Keys and values of all positions so far as views, and no mask: the new one sees them all.
        """
        self._allocate(keys)
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end], None

    def _allocate(self, keys: Tensor) -> bool:
        """Take memory for keys like these (autocast decides their dtype) unless it is there; True if it was not."""
        count, heads, _, head_width = keys.shape
        shape = (count, heads, self.capacity, head_width)
        wanted = (shape, keys.dtype, keys.device)
        if self.keys is not None and (self.keys.shape, self.keys.dtype, self.keys.device) == wanted:
            return False
        self.keys = keys.new_zeros(shape)
        self.values = torch.zeros_like(self.keys)
        return True


class StaticCache(KeyValueCache):
    """The same for a compiled step, whose shapes and addresses must not change: it counts in a tensor and is kept.

    It costs attention to the places that are still empty. The first step of a sample must run uncompiled, because it
    takes the memory.
    """

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store the keys and values (N, heads, 1, head width) of one new position.

        Returns:
            Keys and values of all places, and a mask (1, capacity) of those that are filled.
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
        """Forget all positions, in the same memory."""
        if self.keys is not None:
            for memory in (self.keys, self.values, self.position):
                memory.zero_()  # the values too: a NaN would come through the mask


class Attention(nn.Module):
    """Causal self-attention with a layer norm on the queries and keys of each head.

    Args:
        width: W.
        heads: number of heads; divides ``width``.
        dropout: probability for the attention weights and after the projection.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads, eps=LAYER_NORM_EPSILON)
        self.k_norm = nn.LayerNorm(width // heads, eps=LAYER_NORM_EPSILON)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Attend from every position of ``x`` (N, T, W) to itself and those before it.

        With a cache, ``x`` is one new position (T = 1) that attends to itself and to all the cache holds.
        """
        count, positions, width = x.shape
        qkv = project(self.qkv, x).view(count, positions, 3, self.heads, width // self.heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, head width)
        # Autocast runs layer norms in float32; back to one dtype for the cache and for the attention kernel.
        queries = self.q_norm(queries).to(values.dtype)
        keys = self.k_norm(keys).to(values.dtype)
        mask = None
        if cache is not None:
            keys, values, mask = cache.append(keys, values)
        dropout = self.dropout if self.training else 0.0
        # is_causal instead of a mask, so that the fused kernels apply. The one query of a cached step sees all.
        x = F.scaled_dot_product_attention(queries, keys, values, mask, dropout, is_causal=cache is None)
        x = project(self.proj, x.transpose(1, 2).reshape(count, positions, width))  # (N, T, W)
        return F.dropout(x, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them; dropout after each."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, W) to (N, T, W)."""
        x = F.dropout(F.gelu(project(self.fc1, x)), self.dropout, self.training)  # (N, T, hidden)
        return F.dropout(project(self.fc2, x), self.dropout, self.training)  # (N, T, W)


def project(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)`` for ``x`` (N, T, in), the fast way where a CPU samples: one new position of several images.

    ``nn.Linear`` asks the BLAS for ``x @ W.T``, which makes it rearrange the weights at every call. ``W @ x.T`` takes
    them as they lie, without a copy that could go stale. In float32 at width 768 that saves 15 % of the time at 8 rows,
    30 % at 12, 11 % at 16 and 6 % at 128, and costs time below ``COLUMN_ROWS``.
    """
    count, positions, _ = x.shape
    if x.device.type != "cpu" or positions > 1 or count < COLUMN_ROWS:
        return layer(x)
    columns = x[:, 0].t()  # (in, N)
    if layer.bias is None:
        return torch.mm(layer.weight, columns).t()[:, None]  # (N, 1, out)
    return torch.addmm(layer.bias[:, None], layer.weight, columns).t()[:, None]  # (N, 1, out)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm: what a condition does to a normalised ``x``."""
    return x * (1 + scale) + shift


def initialise(module: nn.Module) -> None:
    """For ``Module.apply``: linear and embedding weights from a (truncated) normal of deviation 0.02, biases zero."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def rotary_table(length: int, head_width: int, base: float) -> Tensor:
    """Cosines and sines for one position of the class and a square grid of tokens.

    The first half of a head's pairs turns by the row, the second by the column. The class has zeros for both, as in the
    release: its queries and keys vanish.

    Returns:
        (2, 1 + L, head width / 2) float32.

    Raises:
        UserError: the tokens form no square.
    """
    side = math.isqrt(length)
    if side**2 != length:
        raise UserError(f"rotary positions need a square grid, got {length} tokens per image; set positions=learned")
    half = head_width // 2
    angles = torch.outer(torch.arange(side), base ** (-torch.arange(0, half, 2) / half))  # (side, half / 2)
    rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (L, half)
    return F.pad(torch.stack([grid.cos(), grid.sin()]), (0, 0, 1, 0))  # (2, 1 + L, half)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring pairs of ``x`` (..., T, D) by angles whose cosines and sines are (2, T, D / 2)."""
    cosines, sines = rotation
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # each (..., T, D / 2)
    return torch.stack([even * cosines - odd * sines, odd * cosines + even * sines], dim=-1).flatten(-2)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the mode before afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class TokenGenerator(nn.Module):
    """What generators of tokens in raster order share: sampling, and mixing with the tokens of real images.

    Attributes:
        codebook_size: K.
        length: L, tokens per image.
        classes: number of classes.
    """

    codebook_size: int
    length: int
    classes: int
    _compiled: Callable[..., Tensor] | None = None
    _static_caches: list[StaticCache] | None = None

    def compile_sampling(self) -> None:
        """Compile the step of sampling from now on, on CUDA into a CUDA graph; no gain on a CPU.

        The first batch of a size takes longer for it, and the key-value cache of the last batch stays in memory. The
        weights may change afterwards: nothing of them is kept.

        Raises:
            UserError: the model is on a CPU and there is no C++ compiler.
        """
        compiler = os.environ.get("CXX", "g++")
        if next(self.parameters()).device.type == "cpu" and shutil.which(compiler) is None:
            raise UserError(
                f"compile=true needs a C++ compiler and {compiler} is none; install g++ or set compile=false"
            )
        self._compiled = torch.compile(self._transform, mode="reduce-overhead", dynamic=False)

    def _caches(self, layers: int, capacity: int) -> list[KeyValueCache]:
        """Empty caches of a sample: new ones, or always the same ones for a compiled step."""
        if self._compiled is None:
            return [KeyValueCache(capacity) for _ in range(layers)]
        if self._static_caches is None:
            self._static_caches = [StaticCache(capacity) for _ in range(layers)]
        for cache in self._static_caches:
            cache.restart()
        return self._static_caches

    def _transform(self, *inputs: Any) -> Tensor:
        """Inputs (N, T, W) and what goes with them through the blocks and the head to logits (N, T, K)."""
        raise NotImplementedError

    def _step(self, position: int, *inputs: Any) -> Tensor:
        """``_transform`` of one position, compiled if asked for: not the first one, which takes the caches' memory."""
        return (self._compiled if self._compiled and position else self._transform)(*inputs)

    # Not inference_mode: its tensors could not be trained on afterwards.
    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,
        sampling: Sampling,
        rng: torch.Generator | Sequence[torch.Generator],
        reference: Tensor | None = None,
        preservation: float | None = None,
    ) -> Tensor:
        """Sample tokens in raster order, or mix them with the tokens of real images.

        For a mixture, each position keeps its real token with probability ``preservation``, drawn once per image before
        everything else. The mixture is what the model sees as context, so sampled tokens fit the kept ones.

        Args:
            labels: (N,) int64; ``null_label`` samples without a class.
            sampling: guidance, temperature, top_k, top_p.
            rng: one CPU generator per image (:func:`robustok.generators.sampling.image_rngs`), or one that seeds them.
            reference: tokens (N, L) int64 of real images.
            preservation: sigma in [0, 1]; 1 returns the reference, 0 or None ignores it.

        Returns:
            Tokens (N, L) int64 on the model's device.

        Raises:
            UserError: labels, reference, preservation or the number of generators do not fit.
        """
        check_labels(labels, self.classes)
        check_preservation(preservation, reference, (len(labels), self.length), self.codebook_size)
        device, rngs = next(self.parameters()).device, per_image(rng, len(labels))
        choose = token_chooser(sampling, rngs, self.length, reference, preservation, device)
        if reference is not None and preservation == 1:
            return reference.to(device, copy=True)
        with evaluating(self):
            return self._sample(labels.to(device), sampling, choose)

    def _sample(self, labels: Tensor, sampling: Sampling, choose: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Run the sequence with a cache; ``choose(step, guided logits (N, K))`` gives each token (N,)."""
        raise NotImplementedError
