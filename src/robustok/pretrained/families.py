"""Models as others released them: the families, which one a state dict belongs to, loading, and the way back.

Reading is strict: every tensor of a file has its place in the model, every weight of the model comes from the file.

To add a family: write ``from_pretrained`` beside its model, a function from the released tensors to a model of their
sizes, and add a line to ``FAMILIES``.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from robustok.errors import UserError
from robustok.generators import dit, gpt, lightningdit, rar, sit
from robustok.losses.discriminators import load_heads
from robustok.pretrained.diffusers_folders import components
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


@dataclass(frozen=True)
class Family:
    """How a release is read.

    Attributes:
        kind: "tokenizer" or "generator".
        model: our class.
        build: released tensors and flat configuration to a model of these sizes, not yet with these weights.
        has: names by which a state dict of this family is told from all others,
        lacks: given that it has none of these.
        export_name: our name of a weight to the release's.
        complete: our model and its renamed weights to the official layout.
        dropped: prefixes of released tensors that our model has no use for.
        discriminator: tensors and configuration of the discriminator in training checkpoints to our network.
    """

    kind: Literal["tokenizer", "generator"]
    model: type[nn.Module]
    build: Callable[[Mapping[str, Tensor], dict[str, Any]], nn.Module]
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    export_name: Callable[[str], str] = lambda name: name
    complete: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]] = lambda model, weights: weights
    dropped: tuple[str, ...] = ()
    discriminator: Callable[[Mapping[str, Tensor], Mapping[str, Any]], nn.Module] | None = None


CODEBOOK, CLASSES = "quantize.embedding.weight", "cls_embedding.embedding_table.weight"


FAMILIES = {
    "robustok": Family(
        "tokenizer",
        RobusTok,
        robustok_release.from_pretrained,
        ("encoder.latent_tokens", CODEBOOK),
        ("encoder.latent_pos_embed",),
        robustok_release.export_name,
        robustok_release.complete,
        robustok_release.DROPPED,
        load_heads,
    ),
    "rar": Family("generator", rar.RAR, rar.from_pretrained, ("target_aware_pos_embed",)),
    "llamagen_tokenizer": Family(
        "tokenizer",
        llamagen.LlamaGen,
        llamagen.from_pretrained,
        ("encoder.conv_blocks.0.res.0.conv1.weight", CODEBOOK),
        ("s2to1encoder.ln_pre.weight",),
        llamagen.export_name,
        llamagen.complete,
    ),
    "llamagen_gpt": Family("generator", gpt.GPT, gpt.from_llamagen, (CLASSES,), ("positional_embedding",)),
    "gigatok_tokenizer": Family(
        "tokenizer",
        gigatok.GigaTok,
        gigatok.from_pretrained,
        ("s2to1encoder.ln_pre.weight",),
        (),
        gigatok.export_name,
        gigatok.complete,
    ),
    "gigatok_gpt": Family("generator", gpt.GPT, gpt.from_gigatok, (CLASSES, "positional_embedding")),
    "maskgit_vqgan": Family(
        "tokenizer",
        maskgit.MaskGIT,
        maskgit.from_pretrained,
        ("encoder.mid.0.conv1.weight", CODEBOOK),
        ("quant_conv.weight",),
        maskgit.export_name,
        vq.without_teacher,
    ),
    "maetok_tokenizer": Family("tokenizer", maetok.MAETok, maetok.from_pretrained, ("encoder.latent_pos_embed",)),
    "sit": Family("generator", sit.SiT, sit.from_pretrained, ("x_embedder.weight", "t_embedder.mlp.0.weight")),
    "vavae": Family(
        "tokenizer",
        kl.KL,
        kl.from_pretrained,
        ("encoder.mid.block_1.conv1.weight", "post_quant_conv.weight"),
        (CODEBOOK,),
        kl.export_name,
        dropped=kl.DROPPED,
    ),
    "lightningdit": Family(
        "generator",
        lightningdit.LightningDiT,
        lightningdit.from_pretrained,
        ("x_embedder.proj.weight", "t_embedder.mlp.0.weight"),
        (),
        lightningdit.export_name,
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
