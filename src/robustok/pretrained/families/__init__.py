"""Whose weights can be read and written, and which family a name or a state dict belongs to.

Reading is strict: every tensor of a file belongs to the model, every weight of the model comes from the file.

To add a family: write a module here with a :class:`robustok.pretrained.family.Family` and add a line to ``FAMILIES``.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from robustok.errors import UserError
from robustok.pretrained.diffusers_folders import components
from robustok.pretrained.families import (
    diffusers,
    dit,
    gigatok,
    gpt,
    lightningdit,
    llamagen,
    maetok,
    maskgit,
    rar,
    robustok,
    sit,
    vavae,
)

FAMILIES = {
    "robustok": robustok.FAMILY,
    "rar": rar.FAMILY,
    "llamagen_tokenizer": llamagen.FAMILY,
    "llamagen_gpt": gpt.LLAMAGEN,
    "gigatok_tokenizer": gigatok.FAMILY,
    "gigatok_gpt": gpt.GIGATOK,
    "maskgit_vqgan": maskgit.FAMILY,
    "maetok_tokenizer": maetok.FAMILY,
    "sit": sit.FAMILY,
    "vavae": vavae.FAMILY,
    "lightningdit": lightningdit.FAMILY,
}
"""Single files of weights."""

FOLDERS = diffusers.FAMILIES | {"dit": dit.FAMILY}
"""Folders of the diffusers library."""

ALIASES = {  # other names; where there are several families, the weights decide which
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
    """The family whose layout these weights have; None where it is unknown."""
    fits = (
        name
        for name, family in FAMILIES.items()
        if all(key in weights for key in family.has) and not any(key in weights for key in family.lacks)
    )
    return next(fits, None)


def choose_family(name: str, weights: Mapping[str, Tensor]) -> str:
    """The family that a name means for these weights.

    Raises:
        UserError: an unknown name, or one that several families have, none of which has this layout.
    """
    candidates = families_named(name)
    if len(candidates) == 1:
        return candidates[0]
    if (found := recognise(weights)) in candidates:
        return found
    shown = f"the weights look like {found}" if found else "the weights are of none of them"
    raise UserError(f"family {name!r} means {' or '.join(candidates)}, and {shown}; name one of {', '.join(FAMILIES)}")


def families_in(path: str | Path, names: tuple[str, ...]) -> dict[str, str]:
    """What a folder of the diffusers library holds: "tokenizer" and "generator" to their families among ``FOLDERS``.

    Raises:
        UserError: no such folder, or none of the families ``names`` in it.
    """
    held = [each.class_name for each in components(path)]
    found = {family.kind: name for name, family in FOLDERS.items() if family.class_name in held}
    if not set(found.values()) & set(names):
        accepted = " or ".join(FOLDERS[name].class_name for name in names)
        raise UserError(f"{path} holds {' and '.join(held)}, expected {accepted}; give another folder or family")
    return found
