"""MaskGIT's VQGAN, in the PyTorch port that RAR and TiTok use (arXiv 2411.00776)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from robustok.config import validate
from robustok.pretrained.families.convolutional import conv_sizes, rename, without_teacher
from robustok.pretrained.family import CODEBOOK, Family
from robustok.pretrained.shapes import depth_of, merge_settings, shape_of
from robustok.tokenizers.maskgit import MaskGIT, MaskGITConfig

NAMES = (  # ours, the authors'
    (r"encoder\.levels", "encoder.down"),
    (r"decoder\.levels", "decoder.up"),
    (r"\.blocks\.", ".block."),
    (r"\.middle\.", ".mid."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.upsample\.conv\.", ".upsample_conv."),
    ("quantizer", "quantize"),
)
CONFIG_NAMES = {  # the authors', ours
    "hidden_channels": "width",
    "channel_mult": "multipliers",
    "num_resolutions": "levels",
    "num_res_blocks": "blocks",
    "num_channels": "channels",
    "num_embeddings": "codebook_size",
    "embedding_dim": "codebook_dim",
    "commitment_cost": "commitment_weight",
    "resolution": "image_size",
    "norm_groups": "groups",
    "downsample": "factor",
}


def build(weights: Mapping[str, Tensor], config: dict[str, Any]) -> MaskGIT:
    """See :class:`robustok.pretrained.family.Family`.

    Raises:
        UserError: weights of another family, or a configuration that contradicts them.
    """
    encoder, decoder, measured = conv_sizes(weights, NAMES)
    size, dim = shape_of(weights, CODEBOOK, 2)
    measured |= {
        "multipliers": encoder["multipliers"],
        "levels": len(encoder["multipliers"]),
        "channels": shape_of(weights, "encoder.conv_in.weight", 4)[1],
        "z_channels": dim,
        "codebook_size": size,
        "codebook_dim": dim,
    }
    defaults = {"groups": 32, "dropout": 0.0, "commitment_weight": 0.25, "image_size": 256}
    settings = merge_settings(measured, config, CONFIG_NAMES, **defaults)
    quantizer = {"size": size, "dim": dim, "normalize": False, "commitment_weight": settings["commitment_weight"]}
    fields = {"image_size": settings["image_size"], "quantizer": quantizer}
    for side, found in (("encoder", encoder), ("decoder", decoder)):
        middle_blocks = depth_of(weights, f"{side}.mid.")
        fields[side] = found | {key: settings[key] for key in ("groups", "dropout")} | {"middle_blocks": middle_blocks}
    return MaskGIT(validate(MaskGITConfig, fields, source="config"))


FAMILY = Family(
    kind="tokenizer",
    model=MaskGIT,
    build=build,
    has=("encoder.mid.0.conv1.weight", CODEBOOK),
    lacks=("quant_conv.weight",),
    export_name=lambda name: rename(name, NAMES),
    complete=without_teacher,
)
