"""LightningDiT, the generator of VA-VAE's latents (arXiv 2501.01423)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from robustok.errors import UserError
from robustok.generators.flow import DiffusionSampling
from robustok.generators.lightningdit import LightningDiT, LightningDiTConfig
from robustok.pretrained.families import diffusion_transformer
from robustok.pretrained.family import Family
from robustok.pretrained.shapes import merge_settings, shape_of

CONFIG_NAMES = diffusion_transformer.CONFIG_NAMES | {  # the authors', ours
    "use_qknorm": "qk_norm",
    "use_swiglu": "swiglu",
    "use_rope": "rope",
    "use_rmsnorm": "rms_norm",
    "wo_shift": "unshifted",
    "mean": "latent_mean",
    "std": "latent_std",
}
PUBLISHED = DiffusionSampling(
    steps=249, guidance_scale=6.7, guidance_interval=(0.125, 1.0), guided_channels=3, timestep_shift=0.3
)


def build(weights: Mapping[str, Tensor], config: dict[str, Any]) -> LightningDiT:
    """See :class:`robustok.pretrained.family.Family`. The tensors determine the variant.

    The latent statistics are in a file of their own (``latents_stats.pt`` with ``mean`` and ``std``); without them the
    model predicts velocities but does not sample. An XL model gets the guidance scale of 800 epochs, 6.7; for the
    one of 64 epochs it is 10.

    Raises:
        UserError: the configuration contradicts the tensors; a fixed table differs; patches larger than 1.
    """
    width, channels, patch, _ = shape_of(weights, "x_embedder.proj.weight", 4)
    if patch != 1:
        raise UserError(f"x_embedder.proj has patches of {patch}; robustok has LightningDiT with patches of 1 only")
    length = shape_of(weights, "pos_embed", 3)[1]
    swiglu, rope = "blocks.0.mlp.w12.weight" in weights, "feat_rope.freqs_cos" in weights
    measured = diffusion_transformer.sizes(weights, channels) | {
        "mlp_width": shape_of(weights, "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight", 2)[1],
        "input_size": round(length**0.5),
        "swiglu": swiglu,
        "rope": rope,
        "rms_norm": "blocks.0.norm1.weight" in weights,
        "unshifted": shape_of(weights, "blocks.0.adaLN_modulation.1.weight", 2)[0] == 4 * width,
    }
    if rope:
        measured["heads"] = width // shape_of(weights, "feat_rope.freqs_cos", 2)[1]
    settings = merge_settings(measured, config, CONFIG_NAMES) | {"shift": not measured["unshifted"]}
    return diffusion_transformer.build_transformer(
        LightningDiT, LightningDiTConfig, weights, settings, (length, channels), PUBLISHED
    )


def complete(model: LightningDiT, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors embed patches of one latent by a 1x1 convolution."""
    weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"][:, :, None, None]  # (W, D, 1, 1)
    return weights


FAMILY = Family(
    kind="generator",
    model=LightningDiT,
    build=build,
    has=("x_embedder.proj.weight", "t_embedder.mlp.0.weight"),
    export_name=lambda name: name.replace("x_embedder.", "x_embedder.proj.", 1),
    complete=complete,
)
