"""MAETok: a ViT autoencoder whose latents are a row of continuous vectors, without quantiser and without KL term.

Source: Chen et al., "Masked Autoencoders Are Effective Tokenizers for Diffusion Models" (arXiv 2502.03444).

    images -> patches + latent tokens -> ViT -> latent tokens -> linear -> latents
    latents -> linear -> mask tokens + latents -> ViT -> pixels

Patches have learned positions, or rotary positions in two dimensions with learned frequencies (Heo et al., arXiv
2403.13298). Parameters have the names of the authors' checkpoints. Small models train from scratch as a plain
autoencoder (:meth:`MAETok.forward`), best with ``init=local layer_scale=null positions=learned``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from timm.layers import Mlp
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn

from robustok.config import Config, Heads
from robustok.errors import UserError
from robustok.tokenizers.conv import check_size
from robustok.tokenizers.robustok import unpatchify

LAYER_NORM_EPSILON = 1e-6


class TransformerConfig(Config):
    """Size of a vision transformer; the defaults are ViT-B."""

    width: int = Field(768, ge=1, description="width of the residual stream")
    depth: int = Field(12, ge=1, description="number of blocks")
    heads: Heads = 12


class MAETokConfig(Config):
    """A MAETok tokenizer; the defaults are the published ImageNet 256x256 model, with 128 latents of width 32."""

    name: Literal["maetok"] = "maetok"
    image_size: int = Field(256, ge=1, description="height and width of the images in pixels")
    patch_size: int = Field(16, ge=1, description="height and width of a patch in pixels; must divide image_size")
    latents: int = Field(128, ge=1, description="latents per image")
    latent_dim: int = Field(32, ge=1, description="width of a latent")
    encoder: TransformerConfig = TransformerConfig()
    decoder: TransformerConfig = TransformerConfig()
    positions: Literal["rotary", "learned"] = Field(
        "rotary", description="positions of the patches: rotary with learned frequencies, or one learned vector each"
    )
    rotary_base: float = Field(10.0, gt=1, description="spread of the frequencies from which rotary positions start")
    decoder_class_token: bool = Field(False, description="whether the decoder has a class token")
    encoder_mask_token: bool = Field(
        False, description="whether the weights hold the vector that replaced masked patches in MAETok's training"
    )
    layer_scale: float | None = Field(1e-5, description="initial LayerScale; null is none")
    init: Literal["dinov2", "local"] = Field(
        "dinov2", description="dinov2: as in DINOv2; local: tokens first attend to their own position, for small models"
    )
    latent_mean: float = Field(0.0, description="mean of all latents, subtracted for a diffusion model")
    latent_std: float = Field(1.0, gt=0, description="standard deviation of all latents, by which they are divided")

    @model_validator(mode="after")
    def _sizes_fit(self) -> "MAETokConfig":
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        for side in (self.encoder, self.decoder):
            if self.positions == "rotary" and side.width // side.heads % 4:
                raise ValueError(f"rotary positions need heads of a multiple of 4, got {side.width // side.heads}")
        return self

    @property
    def grid(self) -> int:
        """Patches per side of an image."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class AutoencoderOutput:
    """What the training forward of an autoencoder returns.

    Attributes:
        reconstructions: (N, 3, H, W), not clamped.
        latents: (N, L, D), not normalised.
    """

    reconstructions: Tensor
    latents: Tensor


class MAETok(nn.Module):
    """Continuous tokenizer. See :class:`robustok.types.Tokenizer` for the contract.

    Its latents are not normalised. A diffusion model needs a mean of 0 and a standard deviation of 1:
    :meth:`normalise` them before it, :meth:`denormalise` its samples before :meth:`decode`.

    Attributes:
        image_range: values of the images that the authors' code takes.
        licence: of the published weights.
    """

    kind = "continuous"
    image_range = (-1.0, 1.0)
    latent_multiplier = None
    latent_space: str | None = None
    licence = "apache-2.0 according to the model page; the code has no licence file"

    def __init__(self, config: MAETokConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.latent_shape = (config.latents, config.latent_dim)
        self.latent_mean, self.latent_std = config.latent_mean, config.latent_std
        self.encoder = Encoder(config)
        self.quant_conv = nn.Linear(config.encoder.width, config.latent_dim)
        self.post_quant_conv = nn.Linear(config.latent_dim, config.decoder.width)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to latents (N, L, D), not normalised.

        Raises:
            UserError: images of another size.
        """
        check_size(images, self.image_size)
        return self.quant_conv(self.encoder(images))  # (N, L, D)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, L, D), not normalised, to images (N, 3, H, W), nominally in [-1, 1], not clamped.

        Raises:
            UserError: latents of another shape.
        """
        if latents.ndim != 3 or latents.shape[1:] != self.latent_shape:
            raise UserError(
                f"got latents of shape {tuple(latents.shape)}, this tokenizer decodes "
                f"(N, {self.latent_shape[0]}, {self.latent_shape[1]}): the row of latents first, their width last"
            )
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, images: Tensor) -> AutoencoderOutput:
        """Training forward of a plain autoencoder: images (N, 3, H, W) in [-1, 1] to reconstructions and latents."""
        latents = self.encode(images)
        return AutoencoderOutput(reconstructions=self.decode(latents), latents=latents)

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents of :meth:`encode` to those that a diffusion model takes."""
        return (latents - self.latent_mean) / self.latent_std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo :meth:`normalise`."""
        return latents * self.latent_std + self.latent_mean

    def decoder_modules(self) -> Sequence[nn.Module]:
        """What post-training may train."""
        return [self.post_quant_conv, self.decoder]

    @torch.no_grad()
    def check(self, images: Tensor | None = None) -> list[str]:
        """Problems with the latent statistics, or with a few dozen images (N, 3, H, W), as sentences."""
        problems = []
        if (self.latent_mean, self.latent_std) == (0.0, 1.0):
            problems.append(
                "The latent statistics are left at mean 0 and standard deviation 1: latents are not normalised; "
                "give vq_mean and vq_std of the authors' config.json."
            )
        if images is None:
            return problems
        low, high = images.min().item(), images.max().item()
        if low >= 0 or low < -1.01 or high > 1.01:
            problems.append(f"The images range from {low:.3g} to {high:.3g}; this tokenizer takes [-1, 1].")
        std = self.encode(images).std().item()
        if not 0.5 < std / self.latent_std < 2:
            inverse = "; that is its inverse." if 0.5 < std * self.latent_std < 2 else "."
            problems.append(
                f"Latents have a standard deviation of {std:.3g}, latent_std is {self.latent_std:.3g}{inverse}"
            )
        return problems


class LatentTransformer(nn.Module):
    """What encoder and decoder share: a ViT over ``[class token, patches, latents]``.

    Args:
        config: of the tokenizer.
        size: of this transformer.
        class_token: whether there is one.
        projection: embeds patches.
    """

    def __init__(self, config: MAETokConfig, size: TransformerConfig, class_token: bool, projection: nn.Module) -> None:
        super().__init__()
        self.patches, self.prefix, self.heads = config.grid**2, int(class_token), size.heads
        self.model = VisionTransformer(config, size, class_token, projection)
        positions = self.model.pos_embed.detach()[:, 1:]  # (1, P, W)
        # With init=local, latents start at positions of patches, evenly spread.
        chosen = torch.linspace(0, self.patches - 1, config.latents).round().long()
        start = positions[:, chosen] if config.init == "local" else 0.02 * torch.randn(1, config.latents, size.width)
        self.latent_pos_embed = nn.Parameter(start.clone())  # (1, L, W)
        self.rotary = config.positions == "rotary"
        if self.rotary:
            self.freqs = nn.Parameter(rotary_frequencies(size, config.rotary_base))  # (2, depth, W / 2)
            rows, columns = torch.meshgrid(*[torch.arange(config.grid).float()] * 2, indexing="ij")
            self.register_buffer("freqs_t_x", columns.flatten())  # (P,)
            self.register_buffer("freqs_t_y", rows.flatten())  # (P,)

    def transform(self, patches: Tensor, latents: Tensor) -> Tensor:
        """Class token and patches (N, c + P, W) and latents (N, L, W) to the normalised outputs (N, c + P + L, W)."""
        x = torch.cat([patches, latents + self.latent_pos_embed], dim=1)  # (N, c + P + L, W)
        rotations = self._rotations(latents.shape[1]) if self.rotary else [None] * len(self.model.blocks)
        for block, rotation in zip(self.model.blocks, rotations, strict=True):
            x = block(x, rotation)
        return self.model.norm(x)

    def _rotations(self, latents: int) -> Tensor:
        """Cosines and sines of every block (depth, 2, heads, c + P + L, head width / 2); only patches are rotated."""
        along_x, along_y = self.freqs[:, :, None]  # each (depth, 1, W / 2)
        angles = self.freqs_t_x[:, None] * along_x + self.freqs_t_y[:, None] * along_y  # (depth, P, W / 2)
        angles = angles.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (depth, heads, P, head width / 2)
        angles = F.pad(angles, (0, 0, self.prefix, latents))  # (depth, heads, c + P + L, head width / 2)
        return torch.stack([angles.cos(), angles.sin()], dim=1)


class Encoder(LatentTransformer):
    """Class token, patches and learned latent tokens; keeps the latents."""

    def __init__(self, config: MAETokConfig) -> None:
        width, patch = config.encoder.width, config.patch_size
        super().__init__(config, config.encoder, True, nn.Conv2d(3, width, patch, patch))
        self.latent_tokens = nn.Parameter(0.02 * torch.randn(1, config.latents, width))
        if config.encoder_mask_token:
            self.register_buffer("mask_token", torch.zeros(1, 1, width))  # only for export to the authors' layout

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to (N, L, W)."""
        vit, count = self.model, len(images)
        patches = vit.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # (N, P, W)
        # The learned positions are used beside rotary ones, too.
        x = torch.cat([vit.cls_token.expand(count, -1, -1), patches], dim=1) + vit.pos_embed  # (N, 1 + P, W)
        return self.transform(x, self.latent_tokens.expand(count, -1, -1))[:, x.shape[1] :]  # (N, L, W)


class Decoder(LatentTransformer):
    """Mask tokens and latents; the mask tokens become patches."""

    def __init__(self, config: MAETokConfig) -> None:
        width, patch = config.decoder.width, config.patch_size
        # Checkpoints hold a patch embedding and, with rotary positions, a position table that are not used. They are
        # buffers, so that they have no gradient and can be exported.
        unused = Unused(weight=(width, 3, patch, patch), bias=(width,))
        super().__init__(config, config.decoder, config.decoder_class_token, unused)
        if self.rotary:
            table = self.model.pos_embed.detach()
            del self.model.pos_embed
            self.model.register_buffer("pos_embed", table)
        self.patch_size = patch
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.to_pixel = nn.ModuleDict({"model": nn.Linear(width, 3 * patch**2)})

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (N, L, W) to images (N, 3, H, W)."""
        x = self.mask_token.expand(-1, self.patches, -1)  # (1, P, W)
        if self.prefix:
            x = torch.cat([self.model.cls_token, x], dim=1)  # (1, 1 + P, W)
        if not self.rotary:
            x = x + self.model.pos_embed[:, 1 - self.prefix :]
        x = self.transform(x.expand(len(latents), -1, -1), latents)[:, self.prefix : self.prefix + self.patches]
        return unpatchify(self.to_pixel["model"](x), self.patch_size)


class VisionTransformer(nn.Module):
    """The parameters of a vision transformer, under DINOv2's names."""

    def __init__(self, config: MAETokConfig, size: TransformerConfig, class_token: bool, projection: nn.Module) -> None:
        super().__init__()
        local = config.init == "local"
        if class_token:
            self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, size.width))
        self.pos_embed = nn.Parameter((0.2 if local else 0.02) * torch.randn(1, 1 + config.grid**2, size.width))
        self.patch_embed = nn.ModuleDict({"proj": projection})
        self.blocks = nn.ModuleList(Block(size, config.layer_scale) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=LAYER_NORM_EPSILON)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight) if local else nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if local:  # keys start as queries: tokens of similar position attend to each other
            for block in self.blocks:
                queries, keys, _ = block.attn.qkv.weight.data.chunk(3)
                keys.copy_(queries)


class Block(nn.Module):
    """A transformer block of DINOv2."""

    def __init__(self, size: TransformerConfig, layer_scale: float | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.width, eps=LAYER_NORM_EPSILON)
        self.attn = Attention(size)
        self.ls1 = LayerScale(size.width, layer_scale) if layer_scale is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(size.width, eps=LAYER_NORM_EPSILON)
        self.mlp = Mlp(size.width, 4 * size.width)
        self.ls2 = LayerScale(size.width, layer_scale) if layer_scale is not None else nn.Identity()

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        """(N, T, W) to (N, T, W)."""
        x = x + self.ls1(self.attn(self.norm1(x), rotation))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Self-attention of all tokens to all."""

    def __init__(self, size: TransformerConfig) -> None:
        super().__init__()
        self.heads = size.heads
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.proj = nn.Linear(size.width, size.width)

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        """(N, T, W) to (N, T, W); ``rotation`` (2, heads, T, head width / 2) rotates queries and keys."""
        queries, keys, values = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rotation is not None:  # each (N, heads, T, head width); the angles are float32 under autocast
            queries, keys = rotate(queries, rotation).to(values.dtype), rotate(keys, rotation).to(values.dtype)
        x = F.scaled_dot_product_attention(queries, keys, values)  # (N, heads, T, head width)
        return self.proj(x.transpose(1, 2).flatten(2))  # (N, T, W)


class Unused(nn.Module):
    """Tensors of a checkpoint that the model does not use.

    Args:
        shapes: of each by name.
    """

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate neighbouring pairs of ``x`` (N, heads, T, D) by angles with cosines and sines (2, heads, T, D / 2)."""
    cosines, sines = rotation
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # each (N, heads, T, D / 2)
    return torch.stack([even * cosines - odd * sines, odd * cosines + even * sines], dim=-1).flatten(-2)


def rotary_frequencies(size: TransformerConfig, base: float) -> Tensor:
    """Initial frequencies along x and y: two directions at a right angle, randomly rotated for every head.

    Returns:
        (2, depth, W / 2).
    """
    head_width = size.width // size.heads
    magnitudes = base ** -(torch.arange(0, head_width, 4) / head_width)  # (head width / 4,)
    turns = 2 * math.pi * torch.rand(size.depth, size.heads, 1)
    angles = torch.cat([turns, turns + math.pi / 2], dim=-1).repeat_interleave(len(magnitudes), dim=-1)
    waves = magnitudes.repeat(2) * torch.stack([angles.cos(), angles.sin()])  # (2, depth, heads, head width / 2)
    return waves.flatten(2)
