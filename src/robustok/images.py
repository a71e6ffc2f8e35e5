"""Data sets to images: the only place that changes value ranges or rounds to uint8.

From top to bottom: value ranges, ``ImageDataset``, and the order in which training and evaluation go through one.
Training order and augmentation are functions of (seed, step) alone. How an image becomes square RGB pixels is in
``robustok.crops``. Which data sets there are, and how to add one, is in ``robustok.sources``; ``Data`` and its
configurations can be imported from here too.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader

from robustok.config import Config
from robustok.crops import center_crop, random_crop, to_rgb
from robustok.sources import (  # noqa: F401
    DATASETS,
    Cifar10,
    Data,
    Digits,
    Folder,
    Npz,
    Parquet,
    Source,
    Split,
    data_at,
    digest,
    one_line,
)
from robustok.types import Batch, UserError

MEMORY_LIMIT = 10**9  # bytes of decoded pixels up to which a data set is held in memory


# Value ranges


def to_pixels(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) float in [-1, 1] to pixels uint8: trunc(clamp(127.5 x + 128, 0, 255)).

    Raises:
        UserError: the images hold NaN, which has no pixel value.
    """
    if images.isnan().any():
        bad = int(images.isnan().flatten(1).any(1).sum())
        raise UserError(
            f"{bad} of {len(images)} images hold NaN, expected numbers in [-1, 1]; use an earlier snapshot of the model"
        )
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def from_pixels(pixels: Tensor) -> Tensor:
    """Pixels uint8 of any shape to images float32 in [-1, 1]; ``to_pixels`` gives the same pixels back."""
    return pixels.to(torch.float32, copy=True).div_(127.5).sub_(1)  # in place: a third of the memory traffic


# Data sets


class Augmentation(Config):
    """What training changes in an image. Passes in order use neither."""

    crop: Literal["center", "random"] = Field("center", description="centre crop, or ADM's random crop")
    flip: bool = Field(False, description="mirror images at random; leave off where sides matter, as in digits")


def open_images(
    data: Data, image_size: int | None, split: Split = "train", augment: Augmentation | None = None
) -> "ImageDataset":
    """Open one split of a data set.

    Args:
        data: which data set, and how much of it.
        image_size: height and width to crop to, in pixels. None takes the images as they are, which must then have one
            size: nothing is cropped or resized. That is how finished samples are evaluated.
        split: "train" or "test". A source with one split is divided by a fixed shuffle.
        augment: what training changes; None is a centre crop without flips.

    Raises:
        UserError: nothing is there, nothing can be read, labels are out of range, or sizes differ without image_size.
    """
    source = DATASETS[data.name](data, split)
    labels, classes = source.labels, len(source.classes)
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(
            f"{source.name} has labels from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}; correct them"
        )
    rows = np.arange(len(labels))
    if source.whole and data.holdout > 0:
        shuffled, tests = _shuffle(len(rows), 0, 0), max(1, round(data.holdout * len(rows)))
        rows = np.sort(shuffled[:tests] if split == "test" else shuffled[tests:])
    if data.limit is not None:
        rows = np.sort(rows[_shuffle(len(rows), 1, 0)[: data.limit]])
    if not len(rows):
        raise UserError(
            f"{source.name} has {len(labels)} images and none for the {split} split; add images or set data.holdout=0"
        )
    return ImageDataset(source, rows, data, split, image_size, augment or Augmentation())


def _common_shape(source: Source, rows: np.ndarray) -> tuple[int, int]:
    """Height and width that all images share; reads the files' headers only.

    Raises:
        UserError: two images have different sizes (both are named), or none can be read.
    """
    if source.shape is not None:
        return source.shape
    first = None
    for row in rows.tolist():
        try:
            with source.open(row) as image:
                size = image.size
        except Exception:  # a broken image is reported when it is decoded
            continue
        first = first or (row, size)
        if size != first[1]:
            one, other = (f"{source.where(r)} is {w}x{h}" for r, (w, h) in (first, (row, size)))
            raise UserError(
                f"images of {source.name} have different sizes: {one} and {other} pixels; "
                "expected one size for images that are used as they are; set image_size to crop them"
            )
    if first is None:
        raise UserError(f"none of the {len(rows)} images of {source.name} can be read; expected image files")
    width, height = first[1]
    return height, width


class ImageDataset:
    """One split of a data set as images of one size. Small sets are decoded once and kept, large ones when read.

    Attributes:
        name: name of the source.
        image_size: height and width of the crops; None where images are taken as they are.
        shape: (H, W) of every image.
        labels: (N,) int64.
        classes: names of the classes.
        fingerprint: digest of what identifies the content: files and sizes (or bytes), split, crop and size.
        broken: place -> reason of the images that could not be read so far.
    """

    def __init__(
        self, source: Source, rows: np.ndarray, data: Data, split: Split, image_size: int | None, augment: Augmentation
    ):
        self.name, self.classes, self.labels = source.name, source.classes, source.labels[rows]
        self.split, self.image_size, self.augment = split, image_size, augment
        self.shape = (image_size, image_size) if image_size else _common_shape(source, rows)
        crop = f"{augment.crop} {image_size}" if image_size else "as they are"
        crop += f" {data.rgb}" if data.rgb != "adm" else ""
        self._rgb = data.rgb
        facts = f"{source.identity} {split} {crop} {digest(rows.astype('<i8').tobytes())}"
        self.fingerprint = digest(facts.encode())
        self.broken: dict[int, str] = {}
        # A handful is tolerated unless 0 is asked for, so that one bad file of twenty stops nobody; one must be good.
        self._allowed = min(max(5, int(data.max_broken * len(rows))), len(rows) - 1) if data.max_broken else 0
        self._source, self._rows, self._memory = source, rows, None
        if (augment.crop == "center" or not image_size) and len(rows) * 3 * math.prod(self.shape) <= MEMORY_LIMIT:
            memory = torch.zeros(len(rows), 3, *self.shape, dtype=torch.uint8)
            broken = {}
            for index in range(len(rows)):
                decoded = self._decode(index, None)
                if isinstance(decoded, str):
                    broken[index] = decoded
                else:
                    memory[index] = decoded
            self._note(broken)
            self._memory = memory

    def __len__(self) -> int:
        return len(self._rows)

    def describe(self) -> str:
        """Name, split, crop, count and digest, for the ``reference`` of a result."""
        height, width = self.shape
        crop = f"{self.augment.crop} crop {self.image_size}" if self.image_size else f"as they are, {height}x{width}"
        return f"{self.name} {self.split}, {crop}, {len(self) - len(self.broken)} images, {self.fingerprint}"

    def read(self, indices: Sequence[int] | np.ndarray | Tensor, seeds: np.ndarray | None = None) -> Batch:
        """Images by their places.

        Args:
            indices: (N,) places in the data set.
            seeds: (N,) int64 >= 0, one for each image's augmentation. With seeds a broken image is replaced by the
                next good one; without them images are plain centre crops and broken ones are left out.

        Raises:
            UserError: more images are broken than ``max_broken`` allows.
        """
        return self._batch(self[_Draw(np.asarray(indices, dtype=np.int64), seeds)])

    def __getitem__(self, draw: "_Draw") -> "_Read":
        """What data workers call; everyone else calls ``read``."""
        seeds = [None] * len(draw.indices) if draw.seeds is None else draw.seeds.tolist()
        pixels, places, kept, broken = [], [], [], {}
        for index, seed in zip(draw.indices.tolist(), seeds, strict=True):
            decoded = self._decode(index, seed)
            while isinstance(decoded, str):
                broken[index] = decoded
                if seed is None or len(broken) > self._allowed:
                    break
                index = (index + 1) % len(self)
                decoded = self._decode(index, seed)
            else:
                pixels.append(decoded)
                places.append(index)
                kept.append(seed)
        images = torch.stack(pixels) if pixels else torch.zeros(0, 3, *self.shape, dtype=torch.uint8)
        if self.augment.flip and draw.seeds is not None:
            mirrored = torch.tensor(kept) % 2 == 1
            images[mirrored] = images[mirrored].flip(-1)
        return _Read(images, torch.tensor(places, dtype=torch.int64), broken)

    def _decode(self, index: int, seed: int | None) -> Tensor | str:
        """Pixels (3, H, W) of one image, or why it cannot be read."""
        if index in self.broken:
            return self.broken[index]
        if self._memory is not None:
            return self._memory[index]
        try:
            with self._source.open(int(self._rows[index])) as image:
                if self.image_size is None:
                    pixels = np.array(to_rgb(image, self._rgb))
                elif seed is None or self.augment.crop == "center":
                    pixels = center_crop(image, self.image_size, self._rgb)
                else:
                    pixels = random_crop(image, self.image_size, torch.Generator().manual_seed(seed), self._rgb)
        except UserError:  # the whole source is damaged
            raise
        except Exception as error:  # image decoders raise nearly anything on a damaged file
            return one_line(error)
        if pixels.shape[:2] != self.shape:  # turned by its EXIF orientation
            return f"it is {pixels.shape[1]}x{pixels.shape[0]} pixels, the others are {self.shape[1]}x{self.shape[0]}"
        return torch.from_numpy(pixels).permute(2, 0, 1)  # (3, H, W)

    def _note(self, broken: dict[int, str]) -> None:
        """Remember broken images, stop when there are too many, and else warn once for each."""
        new = {index: reason for index, reason in broken.items() if index not in self.broken}
        self.broken |= new
        if len(self.broken) > self._allowed:
            first = "; ".join(f"{self._where(index)}: {reason}" for index, reason in list(self.broken.items())[:3])
            raise UserError(
                f"{len(self.broken)} of {len(self)} images of {self.name} cannot be read and at most {self._allowed} "
                f"are skipped ({first}); repair or remove them, or raise data.max_broken"
            )
        for index, reason in new.items():
            warnings.warn(f"skipping an image that cannot be read: {self._where(index)}: {reason}", stacklevel=3)

    def _where(self, index: int) -> str:
        return self._source.where(int(self._rows[index]))

    def _batch(self, read: "_Read") -> Batch:
        self._note(read.broken)
        return Batch(from_pixels(read.pixels), torch.from_numpy(self.labels)[read.indices], read.indices)


@dataclass(frozen=True)
class _Draw:
    """Images to read: places (N,) int64 and seeds (N,) of their augmentation, as ``ImageDataset.read`` takes them."""

    indices: np.ndarray
    seeds: np.ndarray | None = None


@dataclass(frozen=True)
class _Read:
    """What a data worker sends: pixels (N, 3, H, W) uint8, places (N,) int64, and broken places with the reasons."""

    pixels: Tensor
    indices: Tensor
    broken: dict[int, str]


# The order of training and evaluation


def training_batches(
    dataset: ImageDataset,
    global_batch: int,
    seed: int,
    first_step: int,
    steps: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """This rank's rows of the global batches of steps first_step..first_step+steps-1.

    A global batch is a function of (seed, step): starting at step k gives what an uninterrupted iteration gives, and
    the ranks' batches side by side are the batch of a single process.

    Args:
        dataset: what to learn from.
        global_batch: images in a step over all ranks.
        seed: of order and augmentation, >= 0.
        first_step: where to start.
        steps: how many batches.
        rank: number of this process.
        world: number of processes; must divide ``global_batch``.
        workers: processes that decode ahead. Images held in memory need none.

    Raises:
        UserError: the data set is smaller than the batch, ``world`` does not divide it, or too many images are broken.
    """
    rows = rank_rows(global_batch, rank, world)
    batch_indices(len(dataset), global_batch, seed, first_step)  # complain now rather than at the first batch
    draws = (
        _Draw(batch_indices(len(dataset), global_batch, seed, step)[rows], batch_seeds(global_batch, seed, step)[rows])
        for step in range(first_step, first_step + steps)
    )
    return _batches(dataset, draws, workers)


def batches_in_order(
    dataset: ImageDataset, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Go once over the images rank, rank + world, ...: centre crops, none twice, no padding, broken ones left out."""
    mine = np.arange(rank, len(dataset), world)
    draws = (_Draw(mine[start : start + batch_size]) for start in range(0, len(mine), batch_size))
    return (batch for batch in _batches(dataset, draws, workers) if len(batch.indices))


def batches_of(dataset: ImageDataset, draws: Iterator[np.ndarray], workers: int = 0) -> Iterator[Batch]:
    """A batch for each array (n,) of places, without augmentation; a broken image is replaced by the next good one.

    ``workers`` processes decode ahead, so ``draws`` is read ahead too.
    """
    return _batches(dataset, (_Draw(places, np.zeros(len(places), dtype=np.int64)) for places in draws), workers)


def _batches(dataset: ImageDataset, draws: Iterator[_Draw], workers: int) -> Iterator[Batch]:
    # Without a generator of its own the loader would draw from PyTorch's global random numbers.
    workers = 0 if dataset._memory is not None else workers
    loader = DataLoader(
        dataset, batch_size=None, sampler=draws, num_workers=workers, generator=torch.Generator(), collate_fn=_same
    )
    for read in loader:
        yield dataset._batch(read)


def _same(read: _Read) -> _Read:
    return read


def batch_indices(count: int, global_batch: int, seed: int, step: int) -> np.ndarray:
    """Places (global_batch,) int64 of a step's images: a shuffle for each epoch, its incomplete last batch dropped.

    Raises:
        UserError: the batch is larger than the set.
    """
    if not 0 < global_batch <= count:
        raise UserError(
            f"the global batch is {global_batch} and the training set has {count} images; set a batch of 1 to {count}"
        )
    epoch, batch = divmod(step, count // global_batch)
    return _shuffle(count, seed, epoch)[batch * global_batch : (batch + 1) * global_batch]


def batch_seeds(global_batch: int, seed: int, step: int) -> np.ndarray:
    """Seeds (global_batch,) int64 >= 0, one for whatever is random about each row of a step's global batch."""
    return (np.random.PCG64([2, seed, step]).random_raw(global_batch) >> np.uint64(1)).astype(np.int64)


def rank_rows(global_batch: int, rank: int, world: int) -> slice:
    """The rows of the global batch that belong to a rank.

    Raises:
        UserError: ``world`` does not divide ``global_batch``.
    """
    if global_batch % world:
        raise UserError(
            f"a global batch of {global_batch} cannot be shared by {world} processes; set a multiple of {world}"
        )
    return slice(rank * global_batch // world, (rank + 1) * global_batch // world)


@lru_cache(maxsize=2)  # 100 MB each for ImageNet's ten crops
def _shuffle(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation (count,) int64. NumPy promises that PCG64's raw stream never changes, but not ``permutation``."""
    order = np.random.PCG64([1, seed, epoch]).random_raw(count).argsort(kind="stable")
    order.flags.writeable = False
    return order
