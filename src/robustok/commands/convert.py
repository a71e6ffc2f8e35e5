"""Pretrained checkpoints to ours, and back.

    robustok convert family=robustok weights=main-train.pt out=runs/tokenizer
    robustok convert family=sit weights=sit-xl.pt tokenizer=runs/maetok out=runs/generator
    robustok convert family=robustok to=export weights=runs/post original=main-train.pt out=post-train.safetensors
    robustok convert family=diffusers weights=DiT-XL-2-256 out=runs/dit    (its tokenizer and its generator)
    robustok convert family=diffusers to=export weights=runs/post out=sd-vae-post

The families are those of ``pretrained.families``. Those of diffusers are folders, alone or parts of a pipeline.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from robustok.config import Config, plain
from robustok.errors import UserError
from robustok.files import atomic_folder
from robustok.generators import load_generator
from robustok.hub import is_remote
from robustok.pretrained.diffusers_folders import fetch
from robustok.pretrained.export import export_weights
from robustok.pretrained.families import (
    FAMILIES,
    FOLDERS,
    Family,
    FolderFamily,
    choose_family,
    families_in,
    families_named,
)
from robustok.pretrained.load import check_all, load_checkpoint, load_folder, load_pretrained
from robustok.snapshots import read_extra, read_header, write_snapshot
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.types import Generator

R = TypeVar("R", Family, FolderFamily)

__all__ = ["FAMILIES", "ConvertRun", "convert", "export_weights", "load_pretrained"]


class ConvertRun(Config):
    """Pretrained weights to a snapshot, or a snapshot to released weights."""

    family: str = Field(description=f"whose layout the released file has: one of {', '.join((*FAMILIES, *FOLDERS))}")
    weights: Path = Field(
        description="released file (.pt, .bin, .ckpt or .safetensors), or hf://ORG/REPO/FILE; of diffusers the folder "
        "of a model or a pipeline, or hf://ORG/REPO; with to=export, our snapshot or run folder"
    )
    out: Path = Field(
        description="folder of the snapshot; with to=export, the .safetensors file, or "
        "a folder of diffusers; must not exist yet"
    )
    to: Literal["snapshot", "export"] = Field(
        "snapshot", description="snapshot: ours; export: the official names in a safetensors file"
    )
    config: dict[str, Any] = Field(
        {},
        description="what the shapes do not tell, under the release's names, such as config.num_heads=12, and under "
        "config.discriminator for that; default: what the file or a JSON file beside it says",
    )
    tokenizer: Path | None = Field(
        None, description="snapshot of the tokenizer whose latents the generator models; without it nothing checks that"
    )
    statistics: Path | None = Field(
        None, description="file with mean and std of the latents that a diffusion model was trained on"
    )
    discriminator: bool = Field(True, description="take along the discriminator that training left in the file")
    licence: str | None = Field(None, description="of these weights, where it is not that of the release")
    original: Path | None = Field(
        None,
        description="with to=export: the released file, from which comes what we have no use for but official "
        "loaders ask for, such as a frozen teacher",
    )


def convert(run: ConvertRun) -> Path:
    """Convert one model. Nothing is written unless all of it fits and nothing looks wrong.

    Returns:
        The snapshot's folder, or the safetensors file.

    Raises:
        UserError: the weights cannot be read, do not fit or look wrong; latent statistics are missing or contradict
            each other; ``out`` exists, or the disk is full.
    """
    if run.out.exists():
        raise UserError(f"{run.out} exists; choose another out=PATH or remove it first")
    names = families_named(run.family)  # before a long download
    if names[0] in FOLDERS:
        return _export_folder(run, names) if run.to == "export" else _convert_folder(run, names)
    if run.to == "export":
        return write_checkpoint(run.out, _export(run))
    checkpoint = read_checkpoint(run.weights)
    family = choose_family(run.family, checkpoint.weights)
    room, config = FAMILIES[family], {key: value for key, value in run.config.items() if key != "discriminator"}
    model = load_checkpoint(family, checkpoint, config or None)
    discriminator = _discriminator(room, checkpoint, run)
    tokenizer = None if run.tokenizer is None or room.kind == "tokenizer" else load_tokenizer(run.tokenizer)
    header = _header(room, model, checkpoint, run, tokenizer, carried=discriminator is not None)
    extra = {}
    if discriminator is not None:
        header["discriminator"] = plain(discriminator.config)
        extra["discriminator"] = discriminator.state_dict()
    if leftover := _leftover(room, model, checkpoint.weights):
        extra["released"] = leftover
    write_snapshot(run.out, header, model.state_dict(), extra)
    return run.out


def _convert_folder(run: ConvertRun, names: tuple[str, ...]) -> Path:
    """A folder of diffusers: one model, or the two of a pipeline, which get folders of their own.

    The autoencoder of a generator's pipeline is the tokenizer whose latents it models, unless another one is given.
    """
    source = fetch(run.weights)
    held = families_in(source, names)
    wanted = {kind: name for kind, name in held.items() if name in names}
    if "tokenizer" in wanted and run.tokenizer is not None:
        raise UserError(f"{run.weights} holds a tokenizer; drop tokenizer={run.tokenizer}, or set family=dit")
    words = {word for name in held.values() for word in FOLDERS[name].words}
    if unknown := [key for key in run.config if key not in words]:
        raise UserError(f"config.{unknown[0]} is not known; of {run.weights} are {', '.join(sorted(words))}")

    def part(kind: str) -> nn.Module:
        room = FOLDERS[held[kind]]
        return load_folder(held[kind], source, {key: v for key, v in run.config.items() if key in room.words})

    tokenizer = None if run.tokenizer is None else load_tokenizer(run.tokenizer)
    if tokenizer is None and "tokenizer" in held:
        tokenizer = part("tokenizer")
    snapshots = {}
    for kind, name in wanted.items():
        model = tokenizer if kind == "tokenizer" else part(kind)
        header = _header(FOLDERS[name], model, Checkpoint({}, FOLDERS[name].class_name), run, tokenizer)
        snapshots[kind] = header, model.state_dict()
    if len(snapshots) == 1:
        write_snapshot(run.out, *snapshots.popitem()[1], {})
        return run.out
    with atomic_folder(run.out) as folder:
        for kind, (header, weights) in snapshots.items():
            write_snapshot(folder / kind, header, weights, {})
    return run.out


def _header(
    room: Family | FolderFamily,
    model: nn.Module,
    checkpoint: Checkpoint,
    run: ConvertRun,
    tokenizer: nn.Module | None,
    carried: bool = False,
) -> dict[str, Any]:
    """What the snapshot of a model says; one that looks wrong gets none."""
    if room.kind == "tokenizer":
        facts = {"latent_space": encoder_digest(model), "image_range": list(model.image_range)}
    else:
        _take_statistics(model, run, tokenizer)
        facts = _generator_facts(model, run.tokenizer or run.weights, tokenizer)
    if problems := model.check() if hasattr(model, "check") else []:
        raise UserError(f"{run.weights}: {problems[0]}")
    header = {"kind": room.kind, "config": plain(model.config), "step": 0}
    return header | facts | _provenance(room, checkpoint, run, carried)


def _discriminator(room: Family, checkpoint: Checkpoint, run: ConvertRun) -> nn.Module | None:
    """The one that training left in the file, if the family's are ours too."""
    if checkpoint.discriminator is None or room.discriminator is None or not run.discriminator:
        return None
    try:
        return room.discriminator(checkpoint.discriminator, run.config.get("discriminator"))
    except UserError as error:
        raise UserError(
            f"the discriminator in {run.weights}: {error}; set config.discriminator.*, or discriminator=false"
        ) from None


def _provenance(room: Family | FolderFamily, checkpoint: Checkpoint, run: ConvertRun, carried: bool) -> dict[str, str]:
    """Where the weights come from, and under which licence."""
    source = re.sub("^hf:/+", "hf://", run.weights.as_posix()) if is_remote(run.weights) else run.weights.name
    origin = f"converted from {source}, {checkpoint.part}"
    if carried:
        origin += ", with its discriminator"
    elif checkpoint.discriminator is not None:
        origin += "; its discriminator is not used"
    elif room.kind == "tokenizer":
        origin += "; it holds no discriminator"
    facts = {"trained_on": origin, "licence": run.licence or room.model.licence}
    if re.search(r"\bnc\b|non-?commercial", facts["licence"], re.IGNORECASE):
        facts["commercial_use"] = "NOT PERMITTED by this licence, nor of decoders trained from these weights"
    elif re.search(r"\bnone\b|without a licence|no licence", facts["licence"], re.IGNORECASE):
        facts["commercial_use"] = "UNCLEAR, as some of the release came without a licence; ask its authors"
    return facts


def _take_statistics(model: Generator, run: ConvertRun, tokenizer: nn.Module | None) -> None:
    """Tell a diffusion model the statistics of its latents, from wherever they are given; several must agree."""
    if getattr(model, "kind", "discrete") == "discrete":
        if run.statistics is not None:
            raise UserError(f"statistics={run.statistics} is for diffusion models, {run.family} models tokens; drop it")
        return
    given, multiplier = {}, model.config.latent_multiplier
    if run.statistics is not None:
        found = read_checkpoint(run.statistics).weights
        if not {"mean", "std"} <= found.keys():
            raise UserError(f"{run.statistics} holds {', '.join(sorted(found)[:5])}; expected mean and std")
        given["statistics"] = (found["mean"], found["std"], multiplier)
    own = getattr(tokenizer, "latent_mean", 0.0), getattr(tokenizer, "latent_std", 1.0)
    scale = getattr(tokenizer, "latent_multiplier", None)
    if own != (0.0, 1.0) or scale not in (None, 1.0):  # which says that nobody set them
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


def _generator_facts(model: Generator, path: Path | None, tokenizer: nn.Module | None) -> dict[str, Any]:
    """What a snapshot says of a generator; the tokenizer at ``path``, if given, is the one whose latents it models."""
    if tokenizer is not None:
        kind = getattr(model, "kind", "discrete")
        if tokenizer.kind != kind:
            raise UserError(f"{path} makes {tokenizer.kind} latents, the generator models {kind} ones; give its own")
        if kind == "discrete":
            what, expected = "(codes, tokens per image)", (model.codebook_size, model.length)
            found = (len(tokenizer.codebook), tokenizer.latent_shape[0])
        else:
            what, found, expected = "latents of shape", tuple(tokenizer.latent_shape), tuple(model.latent_shape)
        if found != expected:
            raise UserError(
                f"{path} has {what} {found}, the generator {expected}; give the tokenizer that it was trained with"
            )
        model.latent_shape, model.latent_space = tokenizer.latent_shape, encoder_digest(tokenizer)
    return {
        "codebook_size": model.codebook_size,
        "latent_shape": list(model.latent_shape),
        "classes": model.classes,
        "latent_space": model.latent_space,
        "sampling": plain(model.sampling),
    }


# The way back


def _leftover(room: Family, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pretrained statistics that the model has no place for and :func:`export_weights` would make up."""
    own = {room.export_name(name) for name in model.state_dict()}
    made_up = {name: tensor for name, tensor in export_weights(model).items() if name not in own}
    return {name: weights[name] for name, zeros in made_up.items() if not torch.equal(weights[name].to(zeros), zeros)}


def _load_snapshot(path: Path) -> nn.Module:
    """A tokenizer or a generator of ours, whichever it is."""
    return (load_tokenizer if read_header(path).get("kind") == "tokenizer" else load_generator)(path)


def _room_of(model: nn.Module, run: ConvertRun, rooms: Mapping[str, R], names: tuple[str, ...]) -> R:
    """How the model's release is written, which has to be one of those that ``run.family`` names."""
    for name in names:
        if type(model) is rooms[name].model:
            return rooms[name]
    raise UserError(f"{run.weights} holds a {type(model).__name__}, which is no {run.family}; give its own family")


def _export_folder(run: ConvertRun, names: tuple[str, ...]) -> Path:
    """A snapshot as a folder that the diffusers library loads."""
    if run.original is not None:
        raise UserError(f"original={run.original} is for families of a single file; drop it, a folder lacks nothing")
    model = _load_snapshot(run.weights)
    return _room_of(model, run, FOLDERS, names).save(model, run.out)


def _export(run: ConvertRun) -> dict[str, Tensor]:
    """A snapshot's weights in the released layout, with what else the release stores where that is known."""
    model, names = _load_snapshot(run.weights), families_named(run.family)
    weights, room = export_weights(model), _room_of(model, run, FAMILIES, names)
    weights |= read_extra(run.weights, "released").get("released", {})
    if run.original is not None:
        official = read_checkpoint(run.original).weights
        bare = {name: tensor for name, tensor in official.items() if not name.startswith(room.dropped)}
        check_all(bare, weights, names[0])
        own = {room.export_name(name) for name in model.state_dict()}
        weights |= {name: tensor for name, tensor in official.items() if name not in own}
    return weights
