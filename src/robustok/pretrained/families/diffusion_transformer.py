"""What the layouts of SiT and LightningDiT share."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustok.config import validate
from robustok.errors import UserError
from robustok.generators.diffusion_blocks import NORM_EPSILON
from robustok.generators.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from robustok.generators.flow import DiffusionSampling
from robustok.pretrained.shapes import depth_of, shape_of

CONFIG_NAMES = {  # the authors', ours
    "hidden_size": "width",
    "num_heads": "heads",
    "ffn_hidden_dim": "mlp_width",
    "class_dropout_prob": "label_dropout",
    "num_classes": "classes",
    "null_class": "null_label",
    "path_type": "path",
    "in_channels": "channels",
    "norm_eps": "norm_epsilon",
    **{key: key for key in ("mlp_ratio", "latent_multiplier")},
}
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width: the published sizes S, B, L, XL


def sizes(weights: Mapping[str, Tensor], channels: int) -> dict[str, Any]:
    """Sizes from the shapes of either layout."""
    rows, width = shape_of(weights, "y_embedder.embedding_table.weight", 2)
    return {
        "width": width,
        "depth": depth_of(weights, "blocks."),
        "classes": rows - 1,
        "null_label": rows - 1,
        "channels": channels,
        "patch_size": 1,
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        "learn_sigma": shape_of(weights, "final_layer.linear.weight", 2)[0] == 2 * channels,
        "norm_epsilon": NORM_EPSILON,
    }


def build_transformer(
    model_class: type[DiffusionTransformer],
    config_class: type[DiffusionTransformerConfig],
    weights: Mapping[str, Tensor],
    settings: dict[str, Any],
    latent_shape: tuple[int, int],
    published: DiffusionSampling,
) -> DiffusionTransformer:
    """The model of merged settings; ``published`` is the sampling of its XL size.

    Raises:
        UserError: the number of heads is unknown, a setting is not accepted, or a fixed table differs.
    """
    width = settings["width"]
    if settings["qk_norm"]:
        settings["heads"] = width // shape_of(weights, "blocks.0.attn.q_norm.weight", 1)[0]
    settings.setdefault("heads", HEADS.get(width))
    if settings["heads"] is None:
        raise UserError(f"config lacks num_heads, which a width of {width} does not determine; give it")
    for name in ("latent_mean", "latent_std"):
        if name in settings:  # a number, a list, or a tensor such as (1, D, 1, 1)
            settings[name] = np.asarray(settings[name], dtype=np.float64).flatten().tolist()
    if "path" in settings:
        settings["path"] = str(settings["path"]).lower()
    fields = {key: value for key, value in settings.items() if key in config_class.model_fields}
    model = model_class(validate(config_class, fields, source="config"), latent_shape, settings["classes"])
    model.sampling = published if (width, settings["depth"]) == (1152, 28) else DiffusionSampling()
    for name, ours in model.named_buffers():
        given = weights.get(name)
        if given is None or given.shape != ours.shape or ours.is_meta:
            continue  # check_all reports it; an outline has no values
        if not torch.allclose(given.cpu().float(), ours, rtol=0, atol=5e-3):  # half precision rounds by that much
            raise UserError(f"{name} has other values than the fixed table of a {model.config.name}; check the file")
    return model
