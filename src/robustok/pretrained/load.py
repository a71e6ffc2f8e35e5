"""Load other people's weights as models of ours."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustok.checkpoints import Checkpoint, choose_weights, read_checkpoint
from robustok.errors import UserError
from robustok.pretrained.diffusers_folders import fetch
from robustok.pretrained.export import export_weights
from robustok.pretrained.families import FAMILIES, FOLDERS, choose_family, families_in, families_named, recognise
from robustok.pretrained.shapes import flatten_config
from robustok.snapshots import check_finite_weights, outline_for


def load_pretrained(
    family: str, weights: str | Path | Mapping[str, Any], config: Mapping[str, Any] | str | None = None
) -> nn.Module:
    """Load a pretrained model; in eval mode, frozen, on the CPU.

    Args:
        family: one of ``FAMILIES`` or ``FOLDERS``, or another name for one, such as ``va-vae`` or ``SiT-XL``. For
            ``llamagen`` and ``gigatok`` the weights decide whether it is the tokenizer or the GPT.
        weights: path of a .pt, .bin, .ckpt or .safetensors file, ``hf://ORG/REPO/FILE``, or a mapping of the authors'
            names to tensors. The tensors may be inside of ``ema`` (preferred), ``model``, ``state_dict`` and the like,
            and their names behind ``module.`` or ``_orig_mod.``. A mapping may hold nothing besides; a file may if it
            lists which tensors are the model's (:func:`robustok.checkpoints.read_checkpoint`). For ``diffusers`` and
            its families, the folder of a model or a pipeline, or ``hf://ORG/REPO``.
        config: settings that are in no shape, under the authors' names (``num_heads``) or ours (``heads``), nested or
            flat, or such a mapping as JSON. Other keys are ignored unless they look like a misspelling; a value that
            contradicts the weights is refused. None: the configuration in the file, or in a JSON file beside it. Each
            family's ``build`` says which settings it needs.

    Returns:
        A tokenizer; or a generator with ``sampling`` (as published, where its size is), ``latent_shape`` (L, D) and
        ``latent_space`` None, since the file does not name the tokenizer.

    Raises:
        UserError: unknown family; an unreadable file; missing, unexpected or misshapen tensors, or those of another
            family, or that are not finite; a configuration that is incomplete or contradicts them.
    """
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except (ValueError, RecursionError):
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


def load_folder(name: str, path: str | Path, config: Mapping[str, Any]) -> nn.Module:
    """:func:`load_pretrained` for one of the ``FOLDERS``."""
    family = FOLDERS[name]
    if unknown := [key for key in config if key not in family.settings]:
        raise UserError(f"config has {unknown[0]!r}, which {name} does not take; known: {', '.join(family.settings)}")
    return family.load(path, **config)


def load_checkpoint(name: str, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> nn.Module:
    """:func:`load_pretrained` for one of the ``FAMILIES``, from a checkpoint that was read already."""
    family = FAMILIES[name]
    tensors = {key: tensor for key, tensor in checkpoint.weights.items() if not key.startswith(family.dropped)}
    try:
        given = dict(flatten_config(checkpoint.config if config is None else config))
        make = partial(family.build, tensors, given)
        outline_for(make, tensors, "config asks for")
        model = make()
        check_finite_weights(tensors, checkpoint.source)
        check_all(tensors, export_weights(model), name)
    except UserError as error:
        reason = str(error) if str(error).endswith("?") else f"{error}."
        if reason.startswith("config") and config is None and checkpoint.config:
            reason += " This config is the one in the file, or in the JSON file beside it"
        if (found := recognise(checkpoint.weights)) not in (name, None):
            reason += f" These look like the weights of {found}: try family={found}"
        raise UserError(reason.removesuffix(".")) from None
    state = model.state_dict()
    model.load_state_dict({key: tensors[family.export_name(key)].reshape(t.shape) for key, t in state.items()})
    return model.eval().requires_grad_(False)


def check_all(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], family: str) -> None:
    """Refuse tensors unless their names, shapes and types are the expected ones; integers must have equal values.

    Raises:
        UserError: lists up to three problems.
    """
    problems = [f"missing {name}" for name in sorted(expected.keys() - given.keys())]
    problems += [f"unexpected {name}" for name in sorted(given.keys() - expected.keys())]
    for name in sorted(expected.keys() & given.keys()):
        found, wanted = given[name], expected[name]
        if found.shape != wanted.shape:
            problems.append(f"{name} is {tuple(found.shape)}, expected {tuple(wanted.shape)}")
        elif found.is_floating_point() != wanted.is_floating_point():
            problems.append(f"{name} is {found.dtype}, expected {wanted.dtype}")
        elif not wanted.is_floating_point() and not torch.equal(found.cpu(), wanted):
            problems.append(f"{name} has other values than in all published files")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"the weights are not those of a {family} model: {'; '.join(problems[:3])}{more}; check the file"
        )
