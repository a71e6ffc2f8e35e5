"""LlamaGen's tokenizer VQ-16, and VQ-8 (arXiv 2406.06525)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robustok.config import validate
from robustok.pretrained.families.convolutional import conv_sizes, rename, without_teacher
from robustok.pretrained.family import CODEBOOK, Family
from robustok.pretrained.shapes import merge_settings, shape_of
from robustok.tokenizers.llamagen import LlamaGen, LlamaGenConfig
from robustok.tokenizers.vq import VQTokenizer

NAMES = (  # ours, the authors'
    (r"(en|de)coder\.levels", r"\1coder.conv_blocks"),
    (r"\.blocks\.", ".res."),
    (r"\.attentions\.", ".attn."),
    (r"\.middle\.", ".mid."),
    (r"\.shortcut\.", ".nin_shortcut."),
    ("to_latent", "quant_conv"),
    ("from_latent", "post_quant_conv"),
    ("quantizer", "quantize"),
)
CONFIG_NAMES = {  # the authors', ours
    "ch": "width",
    "encoder_ch_mult": "encoder_multipliers",
    "decoder_ch_mult": "decoder_multipliers",
    "num_res_blocks": "blocks",
    "codebook_embed_dim": "codebook_dim",
    "codebook_l2_norm": "normalize",
    "commit_loss_beta": "commitment_weight",
    "dropout_p": "dropout",
    "norm_groups": "groups",
    "downsample": "factor",
}
DEFAULTS = {"normalize": True, "commitment_weight": 0.25, "dropout": 0.0, "groups": 32, "image_size": 256}
USAGE = "quantize.codebook_used"  # which codes the last batches of training used


def build(weights: Mapping[str, Tensor], config: dict[str, Any]) -> LlamaGen:
    """See :class:`robustok.pretrained.family.Family`.

    Raises:
        UserError: weights of another family, or a configuration that contradicts them.
    """
    measured, sides = sizes(weights)
    settings = merge_settings(measured, config, CONFIG_NAMES, **DEFAULTS)
    return LlamaGen(validate(LlamaGenConfig, fields(settings, sides), source="config"))


def sizes(weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Sizes from shapes, under our names; and the fields of encoder and decoder. GigaTok has the same network."""
    encoder, decoder, measured = conv_sizes(weights, NAMES, extra_blocks=1, lowest_first=True)
    size, dim = shape_of(weights, CODEBOOK, 2)
    measured |= {
        "encoder_multipliers": encoder["multipliers"],
        "decoder_multipliers": decoder["multipliers"],
        "z_channels": shape_of(weights, "quant_conv.weight", 4)[1],
        "codebook_size": size,
        "codebook_dim": dim,
        "show_usage": USAGE in weights,
    }
    return measured, {"encoder": encoder, "decoder": decoder}


def fields(settings: dict[str, Any], sides: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The fields that LlamaGenConfig and GigaTokConfig have in common."""
    shared = {key: settings[key] for key in ("groups", "dropout")}
    quantizer = {"size": settings["codebook_size"], "dim": settings["codebook_dim"]}
    quantizer |= {key: settings[key] for key in ("normalize", "commitment_weight")}
    own = {key: settings[key] for key in ("image_size", "z_channels", "show_usage")}
    return {side: side_fields | shared for side, side_fields in sides.items()} | {"quantizer": quantizer} | own


def complete(model: VQTokenizer, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the buffer of usage statistics, as zeros: the authors' loader requires it."""
    weights = without_teacher(model, weights)
    return weights | ({USAGE: torch.zeros(65536)} if model.config.show_usage else {})


FAMILY = Family(
    kind="tokenizer",
    model=LlamaGen,
    build=build,
    has=("encoder.conv_blocks.0.res.0.conv1.weight", CODEBOOK),
    lacks=("s2to1encoder.ln_pre.weight",),
    export_name=lambda name: rename(name, NAMES),
    complete=complete,
    read_under=("model", "ema"),
)
