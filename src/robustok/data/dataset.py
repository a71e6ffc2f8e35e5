"""A split of a data set as images of one size.

The data sets are in ``sources``, the crops to RGB pixels in ``crops``, several sizes for images of several shapes in
``buckets``, the order of training in ``order``, batches and worker processes in ``loader``.
"""

import math
import os
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from robustok.config import Config
from robustok.console import console
from robustok.data.crops import center_crop, oriented_size, random_crop, to_rgb
from robustok.data.folders import Split
from robustok.data.order import WINDOW, Blocks, shuffle, shuffle_in_window
from robustok.data.pixels import from_pixels
from robustok.data.sources import DATASETS, Data, Source
from robustok.errors import FileError, UserError, printable
from robustok.files import bytes_digest, one_line

MEMORY_LIMIT = 10**9  # bytes of decoded pixels up to which a data set is held in memory
CONTENT_LIMIT = 2**26  # bytes of files up to which their content is compared, not size and time of change


class Augmentation(Config):
    """Augmentation of training images; evaluation uses none."""

    crop: Literal["center", "random"] = Field("center", description="centre crop, or ADM's random crop")
    flip: bool = Field(False, description="mirror images at random; leave off where sides matter, as in digits")


def open_images(
    data: Data, image_size: int | None, split: Split = "train", augment: Augmentation | None = None
) -> "ImageDataset":
    """Open one split of a data set.

    Args:
        data: the data set.
        image_size: height and width to crop to, in pixels. None neither crops nor resizes, as samples are evaluated;
            all images must then have one size.
        split: "train" or "test". A source with one split is divided by a fixed shuffle.
        augment: None is a centre crop without flips.

    Raises:
        UserError: the data set is missing, empty or unreadable; labels are out of range; without ``image_size``, sizes
            differ; ``data.buckets`` is set, for which there is ``open_buckets``.
    """
    if data.buckets:
        raise UserError("data.buckets is for post-training of pipelines of diffusers alone; set data.buckets=false")
    source, rows = open_source(data, split)
    return ImageDataset(source, rows, data, split, image_size, augment or Augmentation())


def open_source(data: Data, split: Split) -> tuple[Source, np.ndarray]:
    """The images of a data set before any decoding, and the rows (N,) int64 of one split.

    Raises:
        UserError: as :func:`open_images`.
    """
    source = DATASETS[data.name](data, split)
    labels, classes = source.labels, len(source.classes)
    if len(labels) and not source.unlabelled and not 0 <= labels.min() <= labels.max() < classes:
        one = (labels.min(), labels.max()) == (1, classes)  # ILSVRC's numbers also have another order than the names
        hint = "count from 0 or give a list with the names of the classes" if one else "correct them"
        raise UserError(
            f"{source.name} has labels from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}; {hint}"
        )
    rows = np.arange(len(labels))
    if source.whole and data.holdout > 0:
        shuffled, tests = shuffle(len(rows), 0, 0), max(1, round(data.holdout * len(rows)))
        rows = np.sort(shuffled[:tests] if split == "test" else shuffled[tests:])
    if data.limit is not None:
        blocks = None if source.blocks is None else Blocks(source.blocks[rows])  # of which a few are kept as a whole
        order = shuffle(len(rows), 1, 0) if blocks is None else shuffle_in_window(blocks, 1, 0, window=0)
        rows = np.sort(rows[order[: data.limit]])
    if not len(rows):
        raise UserError(
            f"{source.name} has {len(labels)} images and none for the {split} split; add images or set data.holdout=0"
        )
    if source.blocks is not None and not source.captions:
        _warn_of_sorted(source, rows)
    if source.left_out:
        warnings.warn(f"left out of {source.name} {split}: {source.left_out}", stacklevel=3)
    return source, rows


def _warn_of_sorted(source: Source, rows: np.ndarray) -> None:
    """Warn where images that lie together have one class, so that a shuffle within a window leaves few in a batch."""
    labels = source.labels[rows]
    orders = shuffle_in_window(Blocks(source.blocks[rows]), 0, 0, WINDOW), shuffle(len(rows), 0, 0)
    found, mixed = (len(np.unique(labels[order[:WINDOW]])) for order in orders)
    if found < mixed / 2:
        warnings.warn(
            f"images of {source.name} are sorted by class, and data.streaming mixes neighbours only: the first "
            f"{WINDOW:,} of an epoch have {found:,} of {len(source.classes):,} classes; shuffle the files, or set "
            "data.streaming=false to copy them",
            stacklevel=3,
        )


@cache
def _print_once(line: str) -> None:
    console.print(printable(line), soft_wrap=True, highlight=False, markup=False)


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
        image_size: height and width of the crops, one number for squares; None where images are taken as they are.
        shape: (H, W) of every image.
        labels: (N,) int64; all -1 if they are unknown.
        classes: names of the classes.
        captions: of each label, where labels are numbers of captions and ``classes`` their digests; else empty.
        fingerprint: digest of what identifies the content: files and sizes (or bytes), split, crop and size.
        broken: index -> reason of the images that could not be read so far.
        blocks: of images that are downloaded when they are read; None for others.
    """

    def __init__(
        self,
        source: Source,
        rows: np.ndarray,
        data: Data,
        split: Split,
        image_size: int | tuple[int, int] | None,
        augment: Augmentation,
        held: bool = True,
    ):
        # Names of folders may be any bytes; those in manifests and results are text.
        self.name, self.classes = printable(source.name), list(map(printable, source.classes))
        self.labels, self.captions = source.labels[rows], list(source.captions)
        self.split, self.image_size, self.augment = split, image_size, augment
        if isinstance(image_size, tuple) and image_size[0] == image_size[1]:
            self.image_size = image_size = image_size[0]
        shape = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.shape = shape or _common_shape(source, rows)
        crop = f"{augment.crop} {self._size}" if image_size else "as they are"
        crop += f" {data.rgb}" if data.rgb != "adm" else ""
        self._rgb = data.rgb
        content = f"{source.identity} {split} {crop} {bytes_digest(rows.astype('<i8').tobytes())}"
        self.fingerprint = bytes_digest(content.encode())
        self.broken: dict[int, str] = {}
        # At least five are tolerated unless max_broken is 0, so that a small set may have a bad file; one must be good.
        self._allowed = min(max(5, int(data.max_broken * len(rows))), len(rows) - 1) if data.max_broken else 0
        self._source, self._rows, self._memory = source, rows, None
        self.blocks = None if source.blocks is None else Blocks(source.blocks[rows])
        held = held and self.blocks is None and (augment.crop == "center" or not image_size)
        if held and len(rows) * 3 * math.prod(self.shape) <= MEMORY_LIMIT:
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

    def check_labels(self) -> None:
        """Refuse images whose labels are unknown; call this where labels count.

        Raises:
            UserError: says why they are unknown, and what to do.
        """
        if self._source.unlabelled:
            raise UserError(self._source.unlabelled)

    def smaller(self) -> list[str]:
        """The images that are enlarged to be cropped, each with its size; reads the files' headers."""
        found = []
        for row in self._rows.tolist():
            with suppress(Exception), self._source.open(row) as image:  # a broken image is reported when it is decoded
                height, width = oriented_size(image, self._rgb)
                if height < self.shape[0] or width < self.shape[1]:
                    found.append(f"{self._source.where(row)} with {width}x{height}")
        return found

    def blocks_of(self, indices: np.ndarray) -> Blocks | None:
        """The blocks that images (N,) are downloaded in; None if they are not."""
        return None if self.blocks is None else Blocks(self.blocks.of[indices])

    @property
    def in_memory(self) -> bool:
        """Whether all images are decoded and held in memory."""
        return self._memory is not None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def _size(self) -> str:
        """For example 512x768, and 512 for a square."""
        return str(self.image_size) if isinstance(self.image_size, int) else "x".join(map(str, self.shape))

    def describe(self) -> str:
        """Name, split, crop, count and digest, for the ``reference`` of a result."""
        crop = f"{self.augment.crop} crop {self._size}" if self.image_size else f"as they are, {self._size}"
        return f"{self.name} {self.split}, {crop}, {len(self) - len(self.broken)} images, {self.fingerprint}"

    @cached_property
    def stamp(self) -> str:
        """Digest of the files' content, of large sets of their sizes and times of change: whether they were replaced.

        Unlike ``fingerprint`` it changes when a file is replaced by one of equal name and size. Empty where
        ``fingerprint`` is of the content already.
        """
        if self._source.stamp:
            return self._source.stamp
        states = [os.stat(file) for file in self._source.files if os.path.isfile(file)]
        if sum(state.st_size for state in states) <= CONTENT_LIMIT:
            lines = [bytes_digest(Path(file).read_bytes()) for file in self._source.files if os.path.isfile(file)]
        else:
            lines = [f"{state.st_size} {int(state.st_mtime)}" for state in states]
        return bytes_digest("\n".join(lines).encode(), 16) if lines else ""

    @property
    def names(self) -> list[str] | None:
        """Names of the image files below the folder that holds them all, without suffix; None for other sources."""
        if not self._source.names:
            return None
        return [self._source.names[row] for row in self._rows.tolist()]

    def read(self, indices: Sequence[int] | np.ndarray | Tensor, seeds: np.ndarray | None = None) -> "Batch":
        """Images by their indices.

        Args:
            indices: (N,) indices in the data set.
            seeds: (N,) int64 >= 0 of each image's augmentation; a broken image is then replaced by the next good one.
                None gives centre crops without flips and leaves broken images out.

        Raises:
            UserError: more images are broken than ``max_broken`` allows.
        """
        return self.to_batch(self[Draw(np.asarray(indices, dtype=np.int64), seeds)])

    def __getstate__(self) -> dict[str, Any]:
        """What a data worker needs: of a million files the paths alone, once."""
        source = replace(self._source, files=(), names=(), labels=self.labels[:0], captions=(), blocks=None)
        return self.__dict__ | {"_source": source, "captions": []}

    def __getitem__(self, draw: "Draw") -> "Read":
        """Decode images; data workers call this, other code calls ``read``."""
        seeds = [None] * len(draw.indices) if draw.seeds is None else draw.seeds.tolist()
        pixels, indices, kept, broken = [], [], [], {}
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
                indices.append(index)
                kept.append(seed)
        images = torch.stack(pixels) if pixels else torch.zeros(0, 3, *self.shape, dtype=torch.uint8)
        mirrored = torch.tensor(kept) % 2 == 1 if self.augment.flip and draw.seeds is not None else None
        return Read(images, np.array(indices, dtype=np.int64), broken, mirrored)

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
        except Exception as error:  # image decoders raise nearly anything on a damaged file
            if isinstance(error, UserError) and not isinstance(error, FileError):  # the whole source is damaged
                raise
            return one_line(error)
        if pixels.shape[:2] != self.shape:  # rotated by its EXIF orientation
            return f"it is {pixels.shape[1]}x{pixels.shape[0]} pixels, the others are {self.shape[1]}x{self.shape[0]}"
        return torch.from_numpy(pixels).permute(2, 0, 1)  # (3, H, W)

    def _note(self, broken: dict[int, str]) -> None:
        """Remember broken images and warn once for each.

        Raises:
            UserError: there are too many.
        """
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

    def _found(self) -> str:
        """Name, split, number of images and classes."""
        count, total, names = len(self), len(self._source.labels), self.classes
        shown = ", ".join(names) if len(names) < 8 else f"{', '.join(names[:3])}, ..., {names[-1]}"
        classes = f"{len(names):,} classes ({shown})" if len(names) > 1 else "one class"
        classes = "captions as labels" if self.captions else classes
        return f"{self.name} {self.split}: {count:,}{f' of {total:,}' if count < total else ''} images, {classes}"

    def _where(self, index: int) -> str:
        return self._source.where(int(self._rows[index]))

    def to_batch(self, read: "Read", draws: Any = None) -> "Batch":
        """Decoded pixels, mirrored where they are drawn so, with labels; notes the broken images.

        Raises:
            UserError: more images are broken than ``max_broken`` allows.
        """
        self._note(read.broken)
        if self._source.about:  # at the first batch, so that what is refused before is one line
            _print_once(f"data: {self._found()}; {self._source.about}")
        pixels = read.pixels
        if read.mirrored is not None:
            pixels = torch.where(read.mirrored[:, None, None, None], pixels.flip(-1), pixels)
        labels = torch.from_numpy(self.labels[read.indices])
        return Batch(pixels, labels, torch.from_numpy(read.indices), draws)


def described_shape(description: str) -> tuple[int, int] | None:
    """(H, W) of the images that :meth:`ImageDataset.describe` described; None where the text does not have it."""
    found = re.search(r", (?:(?:center|random) crop|as they are,) (\d+)(?:x(\d+))?, ", description)
    return None if found is None else (int(found[1]), int(found[2] or found[1]))


@dataclass(frozen=True)
class Draw:
    """Images to read: indices (N,) int64 and seeds (N,) of their augmentation, as ``ImageDataset.read`` takes them."""

    indices: np.ndarray
    seeds: np.ndarray | None = None


class Read(NamedTuple):
    """Decoded images.

    Attributes:
        pixels: (N, 3, H, W) uint8.
        indices: (N,) int64.
        broken: indices of images that could not be read, with the reasons.
        mirrored: (N,) bool, images to mirror; None mirrors none.
    """

    pixels: Tensor
    indices: np.ndarray
    broken: dict[int, str]
    mirrored: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Images with their labels and indices.

    Attributes:
        pixels: (N, 3, H, W) uint8, on the device that they were asked for.
        labels: (N,) int64, on the CPU.
        indices: (N,) int64 in the data set, the same in every run; on the CPU.
        draws: random numbers of the step that were made with the batch, if any.
    """

    pixels: Tensor
    labels: Tensor
    indices: Tensor
    draws: Any = None

    @property
    def images(self) -> Tensor:
        """(N, 3, H, W) float32 in [-1, 1], converted from the pixels at each call."""
        return from_pixels(self.pixels)
