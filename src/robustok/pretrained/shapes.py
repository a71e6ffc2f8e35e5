"""Sizes of a model, read from the shapes of its weights and completed from its configuration."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from robustok.errors import UserError


def flatten_config(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The innermost keys of a nested configuration with their values, tuples as lists; values of None are left out."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten_config(value)
        elif value is not None:
            yield key, list(value) if isinstance(value, tuple) else value


def merge_settings(
    measured: dict[str, Any], config: dict[str, Any], names: dict[str, str], **defaults: Any
) -> dict[str, Any]:
    """Settings under our names: those measured from the weights, else the configured ones, else the defaults.

    Args:
        measured: read from the weights, under our names.
        config: flat configuration, under the authors' names or ours; keys that we do not have are ignored.
        names: the authors' names to ours, where the two differ.
        defaults: under our names.

    Raises:
        UserError: a configured value contradicts a measured one, or a key looks like a misspelling.
    """
    known = {**names, **{own: own for own in (*names.values(), *measured, *defaults)}}
    merged = dict(defaults)
    for key, value in config.items():
        if key in known:
            own = known[key]
            if own in measured and measured[own] != value:
                found = measured[own]
                raise UserError(f"config gives {key} = {value!r}, the weights have {found!r}; correct one of them")
            merged[own] = value
        elif near := difflib.get_close_matches(key, known, n=1, cutoff=0.85):
            raise UserError(f"config: unknown key {key!r}; did you mean {near[0]!r}?")
    return merged | measured


def shape_of(weights: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """Shape of a tensor from which sizes are read.

    Raises:
        UserError: it is missing or empty, or has another number of dimensions.
    """
    found = tuple(weights[name].shape) if name in weights else None
    if found is None or len(found) != dimensions or 0 in found:
        what = "is missing" if found is None else f"is {found}, expected {dimensions} dimensions"
        raise UserError(f"{name} {what}; is this a checkpoint of another family?")
    return found


def ratio_of(weights: Mapping[str, Tensor], name: str, width: int, configured: Any = None) -> float:
    """Hidden width of an MLP as a multiple of ``width``, from the bias (hidden,) of its first layer.

    Other code rounds the hidden width down, so a configured ratio that leads to it is returned as it is.
    """
    hidden = shape_of(weights, name, 1)[0]
    if isinstance(configured, int | float) and int(configured * width) == hidden:
        return configured
    return hidden / width


def depth_of(weights: Mapping[str, Tensor], prefix: str) -> int:
    """Number of blocks whose names start with ``prefix``.

    Raises:
        UserError: there are none.
    """
    blocks = {name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)}
    if not blocks:
        raise UserError(f"{prefix}0.* is missing; is this a checkpoint of another family?")
    return len(blocks)
