"""The tokenizer of RobusTok, the paper (arXiv 2509.12474), and the discriminator in its training checkpoints."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robustok.config import validate
from robustok.errors import UserError
from robustok.pretrained.family import CODEBOOK, Family
from robustok.pretrained.shapes import depth_of, flatten_config, merge_settings, ratio_of, shape_of
from robustok.tokenizers.robustok import RobusTok, RobusTokConfig

CONFIG_NAMES = {  # the authors', ours
    "num_heads": "heads",
    "img_size": "image_size",
    "codebook_embed_dim": "codebook_dim",
    "codebook_l2_norm": "normalize",
    "commit_loss_beta": "commitment_weight",
    "drop_path_rate": "drop_path",
    "embed_dim": "width",
    "num_latent_tokens": "latents",
}
PREFIXES = {  # ours, the authors'
    "encoder.backbone.": "encoder.model.",
    "encoder.level_embed.": "encoder.lvl_embed.",
    "to_latent.": "quant_conv.",
    "quantizer.": "quantize.",
    "from_latent.": "post_quant_conv.",
    "decoder.backbone.": "decoder.model.",
    "decoder.level_embed.": "decoder.lvl_embed.",
    "decoder.to_pixels.": "decoder.to_pixel.model.",
}


def build(weights: Mapping[str, Tensor], config: dict[str, Any]) -> RobusTok:
    """See :class:`robustok.pretrained.family.Family`.

    ``num_heads`` is in no shape, but known for the published width of 768.

    Raises:
        UserError: the configuration is incomplete, contradicts the tensors, or names a variant that is not supported.
    """
    positions = shape_of(weights, "encoder.model.pos_embed", 3)[1]
    patch = shape_of(weights, "encoder.model.patch_embed.proj.weight", 4)[-1]
    encoder, decoder = (_vit(weights, side, config) for side in ("encoder", "decoder"))
    measured = {key: encoder[key] for key in ("width", "depth", "mlp_ratio")} | {
        "image_size": round((positions - 1) ** 0.5) * patch,
        "patch_size": patch,
        "latents": shape_of(weights, "encoder.latent_tokens", 3)[1],
        "codebook_size": shape_of(weights, CODEBOOK, 2)[0],
        "codebook_dim": shape_of(weights, "quant_conv.weight", 4)[0],
        # Variants of the authors' code that this library does not have.
        "product_quant": 1,
        "lfq": False,
        "abs_pos_embed": True,
    }
    paper = {"heads": 12} if measured["width"] == 768 else {}
    settings = merge_settings(
        measured, config, CONFIG_NAMES, **paper, normalize=True, commitment_weight=0.25, drop_path=0.1
    )
    if "heads" not in settings:
        raise UserError(f"config lacks num_heads, which a width of {measured['width']} does not determine; give it")
    shared = {key: settings[key] for key in ("heads", "drop_path")}
    quantizer = {"size": measured["codebook_size"], "dim": measured["codebook_dim"]}
    quantizer |= {key: settings[key] for key in ("normalize", "commitment_weight")}
    # All published models have as many latents as patches; check_all refuses others.
    fields = {key: measured[key] for key in ("image_size", "patch_size")}
    fields |= {"encoder": encoder | shared, "decoder": decoder | shared, "quantizer": quantizer}
    return RobusTok(validate(RobusTokConfig, fields, source="config"))


def _vit(weights: Mapping[str, Tensor], side: str, config: dict[str, Any]) -> dict[str, Any]:
    width = shape_of(weights, f"{side}.model.cls_token", 3)[-1]
    return {
        "width": width,
        "depth": depth_of(weights, f"{side}.model.blocks."),
        "mlp_ratio": ratio_of(weights, f"{side}.model.blocks.0.mlp.fc1.bias", width, config.get("mlp_ratio")),
        "layer_scale": 1e-5 if f"{side}.model.blocks.0.ls1.gamma" in weights else None,
    }


def export_name(name: str) -> str:
    """The authors' name of our weight."""
    for own, theirs in PREFIXES.items():
        if name.startswith(own):
            return theirs + name.removeprefix(own)
    return name


def complete(model: RobusTok, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the authors' buffers and give their 1x1 convolutions their shape.

    ``quantize.ema_vocab_hit_SV``, a statistic that only training reports, is all zeros.

    Raises:
        UserError: a model with parts that the authors' layout does not have.
    """
    additions = sorted(name for name in weights if "latent_positions" in name or name.startswith("from_teacher"))
    if additions:
        raise UserError(f"the layout of the authors has no place for {additions[0]}; train without it to export")
    for name in ("quant_conv.weight", "post_quant_conv.weight"):
        weights[name] = weights[name][:, :, None, None]  # (out, in, 1, 1)
    patches, latents = model.config.patches, model.config.length
    # Which half of its sequence a position belongs to; in the decoder the class token is in both.
    weights["encoder.lvl1LC"] = torch.tensor([[0] * (1 + patches) + [1] * latents])  # (1, 1 + P + L)
    weights["decoder.lvl1LC"] = torch.tensor([[0] * (1 + patches) + [1] * (1 + latents)])  # (1, 2 + P + L)
    weights["quantize.ema_vocab_hit_SV"] = torch.zeros(model.config.quantizer.size)
    return weights


DISCRIMINATOR_NAMES = {  # the authors', ours
    "embed_dim": "width",
    "num_heads": "heads",
    "key_depths": "read_after",
    "input_size": "image_size",
    **{key: key for key in ("depth", "patch_size", "mlp_ratio", "gelu")},
}
FIXED = {"norm_type": "bn", "spectral_norm": True, "norm_eps": 1e-6}  # the variant that this library has


def discriminator_settings(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the ``dino`` discriminator whose heads are in a training checkpoint, under ``discriminator``.

    Args:
        weights: of the heads, ``heads.0.0.0.weight_orig`` and so on.
        config: settings that are in no shape, under the authors' names or ours; the backbone defaults to ViT-S/16.

    Raises:
        UserError: a tensor is missing, or the configuration contradicts the tensors.
    """
    measured = FIXED | {
        "width": shape_of(weights, "heads.0.0.0.weight_orig", 3)[0],
        "kernel_size": shape_of(weights, "heads.0.1.fn.0.weight_orig", 3)[-1],
    }
    settings = merge_settings(measured, dict(flatten_config(config)), DISCRIMINATOR_NAMES)
    return {key: value for key, value in settings.items() if key not in FIXED}


FAMILY = Family(
    kind="tokenizer",
    model=RobusTok,
    build=build,
    has=("encoder.latent_tokens", CODEBOOK),
    lacks=("encoder.latent_pos_embed",),
    export_name=export_name,
    complete=complete,
    dropped=("semantic_model.",),  # the frozen teacher, which encoding and decoding do not use
    discriminator=discriminator_settings,
    read_under=("model", "ema"),
)
