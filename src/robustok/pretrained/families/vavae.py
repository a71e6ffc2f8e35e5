"""VA-VAE, the tokenizer of LightningDiT (arXiv 2501.01423)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from robustok.config import validate
from robustok.errors import UserError
from robustok.pretrained.families.convolutional import conv_sizes, rename
from robustok.pretrained.family import CODEBOOK, Family
from robustok.pretrained.shapes import merge_settings, shape_of
from robustok.tokenizers.kl import KL, KLConfig

NAMES = (  # ours, the authors'
    (r"encoder\.levels", "encoder.down"),
    (r"decoder\.levels", "decoder.up"),
    (r"\.blocks\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.middle\.0\.", ".mid.block_1."),
    (r"\.middle\.1\.", ".mid.attn_1."),
    (r"\.middle\.2\.", ".mid.block_2."),
    (r"\.shortcut\.", ".nin_shortcut."),
    ("to_latent", "quant_conv"),
    ("from_latent", "post_quant_conv"),
)
CONFIG_NAMES = {  # the authors', ours
    "ch": "width",
    "ch_mult": "multipliers",
    "num_res_blocks": "blocks",
    "embed_dim": "dim",
    "use_variational": "variational",
    "resolution": "image_size",
    "norm_groups": "groups",
    "downsample": "factor",
}


def build(weights: Mapping[str, Tensor], config: dict[str, Any]) -> KL:
    """See :class:`robustok.pretrained.family.Family`.

    Raises:
        UserError: weights of another family, or a configuration that contradicts them.
    """
    encoder, decoder, measured = conv_sizes(weights, NAMES, extra_blocks=1)
    z_channels, dim = shape_of(weights, "post_quant_conv.weight", 4)[:2]
    measured |= {
        "multipliers": encoder["multipliers"],
        "z_channels": z_channels,
        "dim": dim,
        "variational": shape_of(weights, "quant_conv.weight", 4)[0] == 2 * dim,
        "double_z": shape_of(weights, "encoder.conv_out.weight", 4)[0] == 2 * z_channels,
    }
    if not (measured["variational"] and measured["double_z"]):
        raise UserError(
            f"the encoder does not give mean and variance of {dim} channels; expected a variational autoencoder"
        )
    settings = merge_settings(measured, config, CONFIG_NAMES, groups=32, dropout=0.0, image_size=256)
    shared = {key: settings[key] for key in ("groups", "dropout")}
    fields = {key: settings[key] for key in ("image_size", "dim", "z_channels")}
    fields |= {"encoder": encoder | shared, "decoder": decoder | shared}
    return KL(validate(KLConfig, fields, source="config"))


FAMILY = Family(
    kind="tokenizer",
    model=KL,
    build=build,
    has=("encoder.mid.block_1.conv1.weight", "post_quant_conv.weight"),
    lacks=(CODEBOOK,),
    export_name=lambda name: rename(name, NAMES),
    dropped=("foundation_model.", "linear_proj.", "loss."),  # used in VA-VAE's training only
)
