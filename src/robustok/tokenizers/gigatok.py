"""GigaTok: a convolutional autoencoder with transformers from its grid to a row of tokens, and back.

    images -> CNN -> grid -> transformer -> row of latents -> quantiser -> transformer -> grid -> CNN -> images

Source: Xiong et al., "GigaTok: Scaling Visual Tokenizers to 3 Billion Parameters for Autoregressive Image Generation"
(arXiv 2504.08736).
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from robustok.config import Config, Heads
from robustok.errors import UserError
from robustok.tokenizers.conv import (
    NORM_EPSILON,
    ConvConfig,
    Decoder,
    Encoder,
    Upsample,
    check_size,
    conv,
    to_grid,
    to_row,
)
from robustok.tokenizers.vq import VQConfig, VQTokenizer

PLAIN = ConvConfig(attention=(), middle_attention=False)


class TransformerConfig(Config):
    """Size of one of the two transformers."""

    width: int = Field(512, ge=1, description="width of the residual stream")
    depth: int = Field(6, ge=1, description="number of blocks")
    heads: Heads = 8


class AlignmentConfig(Config):
    """The MLP that GigaTok's training aligned with a frozen DINOv2; encoding and decoding do not use it."""

    width: int = Field(768, ge=1, description="width of the features it is aligned with")
    hidden: int = Field(3072, ge=1, description="hidden width")
    depth: int = Field(3, ge=1, description="transformer blocks of the decoder before the features that it reads")


class GigaTokConfig(VQConfig):
    """GigaTok; the defaults have the layout of its S-B model."""

    name: Literal["gigatok"] = "gigatok"
    encoder: ConvConfig = PLAIN
    decoder: ConvConfig = PLAIN
    z_channels: int = Field(256, ge=1, description="channels between the networks and the projection to the codebook")
    show_usage: bool = Field(
        True, description="whether exported files hold the usage of codes, as all published ones do"
    )
    latents: int = Field(256, ge=1, description="tokens per image, a power of two")
    grid_to_row: TransformerConfig = TransformerConfig()
    row_to_grid: TransformerConfig = TransformerConfig(width=768, depth=12, heads=12)
    adaptive_norm: bool = Field(True, description="statistics of the grid modulate every level of the decoder")
    depth_to_space: bool = Field(True, description="up-sample by depth to space; else by nearest neighbours")
    alignment: AlignmentConfig | None = Field(None, description="head that GigaTok's training aligned with DINOv2")

    @model_validator(mode="after")
    def _fits(self) -> "GigaTokConfig":
        if self.latents & (self.latents - 1):
            raise ValueError(f"latents {self.latents} is no power of two, as the pyramid of queries needs")
        if self.alignment is not None and self.alignment.depth > self.row_to_grid.depth:
            raise ValueError(
                f"alignment.depth {self.alignment.depth} exceeds {self.row_to_grid.depth} blocks; lower it"
            )
        return self

    @property
    def grid(self) -> int:
        """Height and width of the grid."""
        return self.image_size // self.patch_size

    @property
    def length(self) -> int:
        """L, latents per image."""
        return self.latents


class GigaTok(VQTokenizer):
    """GigaTok. Its tokens are a row without positions in the image; images have the one size it was trained for."""

    licence = "MIT"

    def __init__(self, config: GigaTokConfig) -> None:
        super().__init__(config)
        z = config.z_channels
        self.encoder = Encoder(config.encoder, z)
        self.grid_to_row = GridToRow(config)
        self.to_latent = nn.Linear(z, config.quantizer.dim)
        self.from_latent = nn.Linear(config.quantizer.dim, z)
        self.row_to_grid = RowToGrid(config)
        self.alignment = None if config.alignment is None else alignment_head(config)
        up = DepthToSpace if config.depth_to_space else Upsample
        half = AdaptiveDecoder if config.adaptive_norm else Decoder
        self.decoder = half(config.decoder, z, config.decoder.blocks + 1, up=up, lowest_first=True)

    def features(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to features (N, L, D) before the quantiser.

        Raises:
            UserError: images of another size.
        """
        check_size(images, self.image_size)
        return self.to_latent(self.grid_to_row(self.encoder(images)))  # (N, L, D)

    def decode_vectors(self, vectors: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Code vectors (N, L, D) to images (N, 3, H, W).

        Raises:
            UserError: another number of tokens than the tokenizer makes, or a grid: they are a row.
        """
        length = self.config.latents
        if vectors.shape[1] != length or grid not in (None, (1, length)):
            found = f"{vectors.shape[1]} tokens an image" if grid is None else f"a grid of {grid[0]} x {grid[1]}"
            raise UserError(f"got {found}, this tokenizer decodes a row of {length}; give tokens (N, {length})")
        return self.decoder(self.row_to_grid(self.from_latent(vectors)))

    def decoder_modules(self) -> Sequence[nn.Module]:
        """What post-training may train."""
        return [self.from_latent, self.row_to_grid, self.decoder]


class CrossBlock(nn.Module):
    """Self-attention, cross-attention, MLP; positions are added to queries and keys, not to values."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.self_attn = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, positions: Tensor, memory: Tensor, memory_positions: Tensor) -> Tensor:
        """Queries (N, Q, width) that attend to the memory (N, M, width), each with its positions."""
        h = self.norm1(x)
        x = x + self.self_attn(h + positions, h + positions, h, need_weights=False)[0]  # (N, Q, width)
        h = self.norm2(x) + positions
        # The memory was normalised before its embedding.
        x = x + self.multihead_attn(h, memory + memory_positions, memory, need_weights=False)[0]
        return x + self.linear2(F.gelu(self.linear1(self.norm3(x))))


class GridToRow(nn.Module):
    """Grid (N, z, h, w) to a row (N, L, z): queries attend to the grid."""

    def __init__(self, config: GigaTokConfig) -> None:
        super().__init__()
        z, size = config.z_channels, config.grid_to_row
        self.latents = config.latents
        self.ln_pre, self.embed = nn.LayerNorm(z), nn.Linear(z, size.width)
        self.grid_positions = positions(config.grid**2, size.width)
        self.latent_positions = positions(config.latents, size.width)
        self.global_proj = nn.Linear(size.width, size.width)
        self.transformer = nn.ModuleList(CrossBlock(size) for _ in range(size.depth))
        self.ln_post, self.conv_out = nn.LayerNorm(size.width), nn.Linear(size.width, z)

    def forward(self, grid: Tensor) -> Tensor:
        """Grid to row."""
        memory = self.embed(self.ln_pre(to_row(grid)))  # (N, h w, width)
        x = self.global_proj(pyramid(to_grid(memory, tuple(grid.shape[2:])), self.latents))  # (N, L, width)
        for block in self.transformer:
            x = block(x, self.latent_positions, memory, self.grid_positions)
        return self.conv_out(self.ln_post(x))  # (N, L, z)


class RowToGrid(nn.Module):
    """Row (N, L, z) to a grid (N, z, h, w): every position starts from the first latent and attends to the row."""

    def __init__(self, config: GigaTokConfig) -> None:
        super().__init__()
        z, size = config.z_channels, config.row_to_grid
        self.ln_pre, self.embed = nn.LayerNorm(z), nn.Linear(z, size.width)
        self.grid_positions = positions(config.grid**2, size.width)
        self.latent_positions = positions(config.latents, size.width)
        self.transformer = nn.ModuleList(CrossBlock(size) for _ in range(size.depth))
        self.ln_post, self.conv_out = nn.LayerNorm(size.width), conv(size.width, z)

    def states(self, row: Tensor, depth: int) -> Tensor:
        """The positions of the grid (N, h w, width) after the first ``depth`` blocks."""
        memory = self.embed(self.ln_pre(row))  # (N, L, width)
        x = memory[:, :1].expand(-1, self.grid_positions.shape[1], -1)  # (N, h w, width)
        for block in self.transformer[:depth]:
            x = block(x, self.grid_positions, memory, self.latent_positions)
        return x

    def forward(self, row: Tensor) -> Tensor:
        """Row to grid."""
        return self.conv_out(to_grid(self.ln_post(self.states(row, len(self.transformer)))))  # (N, z, h, w)


def positions(length: int, width: int) -> nn.Parameter:
    """Learned positions (1, length, width)."""
    return nn.Parameter(width**-0.5 * torch.randn(1, length, width))


def pyramid(grid: Tensor, count: int) -> Tensor:
    """Averages of the grid (N, C, h, w) over 1, then 1, 2, 4, ... blocks, (N, count, C); count is a power of two.

    Every level halves the blocks of the one before, first their width, then their height.
    """
    rows = columns = 1
    averages = [grid.mean((2, 3))[:, None]]  # (N, 1, C)
    for _ in range(count.bit_length() - 1):
        averages.append(to_row(F.adaptive_avg_pool2d(grid, (rows, columns))))  # (N, rows columns, C)
        rows, columns = (rows, 2 * columns) if rows == columns else (2 * rows, columns)
    return torch.cat(averages, 1)  # (N, count, C)


def alignment_head(config: GigaTokConfig) -> nn.Sequential:
    """Three layers from the states of the grid to the features that these are aligned with."""
    head, width = config.alignment, config.row_to_grid.width
    sizes = (nn.Linear(width, head.hidden), nn.Linear(head.hidden, head.hidden), nn.Linear(head.hidden, head.width))
    return nn.Sequential(sizes[0], nn.SiLU(), sizes[1], nn.SiLU(), sizes[2])


class AdaptiveNorm(nn.Module):
    """A group norm whose scale and shift are computed from standard deviation and mean of the decoder's input."""

    def __init__(self, channels: int, features: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=NORM_EPSILON, affine=False)
        self.gamma, self.beta = nn.Linear(features, channels), nn.Linear(features, channels)

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        """(N, channels, H, W), modulated by the grid (N, features, h, w)."""
        scale = self.gamma((grid.var((2, 3)) + NORM_EPSILON).sqrt())  # (N, channels)
        return self.norm(x) * scale[..., None, None] + self.beta(grid.mean((2, 3)))[..., None, None]


class AdaptiveDecoder(Decoder):
    """The convolutional decoder with an adaptive norm before every level."""

    def __init__(self, config: ConvConfig, channels: int, blocks: int, **parts: Any) -> None:
        super().__init__(config, channels, blocks, **parts)
        for level in self.levels.values():
            level.adaptive = AdaptiveNorm(level.blocks[0].conv1.in_channels, channels, config.groups)

    def forward(self, grid: Tensor) -> Tensor:
        """Grid (N, channels, h, w) to images (N, 3, H, W)."""
        x = self.middle(self.conv_in(grid))  # (N, widths[-1], h, w)
        for level in self.levels.values():
            x = level.upsample(level(level.adaptive(x, grid)))  # (N, widths[level], 2 h, 2 w)
        return self.conv_out(F.silu(self.norm_out(x)))


class DepthToSpace(nn.Module):
    """A convolution to four times the channels, which become blocks of two by two."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, 2 H, 2 W)."""
        x = self.conv1(x).unflatten(1, (2, 2, -1))  # (N, row, column, C, H, W)
        return x.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)  # (N, C, 2 H, 2 W)
