"""LlamaGen's tokenizer VQ-16 (and VQ-8): a convolutional network with an l2-normalised codebook.

Source: Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (arXiv 2406.06525).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.checkpoints import settle, shape_of
from robustok.config import validate
from robustok.tokenizers.conv import NORM_EPSILON, Decoder, Encoder, conv_sizes, rename
from robustok.tokenizers.vq import VQConfig, VQTokenizer, without_teacher

NAMES = (  # ours, the release's
    (r"(en|de)coder\.levels", r"\1coder.conv_blocks"),
    (r"\.blocks\.", ".res."),
    (r"\.attentions\.", ".attn."),
    (r"\.middle\.", ".mid."),
    (r"\.shortcut\.", ".nin_shortcut."),
    ("to_latent", "quant_conv"),
    ("from_latent", "post_quant_conv"),
    ("quantizer", "quantize"),
)
CONFIG_NAMES = {  # the release's, ours
    "ch": "width",
    "encoder_ch_mult": "encoder_multipliers",
    "decoder_ch_mult": "decoder_multipliers",
    "num_res_blocks": "blocks",
    "z_channels": "z_channels",
    "codebook_size": "codebook_size",
    "codebook_embed_dim": "codebook_dim",
    "codebook_l2_norm": "normalize",
    "commit_loss_beta": "commitment_weight",
    "dropout_p": "dropout",
    "norm_groups": "groups",
    "norm_eps": "norm_eps",
    "image_size": "image_size",
    "downsample": "factor",
}
USAGE = "quantize.codebook_used"  # which codes the release's last batches of training used


class LlamaGenConfig(VQConfig):
    """LlamaGen's tokenizer; the defaults are its VQ-16."""

    name: Literal["llamagen"] = "llamagen"
    z_channels: int = Field(256, ge=1, description="channels between the encoder and the projection to the codebook")
    show_usage: bool = Field(True, description="the released file has the statistics of codes in use, as all do so far")


class LlamaGen(VQTokenizer):
    """LlamaGen's tokenizer. Tokens are a grid, row by row; the decoder takes grids of any shape.

    Args:
        config: sizes.
        pretrained: for the signature's sake; only tokenizers with a backbone start from pretrained weights.
    """

    licence = "MIT"

    def __init__(self, config: LlamaGenConfig, pretrained: bool = False) -> None:
        super().__init__(config)
        self.encoder = Encoder(config.encoder, config.z_channels)
        self.to_latent = nn.Conv2d(config.z_channels, config.quantizer.dim, 1)
        self.from_latent = nn.Conv2d(config.quantizer.dim, config.z_channels, 1)
        self.decoder = Decoder(config.decoder, config.z_channels, config.decoder.blocks + 1, lowest_first=True)


def from_pretrained(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> LlamaGen:
    """A tokenizer of the sizes that released weights and a flat configuration tell; not yet with these weights.

    Raises:
        UserError: weights of another family, or a configuration that contradicts them.
    """
    facts, sides = pretrained_facts(weights)
    settings = settle(facts, dict(config), CONFIG_NAMES, **DEFAULTS)
    return LlamaGen(validate(LlamaGenConfig, pretrained_settings(settings, sides), source="config"))


DEFAULTS = {"normalize": True, "commitment_weight": 0.25, "dropout": 0.0, "groups": 32, "image_size": 256}


def pretrained_facts(weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What the shapes tell, under our names; and the sizes of encoder and decoder. GigaTok's network is alike."""
    encoder = conv_sizes(weights, "encoder", NAMES)
    decoder = conv_sizes(weights, "decoder", NAMES, extra_blocks=1, lowest_first=True)
    size, dim = shape_of(weights, "quantize.embedding.weight", 2)
    facts = {
        "width": encoder["width"],
        "encoder_multipliers": encoder["multipliers"],
        "decoder_multipliers": decoder["multipliers"],
        "blocks": encoder["blocks"],
        "z_channels": shape_of(weights, "quant_conv.weight", 4)[1],
        "codebook_size": size,
        "codebook_dim": dim,
        "show_usage": USAGE in weights,
        "norm_eps": NORM_EPSILON,
        "factor": 2 ** (len(encoder["multipliers"]) - 1),
    }
    return facts, {"encoder": encoder, "decoder": decoder}


def pretrained_settings(settings: Mapping[str, Any], sides: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What :class:`LlamaGenConfig` and GigaTok's configuration have in common."""
    shared = {key: settings[key] for key in ("groups", "dropout")}
    quantizer = {"size": settings["codebook_size"], "dim": settings["codebook_dim"]}
    quantizer |= {key: settings[key] for key in ("normalize", "commitment_weight")}
    own = {key: settings[key] for key in ("image_size", "z_channels", "show_usage")}
    return {side: {**sizes, **shared} for side, sizes in sides.items()} | {"quantizer": quantizer} | own


def export_name(name: str) -> str:
    """The release's name of our weight."""
    return rename(name, NAMES)


def complete(model: VQTokenizer, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the release's buffer of usage statistics, as zeros: its loader is strict."""
    weights = without_teacher(model, weights)
    return weights | ({USAGE: torch.zeros(65536)} if model.config.show_usage else {})
