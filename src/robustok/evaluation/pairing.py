"""Which image of the reference each finished image was made from: by name where both have names, else by order."""

import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from robustok.data.dataset import ImageDataset
from robustok.data.labels import sort_names
from robustok.errors import UserError


def partners(images: ImageDataset, originals: ImageDataset) -> Tensor:
    """Index in ``originals`` of the partner of each image, (N,) int64.

    Image files are paired by their path in the folder, else by their name alone, else by the number that it is; the
    suffix does not count. An array has no names: its image i belongs to the i-th file, in the order of the numbers in
    the names (2.png before 10.png).

    Raises:
        UserError: there are not as many on both sides, or only some of the names are on both sides.
    """
    if len(originals) != len(images):
        raise UserError(
            f"paired_images: {images.describe()} against {originals.describe()}; expected as many images on both sides"
        )
    if images.names is not None and originals.names is not None:
        for key in (str, os.path.basename, _number):
            if (found := _by(key, images.names, originals.names)) is not None:
                return found
        _refuse_missing_partners(images.names, originals.names)
    first, second = _order(images), _order(originals)
    if images.names is not None and originals.names is not None:
        warnings.warn(
            f"paired_images: names differ, so images are paired in order: {images.names[first[0]]} with "
            f"{originals.names[second[0]]}, ..., {images.names[first[-1]]} with {originals.names[second[-1]]}",
            stacklevel=2,
        )
    found = torch.empty(len(images), dtype=torch.int64)
    found[torch.tensor(first)] = torch.tensor(second)
    return found


def _by(key: Callable[[str], object], names: list[str], others: list[str]) -> Tensor | None:
    """Index of the other name with the same key, for each name; None unless that pairs all of them."""
    rows = {key(name): row for row, name in enumerate(others)}
    keys = [key(name) for name in names]
    if None in rows or len(rows) < len(others) or set(keys) != rows.keys():
        return None
    return torch.tensor([rows[key] for key in keys])


def _refuse_missing_partners(names: list[str], others: list[str]) -> None:
    shared = set(names) & set(others)
    if shared and len(set(names)) == len(names):
        lacking, instead = (sort_names(set(side) - shared)[:1] or ["nothing"] for side in (names, others))
        raise UserError(
            f"paired_images: {len(shared)} of {len(names)} names are on both sides, {lacking[0]} has no partner "
            f"({instead[0]} has none either); give both the same names"
        )


def _number(name: str) -> int | None:
    stem = os.path.basename(name)
    return int(stem) if stem.isdecimal() else None


def _order(images: ImageDataset) -> list[int]:
    """Rows in the order of the numbers in the names; arrays as they are."""
    if images.names is None:
        return list(range(len(images)))
    rows = {name: row for row, name in enumerate(images.names)}
    if len(rows) < len(images):  # such as 1.png beside 1.jpg
        return list(range(len(images)))
    return [rows[name] for name in sort_names(rows)]
