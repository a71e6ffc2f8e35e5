"""MAETok's tokenizer (arXiv 2502.03444)."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from robustok.config import validate
from robustok.errors import UserError
from robustok.pretrained.family import Family
from robustok.pretrained.shapes import depth_of, merge_settings, shape_of
from robustok.tokenizers.maetok import MAETok, MAETokConfig

CONFIG_NAMES = {  # the authors', ours
    "base_image_size": "image_size",
    "enc_patch_size": "patch_size",
    "dec_patch_size": "patch_size",
    "num_latent_tokens": "latents",
    "codebook_embed_dim": "latent_dim",
    "embed_dim": "width",
    "num_heads": "heads",
    "rope_mixed": "rope_mixed",
    "rope_theta": "rotary_base",
    "dec_cls_token": "decoder_class_token",
    "enc_token_drop": "token_drop",
    "enc_token_drop_max": "token_drop_max",
    "vq_mean": "latent_mean",
    "vq_std": "latent_std",
}
DINOV2_HEADS = {384: 6, 768: 12, 1024: 16, 1536: 24}  # by width


def build(weights: Mapping[str, Tensor], config: dict[str, Any]) -> MAETok:
    """See :class:`robustok.pretrained.family.Family`.

    Without ``vq_mean`` and ``vq_std`` in the configuration :meth:`MAETok.normalise` changes nothing. It must give
    ``num_heads`` where a width is none of DINOv2's.

    Raises:
        UserError: the configuration contradicts the tensors, or names a variant that is not supported.
    """
    patch = shape_of(weights, "encoder.model.patch_embed.proj.weight", 4)[-1]
    grid = math.isqrt(shape_of(weights, "encoder.model.pos_embed", 3)[1] - 1)
    latent_dim, encoder_width = shape_of(weights, "quant_conv.weight", 2)
    widths = {"encoder": encoder_width, "decoder": shape_of(weights, "post_quant_conv.weight", 2)[0]}
    rotary = "decoder.freqs" in weights
    measured = {
        "image_size": grid * patch,
        "patch_size": patch,
        "latents": shape_of(weights, "encoder.latent_tokens", 3)[1],
        "latent_dim": latent_dim,
        "encoder_depth": depth_of(weights, "encoder.model.blocks."),
        "decoder_depth": depth_of(weights, "decoder.model.blocks."),
        "decoder_class_token": "decoder.model.cls_token" in weights,
        "use_rope": rotary,
        "use_ape": not rotary,
        "enc_type": "vit",
        "dec_type": "vit",
        "to_pixel": "linear",
    }
    if rotary:
        measured["rope_mixed"] = True  # the other variant, axial, fails in the authors' code
    if len(set(widths.values())) == 1:
        measured["width"] = encoder_width
    settings = merge_settings(measured, config, CONFIG_NAMES, latent_mean=0.0, latent_std=1.0, rotary_base=10.0)
    keys = ("image_size", "patch_size", "latents", "latent_dim", "decoder_class_token", "latent_mean", "latent_std")
    fields = {key: settings[key] for key in (*keys, "rotary_base")} | {
        "positions": "rotary" if rotary else "learned",
        "encoder_mask_token": "encoder.mask_token" in weights,
        "layer_scale": 1e-5 if "encoder.model.blocks.0.ls1.gamma" in weights else None,
    }
    for side, width in widths.items():
        heads = settings.get("heads") or DINOV2_HEADS.get(width)
        if heads is None:
            raise UserError(f"config lacks num_heads, which a width of {width} does not determine; give it")
        fields[side] = {"width": width, "depth": settings[f"{side}_depth"], "heads": heads}
    return MAETok(validate(MAETokConfig, fields, source="config"))


FAMILY = Family("tokenizer", MAETok, build, has=("encoder.latent_pos_embed",))
