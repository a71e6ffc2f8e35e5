"""Models as others released them: the families, which one a state dict belongs to, loading, and the way back.

Reading is strict: every tensor of a file has its place in the model, every weight of the model comes from the file.

To add a family: write ``from_released`` beside its model, a function from the released tensors to a model of their
sizes, and add a line to ``FAMILIES``.
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustok.checkpoints import Checkpoint, choose_weights, flatten_config, read_checkpoint
from robustok.diffusers_folders import components, fetch
from robustok.discriminators import load_heads
from robustok.generators import dit, gpt, lightningdit, rar, sit
from robustok.tokenizers import (
    diffusers_dc,
    diffusers_kl,
    diffusers_vq,
    gigatok,
    kl,
    llamagen,
    maetok,
    maskgit,
    robustok_release,
    vq,
)
from robustok.tokenizers.robustok import RobusTok
from robustok.types import UserError


@dataclass(frozen=True)
class Family:
    """How a release is read.

    Attributes:
        kind: "tokenizer" or "generator".
        model: our class.
        build: released tensors and flat configuration to a model of these sizes, not yet with these weights.
        has: names by which a state dict of this family is told from all others,
        lacks: given that it has none of these.
        released_name: our name of a weight to the release's.
        complete: our model and its renamed weights to the official layout.
        dropped: prefixes of released tensors that our model has no use for.
        discriminator: tensors and configuration of the discriminator in training checkpoints to our network.
    """

    kind: Literal["tokenizer", "generator"]
    model: type[nn.Module]
    build: Callable[[Mapping[str, Tensor], dict[str, Any]], nn.Module]
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    released_name: Callable[[str], str] = lambda name: name
    complete: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]] = lambda model, weights: weights
    dropped: tuple[str, ...] = ()
    discriminator: Callable[[Mapping[str, Tensor], Mapping[str, Any]], nn.Module] | None = None


CODEBOOK, CLASSES = "quantize.embedding.weight", "cls_embedding.embedding_table.weight"
FAMILIES = {
    "robustok": Family(
        "tokenizer",
        RobusTok,
        robustok_release.from_released,
        ("encoder.latent_tokens", CODEBOOK),
        ("encoder.latent_pos_embed",),
        robustok_release.released_name,
        robustok_release.complete,
        robustok_release.DROPPED,
        load_heads,
    ),
    "rar": Family("generator", rar.RAR, rar.from_released, ("target_aware_pos_embed",)),
    "llamagen_tokenizer": Family(
        "tokenizer",
        llamagen.LlamaGen,
        llamagen.from_released,
        ("encoder.conv_blocks.0.res.0.conv1.weight", CODEBOOK),
        ("s2to1encoder.ln_pre.weight",),
        llamagen.released_name,
        llamagen.complete,
    ),
    "llamagen_gpt": Family("generator", gpt.GPT, gpt.from_llamagen, (CLASSES,), ("positional_embedding",)),
    "gigatok_tokenizer": Family(
        "tokenizer",
        gigatok.GigaTok,
        gigatok.from_released,
        ("s2to1encoder.ln_pre.weight",),
        (),
        gigatok.released_name,
        gigatok.complete,
    ),
    "gigatok_gpt": Family("generator", gpt.GPT, gpt.from_gigatok, (CLASSES, "positional_embedding")),
    "maskgit_vqgan": Family(
        "tokenizer",
        maskgit.MaskGIT,
        maskgit.from_released,
        ("encoder.mid.0.conv1.weight", CODEBOOK),
        ("quant_conv.weight",),
        maskgit.released_name,
        vq.without_teacher,
    ),
    "maetok_tokenizer": Family("tokenizer", maetok.MAETok, maetok.from_released, ("encoder.latent_pos_embed",)),
    "sit": Family("generator", sit.SiT, sit.from_released, ("x_embedder.weight", "t_embedder.mlp.0.weight")),
    "vavae": Family(
        "tokenizer",
        kl.KL,
        kl.from_released,
        ("encoder.mid.block_1.conv1.weight", "post_quant_conv.weight"),
        (CODEBOOK,),
        kl.released_name,
        dropped=kl.DROPPED,
    ),
    "lightningdit": Family(
        "generator",
        lightningdit.LightningDiT,
        lightningdit.from_released,
        ("x_embedder.proj.weight", "t_embedder.mlp.0.weight"),
        (),
        lightningdit.released_name,
        lightningdit.complete,
    ),
}


@dataclass(frozen=True)
class FolderFamily:
    """How a folder of the diffusers library is read and written.

    Attributes:
        kind: "tokenizer" or "generator".
        model: our class.
        class_name: that of the library.
        load: the folder, and settings that it does not tell, to the model.
        save: the model and a new folder, which the library loads.
        words: names of these settings.
    """

    kind: Literal["tokenizer", "generator"]
    model: type[nn.Module]
    class_name: str
    load: Callable[..., nn.Module]
    save: Callable[[Any, Path], Path]
    words: tuple[str, ...]


FOLDERS = {
    **{
        name: FolderFamily("tokenizer", model, model.class_name, module.from_folder, module.to_folder, ("image_size",))
        for name, model, module in (
            ("diffusers_kl", diffusers_kl.DiffusersKL, diffusers_kl),
            ("diffusers_dc", diffusers_dc.DiffusersDC, diffusers_dc),
            ("diffusers_vq", diffusers_vq.DiffusersVQ, diffusers_vq),
        )
    },
    "dit": FolderFamily(
        "generator",
        dit.DiT,
        "DiTTransformer2DModel",
        dit.from_folder,
        dit.to_folder,
        ("latent_mean", "latent_std", "latent_multiplier"),
    ),
}
ALIASES = {  # other names; where there are several families, the weights tell which
    "robustok_tokenizer": ("robustok",),
    "rar_generator": ("rar",),
    "llamagen": ("llamagen_tokenizer", "llamagen_gpt"),
    "gigatok": ("gigatok_tokenizer", "gigatok_gpt"),
    "maskgit": ("maskgit_vqgan",),
    "maetok": ("maetok_tokenizer",),
    "vae": ("vavae",),
    "va_vae": ("vavae",),
    "diffusers": tuple(FOLDERS),
}


def families_named(name: str) -> tuple[str, ...]:
    """The families that a name may mean: case and separators do not matter, and a size may follow (``sit-xl``).

    Raises:
        UserError: none; lists those known.
    """
    known = {family: (family,) for family in (*FAMILIES, *FOLDERS)} | ALIASES
    key = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    fits = [other for other in known if f"{key}_".startswith(f"{other}_")]
    if fits:
        return known[max(fits, key=len)]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0)
    raise UserError(f"unknown family {name!r}; known: {', '.join((*FAMILIES, *FOLDERS))}; did you mean {near[0]!r}?")


def recognise(weights: Mapping[str, Tensor]) -> str | None:
    """The family whose names these are; None where the names tell none."""
    fits = (
        name
        for name, family in FAMILIES.items()
        if all(key in weights for key in family.has) and not any(key in weights for key in family.lacks)
    )
    return next(fits, None)


def choose_family(name: str, weights: Mapping[str, Tensor]) -> str:
    """The family that a name means for these weights.

    Raises:
        UserError: an unknown name, or one of several families none of which the weights show.
    """
    candidates = families_named(name)
    if len(candidates) == 1:
        return candidates[0]
    if (found := recognise(weights)) in candidates:
        return found
    shown = f"the weights look like {found}" if found else "the weights tell neither"
    raise UserError(f"family {name!r} means {' or '.join(candidates)}, and {shown}; name one of {', '.join(FAMILIES)}")


def families_in(path: str | Path, names: tuple[str, ...]) -> dict[str, str]:
    """What a folder of the diffusers library holds: "tokenizer" and "generator" to their families among ``FOLDERS``.

    Raises:
        UserError: no such folder, or none of the families ``names`` in it.
    """
    held = [each.class_name for each in components(path)]
    found = {room.kind: name for name, room in FOLDERS.items() if room.class_name in held}
    if not set(found.values()) & set(names):
        accepted = " or ".join(FOLDERS[name].class_name for name in names)
        raise UserError(f"{path} holds {' and '.join(held)}, expected {accepted}; give another folder or family")
    return found


# Loading and the way back


def load_released(
    family: str, weights: str | Path | Mapping[str, Any], config: Mapping[str, Any] | str | None = None
) -> nn.Module:
    """Load a released model; in eval mode, frozen, on the CPU.

    Args:
        family: one of ``FAMILIES``, or a name that can mean nothing else, such as ``va-vae``, ``SiT-XL`` or, since the
            weights tell tokenizer from GPT, ``llamagen``.
        weights: path of a .pt, .bin, .ckpt or .safetensors file, ``hf://ORG/REPO/FILE``, or a mapping of the release's
            names to tensors; either may wrap the tensors as released training does, under ``ema`` (preferred),
            ``model``, ``module`` or ``state_dict``. Every tensor counts, so a mapping holds nothing else; a file may
            hold more if it says which are the model's (:func:`robustok.checkpoints.read_checkpoint`). For ``diffusers``
            and its families, the folder of a model or a pipeline, or ``hf://ORG/REPO``.
        config: what the shapes do not tell, under the release's names (``num_heads``) or ours (``heads``), nested as
            released configurations are or flat, or such a mapping as JSON. Other keys are ignored unless they look
            like a misspelling, and a value that contradicts the weights is refused. None: what the file, or a JSON
            file beside it, says. Each family's ``from_released`` tells what it cannot do without.

    Returns:
        A tokenizer; or a generator with ``sampling`` (as published, where its size is), ``latent_shape`` (L, D) and
        ``latent_space`` None, since the file does not say whose latents these are.

    Raises:
        UserError: unknown family; an unreadable file; missing, unexpected or misshapen tensors, or those of another
            family; a configuration that is incomplete or contradicts them.
    """
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except ValueError:
            raise UserError(f"config is text but no JSON: {config[:40]!r}; give a mapping") from None
    if (names := families_named(family))[0] in FOLDERS:
        if isinstance(weights, Mapping):
            raise UserError(f"family {family!r} is read from a folder of the diffusers library; give its path")
        weights = fetch(weights)
        found = [name for name in families_in(weights, names).values() if name in names]
        if len(found) > 1:
            raise UserError(f"{weights} holds {' and '.join(found)}; name one of them as the family")
        return load_folder(found[0], weights, config or {})
    checkpoint = choose_weights(weights, "weights") if isinstance(weights, Mapping) else read_checkpoint(weights)
    return load_checkpoint(choose_family(family, checkpoint.weights), checkpoint, config)


def load_folder(family: str, path: str | Path, config: Mapping[str, Any]) -> nn.Module:
    """:func:`load_released` of one of the ``FOLDERS``."""
    room = FOLDERS[family]
    if unknown := [key for key in config if key not in room.words]:
        raise UserError(f"config has {unknown[0]!r}, which {family} does not take; known: {', '.join(room.words)}")
    return room.load(path, **config)


def load_checkpoint(family: str, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> nn.Module:
    """:func:`load_released` of a file that was read already; ``family`` is one of ``FAMILIES``."""
    room, looks = FAMILIES[family], recognise(checkpoint.weights)
    tensors = {name: tensor for name, tensor in checkpoint.weights.items() if not name.startswith(room.dropped)}
    try:
        model = room.build(tensors, dict(flatten_config(checkpoint.config if config is None else config)))
        check_all(tensors, to_released(model), family)
    except UserError as error:
        reason = str(error) if str(error).endswith("?") else f"{error}."
        if reason.startswith("config") and config is None and checkpoint.config:
            reason += " This config is the one in the file, or in the JSON file beside it"
        if looks not in (family, None):
            reason += f" These look like the weights of {looks}: try family={looks}"
        raise UserError(reason.removesuffix(".")) from None
    state = model.state_dict()
    model.load_state_dict({name: tensors[room.released_name(name)].reshape(t.shape) for name, t in state.items()})
    return model.eval().requires_grad_(False)


def to_released(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights under the official names and in the official shapes, bit for bit, on the CPU.

    They share memory with the model. What nothing reads but official loaders ask for is only made up here: statistics
    of codes in use are zeros, and a frozen teacher is no part of it. The verb takes both from the ``original`` file.

    Raises:
        UserError: a model that the release has no place for.
    """
    room = next((family for family in FAMILIES.values() if type(model) is family.model), None)
    if room is None:
        raise UserError(
            f"a {type(model).__name__} has no released layout; "
            f"convertible are {', '.join(sorted({family.model.__name__ for family in FAMILIES.values()}))}"
        )
    weights = {room.released_name(name): tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return room.complete(model, weights)


def check_all(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], family: str) -> None:
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
