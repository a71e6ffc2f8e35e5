"""GigaTok's tokenizer (arXiv 2504.08736)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from robustok.config import validate
from robustok.errors import UserError
from robustok.pretrained.families import llamagen
from robustok.pretrained.families.convolutional import rename
from robustok.pretrained.family import Family
from robustok.pretrained.shapes import depth_of, merge_settings, shape_of
from robustok.tokenizers.gigatok import AlignmentConfig, GigaTok, GigaTokConfig

NAMES = (  # ours, the authors'
    *llamagen.NAMES,
    (r"decoder\.conv_blocks\.(\d+)\.adaptive", r"decoder.adaptive.\1"),
    (r"grid_to_row\.embed", "s2to1encoder.encoder_embed"),
    (r"row_to_grid\.embed", "s1to2decoder.decoder_embed"),
    ("grid_to_row", "s2to1encoder"),
    ("row_to_grid", "s1to2decoder"),
    ("alignment", "s1to2decoder.distill_mlp"),
    ("grid_positions", "positional_embedding"),
    ("latent_positions", "latent_token_positional_embedding"),
)
CONFIG_NAMES = llamagen.CONFIG_NAMES | {  # the authors', ours
    "num_latent_tokens": "latents",
    "encoder_layers": "encoder_depth",
    "decoder_layers": "decoder_depth",
    "adaptive_gn": "adaptive_norm",
    "d2s_up": "depth_to_space",
    "distill_depth": "alignment_depth",
    "out_inner_dim": "alignment_width",
    "multi_level_query_init": "query_pyramid",
    "last_level_2d_query_init": "last_level_queries",
    "multi_level_2d_query_init": "multi_level_queries",
    "group_norm_eps": "norm_eps",
}
HEAD = "s1to2decoder.distill_mlp."


def build(weights: Mapping[str, Tensor], config: dict[str, Any]) -> GigaTok:
    """See :class:`robustok.pretrained.family.Family`.

    The number of heads is in no shape: without ``encoder_heads`` and ``decoder_heads`` each is 64 wide.

    Raises:
        UserError: weights of another family, or a configuration that is incomplete or contradicts them.
    """
    measured, sides = llamagen.sizes(weights)
    length, _, _ = shape_of(weights, "s2to1encoder.positional_embedding", 3)
    grid = round(length**0.5)
    measured |= {
        "grid": grid,
        "image_size": grid * measured["factor"],
        "latents": shape_of(weights, "s2to1encoder.latent_token_positional_embedding", 3)[0],
        "encoder_width": shape_of(weights, "s2to1encoder.encoder_embed.weight", 2)[0],
        "encoder_depth": depth_of(weights, "s2to1encoder.transformer."),
        "decoder_width": shape_of(weights, "s1to2decoder.decoder_embed.weight", 2)[0],
        "decoder_depth": depth_of(weights, "s1to2decoder.transformer."),
        "adaptive_norm": "decoder.adaptive.0.gamma.weight" in weights,
        "depth_to_space": "decoder.conv_blocks.0.upsample.conv1.weight" in weights,
        "layer_norm_eps": 1e-5,
        # How the queries start. The authors' code has other ways, for which no weights are published.
        "query_pyramid": True,
        "last_level_queries": False,
        "multi_level_queries": False,
    }
    aligned = f"{HEAD}0.weight" in weights
    if aligned:
        measured["alignment_width"] = shape_of(weights, f"{HEAD}4.weight", 2)[0]
    heads = {f"{side}_heads": measured[f"{side}_width"] / 64 for side in ("encoder", "decoder")}
    defaults = llamagen.DEFAULTS | heads | {"alignment_depth": AlignmentConfig().depth}
    settings = merge_settings(measured, config, CONFIG_NAMES, **defaults)
    fields = llamagen.fields(settings, sides)
    fields |= {key: settings[key] for key in ("latents", "adaptive_norm", "depth_to_space")}
    for name, side in (("grid_to_row", "encoder"), ("row_to_grid", "decoder")):
        fields[name] = {key: settings[f"{side}_{key}"] for key in ("width", "depth", "heads")}
        if fields[name]["heads"] % 1:
            width = measured[f"{side}_width"]
            raise UserError(f"config lacks {side}_heads, which a width of {width} does not determine; give it")
    if aligned:
        hidden = shape_of(weights, f"{HEAD}0.weight", 2)[0]
        depth = min(settings["alignment_depth"], measured["decoder_depth"])
        fields["alignment"] = {"width": measured["alignment_width"], "hidden": hidden, "depth": depth}
    return GigaTok(validate(GigaTokConfig, fields, source="config"))


def complete(model: GigaTok, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give 1x1 convolutions and positions the authors' shapes, and add the buffer of usage statistics."""
    for name in ("quant_conv.weight", "post_quant_conv.weight", "s2to1encoder.conv_out.weight"):
        weights[name] = weights[name][:, :, None, None]  # (out, in, 1, 1)
    for name in [name for name in weights if name.endswith("positional_embedding")]:
        weights[name] = weights[name].transpose(0, 1)  # (L, 1, width)
    return llamagen.complete(model, weights)


FAMILY = Family(
    kind="tokenizer",
    model=GigaTok,
    build=build,
    has=("s2to1encoder.ln_pre.weight",),
    export_name=lambda name: rename(name, NAMES),
    complete=complete,
    read_under=("ema", "model"),
)
