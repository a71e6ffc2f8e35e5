"""LightningDiT, the diffusion transformer of VA-VAE, over latents on a square grid.

Source: Yao et al., "Reconstruction vs. Generation: Taming Optimization Dilemma in Latent Diffusion Models" (arXiv
2501.01423). Time runs from 0 (noise) to 1 (data).
"""

from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.errors import UserError
from robustok.generators.diffusion_blocks import MLP, NORM_EPSILON, SwiGLU
from robustok.generators.diffusion_transformer import (
    DiffusionTransformer,
    DiffusionTransformerConfig,
)


class LightningDiTConfig(DiffusionTransformerConfig):
    """A LightningDiT. The default size is XL; rope, rms_norm, swiglu and shift are on in all published models."""

    name: Literal["lightningdit"] = "lightningdit"
    noise_levels: Literal["uniform", "logit_normal"] = Field("logit_normal", description="distribution in training")
    rope: bool = Field(True, description="rotary positions beside the table")
    rms_norm: bool = Field(True, description="root-mean-square norms with weights instead of layer norms without")
    swiglu: bool = Field(True, description="gated MLP")
    shift: bool = Field(True, description="the condition shifts the branches too")


class RotaryTable(nn.Module):
    """Fixed cosines and sines (L, head width): half of a head rotates by the row, the other half by the column."""

    def __init__(self, side: int, head_width: int) -> None:
        super().__init__()
        frequencies = 1 / 10_000 ** (torch.arange(0, head_width // 2, 2).float() / (head_width // 2))
        angles = (torch.arange(side)[:, None] * frequencies).repeat_interleave(2, dim=1)  # (side, head width / 2)
        rows, columns = (angles[index] for index in _grid(side))  # each (L, head width / 2)
        angles = torch.cat([rows, columns], dim=1)  # (L, head width)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        """Rotate neighbouring pairs of (N, heads, L, head width)."""
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # each (N, heads, L, head width / 2)
        swapped = torch.stack([-odd, even], dim=-1).flatten(-2)
        return x * self.freqs_cos + swapped * self.freqs_sin


class LightningDiT(DiffusionTransformer):
    """Velocity of a square grid of latents, passed as a sequence (N, L, D) in raster order.

    Raises:
        UserError: L is no square number, or rotary positions with heads whose width does not divide by 4.
    """

    noise_time = 0.0
    licence = "MIT"

    def _assemble(self) -> None:
        config, length = self.config, self.latent_shape[0]
        self.side = round(length**0.5)
        if self.side**2 != length:
            raise UserError(f"lightningdit models a square grid, got {length} latents per image; sit takes any number")
        head_width = config.width // config.heads
        if config.rope and head_width % 4:
            raise UserError(f"a width of {config.width} gives {config.heads} heads of {head_width}, no multiple of 4")
        norm = partial(nn.LayerNorm, eps=NORM_EPSILON, elementwise_affine=False)
        head_norm = nn.LayerNorm
        if config.rms_norm:
            norm = head_norm = partial(nn.RMSNorm, eps=NORM_EPSILON)
        mlp, ratio = (SwiGLU, 8 / 3) if config.swiglu else (MLP, 4)
        self.register_buffer("pos_embed", grid_table(self.side, config.width))
        if config.rope:
            self.feat_rope = RotaryTable(self.side, head_width)
        self._stack(norm, head_norm, mlp, config.mlp_width or int(ratio * config.width), config.shift)

    def _rotate(self, x: Tensor) -> Tensor:
        return self.feat_rope(x) if self.config.rope else x

    def velocity(self, latents: Tensor, times: Tensor | float, labels: Tensor) -> Tensor:
        """As in :class:`DiffusionTransformer`; also takes the authors' layout (N, D, H, W), and then returns it."""
        if latents.ndim != 4:
            return super().velocity(latents, times, labels)
        if latents.shape[2:] != (self.side, self.side):
            raise UserError(f"got a grid of {tuple(latents.shape[2:])}; this lightningdit has {(self.side, self.side)}")
        velocity = super().velocity(latents.flatten(2).transpose(1, 2), times, labels)  # (N, L, D)
        return velocity.transpose(1, 2).unflatten(2, (self.side, self.side))  # (N, D, H, W)


def grid_table(side: int, width: int) -> Tensor:
    """Fixed positions (1, L, W): the first half of the width by the column, the second by the row; sines, cosines."""
    quarter = width // 4
    frequencies = 1 / 10_000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side)[:, None] * frequencies  # (side, W / 4)
    table = torch.cat([angles.sin(), angles.cos()], dim=1).float()  # (side, W / 2)
    rows, columns = _grid(side)
    return torch.cat([table[columns], table[rows]], dim=1)[None]  # (1, L, W)


def _grid(side: int) -> tuple[Tensor, Tensor]:
    """Row and column of each index in raster order, each (L,)."""
    indices = torch.arange(side**2)
    return indices // side, indices % side
