"""Other people's checkpoints to snapshots, and back.

    robustok convert family=robustok weights=main-train.pt out=runs/tokenizer
    robustok convert family=sit weights=sit-xl.pt tokenizer=runs/maetok out=runs/generator
    robustok convert family=robustok to=export weights=runs/post original=main-train.pt out=post-train.safetensors
    robustok convert family=diffusers weights=DiT-XL-2-256 out=runs/dit    (its tokenizer and its generator)
    robustok convert family=diffusers to=export weights=runs/post out=sd-vae-post

Families are single files of weights (``FAMILIES``), or folders of the diffusers library (``FOLDERS``), alone or parts
of a pipeline.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from robustok.config import Config, plain
from robustok.console import note
from robustok.errors import UserError
from robustok.files import atomic_folder
from robustok.generators import load_generator
from robustok.hub import hub_address, is_remote
from robustok.losses.discriminators import DinoHeads, load_heads
from robustok.model_card import licence_fields
from robustok.pretrained.diffusers_folders import fetch
from robustok.pretrained.export import export_folder, export_weights
from robustok.pretrained.families import FAMILIES, FOLDERS, choose_family, families_in, families_named
from robustok.pretrained.family import Family
from robustok.pretrained.load import check_all, load_checkpoint, load_folder
from robustok.snapshots import read_extra, read_header, write_snapshot
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.types import Generator, Tokenizer

ALL = FAMILIES | FOLDERS


class ConvertRun(Config):
    """Pretrained weights to a snapshot, or a snapshot to the layout of its authors."""

    family: str = Field(description=f"layout of the pretrained weights: one of {', '.join(ALL)}")
    weights: Path = Field(
        description="file (.pt, .bin, .ckpt or .safetensors), or hf://ORG/REPO/FILE; of diffusers the folder of a "
        "model or a pipeline, or hf://ORG/REPO; with to=export, our snapshot or run folder"
    )
    out: Path = Field(
        description="folder of the snapshot; with to=export, the .safetensors file, or "
        "a folder of diffusers; must not hold anything else yet"
    )
    to: Literal["snapshot", "export"] = Field(
        "snapshot", description="snapshot: ours; export: the authors' names in a safetensors file"
    )
    config: dict[str, Any] = Field(
        {},
        description="settings that are in no shape, under the authors' names, such as config.num_heads=12, and under "
        "config.discriminator for that; default: those in the file or in a JSON file beside it",
    )
    tokenizer: Path | None = Field(
        None, description="snapshot of the tokenizer whose latents the generator models; null: that is not checked"
    )
    statistics: Path | None = Field(
        None, description="file with mean and std of the latents that a diffusion model was trained on"
    )
    discriminator: bool = Field(True, description="keep the discriminator of a training checkpoint")
    licence: str | None = Field(None, description="of these weights, where it is not that of the family")
    original: Path | None = Field(
        None,
        description="with to=export: the original file, which provides what our model does not have but the authors' "
        "loaders require, such as a frozen teacher",
    )


def convert(run: ConvertRun) -> Path:
    """Convert one model. Nothing is written unless all of it fits and no check fails.

    Returns:
        The snapshot's folder, or the safetensors file.

    Raises:
        UserError: the weights cannot be read, do not fit or fail a check; latent statistics are missing or contradict
            each other; ``out`` holds something else, or the disk is full.
    """
    names = families_named(run.family)  # before a long download
    if run.to == "export":
        return _export(run, names)
    return _convert_folder(run, names) if names[0] in FOLDERS else _convert_file(run)


def _convert_file(run: ConvertRun) -> Path:
    checkpoint = read_checkpoint(run.weights)
    name = choose_family(run.family, checkpoint.weights)
    family, config = FAMILIES[name], {key: value for key, value in run.config.items() if key != "discriminator"}
    model = load_checkpoint(name, checkpoint, config or None)
    heads = _discriminator(family, checkpoint, run)
    given = family.kind == "generator" and run.tokenizer is not None
    header = _header(run, name, model, checkpoint.part, load_tokenizer(run.tokenizer) if given else None)
    extra = {}
    if heads is not None:
        header["trained_on"] += ", with its discriminator"
        header["discriminator"], extra["discriminator"] = plain(heads.config), heads.state_dict()
    elif checkpoint.discriminator is not None:
        header["trained_on"] += "; its discriminator is not used"
    elif family.kind == "tokenizer":
        header["trained_on"] += "; it holds no discriminator"
    if statistics := _statistics(family, model, checkpoint.weights):
        extra["released"] = statistics
    write_snapshot(run.out, header, model.state_dict(), extra, once=True)
    return run.out


def _convert_folder(run: ConvertRun, names: tuple[str, ...]) -> Path:
    """Convert a folder of diffusers: one model, or the two of a pipeline, each to a folder of its own.

    The autoencoder of a generator's pipeline is the tokenizer whose latents it models, unless another one is given.
    """
    source = fetch(run.weights)
    held = families_in(source, names)
    wanted = {kind: name for kind, name in held.items() if name in names}
    if "tokenizer" in wanted and run.tokenizer is not None:
        raise UserError(f"{run.weights} holds a tokenizer; drop tokenizer={run.tokenizer}, or set family=dit")
    known = {setting for name in held.values() for setting in FOLDERS[name].settings}
    if unknown := [key for key in run.config if key not in known]:
        raise UserError(f"config.{unknown[0]} is not known; of {run.weights} are {', '.join(sorted(known))}")

    def load(name: str) -> nn.Module:
        return load_folder(name, source, {key: v for key, v in run.config.items() if key in FOLDERS[name].settings})

    tokenizer = None if run.tokenizer is None else load_tokenizer(run.tokenizer)
    if tokenizer is None and "tokenizer" in held:
        tokenizer = load(held["tokenizer"])
    snapshots = {}
    for kind, name in wanted.items():
        model = tokenizer if kind == "tokenizer" else load(name)
        header = _header(run, name, model, FOLDERS[name].class_name, tokenizer)
        header["trained_on"] += "; it holds no discriminator" if kind == "tokenizer" else ""
        snapshots[kind] = header, model.state_dict()
    if len(snapshots) == 1:
        write_snapshot(run.out, *snapshots.popitem()[1], {}, once=True)
        return run.out
    with atomic_folder(run.out, once=True) as folder:
        for kind, (header, weights) in snapshots.items():
            write_snapshot(folder / kind, header, weights, {})
    return run.out


def _header(run: ConvertRun, name: str, model: nn.Module, part: str, tokenizer: nn.Module | None) -> dict[str, Any]:
    """The header of a snapshot.

    Args:
        run: settings.
        name: of the family.
        model: whose snapshot it is.
        part: of the file or pipeline that the weights are from.
        tokenizer: whose latents a generator models, if it is known.

    Raises:
        UserError: the model does not fit the tokenizer, or a check finds a problem.
    """
    family = ALL[name]
    header = {"kind": family.kind, "config": plain(model.config), "step": 0}
    if family.kind == "tokenizer":
        header |= {"latent_space": encoder_digest(model), "image_range": list(model.image_range)}
    else:
        if tokenizer is not None:
            _check_tokenizer(model, tokenizer, run.tokenizer or run.weights)
            model.latent_shape, model.latent_space = tokenizer.latent_shape, encoder_digest(tokenizer)
        _set_statistics(model, run, tokenizer)
        header |= {"config": plain(model.config), "codebook_size": model.codebook_size}
        header |= {"latent_shape": list(model.latent_shape), "classes": model.classes}
        header |= {"latent_space": model.latent_space, "sampling": plain(model.sampling)}
    if problems := model.check():
        raise UserError(f"{run.weights}: {problems[0]}")
    file = hub_address(run.weights) if is_remote(run.weights) else run.weights.name
    header["source"] = {"file": file, "part": part, "family": name}
    header |= {"trained_on": f"converted from {file}, {part}"} | licence_fields(run.licence or family.model.licence)
    return header


def _discriminator(family: Family, checkpoint: Checkpoint, run: ConvertRun) -> DinoHeads | None:
    """The discriminator of a training checkpoint; None where there is none, or its family has another kind."""
    if checkpoint.discriminator is None or family.discriminator is None or not run.discriminator:
        return None
    try:
        settings = family.discriminator(checkpoint.discriminator, run.config.get("discriminator", {}))
        return load_heads(settings, checkpoint.discriminator)
    except UserError as error:
        raise UserError(
            f"the discriminator in {run.weights}: {error}; set config.discriminator.*, or discriminator=false"
        ) from None


def _check_tokenizer(model: Generator, tokenizer: Tokenizer, path: Path) -> None:
    """Refuse a tokenizer whose latents the generator cannot model."""
    if tokenizer.kind != model.kind:
        raise UserError(f"{path} makes {tokenizer.kind} latents, the generator models {model.kind} ones; give its own")
    if tokenizer.kind == "discrete":
        what, expected = "(codes, tokens per image)", (model.codebook_size, model.length)
        found = (len(tokenizer.codebook), tokenizer.latent_shape[0])
    else:
        what, found, expected = "latents of shape", tuple(tokenizer.latent_shape), tuple(model.latent_shape)
    if found != expected:
        raise UserError(
            f"{path} has {what} {found}, the generator {expected}; give the tokenizer that it was trained with"
        )


def _set_statistics(model: Generator, run: ConvertRun, tokenizer: Tokenizer | None) -> None:
    """Set the latent statistics of a diffusion model: from the file, then from the tokenizer, which must agree."""
    if model.kind == "discrete":
        if run.statistics is not None:
            raise UserError(f"statistics={run.statistics} is for diffusion models, {run.family} models tokens; drop it")
        return
    given, multiplier = {}, model.config.latent_multiplier
    if run.statistics is not None:
        found = read_checkpoint(run.statistics).weights
        if not {"mean", "std"} <= found.keys():
            raise UserError(f"{run.statistics} holds {', '.join(sorted(found)[:5])}; expected mean and std")
        given["statistics"] = (found["mean"], found["std"], multiplier)
    if tokenizer is not None:
        own, scale = (tokenizer.latent_mean, tokenizer.latent_std), tokenizer.latent_multiplier
        if own != (0.0, 1.0) or scale not in (None, 1.0):  # else they are defaults, and unknown
            given["tokenizer"] = (*own, multiplier if scale is None else scale)
    for source, values in given.items():
        before, old = model.config.latent_multiplier, (model.latent_mean, model.latent_std)
        model.set_latent_statistics(*values)
        new, shape = (model.latent_mean, model.latent_std), model.latent_shape[1:]
        if old[0] is not None and not (
            before == model.config.latent_multiplier
            and all(torch.allclose(a.expand(shape), b.expand(shape)) for a, b in zip(old, new, strict=True))
        ):
            raise UserError(f"{source} gives other latent statistics than config or statistics; keep the right ones")
    if model.latent_mean is None:
        raise UserError(
            f"{run.family} needs the statistics of its latents; give tokenizer=FOLDER of a tokenizer that has them, "
            "statistics=latents_stats.pt, or config.latent_mean and config.latent_std"
        )


def _statistics(family: Family, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the file that the model does not have and :func:`export_weights` would replace by zeros."""
    own = {family.export_name(name) for name in model.state_dict()}
    added = {name: tensor for name, tensor in export_weights(model).items() if name not in own}
    return {name: weights[name] for name, zeros in added.items() if not torch.equal(weights[name].to(zeros), zeros)}


def _export(run: ConvertRun, names: tuple[str, ...]) -> Path:
    """A snapshot in the layout of its authors."""
    if names[0] in FOLDERS and run.original is not None:
        raise UserError(f"original={run.original} is for families of a single file; drop it")
    load = load_tokenizer if read_header(run.weights).get("kind") == "tokenizer" else load_generator
    model = load(run.weights)
    name = next((name for name in names if type(model) is ALL[name].model), None)
    if name is None:
        raise UserError(f"{run.weights} holds a {type(model).__name__}, which is no {run.family}; give its own family")
    if name in FOLDERS:
        return export_folder(model, run.out)
    family = FAMILIES[name]
    weights = export_weights(model) | read_extra(run.weights, "released").get("released", {})
    if run.original is not None:
        official = read_checkpoint(run.original).weights
        check_all({key: v for key, v in official.items() if not key.startswith(family.dropped)}, weights, name)
        own = {family.export_name(key) for key in model.state_dict()}
        weights |= {key: tensor for key, tensor in official.items() if key not in own}
    elif family.dropped:
        left_out = " and ".join(f"{prefix}*" for prefix in family.dropped)
        note(
            f"{run.out} has no {left_out}, which {run.family} needs for training only, but loaders of its authors may "
            "require; original=FILE of the original weights adds them"
        )
    return write_checkpoint(run.out, weights, once=True)
