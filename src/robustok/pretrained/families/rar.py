"""RAR, the generator of tokens of RobusTok's and of MaskGIT's tokenizers (arXiv 2411.00776)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from robustok.config import validate
from robustok.errors import UserError
from robustok.generators.rar import RAR, RARConfig
from robustok.generators.sampling import Sampling
from robustok.pretrained.family import Family
from robustok.pretrained.shapes import depth_of, merge_settings, shape_of

CONFIG_NAMES = {  # the authors', ours
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "class_label_dropout": "label_dropout",
    "image_seq_len": "length",
    "condition_num_classes": "classes",
    "codebook_embed_dim": "codebook_dim",
}
PUBLISHED = {  # (codes, width): the settings of the published results, with RobusTok's tokens and with MaskGIT's
    (4096, 768): Sampling(guidance_scale=6.0, guidance_power=1.15, temperature=1.02),
    (4096, 1024): Sampling(guidance_scale=6.75, guidance_power=1.01, temperature=1.04),
    (1024, 768): Sampling(guidance_scale=16.0, guidance_power=2.75),
    (1024, 1024): Sampling(guidance_scale=15.5, guidance_power=2.5, temperature=1.02),
    (1024, 1280): Sampling(guidance_scale=6.9, guidance_power=1.5, temperature=1.02),
}
CODE_WIDTHS = {1024: 256}  # by codes: MaskGIT's; RobusTok's codes are 64 wide
SPARE_POSITIONS, SPARE_TIMESTEPS = 1024, 100  # rows of the authors' tables beyond the tokens of an image


def build(weights: Mapping[str, Tensor], config: dict[str, Any]) -> RAR:
    """See :class:`robustok.pretrained.family.Family`. All sizes are in the shapes, down to the heads.

    Raises:
        UserError: the configuration contradicts the tensors, or these do not determine the tokens per image.
    """
    width = shape_of(weights, "cls_token", 3)[-1]
    codes = shape_of(weights, "lm_head.weight", 2)[0]
    positions, timesteps = (shape_of(weights, name, 3)[1] for name in ("pos_embed", "timesteps_embeddings"))
    measured = {
        "width": width,
        "depth": depth_of(weights, "blocks."),
        "heads": width // shape_of(weights, "blocks.0.attn.q_norm.weight", 1)[0],
        "mlp_width": shape_of(weights, "blocks.0.mlp.fc1.weight", 2)[0],
        "codebook_size": codes,
        "classes": shape_of(weights, "embeddings.weight", 2)[0] - codes - 2,  # one mask token, one "no class"
    }
    exact = positions == timesteps  # no spare rows: a model that this library trained
    length = positions - (2 if exact else SPARE_POSITIONS)
    tables = {"length": length} if exact or length == timesteps - SPARE_TIMESTEPS else {}
    settings = merge_settings(measured, config, CONFIG_NAMES, **tables, dropout=0.1, label_dropout=0.1)
    if "length" not in settings or settings["length"] < 1 or measured["classes"] < 1:
        raise UserError(
            f"tables of {positions} and {timesteps} rows and {measured['classes']} classes do not determine "
            "the tokens per image; give config image_seq_len, or check the file"
        )
    fields = {key: settings[key] for key in ("width", "depth", "heads", "dropout", "label_dropout")}
    fields |= {"mlp_ratio": measured["mlp_width"] / width, "position_rows": positions, "timestep_rows": timesteps}
    model = RAR(validate(RARConfig, fields, source="config"), codes, settings["length"], measured["classes"])
    model.latent_shape = (model.length, settings.get("codebook_dim") or CODE_WIDTHS.get(codes, 64))
    model.latent_space = None
    model.sampling = PUBLISHED.get((codes, width), Sampling())
    return model


FAMILY = Family("generator", RAR, build, has=("target_aware_pos_embed",))
