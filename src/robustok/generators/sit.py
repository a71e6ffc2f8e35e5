"""SiT, the diffusion transformer that MAETok is published with, for latents without a grid.

Sources: Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers"
(arXiv 2401.08740); Chen et al., "Masked Autoencoders Are Effective Tokenizers for Diffusion Models" (arXiv 2502.03444).
Time runs from 1 (noise) to 0 (data).
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustok.checkpoints import ratio_of, settle, shape_of
from robustok.generators.diffusion_blocks import MLP, NORM_EPSILON
from robustok.generators.diffusion_transformer import (
    DiffusionTransformer,
    DiffusionTransformerConfig,
    build_pretrained,
    check_tables,
    pretrained_facts,
)
from robustok.generators.flow import DiffusionSampling


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


# Pretrained checkpoints

NAMES = {
    "hidden_size": "width",
    "depth": "depth",
    "num_heads": "heads",
    "ffn_hidden_dim": "mlp_width",
    "mlp_ratio": "mlp_ratio",
    "class_dropout_prob": "label_dropout",
    "num_classes": "classes",
    "null_class": "null_label",
    "path_type": "path",
    "input_size": "input_size",
    "patch_size": "patch_size",
    "in_channels": "channels",
    "qk_norm": "qk_norm",
    "learn_sigma": "learn_sigma",
    "norm_eps": "norm_epsilon",
    "vae_1d": "sequence",
    "vq_mean": "latent_mean",
    "vq_std": "latent_std",
    "latent_multiplier": "latent_multiplier",
    "decoder_hidden_size": "decoder_width",
    "use_cfg": "use_cfg",
    "fused_attn": "fused_attn",
}
PUBLISHED = DiffusionSampling(sampler="euler_maruyama", steps=250, guidance_scale=1.9, guidance_interval=(0.0, 0.75))


def from_pretrained(weights: Mapping[str, Tensor], config: dict[str, Any]) -> SiT:
    """A SiT of the sizes that the tensors and the flat configuration tell, not yet with these weights.

    ``num_heads`` is in no tensor, but known for the published widths. The latent statistics are in the configuration
    of the tokenizer (``vq_mean``, ``vq_std``); without them the model predicts velocities but does not sample.

    Raises:
        UserError: the configuration contradicts the tensors, or is needed and silent; a fixed table differs.
    """
    width, channels = shape_of(weights, "x_embedder.weight", 2)
    length = shape_of(weights, "pos_embed", 3)[1]
    facts = pretrained_facts(weights, channels) | {
        "mlp_width": shape_of(weights, "blocks.0.mlp.fc1.weight", 2)[0],
        "mlp_ratio": ratio_of(weights, "blocks.0.mlp.fc1.bias", width, config.get("mlp_ratio")),
        "input_size": length,
        "sequence": True,
    }
    model = build_pretrained(SiT, SiTConfig, weights, settle(facts, config, NAMES), (length, channels))
    model.sampling = PUBLISHED if (width, facts["depth"]) == (1152, 28) else DiffusionSampling()
    check_tables(model, weights)
    return model
