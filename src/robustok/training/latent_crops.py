"""Training a decoder on crops of latents: images of 1024 pixels in the memory of smaller ones.

A convolutional decoder decodes a window of the grid of latents as it decodes the whole, but for the pixels near the
window's edge, which depend on latents outside of it. So the window is larger than the crop by a margin, and the loss
sees the crop alone. The edge of the image is no edge of the window: there the decoder pads as always.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.config import Config
from robustok.errors import UserError
from robustok.randomness import step_rng
from robustok.types import Tokenizer


class LatentCrop(Config):
    """Which part of each image is decoded in a step, drawn anew each time."""

    size: int | None = Field(
        None, ge=1, description="height and width of the part that the loss sees, in pixels; null: whole images"
    )
    margin: int | None = Field(
        None,
        ge=0,
        description="pixels around it that are decoded too, and left out of the loss; null: as far as the decoder's "
        "convolutions reach, so that the crop is decoded as in the whole image",
    )


Pair = tuple[int, int]  # of rows and columns


@dataclass(frozen=True)
class Cut:
    """Crops of some images; those without ``corners`` stay whole.

    Attributes:
        grid: rows and columns of all latents.
        size: of a crop, a square, in latents.
        window: rows and columns of what is decoded.
        factor: pixels along one side of a latent.
        corners: (top, left) of the crop of each image, in latents.
    """

    grid: Pair = (0, 0)
    size: int = 0
    window: Pair = (0, 0)
    factor: int = 1
    corners: tuple[Pair, ...] | None = None

    def latents(self, latents: Tensor) -> Tensor:
        """The windows of latents (N, L), (N, L, D) or (N, rows, columns, D), in the same order of dimensions."""
        if self.corners is None:
            return latents
        grids = latents if latents.ndim == 4 else latents.unflatten(1, self.grid)  # (N, h, w) or (N, h, w, D)
        (height, width), starts = self.window, map(self._start, self.corners)
        parts = [g[y : y + height, x : x + width] for g, (y, x) in zip(grids, starts, strict=True)]
        windows = torch.stack(parts)  # (N, height, width) or (N, height, width, D)
        return windows if latents.ndim == 4 else windows.flatten(1, 2)

    def decoded(self, images: Tensor) -> Tensor:
        """The crops of decoded windows (N, 3, H, W)."""
        if self.corners is None:
            return images
        pairs = zip(self.corners, map(self._start, self.corners), strict=True)
        return self._cut(images, [(y - top, x - left) for (y, x), (top, left) in pairs])

    def images(self, images: Tensor) -> Tensor:
        """The crops of whole images (N, 3, H, W), of any type."""
        return images if self.corners is None else self._cut(images, self.corners)

    def _start(self, corner: Pair) -> Pair:
        """Where the window of a crop starts: a margin before it, inside of the image."""
        y, x = (
            min(max(crop - (window - self.size) // 2, 0), side - window)
            for crop, window, side in zip(corner, self.window, self.grid, strict=True)
        )
        return y, x

    def _cut(self, images: Tensor, corners: Sequence[Pair]) -> Tensor:
        end, pixels = self.size * self.factor, [(y * self.factor, x * self.factor) for y, x in corners]
        return torch.stack([i[:, y : y + end, x : x + end] for i, (y, x) in zip(images, pixels, strict=True)])


WHOLE = Cut()


def join_cuts(cuts: Sequence[Cut]) -> Cut:
    """The crops of several parts of a batch."""
    if cuts[0].corners is None:
        return WHOLE
    return replace(cuts[0], corners=tuple(corner for cut in cuts for corner in cut.corners))


@dataclass(frozen=True)
class Cropping:
    """The sizes of crops, in latents; see :class:`Cut`."""

    grid: Pair
    size: int
    window: Pair
    factor: int

    def draw(self, global_batch: int, rows: slice, seed: int, step: int, objective: str) -> Cut:
        """Crops of a step, drawn for the global batch, of which a process takes its rows."""
        rng, ends = step_rng(seed, step, f"latent crops/{objective}"), [side - self.size + 1 for side in self.grid]
        if ends[0] == ends[1]:
            corners = torch.randint(ends[0], (global_batch, 2), generator=rng)
        else:
            corners = torch.stack([torch.randint(end, (global_batch,), generator=rng) for end in ends], dim=1)
        return Cut(self.grid, self.size, self.window, self.factor, tuple(map(tuple, corners[rows].tolist())))


def cropping(crop: LatentCrop, tokenizer: Tokenizer, shape: Pair | None = None) -> Cropping | None:
    """The sizes for a tokenizer; None where images are decoded whole.

    Args:
        crop: settings.
        tokenizer: whose decoder is trained.
        shape: height and width of the images; None: the tokenizer's own.

    Raises:
        UserError: a decoder that does not decode parts; sizes that do not fit it.
    """
    if crop.size is None:
        if crop.margin is not None:
            raise UserError("crop.margin is without crop.size; set the size of the crops, or drop the margin")
        return None
    side = math.isqrt(tokenizer.latent_shape[0])
    factor = tokenizer.image_size // side
    reach = _reach(tokenizer, side, factor)
    for name, value in (("size", crop.size), ("margin", crop.margin or 0)):
        if value % factor:
            raise UserError(f"crop.{name}={value} is not a multiple of the {factor} pixels of a latent; round it")
    shape = shape or (tokenizer.image_size, tokenizer.image_size)
    if crop.size > min(shape):
        pixels = f"{shape[0]}" if shape[0] == shape[1] else f"{shape[0]}x{shape[1]}"
        raise UserError(f"crop.size={crop.size} is larger than the images of {pixels} pixels; lower it")
    size, margin = crop.size // factor, -(-reach // factor) if crop.margin is None else crop.margin // factor
    rows, columns = (pixels // factor for pixels in shape)
    window = size + 2 * margin
    return Cropping((rows, columns), size, (min(rows, window), min(columns, window)), factor)


@torch.no_grad()
def _reach(tokenizer: Tokenizer, side: int, factor: int) -> int:
    """How many pixels the convolutions of a decoder reach to one side, all in a row: its receptive field's radius.

    Attention and group normalisation see the whole window, and are not counted.

    Raises:
        UserError: it does not decode a part of the grid.
    """
    small = max(2, side // 2)
    refusal = UserError(
        "crop.size needs a convolutional decoder, which decodes parts of a grid of latents; this one decodes whole "
        "images only; set crop.size=null"
    )
    if side * side != tokenizer.latent_shape[0]:
        raise refusal
    parameter = next(tokenizer.parameters())
    shape = (1, small * small) if tokenizer.kind == "discrete" else (1, small * small, tokenizer.latent_shape[1])
    latents = torch.zeros(shape, device=parameter.device, dtype=torch.long if len(shape) == 2 else parameter.dtype)
    found: list[tuple[int, int]] = []  # of each convolution: how far it reaches, height of its output

    def note_convolution(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        found.append(((module.kernel_size[-1] - 1) // 2 * module.dilation[-1], output.shape[-1]))

    modules = [m for part in tokenizer.decoder_modules() for m in part.modules()]
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d | nn.Conv3d)]
    hooks = [m.register_forward_hook(note_convolution) for m in convolutions]
    try:
        images = tokenizer.decode(latents)
    except (UserError, RuntimeError, ValueError):
        raise refusal from None
    finally:
        for hook in hooks:
            hook.remove()
    if not found or images.shape[-1] != small * factor:
        raise refusal
    return math.ceil(sum(reach * images.shape[-1] / width for reach, width in found))
