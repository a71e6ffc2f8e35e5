"""Aspect-ratio buckets: several sizes for photographs of several shapes, so that they are not cut to squares.

Each photograph goes to the size that is nearest in shape. A bucket is a data set of one size, and has caches of latents
of its own, in folders named HEIGHTxWIDTH:

    runs/post/latents/512x768/  768x512/  640x640/
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from robustok.data.crops import oriented_size
from robustok.data.dataset import MEMORY_LIMIT, Augmentation, ImageDataset, open_images, open_source
from robustok.data.folders import Split
from robustok.data.sources import Data
from robustok.errors import UserError, printable
from robustok.types import Tokenizer

STEP = 64  # pixels between sizes, as the training of Stable Diffusion XL has it; less for small images
LONGEST = 2  # longer side over shorter side


def open_buckets(data: Data, tokenizer: Tokenizer, split: Split = "train") -> list[ImageDataset]:
    """Open one split of a data set at the sizes of its buckets, those without images left out.

    Args:
        data: the data set; without ``buckets`` it has one size, that of the tokenizer.
        tokenizer: which is to encode the images.
        split: as for :func:`robustok.data.dataset.open_images`.

    Raises:
        UserError: the tokenizer takes images of one size, or a bucket's size is no multiple of what it needs; images
            are streamed; or as ``open_images``.
    """
    if not data.buckets:
        return [open_images(data, tokenizer.image_size, split)]
    sizes = _sizes(data, tokenizer)
    source, rows = open_source(data, split)
    if source.blocks is not None:
        raise UserError(
            "data.buckets reads the size of every photograph first, for which data.streaming=true would download all; "
            "set data.streaming=false"
        )
    shapes, found = np.log([height / width for height, width in sizes]), np.full(len(rows), -1)
    for i, row in enumerate(rows.tolist()):
        with suppress(Exception), source.open(row) as image:  # a broken image is reported when it is decoded
            height, width = oriented_size(image, data.rgb)
            found[i] = np.abs(np.log(height / width) - shapes).argmin()
    found[found < 0] = np.bincount(found[found >= 0], minlength=len(sizes)).argmax()
    pixels = sum(sizes[i][0] * sizes[i][1] for i in found.tolist())
    held = 3 * pixels <= MEMORY_LIMIT  # all of them or none
    buckets = []
    for i, size in enumerate(sizes):
        if (found == i).any():
            own = replace(source, about=source.about and f"{source.about}, bucket {bucket_name(size)}")
            buckets.append(ImageDataset(own, rows[found == i], data, split, size, Augmentation(), held))
    return buckets


def _sizes(data: Data, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Height and width of each bucket, those without images too.

    Raises:
        UserError: the tokenizer takes images of one size, or a size is no multiple of what it needs.
    """
    if not hasattr(tokenizer, "encode_grid"):
        raise UserError(
            "data.buckets is for autoencoders of diffusers, whose images may have any size; a tokenizer of family "
            f"{tokenizer.config.name} takes one; set data.buckets=false"
        )
    unit = max(8, 2 * tokenizer.factor)  # two latents, which some pipelines make one of; Stable Diffusion's ask for 8
    if data.buckets is True:
        return bucket_sizes(tokenizer.image_size, unit)
    for height, width in data.buckets:
        if height % unit or width % unit:
            raise UserError(f"data.buckets has {height}x{width}, expected multiples of {unit} pixels; round them")
    return list(dict.fromkeys(data.buckets))


def bucket_sizes(size: int, unit: int) -> list[tuple[int, int]]:
    """Sizes (height, width) of no more pixels than a square, from 1:2 to 2:1, the widest first.

    Sides are multiples of 64 pixels as in the training of Stable Diffusion XL (Podell et al., arXiv 2307.01952), for
    small images of an eighth of the square's side.

    Args:
        size: side of the square, which is among them.
        unit: of which all sides are multiples.
    """
    step = max(unit, min(STEP, size // 8) // unit * unit)
    shorter = range(step, size, step)
    wide = [(side, size * size // side // step * step) for side in shorter]
    wide = [(height, width) for height, width in wide if height < width <= LONGEST * height]
    return [*wide, (size, size), *((width, height) for height, width in reversed(wide))]


def check_sizes(buckets: Sequence[ImageDataset]) -> None:
    """Refuse images that would be enlarged; reads the files' headers, unless they would be downloaded for it.

    Raises:
        UserError: says how many are smaller and names three.
    """
    small, smallest = [], []
    for data in buckets:
        found = data.smaller() if data.blocks is None else []
        small += found
        smallest += [bucket_name(data.shape)] * bool(found)
    if not small:
        return
    shown = printable(", ".join(small[:3]) + (", ..." if len(small) > 3 else ""))
    count = f"{len(small):,} of {sum(map(len, buckets)):,} images are smaller than"
    if len(buckets) == 1:
        size = min(buckets[0].shape)
        raise UserError(
            f"{count} the pipeline's {size} pixels ({shown}); move them away, or set tokenizer.config.image_size"
        )
    raise UserError(
        f"{count} their bucket, of height x width {', '.join(smallest)} ({shown}, width x height); move them away, or "
        "set smaller data.buckets or tokenizer.config.image_size"
    )


def describe_buckets(data: Data, buckets: Sequence[ImageDataset], batch_size: int) -> str:
    """How many images each bucket has, and which have too few: none of those given, or less than a batch."""
    found = {bucket_name(bucket.shape): len(bucket) for bucket in buckets}
    words = f"buckets of {buckets[0].name} {buckets[0].split} (height x width: images): "
    words += ", ".join(f"{name}: {count:,}" for name, count in found.items())
    given = [] if data.buckets is True else map(bucket_name, data.buckets)
    if empty := [name for name in dict.fromkeys(given) if name not in found]:
        words += f"; none in {', '.join(empty)}, left out"
    few = [name for name, count in found.items() if count < batch_size]
    if few and buckets[0].split == "train":
        words += f"; fewer than batch_size in {', '.join(few)}, which are repeated in a batch"
    return words


def bucket_name(shape: tuple[int, int]) -> str:
    """The name of a bucket's folder, HEIGHTxWIDTH."""
    return "x".join(map(str, shape))


def bucket_folder(path: Path, data: Data, bucket: ImageDataset) -> Path:
    """Where a folder of latents has those of a bucket; the folder itself without buckets."""
    return path / bucket_name(bucket.shape) if data.buckets else path


def shares(count: int, sizes: Sequence[int]) -> list[int]:
    """``count`` divided in proportion to ``sizes``, with at least one for each."""
    ends = np.floor(np.cumsum(sizes) * (count / sum(sizes)) + 0.5).astype(int)
    return [max(1, part) for part in np.diff(ends, prepend=0).tolist()]
