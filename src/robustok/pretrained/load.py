"""Load other people's weights as models of ours."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustok.checkpoints import Checkpoint, choose_weights, flatten_config, read_checkpoint
from robustok.errors import UserError
from robustok.pretrained.diffusers_folders import fetch
from robustok.pretrained.export import export_weights
from robustok.pretrained.families import FAMILIES, FOLDERS, choose_family, families_in, families_named, recognise

# Loading and the way back


def load_pretrained(
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
            file beside it, says. Each family's ``from_pretrained`` tells what it cannot do without.

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
    """:func:`load_pretrained` of one of the ``FOLDERS``."""
    room = FOLDERS[family]
    if unknown := [key for key in config if key not in room.words]:
        raise UserError(f"config has {unknown[0]!r}, which {family} does not take; known: {', '.join(room.words)}")
    return room.load(path, **config)


def load_checkpoint(family: str, checkpoint: Checkpoint, config: Mapping[str, Any] | None) -> nn.Module:
    """:func:`load_pretrained` of a file that was read already; ``family`` is one of ``FAMILIES``."""
    room, looks = FAMILIES[family], recognise(checkpoint.weights)
    tensors = {name: tensor for name, tensor in checkpoint.weights.items() if not name.startswith(room.dropped)}
    try:
        model = room.build(tensors, dict(flatten_config(checkpoint.config if config is None else config)))
        check_all(tensors, export_weights(model), family)
    except UserError as error:
        reason = str(error) if str(error).endswith("?") else f"{error}."
        if reason.startswith("config") and config is None and checkpoint.config:
            reason += " This config is the one in the file, or in the JSON file beside it"
        if looks not in (family, None):
            reason += f" These look like the weights of {looks}: try family={looks}"
        raise UserError(reason.removesuffix(".")) from None
    state = model.state_dict()
    model.load_state_dict({name: tensors[room.export_name(name)].reshape(t.shape) for name, t in state.items()})
    return model.eval().requires_grad_(False)


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
