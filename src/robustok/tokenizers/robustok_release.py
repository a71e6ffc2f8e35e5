"""The released layout of the paper's tokenizer: names, shapes, and what the shapes do not tell."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robustok.checkpoints import depth_of, ratio_of, settle, shape_of
from robustok.config import validate
from robustok.errors import UserError
from robustok.tokenizers.robustok import RobusTok, RobusTokConfig

DROPPED = ("semantic_model.",)  # the frozen teacher, which nothing that encodes or decodes uses
NAMES = {
    "num_heads": "heads",
    "img_size": "image_size",
    "patch_size": "patch_size",
    "codebook_size": "codebook_size",
    "codebook_embed_dim": "codebook_dim",
    "codebook_l2_norm": "normalize",
    "commit_loss_beta": "commitment_weight",
    "drop_path_rate": "drop_path",
    "embed_dim": "width",
    "depth": "depth",
    "mlp_ratio": "mlp_ratio",
    "num_latent_tokens": "latents",
    "product_quant": "product_quant",
    "lfq": "lfq",
    "abs_pos_embed": "abs_pos_embed",
}
PREFIXES = {  # ours: the release's
    "encoder.backbone.": "encoder.model.",
    "encoder.level_embed.": "encoder.lvl_embed.",
    "to_latent.": "quant_conv.",
    "quantizer.": "quantize.",
    "from_latent.": "post_quant_conv.",
    "decoder.backbone.": "decoder.model.",
    "decoder.level_embed.": "decoder.lvl_embed.",
    "decoder.to_pixels.": "decoder.to_pixel.model.",
}


def from_pretrained(weights: Mapping[str, Tensor], config: dict[str, Any]) -> RobusTok:
    """A tokenizer of the sizes that the tensors and the flat configuration tell, not yet with these weights.

    ``num_heads`` is in no tensor, but known for the published width of 768.

    Raises:
        UserError: the configuration is incomplete, contradicts the tensors, or names a variant that is not supported.
    """
    positions = shape_of(weights, "encoder.model.pos_embed", 3)[1]
    patch = shape_of(weights, "encoder.model.patch_embed.proj.weight", 4)[-1]
    width = shape_of(weights, "encoder.model.cls_token", 3)[-1]
    facts = {
        "image_size": round((positions - 1) ** 0.5) * patch,
        "patch_size": patch,
        "latents": shape_of(weights, "encoder.latent_tokens", 3)[1],
        "codebook_size": shape_of(weights, "quantize.embedding.weight", 2)[0],
        "codebook_dim": shape_of(weights, "quant_conv.weight", 4)[0],
        "width": width,
        "depth": depth_of(weights, "encoder.model.blocks."),
        "mlp_ratio": ratio_of(weights, "encoder.model.blocks.0.mlp.fc1.bias", width, config.get("mlp_ratio")),
        # Variants of the released code that this family does not have.
        "product_quant": 1,
        "lfq": False,
        "abs_pos_embed": True,
    }
    paper = {"heads": 12} if facts["width"] == 768 else {}
    settings = settle(facts, config, NAMES, **paper, normalize=True, commitment_weight=0.25, drop_path=0.1)
    if "heads" not in settings:
        raise UserError(f"config lacks num_heads, which the shapes of a width of {facts['width']} do not tell; give it")

    def vit(side: str) -> dict[str, Any]:
        width = shape_of(weights, f"{side}.model.cls_token", 3)[-1]
        return {
            "width": width,
            "depth": depth_of(weights, f"{side}.model.blocks."),
            "mlp_ratio": ratio_of(weights, f"{side}.model.blocks.0.mlp.fc1.bias", width, config.get("mlp_ratio")),
            "heads": settings["heads"],
            "layer_scale": 1e-5 if f"{side}.model.blocks.0.ls1.gamma" in weights else None,
            "drop_path": settings["drop_path"],
        }

    quantizer = {"size": facts["codebook_size"], "dim": facts["codebook_dim"]}
    quantizer |= {key: settings[key] for key in ("normalize", "commitment_weight")}
    sizes = {key: facts[key] for key in ("image_size", "patch_size")}
    # Latents are as many as patches in every release; the strict check finds it out where they are not.
    ours = sizes | {"encoder": vit("encoder"), "decoder": vit("decoder"), "quantizer": quantizer}
    return RobusTok(validate(RobusTokConfig, ours, source="config"))


def export_name(name: str) -> str:
    """The release's name of our weight."""
    for own, released in PREFIXES.items():
        if name.startswith(own):
            return released + name.removeprefix(own)
    return name


def complete(model: RobusTok, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the release's buffers and give its 1 x 1 convolutions their shape.

    ``quantize.ema_vocab_hit_SV``, a statistic that only training reports, starts from zeros.

    Raises:
        UserError: a model with parts that the release has no place for.
    """
    additions = sorted(name for name in weights if "latent_positions" in name or name.startswith("from_teacher"))
    if additions:
        raise UserError(f"the released layout has no place for {additions[0]}; train without it to export")
    for name in ("quant_conv.weight", "post_quant_conv.weight"):
        weights[name] = weights[name][:, :, None, None]  # (out, in, 1, 1)
    patches, latents = model.config.patches, model.config.length
    # Which half of its sequence a position belongs to; the decoder's class token stands in both.
    weights["encoder.lvl1LC"] = torch.tensor([[0] * (1 + patches) + [1] * latents])  # (1, 1 + P + L)
    weights["decoder.lvl1LC"] = torch.tensor([[0] * (1 + patches) + [1] * (1 + latents)])  # (1, 2 + P + L)
    weights["quantize.ema_vocab_hit_SV"] = torch.zeros(model.config.quantizer.size)
    return weights
