"""SiT, the diffusion transformer that MAETok is published with, for latents without a grid.

Sources: Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers"
(arXiv 2401.08740); Chen et al., "Masked Autoencoders Are Effective Tokenizers for Diffusion Models" (arXiv 2502.03444).
Time runs from 1 (noise) to 0 (data).
"""

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from robustok.generators.diffusion_blocks import MLP, NORM_EPSILON
from robustok.generators.diffusion_transformer import (
    DiffusionTransformer,
    DiffusionTransformerConfig,
)


class SiTConfig(DiffusionTransformerConfig):
    """A SiT. The default size is SiT-XL."""

    name: Literal["sit"] = "sit"


class SiT(DiffusionTransformer):
    """Velocity of a sequence of latents, for MAETok and other tokenizers without a grid."""

    noise_time = 1.0
    licence = "Apache-2.0 by the card of the weights; the code was released without a licence"

    def _assemble(self) -> None:
        width = self.config.width
        self.register_buffer("pos_embed", position_table(self.latent_shape[0], width))
        norm = partial(nn.LayerNorm, eps=NORM_EPSILON, elementwise_affine=False)
        self._stack(norm, nn.LayerNorm, MLP, self.config.mlp_width or 4 * width)


def position_table(length: int, width: int) -> Tensor:
    """Fixed positions (1, L, W): sine and cosine of each frequency side by side."""
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))  # (W / 2,)
    angles = torch.arange(length)[:, None] * frequencies  # (L, W / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[None, :, :width]
