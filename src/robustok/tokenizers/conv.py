"""What the convolutional tokenizers share: blocks, encoder, decoder, and the shapes of images and latents.

LlamaGen, VA-VAE, GigaTok and MaskGIT all descend from the network of VQGAN (Esser et al., arXiv 2012.09841): levels of
residual blocks, each at half the resolution of the one before. What differs in one of them is in its own file.

Level 0 of an encoder has the full resolution. The levels of a decoder are numbered as in its authors' code: from the
full resolution, too, or in the order of computation.
"""

from collections.abc import Callable

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from robustok.config import Config
from robustok.errors import UserError

NORM_EPSILON = 1e-6


class ConvConfig(Config):
    """Size of a convolutional encoder or decoder; the defaults are VQ-16's."""

    width: int = Field(128, ge=1, description="channels at full resolution, before the multiplier")
    multipliers: tuple[int, ...] = Field(
        (1, 1, 2, 2, 4), min_length=1, description="channels of each level as multiples of width, full resolution first"
    )
    blocks: int = Field(2, ge=1, description="residual blocks a level; decoders of the VQGAN kind have one more")
    attention: tuple[int, ...] | None = Field(
        None, description="levels with attention, 0 is the full resolution; null: only the lowest"
    )
    middle_blocks: int = Field(2, ge=1, description="residual blocks at the lowest resolution, between the levels")
    middle_attention: bool = Field(True, description="attention after the first of these")
    groups: int = Field(32, ge=1, description="groups of the group norms; must divide the channels of every level")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside residual blocks, in training")

    @model_validator(mode="after")
    def _groups_fit(self) -> "ConvConfig":
        for channels in (self.width, *self.widths):
            if channels % self.groups:
                raise ValueError(f"groups {self.groups} do not divide {channels} channels; choose a divisor")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, full resolution first."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent."""
        return 2 ** (len(self.multipliers) - 1)

    def attends(self, level: int) -> bool:
        """Whether a level has attention."""
        return level == len(self.multipliers) - 1 if self.attention is None else level in self.attention


class GridConfig(Config):
    """A convolutional tokenizer whose latents are a grid."""

    image_size: int = Field(256, ge=1, description="height and width of the images it is used at, in pixels")
    encoder: ConvConfig = ConvConfig()
    decoder: ConvConfig = ConvConfig()

    @model_validator(mode="after")
    def _levels_fit(self) -> "GridConfig":
        if self.encoder.factor != self.decoder.factor or self.image_size % self.encoder.factor:
            raise ValueError(
                f"the encoder shrinks by {self.encoder.factor}, the decoder enlarges by {self.decoder.factor}, "
                f"image_size is {self.image_size}; give both as many multipliers, and a multiple as image_size"
            )
        return self

    @property
    def patch_size(self) -> int:
        """Pixels along one side of a latent."""
        return self.encoder.factor

    @property
    def length(self) -> int:
        """L, latents per image."""
        return (self.image_size // self.patch_size) ** 2


def group_norm(channels: int, config: ConvConfig) -> nn.GroupNorm:
    """A group norm with the epsilon of this family of networks."""
    return nn.GroupNorm(config.groups, channels, eps=NORM_EPSILON)


def conv(channels: int, out: int, kernel: int = 3, bias: bool = True) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=bias)


class ResidualBlock(nn.Module):
    """Norm, swish, convolution, twice; a 1x1 convolution of the input where the number of channels changes."""

    def __init__(self, channels: int, out: int, config: ConvConfig) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels, config), conv(channels, out)
        self.norm2, self.conv2 = group_norm(out, config), conv(out, out)
        self.dropout = nn.Dropout(config.dropout)
        self.shortcut = nn.Identity() if channels == out else conv(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))  # (N, out, H, W)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Self-attention of all positions of the grid, with a single head."""

    def __init__(self, channels: int, config: ConvConfig) -> None:
        super().__init__()
        self.norm = group_norm(channels, config)
        self.q, self.k, self.v, self.proj_out = (conv(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))  # (N, H W, C) each
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]  # (N, H W, C)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))  # (N, C, H, W)


class Downsample(nn.Module):
    """A convolution of stride 2, padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


Block = Callable[[int, int, ConvConfig], nn.Module]
Resample = Callable[[int], nn.Module]


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the level has it."""

    def __init__(self, number: int, channels: int, blocks: int, config: ConvConfig, block: Block) -> None:
        super().__init__()
        out = config.widths[number]
        self.blocks = nn.ModuleList(block(channels if i == 0 else out, out, config) for i in range(blocks))
        attended = blocks if config.attends(number) else 0
        self.attentions = nn.ModuleList(Attention(out, config) for _ in range(attended))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, out, H, W)."""
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[i](x)
        return x


def middle(config: ConvConfig, block: Block) -> nn.Sequential:
    """Blocks at the lowest resolution, between the levels and the latents."""
    width = config.widths[-1]
    attention = [Attention(width, config)] if config.middle_attention else []
    first, *others = (block(width, width, config) for _ in range(config.middle_blocks))
    return nn.Sequential(first, *attention, *others)


class Encoder(nn.Module):
    """Images (N, 3, H, W) to (N, channels, H / factor, W / factor)."""

    def __init__(
        self, config: ConvConfig, channels: int, block: Block = ResidualBlock, down: Resample = Downsample
    ) -> None:
        super().__init__()
        self.conv_in = conv(3, config.width)
        self.levels = nn.ModuleList()
        width = config.width
        for number, out in enumerate(config.widths):
            level = Level(number, width, config.blocks, config, block)
            level.downsample = down(out) if number + 1 < len(config.widths) else nn.Identity()
            self.levels.append(level)
            width = out
        self.middle = middle(config, block)
        self.norm_out = group_norm(width, config)
        self.conv_out = conv(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Images to features."""
        x = self.conv_in(x.contiguous())  # (N, width, H, W); contiguous as in to_grid
        for level in self.levels:
            x = level.downsample(level(x))  # (N, widths[level], half, half)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Features (N, channels, h, w) to images (N, 3, factor h, factor w).

    Args:
        config: sizes.
        channels: of the features.
        blocks: residual blocks a level.
        block: makes a residual block.
        up: makes what doubles the resolution.
        lowest_first: number the levels in the order of computation, rather than from the full resolution.
    """

    def __init__(
        self,
        config: ConvConfig,
        channels: int,
        blocks: int,
        block: Block = ResidualBlock,
        up: Resample = Upsample,
        lowest_first: bool = False,
    ) -> None:
        super().__init__()
        width = config.widths[-1]
        self.conv_in = conv(channels, width)
        self.middle = middle(config, block)
        self.levels = nn.ModuleDict()  # in the order of computation, whatever their numbers
        for order, number in enumerate(reversed(range(len(config.widths)))):
            level = Level(number, width, blocks, config, block)
            width = config.widths[number]
            level.upsample = up(width) if number else nn.Identity()
            self.levels[str(order if lowest_first else number)] = level
        self.norm_out = group_norm(width, config)
        self.conv_out = conv(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Features to images."""
        x = self.middle(self.conv_in(x))  # (N, widths[-1], h, w)
        for level in self.levels.values():
            x = level.upsample(level(x))  # (N, widths[level], 2 h, 2 w)
        return self.conv_out(F.silu(self.norm_out(x)))


# Shapes of images and latents


def check_images(images: Tensor, factor: int) -> None:
    """Refuse images that a convolutional encoder cannot take.

    Raises:
        UserError: no images (N, 3, H, W), or sides that are no multiples of ``factor``.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
        raise UserError(
            f"got images of shape {tuple(images.shape)}, this tokenizer takes (N, 3, H, W) with H and W divisible "
            f"by {factor}; resize them"
        )


def image_problems(images: Tensor, reconstructions: Tensor) -> list[str]:
    """Problems with images and their reconstructions, both (N, 3, H, W), as sentences; empty if there are none."""
    found, low, high = [], images.min().item(), images.max().item()
    if low < -1.001 or high > 1.001:
        found.append(f"The images range from {low:.3g} to {high:.3g}, but a tokenizer takes [-1, 1].")
    elif low >= 0:
        found.append(f"The lowest value of the images is {low:.3g}: they seem to be in [0, 1], not in [-1, 1].")
    constant = images.mean((2, 3), keepdim=True)  # (N, 3, 1, 1)
    error, plain = ((images - other).square().mean().item() for other in (reconstructions, constant))
    if not error < plain:
        found.append(
            f"The squared error of the reconstructions ({error:.3g}) is larger than that of the mean colours "
            f"({plain:.3g}): the weights are untrained, or the value range or the file is wrong."
        )
    return found


def check_size(images: Tensor, size: int) -> None:
    """Refuse images that are not (N, 3, size, size).

    Raises:
        UserError: another shape.
    """
    if images.shape[1:] != (3, size, size):
        raise UserError(
            f"got images of shape {tuple(images.shape)}, this tokenizer takes (N, 3, {size}, {size}); resize them"
        )


def to_row(grid: Tensor) -> Tensor:
    """Latents (N, D, h, w) to (N, h w, D), row by row."""
    return grid.flatten(2).transpose(1, 2)


def to_grid(latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Latents (N, L, D) to (N, D, h, w); a square unless the grid (h, w) is given, or latents (N, h, w, D).

    Raises:
        UserError: L is not h w.
    """
    if latents.ndim == 4:
        latents, grid = latents.flatten(1, 2), tuple(latents.shape[1:3])
    length = latents.shape[1]
    rows, columns = grid or (round(length**0.5),) * 2
    if rows * columns != length:
        raise UserError(
            f"got {length} latents an image, which fill no grid of {rows} x {columns}; "
            "give latents of whole images, and grid=(rows, columns) unless these are square"
        )
    # Contiguous: with channels last in memory, the CPU's group norm loses up to three digits.
    return latents.transpose(1, 2).reshape(len(latents), -1, rows, columns).contiguous()  # (N, D, h, w)
