"""Sets of images in a feature space, and their statistics on disk.

One .npz file without pickles. ``mu``, ``sigma``, ``mu_s`` and ``sigma_s`` are the keys of ADM's reference batches,
which can be given too. ``name``, ``data``, ``count`` and ``stamp`` are ours.
"""

import re
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Literal
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from robustok.console import note
from robustok.errors import UserError
from robustok.files import atomic_file, bytes_digest, one_line, regular_file
from robustok.metrics.frechet import GaussianStatistics, covariance_factor

# Raised by numpy and zipfile for damaged files and files of other formats.
UNREADABLE = (OSError, ValueError, TypeError, EOFError, KeyError, RuntimeError, MemoryError, BadZipFile, zlib.error)
UNREADABLE += (TokenError,)
NUMBERS = ("mu", "sigma", "mu_s", "sigma_s", "features")
DIGITS = 16

Part = Literal["features", "spatial", "logits"]


@dataclass(frozen=True)
class Reference:
    """A set of images in a feature space: a reference, or a set to evaluate.

    Attributes:
        statistics: of the features.
        name: extractor of the features; None where it is unknown.
        data: the images: data set, split, crop, digest; None where they are unknown.
        features: (M, F) one by one, for KID, precision and recall: of all images in the order of the set, or of a part
            of them (ADM's takes 10,000); None where they were not kept.
        spatial: statistics of the spatial features, for sFID; None where they were not computed.
        logits: (N, classes), for the Inception Score; never saved.
        stamp: of the images' files; empty where it is unknown.
    """

    statistics: GaussianStatistics
    name: str | None = None
    data: str | None = None
    features: Tensor | None = None
    spatial: GaussianStatistics | None = None
    logits: Tensor | None = None
    stamp: str = ""

    @property
    def count(self) -> int | None:
        """N, images behind the statistics; None where it is unknown, as in ADM's files."""
        return self.statistics.count

    @cached_property
    def factor(self) -> Tensor:
        """:func:`covariance_factor`, kept for many comparisons with one reference."""
        return covariance_factor(self.statistics)

    @cached_property
    def spatial_factor(self) -> Tensor:
        """The same of the spatial features, if there are any."""
        return covariance_factor(self.spatial)

    @cached_property
    def digest(self) -> str:
        """Eight hexadecimal digits of a SHA-256 of the statistics."""
        arrays = (self.statistics.mean, self.statistics.covariance)
        return bytes_digest(b"".join(array.cpu().numpy().tobytes() for array in arrays), 8)

    def describe(self) -> str:
        """The images, their number and the digest of the statistics, for the ``reference`` of a result."""
        count = "an unknown number of" if self.count is None else self.count
        return f"{self.data or 'images of unknown origin'}, {count} images, statistics {self.digest}"


def save_reference(reference: Reference, path: str | Path) -> None:
    """Write a reference as one .npz file, whole or not at all.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    arrays = moments(reference.statistics, "")
    if reference.spatial is not None:
        arrays |= moments(reference.spatial, "_s")
    if reference.features is not None:
        arrays["features"] = reference.features.detach().float().cpu().numpy()
    origin = {"name": reference.name, "data": reference.data, "count": reference.count, "stamp": reference.stamp}
    arrays |= {key: np.array(value) for key, value in origin.items() if value not in (None, "")}
    with atomic_file(path, shared=True) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load_reference(
    path: str | Path, name: str | None = None, data: str | None = None, count: int | None = None
) -> Reference:
    """Read what :func:`save_reference` wrote, or a reference file of ADM.

    ADM's files have neither extractor nor data nor count (1,281,167 for all of ImageNet's training set); the arguments
    are used instead. Their ``arr_0`` is not read: these 10,000 images are for precision and recall, and are not the
    images behind the statistics.

    Args:
        path: .npz file with ``mu`` (F,) and ``sigma`` (F, F), and ``mu_s`` and ``sigma_s`` for sFID.
        name: extractor in use; a file that names another one is refused.
        data: the images in use, as :attr:`Reference.data`; a file that names others is refused.
        count: their number; a file that names another one is refused. Distances do not need it.

    Raises:
        UserError: unreadable, damaged, pickled or missing arrays, shapes that do not fit, values that are no
            statistics, or those of another extractor, other data or another number of images.
    """
    arrays = _read(Path(path))
    expected = {"name": (name, str), "data": (data, str), "count": (count, int)}
    origin = {key: _origin(path, arrays, key, *wanted) for key, wanted in expected.items()}
    if origin["count"] is not None and origin["count"] < 2:
        raise UserError(f"{path} is of {origin['count']} images, a covariance needs at least 2; compute it again")
    statistics = _statistics(path, arrays, "", origin["count"])
    spatial = _statistics(path, arrays, "_s", origin["count"]) if "mu_s" in arrays else None
    features = arrays.get("features")
    if features is not None and (features.ndim != 2 or features.shape[1] != statistics.dim):
        raise UserError(
            f"{path}: features are {features.shape}, expected (M, {statistics.dim}) to go with mu; replace it"
        )
    return Reference(
        statistics,
        origin["name"],
        origin["data"] or Path(path).name,
        None if features is None else torch.from_numpy(features),
        spatial,
        stamp=_origin(path, arrays, "stamp", None, str) or "",
    )


def cached_reference(
    folder: str | Path,
    name: str,
    data: str,
    count: int,
    make: Callable[[], Reference],
    needs: Collection[Part] = (),
    write: bool = True,
    stamp: str = "",
) -> Reference:
    """The reference of these images in this feature space: from the folder, or made and put there.

    Other data, another count or another extractor have another file name, so a changed data set is computed again. A
    file whose content does not fit its name is refused and never overwritten.

    With several processes call it in all of them, with ``write`` in one, and a folder that all of them share: then
    ``make`` runs in all or in none.

    Args:
        folder: made if it does not exist.
        name: of the extractor.
        data: the images, with a digest: whatever changes when they do, such as ``ImageDataset.describe()``.
        count: number of images.
        make: computes the reference; its ``name`` and ``data`` are filled in.
        needs: parts that have to be there; a file without them is made again, and keeps what it had.
        write: whether to put what was made into the folder.
        stamp: changes when the images' files are replaced, such as ``ImageDataset.stamp``; a file in the folder with
            another one is made again. Files of earlier versions have none and are used.

    Raises:
        UserError: the file in the folder is damaged or belongs to something else, it cannot be written, or what was
            made is not what was asked for.
    """
    path = reference_path(folder, name, data, count)
    old = load_reference(path, name, data, count) if path.exists() else None
    if old is not None and old.stamp not in ("", stamp):
        note(f"{path}: files of {data} were replaced since, so it is computed again")
        old = None
    if old is not None and all(getattr(old, part) is not None for part in needs):
        return old
    made = replace(make(), name=name, data=data, stamp=stamp)
    if made.count != count:
        found = f"computed a reference of {made.count} images, expected {count}"
        raise UserError(f"{found} of {data}; look for broken ones")
    if old is not None:
        kept = {part: getattr(old, part) for part in ("features", "spatial") if getattr(made, part) is None}
        made = replace(made, **kept)
    if write:
        save_reference(made, path)
    return made


def reference_path(folder: str | Path, name: str, data: str, count: int) -> Path:
    """Where :func:`cached_reference` keeps a reference: the extractor, the count and a digest of all three."""
    digest = bytes_digest("\n".join((name, data, str(count))).encode(), DIGITS)
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    return Path(folder) / f"{readable}-{count}-{digest}.npz"


def moments(statistics: GaussianStatistics, suffix: str) -> dict[str, np.ndarray]:
    """Mean and covariance as ``mu`` and ``sigma`` with a suffix, the keys of ADM's files."""
    found = {"mu": statistics.mean, "sigma": statistics.covariance}
    return {key + suffix: moment.cpu().numpy() for key, moment in found.items()}


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays that a reference may have, read without unpickling anything."""
    what = "give an .npz file with the keys mu and sigma"
    if path.is_dir() or not path.exists():
        raise UserError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; {what}")
    path = regular_file(path)
    try:
        with open(path, "rb") as stream:
            zipped = stream.read(2) == b"PK"
        if not zipped:
            raise UserError(f"{path} is no .npz file, whatever its name; {what}")
        with np.load(path, allow_pickle=False) as file:
            found = file.files
            needed = ["mu", "sigma"] + (["mu_s", "sigma_s"] if {"mu_s", "sigma_s"} & set(found) else [])
            if missing := [key for key in needed if key not in found]:
                remedy = "give it as images, not as statistics" if "arr_0" in found else "compute it again"
                holds = ", ".join(sorted(found)) or "nothing"
                raise UserError(f"{path} holds {holds} and lacks {', '.join(missing)}; {remedy}")
            return {
                key: _array(path, file, key) for key in (*NUMBERS, "name", "data", "count", "stamp") if key in found
            }
    except UNREADABLE as error:
        raise UserError(f"{path} is cut off or damaged ({one_line(error)}); copy or compute it again") from None


def _array(path: Path, file: "np.lib.npyio.NpzFile", key: str) -> np.ndarray:
    """One array, of plain numbers (or of plain text, for a name)."""
    try:
        array = file[key]
    except ValueError as error:
        if "pickle" not in str(error).lower():
            raise
        raise UserError(f"{path}: {key} holds pickled objects, which are never loaded; expected numbers") from None
    if key not in NUMBERS:
        return array
    if array.dtype.kind not in "fiu":
        raise UserError(f"{path}: {key} is {array.dtype}, expected numbers; compute it again")
    if not np.isfinite(array).all():
        raise UserError(f"{path}: {key} holds values that are not finite; compute it again from sound images")
    return array


def _origin(
    path: str | Path, arrays: dict[str, np.ndarray], key: str, expected: str | int | None, kind: type
) -> str | int | None:
    """The name, data or count in the file, which has to be the expected one; the expected one if it has none."""
    if key not in arrays:
        return expected
    array = arrays[key]
    if array.size != 1 or array.dtype.kind not in ("U" if kind is str else "iu"):
        raise UserError(f"{path}: {key} is {array.dtype} {array.shape}, expected one {kind.__name__}; compute it again")
    found = kind(array.item())
    if expected is not None and found != expected:
        words = {"name": "features of the extractor", "data": "the images", "count": "a number of images,"}
        raise UserError(f"{path} holds {words[key]} {found}, expected {expected}; delete it or compute it again")
    return found


def _statistics(path: str | Path, arrays: dict[str, np.ndarray], suffix: str, count: int | None) -> GaussianStatistics:
    mean, covariance = (torch.from_numpy(arrays[key + suffix].astype(np.float64)) for key in ("mu", "sigma"))
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        shapes = f"mu{suffix} is {tuple(mean.shape)} and sigma{suffix} {tuple(covariance.shape)}"
        raise UserError(f"{path}: {shapes}, expected (F,) and (F, F); compute them again")
    largest = covariance.abs().max()
    if (covariance - covariance.T).abs().max() > 1e-4 * largest or covariance.diagonal().min() < -1e-4 * largest:
        raise UserError(f"{path}: sigma{suffix} is no covariance (not symmetric, or of negative variance); replace it")
    return GaussianStatistics.from_moments(mean, covariance, count)
