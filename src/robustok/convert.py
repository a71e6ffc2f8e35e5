"""Released checkpoints to ours, and back.

    robustok convert family=robustok weights=main-train.pt out=runs/tokenizer
    robustok convert family=robustok to=released weights=runs/post out=post-train.safetensors

Reading is strict: every tensor of the file has its place in the model, every weight of the model comes from the file.

To add a family: write a function that builds the model from the released tensors, and add a line to ``FAMILIES``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.checkpoints import (
    choose_weights,
    depth_of,
    flatten_config,
    read_checkpoint,
    settle,
    shape_of,
    write_checkpoint,
)
from robustok.config import Config, plain, validate
from robustok.generators import load_generator
from robustok.generators.rar import RAR, RARConfig
from robustok.generators.sampling import Sampling
from robustok.snapshots import write_snapshot
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.tokenizers.robustok import RobusTok, RobusTokConfig
from robustok.types import UserError


class ConvertRun(Config):
    """Released weights to a snapshot, or a snapshot to released weights."""

    family: Literal["robustok", "rar"] = Field(description="whose layout the released file has")
    weights: Path = Field(
        description="released file (.pt, .bin or .safetensors); with to=released, our snapshot or run folder"
    )
    out: Path = Field(description="folder of the snapshot; with to=released, the .safetensors file; must not exist yet")
    to: Literal["snapshot", "released"] = Field(
        "snapshot",
        description="snapshot: ours; released: the official names in a safetensors file, without the frozen teacher",
    )
    config: dict[str, Any] = Field(
        {}, description="what the shapes do not tell, under the release's names, such as config.num_heads=12"
    )
    tokenizer: Path | None = Field(
        None, description="snapshot of the tokenizer whose tokens the generator models; without it nothing checks that"
    )


def convert(run: ConvertRun) -> Path:
    """Convert one model. Nothing is written unless all of it fits.

    Returns:
        The snapshot's folder, or the safetensors file.

    Raises:
        UserError: the weights cannot be read or do not fit, ``out`` exists, or the disk is full.
    """
    if run.out.exists():
        raise UserError(f"{run.out} exists; choose another out=PATH or remove it first")
    kind = FAMILIES[run.family].kind
    if run.to == "released":
        load = load_tokenizer if kind == "tokenizer" else load_generator
        return write_checkpoint(run.out, to_released(load(run.weights)))
    weights, part = read_checkpoint(run.weights)
    model = load_released(run.family, weights, run.config)
    header = {"kind": kind, "config": plain(model.config), "step": 0}
    header["trained_on"] = f"converted from {run.weights.name}, {part}"
    header |= (
        {"latent_space": encoder_digest(model)} if kind == "tokenizer" else _generator_header(model, run.tokenizer)
    )
    write_snapshot(run.out, header, model.state_dict(), {})
    return run.out


def _generator_header(model: RAR, path: Path | None) -> dict[str, Any]:
    """What a snapshot says of a generator; the tokenizer at ``path``, if given, is the one whose tokens it models."""
    if path is not None:
        tokenizer = load_tokenizer(path)
        found, expected = (len(tokenizer.codebook), tokenizer.latent_shape[0]), (model.codebook_size, model.length)
        if found != expected:
            raise UserError(
                f"{path} has (codes, tokens per image) {found}, the generator {expected}; "
                "give the tokenizer that it was trained with"
            )
        model.latent_shape, model.latent_space = tokenizer.latent_shape, encoder_digest(tokenizer)
    return {
        "codebook_size": model.codebook_size,
        "latent_shape": list(model.latent_shape),
        "classes": model.classes,
        "latent_space": model.latent_space,
        "sampling": plain(model.sampling),
    }


def load_released(
    family: str, weights: str | Path | Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> nn.Module:
    """Load a released model; in eval mode, frozen, on the CPU.

    Args:
        family: one of ``FAMILIES``.
        weights: path of a .pt, .bin or .safetensors file, or a mapping of the release's names to tensors; either may
            wrap the tensors as released training does, under ``ema`` (preferred) or ``model``.
        config: what the shapes do not tell, under the release's names (``num_heads``) or ours (``heads``), nested as
            released configurations are or flat. Other keys are ignored unless they look like a misspelling, and a
            value that contradicts the weights is refused. Defaults: 12 heads at width 768 for robustok; nothing else
            is needed for either family.

    Returns:
        :class:`RobusTok`; or :class:`RAR` with ``sampling`` (the paper's for B and L, else the defaults),
        ``latent_shape`` (L, D) and ``latent_space`` None, since the file does not say whose tokens these are. D is
        ``codebook_embed_dim`` of the configuration, or the paper's 64.

    Raises:
        UserError: unknown family; an unreadable file; missing, unexpected or misshapen tensors; a configuration that is
            incomplete or contradicts them.
    """
    if family not in FAMILIES:
        raise UserError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    tensors = (choose_weights(weights, "weights") if isinstance(weights, Mapping) else read_checkpoint(weights))[0]
    room = FAMILIES[family]
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(room.dropped)}
    model = room.build(tensors, dict(flatten_config(config or {})))
    _check_all(tensors, to_released(model), family)
    state = model.state_dict()
    model.load_state_dict({name: tensors[room.released_name(name)].reshape(t.shape) for name, t in state.items()})
    return model.eval().requires_grad_(False)


def to_released(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights under the official names and in the official shapes, bit for bit, on the CPU.

    They share memory with the model. The frozen teacher (``semantic_model.*``) is no part of it, but the official
    loader is strict: take its 174 tensors from the official file. ``quantize.ema_vocab_hit_SV``, a statistic that only
    training reports, starts from zeros.

    Raises:
        UserError: a model that the release has no place for.
    """
    room = next((family for family in FAMILIES.values() if type(model) is family.model), None)
    if room is None:
        raise UserError(
            f"a {type(model).__name__} has no released layout; "
            f"convertible are {', '.join(family.model.__name__ for family in FAMILIES.values())}"
        )
    weights = {room.released_name(name): tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return room.complete(model, weights)


# Checking


def _check_all(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], family: str) -> None:
    """Every key there, none besides, each of its shape, and the constants as they must be."""
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    problems = [f"missing {name}" for name in sorted(expected.keys() - given.keys())]
    problems += [f"unexpected {name}" for name in sorted(given.keys() - expected.keys())]
    for name in sorted(expected.keys() & given.keys()):
        if tuple(given[name].shape) != shapes[name]:
            problems.append(f"{name} is {tuple(given[name].shape)}, expected {shapes[name]}")
        elif given[name].is_floating_point() != expected[name].is_floating_point():
            problems.append(f"{name} is {given[name].dtype}, expected {expected[name].dtype}")
        elif not expected[name].is_floating_point() and not torch.equal(given[name].cpu(), expected[name]):
            problems.append(f"{name} has other values than the release's")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"the weights are not those of a {family} model: {'; '.join(problems[:3])}{more}; check the file"
        )


# The tokenizer

TOKENIZER_NAMES = {
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


def _build_tokenizer(weights: Mapping[str, Tensor], config: dict[str, Any]) -> RobusTok:
    """A tokenizer of the sizes that the shapes and the configuration tell."""
    positions = shape_of(weights, "encoder.model.pos_embed", 3)[1]
    patch = shape_of(weights, "encoder.model.patch_embed.proj.weight", 4)[-1]
    facts = {
        "image_size": round((positions - 1) ** 0.5) * patch,
        "patch_size": patch,
        "latents": shape_of(weights, "encoder.latent_tokens", 3)[1],
        "codebook_size": shape_of(weights, "quantize.embedding.weight", 2)[0],
        "codebook_dim": shape_of(weights, "quant_conv.weight", 4)[0],
        "width": shape_of(weights, "encoder.model.cls_token", 3)[-1],
        "depth": depth_of(weights, "encoder.model.blocks."),
        # Variants of the released code that this family does not have.
        "product_quant": 1,
        "lfq": False,
        "abs_pos_embed": True,
    }
    paper = {"heads": 12} if facts["width"] == 768 else {}
    settings = settle(facts, config, TOKENIZER_NAMES, **paper, normalize=True, commitment_weight=0.25, drop_path=0.1)
    if "heads" not in settings:
        raise UserError(f"config lacks num_heads, which the shapes of a width of {facts['width']} do not tell; give it")

    def vit(side: str) -> dict[str, Any]:
        return {
            "width": shape_of(weights, f"{side}.model.cls_token", 3)[-1],
            "depth": depth_of(weights, f"{side}.model.blocks."),
            "heads": settings["heads"],
            "layer_scale": 1e-5 if f"{side}.model.blocks.0.ls1.gamma" in weights else None,
            "drop_path": settings["drop_path"],
        }

    quantizer = {"size": facts["codebook_size"], "dim": facts["codebook_dim"]}
    quantizer |= {key: settings[key] for key in ("normalize", "commitment_weight")}
    sizes = {key: facts[key] for key in ("image_size", "patch_size")}
    # Latents are as many as patches in every release; _check_all finds it out where they are not.
    ours = sizes | {"encoder": vit("encoder"), "decoder": vit("decoder"), "quantizer": quantizer}
    return RobusTok(validate(RobusTokConfig, ours, source="config"))


def _tokenizer_name(name: str) -> str:
    """The release's name of our weight."""
    for own, released in PREFIXES.items():
        if name.startswith(own):
            return released + name.removeprefix(own)
    return name


def _complete_tokenizer(model: RobusTok, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the release's buffers and give its 1 x 1 convolutions their shape."""
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


# The generator

RAR_NAMES = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "dropout": "dropout",
    "class_label_dropout": "label_dropout",
    "image_seq_len": "length",
    "condition_num_classes": "classes",
    "codebook_size": "codebook_size",
    "codebook_embed_dim": "codebook_dim",
}
RAR_SAMPLING = {  # (width, depth): as the paper samples RAR-B and RAR-L
    (768, 24): Sampling(guidance_scale=6.0, guidance_power=1.15, temperature=1.02),
    (1024, 24): Sampling(guidance_scale=6.75, guidance_power=1.01, temperature=1.04),
}
SPARE_POSITIONS, SPARE_TIMESTEPS = 1024, 100  # rows of the released tables beyond the tokens of an image


def _build_rar(weights: Mapping[str, Tensor], config: dict[str, Any]) -> RAR:
    """A generator of the sizes that the shapes tell, down to the number of heads."""
    width = shape_of(weights, "cls_token", 3)[-1]
    codes = shape_of(weights, "lm_head.weight", 2)[0]
    positions, timesteps = (shape_of(weights, name, 3)[1] for name in ("pos_embed", "timesteps_embeddings"))
    facts = {
        "width": width,
        "depth": depth_of(weights, "blocks."),
        "heads": width // shape_of(weights, "blocks.0.attn.q_norm.weight", 1)[0],
        "mlp_width": shape_of(weights, "blocks.0.mlp.fc1.weight", 2)[0],
        "codebook_size": codes,
        "classes": shape_of(weights, "embeddings.weight", 2)[0] - codes - 2,  # one mask token, one "no class"
    }
    tables = {}
    if positions == timesteps:  # ours
        tables["length"] = positions - 2
    elif positions - SPARE_POSITIONS == timesteps - SPARE_TIMESTEPS:
        tables["length"] = positions - SPARE_POSITIONS
    settings = settle(facts, config, RAR_NAMES, **tables, dropout=0.1, label_dropout=0.1, codebook_dim=64)
    if "length" not in settings or settings["length"] < 1 or facts["classes"] < 1:
        raise UserError(
            f"tables of {positions} and {timesteps} rows and {facts['classes']} classes do not tell "
            "the tokens per image; give config image_seq_len, or check the file"
        )
    ours = {key: settings[key] for key in ("width", "depth", "heads", "dropout", "label_dropout")}
    ours |= {"mlp_ratio": facts["mlp_width"] / width, "position_rows": positions, "timestep_rows": timesteps}
    length = settings["length"]
    model = RAR(validate(RARConfig, ours, source="config"), codes, length, facts["classes"])
    model.latent_shape = (length, settings["codebook_dim"])
    model.latent_space = None
    model.sampling = RAR_SAMPLING.get((width, facts["depth"]), Sampling())
    return model


@dataclass(frozen=True)
class Family:
    """How a release is read.

    Attributes:
        kind: "tokenizer" or "generator".
        model: our class.
        build: released tensors and flat configuration to a model of these sizes, not yet with these weights.
        released_name: our name of a weight to the release's.
        complete: our model and its renamed weights to the official layout.
        dropped: prefixes of released tensors that our model has no use for.
    """

    kind: Literal["tokenizer", "generator"]
    model: type[nn.Module]
    build: Callable[[Mapping[str, Tensor], dict[str, Any]], nn.Module]
    released_name: Callable[[str], str] = lambda name: name
    complete: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]] = lambda model, weights: weights
    dropped: tuple[str, ...] = ()


FAMILIES = {
    "robustok": Family(
        "tokenizer", RobusTok, _build_tokenizer, _tokenizer_name, _complete_tokenizer, dropped=("semantic_model.",)
    ),
    "rar": Family("generator", RAR, _build_rar),
}
