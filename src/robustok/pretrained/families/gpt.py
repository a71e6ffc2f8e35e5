"""LlamaGen's and GigaTok's GPT (arXiv 2406.06525 and 2504.08736)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from robustok.config import validate
from robustok.errors import UserError
from robustok.generators.gpt import GPT, GPT_SIZES, GPTConfig
from robustok.generators.sampling import Sampling
from robustok.pretrained.family import Family
from robustok.pretrained.shapes import depth_of, merge_settings, shape_of

CLASSES = "cls_embedding.embedding_table.weight"
CONFIG_NAMES = {  # the authors', ours
    "dim": "width",
    "n_layer": "depth",
    "n_head": "heads",
    "n_kv_head": "kv_heads",
    "head_dim": "head_width",
    "ffn_hidden_dim": "mlp_width",
    "vocab_size": "codebook_size",
    "block_size": "length",
    "num_classes": "classes",
    "null_class": "null_label",
    "cls_token_num": "class_tokens",
    "rope": "rope",
    "rope_base": "rotary_base",
    "use_qk_norm": "query_key_norm",
    "use_adaLN": "adaptive_norm",
    "use_simple_adaLN": "simple_adaptive_norm",
    "norm_eps": "norm_epsilon",
    "class_dropout_prob": "label_dropout",
    "codebook_embed_dim": "codebook_dim",
}
DEFAULTS = {"norm_epsilon": 1e-5, "label_dropout": 0.1, "codebook_dim": 8}
LONGEST = 2**16  # tokens of an image
LLAMAGEN_SCALES = {768: 2.0, 1024: 2.0, 1280: 1.75, 1536: 1.75, 3200: 1.65}  # by width: the documented commands


def build_llamagen(weights: Mapping[str, Tensor], config: dict[str, Any]) -> GPT:
    """See :class:`robustok.pretrained.family.Family`.

    ``block_size``, the tokens per image, is in no shape: 256 for models of 256 pixels, 576 for 384. Nor is ``n_head``,
    but it is known for the published sizes.

    Raises:
        UserError: the configuration lacks one of these or contradicts the tensors.
    """
    measured = _sizes(weights) | {"rope": True, "adaptive_norm": False, "query_key_norm": False}
    settings = merge_settings(measured, config, CONFIG_NAMES, **DEFAULTS, rotary_base=10_000.0)
    if "length" not in settings:
        raise UserError("config lacks block_size, the tokens per image; give 256 for 256-pixel models, 576 for 384")
    if not isinstance(length := settings["length"], int | float) or length not in range(1, LONGEST + 1):
        raise UserError(f"config gives block_size = {length!r}, expected a whole number of tokens, at most {LONGEST}")
    settings["length"] = int(length)
    scale = LLAMAGEN_SCALES.get(measured["width"], 1.5)
    return _model(weights, settings, "rotary", Sampling(guidance_scale=scale, guidance_power=0))


def build_gigatok(weights: Mapping[str, Tensor], config: dict[str, Any]) -> GPT:
    """See :class:`robustok.pretrained.family.Family`.

    The tensors determine the variant; only ``n_head`` is in no shape, but it is known for the published sizes.

    Raises:
        UserError: the configuration contradicts the tensors; or rotary positions, with which the authors' code cannot
            sample.
    """
    if config.get("rope"):
        raise UserError("config gives rope = True, with which the authors' code cannot sample; not supported")
    measured = _sizes(weights) | {
        "length": shape_of(weights, "positional_embedding", 2)[0] - 1,
        "adaptive_norm": "layers.0.adaLN_modulation.1.weight" in weights,
        "query_key_norm": "layers.0.attention.q_norm.weight" in weights,
        "simple_adaptive_norm": False,
        "rope": False,
    }
    settings = merge_settings(measured, config, CONFIG_NAMES, **DEFAULTS)
    return _model(weights, settings, "learned", Sampling(guidance_scale=1.75, guidance_power=0, guidance_from=0.18))


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes from the shapes of both layouts."""
    codebook_size, width = shape_of(weights, "tok_embeddings.weight", 2)
    classes = shape_of(weights, CLASSES, 2)[0] - 1
    return {
        "width": width,
        "depth": depth_of(weights, "layers."),
        "mlp_width": shape_of(weights, "layers.0.feed_forward.w1.weight", 2)[0],
        "codebook_size": codebook_size,
        "classes": classes,
        "null_label": classes,
        "class_tokens": 1,
        "model_type": "c2i",
    }


def _model(weights: Mapping[str, Tensor], settings: dict[str, Any], positions: str, sampling: Sampling) -> GPT:
    width, depth = settings["width"], settings["depth"]
    published = {(size.width, size.depth): size.heads for size in GPT_SIZES.values()}
    heads = settings.get("heads") or published.get((width, depth))
    if heads is None:
        raise UserError(f"config lacks n_head, which width {width} and depth {depth} do not determine; give it")
    rows = shape_of(weights, "layers.0.attention.wqkv.weight", 2)[0]  # those of the queries, the keys and the values
    kv_heads = (rows - width) * heads // (2 * width)
    if kv_heads < 1 or rows != width + 2 * kv_heads * (width // heads):
        raise UserError(f"attention.wqkv has {rows} rows, which {heads} heads do not divide; correct n_head")
    for key, value in (("kv_heads", kv_heads), ("head_width", width // heads)):
        if settings.get(key, value) != value:
            raise UserError(f"config gives {key} = {settings[key]}, the weights have {value}; correct one of them")
    keys = ["width", "depth", "mlp_width", "norm_epsilon", "label_dropout", "adaptive_norm", "query_key_norm"]
    keys += ["rotary_base"] if positions == "rotary" else []
    fields = {key: settings[key] for key in keys} | {"heads": heads, "kv_heads": kv_heads, "positions": positions}
    size = (settings["codebook_size"], settings["length"], settings["classes"])
    model = GPT(validate(GPTConfig, fields, source="config"), *size)
    model.latent_shape = (settings["length"], settings["codebook_dim"])
    model.sampling = sampling
    return model


LLAMAGEN = Family("generator", GPT, build_llamagen, has=(CLASSES,), lacks=("positional_embedding",))
GIGATOK = Family("generator", GPT, build_gigatok, has=(CLASSES, "positional_embedding"))
