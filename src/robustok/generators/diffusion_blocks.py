"""Parts of diffusion transformers: time embedding, attention, MLPs, modulated blocks and head.

Parameters have the names of the authors' code. Letters beside those of ``robustok.types``: W width.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from robustok.generators.tokens import modulate

NORM_EPSILON = 1e-6
TIME_FEATURES = 256


class TimeEmbedder(nn.Module):
    """Times in [0, 1], unscaled, as 128 cosines and 128 sines through an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times: Tensor) -> Tensor:
        """(N,) to (N, W)."""
        half = TIME_FEATURES // 2
        # float32, as in the authors' code
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=times.device) / half)
        angles = times[:, None] * frequencies.to(times.dtype)  # (N, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Attention(nn.Module):
    """Self-attention over all latents, with optional norms and rotation of queries and keys.

    Args:
        width: W.
        heads: number of heads.
        norm: makes the norm of a head's queries or keys from its width; None is no norm.
    """

    def __init__(self, width: int, heads: int, norm: Callable[[int], nn.Module] | None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm, self.k_norm = (norm(width // heads) if norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, rotate: Callable[[Tensor], Tensor]) -> Tensor:
        """(N, L, W) to (N, L, W); ``rotate`` adds positions to queries and keys (N, heads, L, head width)."""
        count, length, width = x.shape
        qkv = self.qkv(x).view(count, length, 3, self.heads, width // self.heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, L, head width)
        # Autocast runs norms and rotation in float32; the attention kernel wants one dtype.
        queries = rotate(self.q_norm(queries)).to(values.dtype)
        keys = rotate(self.k_norm(keys)).to(values.dtype)
        x = F.scaled_dot_product_attention(queries, keys, values)  # (N, heads, L, head width)
        return self.proj(x.transpose(1, 2).reshape(count, length, width))


MLP = partial(Mlp, act_layer=partial(nn.GELU, approximate="tanh"))
"""Two linear layers with a GELU between them, approximated by a hyperbolic tangent; of width and hidden width."""


class SwiGLU(nn.Module):
    """Gated MLP (arXiv 2002.05202); ``w12`` packs the gate, then the value."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, W) to (N, L, W)."""
        gate, value = self.w12(x).chunk(2, dim=-1)  # each (N, L, hidden)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """A transformer block whose branches are scaled, gated and, unless ``shift`` is off, shifted by the condition."""

    def __init__(
        self, attention: Attention, mlp: nn.Module, norm: Callable[[int], nn.Module], width: int, shift: bool = True
    ) -> None:
        super().__init__()
        self.shift = shift
        self.norm1 = norm(width)
        self.attn = attention
        self.norm2 = norm(width)
        self.mlp = mlp
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (6 if shift else 4) * width))

    def forward(self, x: Tensor, condition: Tensor, rotate: Callable[[Tensor], Tensor]) -> Tensor:
        """``x`` (N, L, W) and ``condition`` (N, 1, W)."""
        parts = self.adaLN_modulation(condition).chunk(6 if self.shift else 4, dim=-1)  # each (N, 1, W)
        if not self.shift:
            parts = (torch.zeros_like(parts[0]), *parts[:2], torch.zeros_like(parts[0]), *parts[2:])
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), rotate)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Modulated norm and head."""

    def __init__(self, width: int, channels: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm_final = norm(width)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``x`` (N, L, W) and ``condition`` (N, 1, W) to (N, L, channels)."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)  # each (N, 1, W)
        return self.linear(modulate(self.norm_final(x), shift, scale))
