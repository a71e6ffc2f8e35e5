"""The paper's tokenizer: ViT encoder with learned latent tokens, vector quantiser, ViT decoder with mask tokens.

    images -> patches + latent tokens -> ViT -> latent tokens -> linear -> quantiser -> linear -> mask tokens +
    latents -> ViT -> pixels

Any image size that the patch size divides works, with any number of latents.
"""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from timm.models import vision_transformer as timm_vit
from timm.models.vision_transformer import LayerScale, VisionTransformer
from torch import Tensor, nn

from robustok.backbones import pretrained_backbone
from robustok.config import Config, Heads
from robustok.errors import UserError
from robustok.files import one_line
from robustok.tokenizers.conv import check_size
from robustok.tokenizers.quantizer import QuantizerConfig
from robustok.tokenizers.quantizers import AnyQuantizerConfig, build_quantizer
from robustok.tokenizers.vq import QuantizedTokenizer


class ViTConfig(Config):
    """Size of a vision transformer; the defaults are ViT-B."""

    width: int = Field(768, ge=1, description="width of the residual stream")
    depth: int = Field(12, ge=1, le=10_000, description="number of blocks")
    heads: Heads = 12
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLPs, in widths")
    layer_scale: float | None = Field(
        None, description="initial LayerScale; DINOv2 backbones have it (1e-5); null is none"
    )
    init: Literal["timm", "local"] = Field(
        "timm", description="timm: its default; local: small models learn from scratch in a tenth of the steps"
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth of the last block, rising linearly from 0")
    pretrained: str | None = Field(
        None, description="timm model to start from, such as vit_base_patch14_dinov2.lvd142m, resampled to this size"
    )
    weights: Path | None = Field(
        None, description="local file with the pretrained weights, in timm's layout or DINOv2's; null downloads them"
    )


class RobusTokConfig(Config):
    """The paper's tokenizer; the defaults are its ImageNet 256x256 model."""

    name: Literal["robustok"] = "robustok"
    image_size: int = Field(256, ge=1, description="height and width of the images in pixels")
    patch_size: int = Field(16, ge=1, description="height and width of a patch in pixels; must divide image_size")
    latents: int | None = Field(
        None, ge=1, description="latents per image; null is one per patch, which share its position"
    )
    encoder: ViTConfig = ViTConfig()
    decoder: ViTConfig = ViTConfig()
    quantizer: AnyQuantizerConfig = QuantizerConfig()
    teacher_width: int | None = Field(
        None,
        ge=1,
        description="width of the semantic teacher's features where it is not the encoder's width; adds a projection",
    )

    @model_validator(mode="after")
    def _patches_fit(self) -> "RobusTokConfig":
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}; "
                "choose a divisor of the image size"
            )
        return self

    @property
    def patches(self) -> int:
        """Patches per image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def length(self) -> int:
        """L, latents per image."""
        return self.latents or self.patches


class RobusTok(QuantizedTokenizer):
    """Tokenizer of the paper. See :class:`robustok.types.DiscreteTokenizer` for the contract."""

    licence = "none: the weights were published without a licence"

    def __init__(self, config: RobusTokConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.latent_shape = (config.length, config.quantizer.dim)
        self.encoder = Encoder(config)
        self.to_latent = nn.Linear(self.encoder.width, config.quantizer.dim)  # the paper's quant_conv
        self.quantizer = build_quantizer(config.quantizer)
        self.from_latent = nn.Linear(config.quantizer.dim, config.decoder.width)  # post_quant_conv
        self.decoder = Decoder(config)
        own_width = config.teacher_width in (None, self.encoder.width)
        self.from_teacher = None if own_width else nn.Linear(config.teacher_width, self.encoder.width)

    def features(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to features (N, L, D) before the quantiser.

        Raises:
            UserError: images of another size.
        """
        check_size(images, self.image_size)
        return self.to_latent(self.encoder(images))  # (N, L, D)

    def decode(self, latents: Tensor) -> Tensor:
        """Tokens (N, L) to images (N, 3, H, W), nominally in [-1, 1], not clamped.

        Raises:
            UserError: another number of tokens than the tokenizer makes.
        """
        if latents.ndim != 2 or latents.shape[1] != self.latent_shape[0]:
            raise UserError(
                f"got latents of shape {tuple(latents.shape)}, "
                f"this tokenizer decodes tokens (N, {self.latent_shape[0]})"
            )
        return self.decode_vectors(self.embed(latents))

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Code vectors (N, L, D) to images (N, 3, H, W)."""
        return self.decoder(self.from_latent(vectors))

    def project_teacher(self, features: Tensor) -> Tensor:
        """Features (N, teacher width) of the semantic teacher to (N, D), by the projection of the latents (paper)."""
        return self.to_latent(features if self.from_teacher is None else self.from_teacher(features))  # (N, D)


class Encoder(nn.Module):
    """ViT over the class token, the patches and the learned latent tokens; returns the latents."""

    def __init__(self, config: RobusTokConfig) -> None:
        super().__init__()
        self.backbone, self.drop_path = vision_transformer(config.encoder, config), config.encoder.drop_path
        self.width = self.backbone.embed_dim
        self.latent_tokens = nn.Parameter(torch.randn(1, config.length, self.width) * 1e-6)
        self.latent_positions = latent_positions(config, self.width)
        self.level_embed = level_embedding(self.width)  # of image tokens (0) and latent tokens (1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to (N, L, width)."""
        vit = self.backbone
        n = len(images)
        patches = vit.patch_embed(images)  # (N, P, width)
        x = torch.cat([vit.cls_token.expand(n, -1, -1), patches], 1) + vit.pos_embed  # (N, 1 + P, width)
        # By default latent i has the positional embedding of patch i.
        positions = vit.pos_embed[:, 1:] if self.latent_positions is None else self.latent_positions
        z = (self.latent_tokens + positions).expand(n, -1, -1)  # (N, L, width)
        s = torch.cat([x + self.level_embed.weight[0], z + self.level_embed.weight[1]], 1)  # (N, 1 + P + L, width)
        return vit.norm(through_blocks(vit, s, self.drop_path))[:, x.shape[1] :]  # (N, L, width)


class Decoder(nn.Module):
    """ViT over mask tokens and latents; the mask tokens become patches."""

    def __init__(self, config: RobusTokConfig) -> None:
        super().__init__()
        self.backbone, self.drop_path = vision_transformer(config.decoder, config), config.decoder.drop_path
        del self.backbone.patch_embed  # no pixels enter the decoder; DDP refuses parameters that nothing uses
        width = self.backbone.embed_dim
        self.patch_size = config.patch_size
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 1e-6)
        self.latent_positions = latent_positions(config, width)
        self.level_embed = level_embedding(width)
        self.to_pixels = nn.Linear(width, 3 * config.patch_size**2)

    def forward(self, z: Tensor) -> Tensor:
        """Latents (N, L, width) to images (N, 3, H, W)."""
        vit = self.backbone
        patches = vit.pos_embed.shape[1] - 1
        x = torch.cat([vit.cls_token, self.mask_token.expand(-1, patches, -1)], 1) + vit.pos_embed  # (1, 1 + P, width)
        # The class token is in the sequence a second time, before the latents: the published model was trained so.
        cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(z), -1, -1)  # (N, 1, width)
        positions = vit.pos_embed[:, 1:] if self.latent_positions is None else self.latent_positions
        z = torch.cat([cls, z + positions], 1) + self.level_embed.weight[1]  # (N, 1 + L, width)
        s = torch.cat([(x + self.level_embed.weight[0]).expand(len(z), -1, -1), z], 1)  # (N, 2 + P + L, width)
        s = vit.norm(through_blocks(vit, s, self.drop_path))  # (N, 2 + P + L, width)
        return unpatchify(self.to_pixels(s[:, 1 : 1 + patches]), self.patch_size)


class Block(timm_vit.Block):
    """timm's block with drop path whose random numbers are drawn outside, so that all blocks compile to one graph."""

    def forward(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """Tokens (N, T, width); ``scales`` (2, N, 1, 1) multiply the results of attention and MLP, None is 1."""
        first, second = (None, None) if scales is None else scales.unbind()  # (N, 1, 1) each
        attended = self.ls1(self.attn(self.norm1(x)))
        x = x + (attended if first is None else attended * first)
        found = self.ls2(self.mlp(self.norm2(x)))
        return x + (found if second is None else found * second)


def through_blocks(vit: VisionTransformer, x: Tensor, drop_path: float) -> Tensor:
    """Tokens (N, T, width) through all blocks, in training with drop path.

    Stochastic depth (Huang et al., arXiv 1603.09382): of each image and block, attention and MLP are left out with a
    probability that rises linearly from 0 at the first block to ``drop_path`` at the last; what is kept is divided by
    the probability of keeping it.
    """
    if not (vit.training and drop_path):
        return vit.blocks(x)
    keep = 1 - torch.linspace(0, drop_path, len(vit.blocks), device=x.device)[:, None, None, None, None]
    draws = torch.rand(len(vit.blocks), 2, len(x), 1, 1, device=x.device)
    for block, scales in zip(vit.blocks, (draws < keep) / keep, strict=True):  # scales: (2, N, 1, 1)
        x = block(x, scales)
    return x


def vision_transformer(config: ViTConfig, tokenizer: RobusTokConfig) -> VisionTransformer:
    """A vision transformer of timm: class token, learned positions, no registers, no head."""
    vit = VisionTransformer(
        img_size=tokenizer.image_size,
        patch_size=tokenizer.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        init_values=config.layer_scale,
        # timm rounds the hidden width down: half an element more keeps it where a ratio is not exact.
        mlp_ratio=(int(config.width * config.mlp_ratio + 1e-6) + 0.5) / config.width,
        num_classes=0,
        block_fn=Block,
    )
    if config.init == "local":
        _start_local(vit)
    return vit


def load_pretrained_backbones(tokenizer: RobusTok) -> None:
    """Copy the weights of the pretrained backbones that the configuration names, into encoder and decoder.

    Positions and patch kernel are resampled to the tokenizer's image and patch size.

    Raises:
        UserError: a backbone cannot be loaded, or has another width, depth or number of heads than configured.
    """
    sizes = {"img_size": tokenizer.image_size, "patch_size": tokenizer.config.patch_size}
    for half, config in ((tokenizer.encoder, tokenizer.config.encoder), (tokenizer.decoder, tokenizer.config.decoder)):
        if config.pretrained is not None:
            _copy_backbone(half.backbone, config, sizes)


def _copy_backbone(vit: VisionTransformer, config: ViTConfig, sizes: dict[str, int]) -> None:
    role, setting = "the pretrained backbone", "weights, or set pretrained=null to start from random weights"
    source = pretrained_backbone(config.pretrained, config.weights, role, setting, **sizes)
    if not isinstance(source, VisionTransformer):
        raise UserError(f"{config.pretrained} is a {type(source).__name__}; give a vision transformer of timm")
    found = (source.embed_dim, len(source.blocks), source.blocks[0].attn.num_heads)
    if found != (config.width, config.depth, config.heads):
        raise UserError(
            f"{config.pretrained} has width, depth, heads {found}, "
            f"configured are {(config.width, config.depth, config.heads)}; make them equal"
        )
    scaled = isinstance(source.blocks[0].ls1, LayerScale)
    if scaled != (config.layer_scale is not None):
        raise UserError(
            f"{config.pretrained} {'has' if scaled else 'has no'} LayerScale and layer_scale is {config.layer_scale}; "
            f"set layer_scale={'1e-5' if scaled else 'null'}"
        )
    own, given = vit.state_dict(), source.state_dict()  # the decoder has no patch embedding
    try:
        vit.load_state_dict({name: given[name] for name in given if name in own or not name.startswith("patch_embed.")})
    except RuntimeError as error:
        reason = one_line(error, 160)
        raise UserError(
            f"{config.pretrained} is no plain vision transformer with a class token ({reason}); choose another"
        ) from None


def _start_local(vit: VisionTransformer) -> None:
    """Let every token attend to its own position at first: an addition for small models without pretrained weights.

    Keys start equal to queries, so that tokens of similar position attend to each other, and positions start ten times
    larger than timm's. So latents attend to their patches, and mask tokens to their latents, from the first step on.
    """
    for module in vit.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    for block in vit.blocks:
        queries, keys, _ = block.attn.qkv.weight.data.chunk(3)
        keys.copy_(queries)
    nn.init.normal_(vit.pos_embed, std=0.2)


def latent_positions(config: RobusTokConfig, width: int) -> nn.Parameter | None:
    """Positions of the latents if their number is not that of the patches; None: those of the patches."""
    if config.length == config.patches:
        return None
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, config.length, width), std=0.02))


def level_embedding(width: int) -> nn.Embedding:
    """Two learned vectors, one for each half of the sequence."""
    embedding = nn.Embedding(2, width)
    nn.init.trunc_normal_(embedding.weight, std=(1 / width / 3) ** 0.5)
    return embedding


def unpatchify(x: Tensor, patch_size: int) -> Tensor:
    """Patches (N, P, p * p * 3) in rows, channel last inside a patch, to images (N, 3, H, W)."""
    n, patches, _ = x.shape
    side = int(patches**0.5)
    x = x.reshape(n, side, side, patch_size, patch_size, 3)  # (N, row, column, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, 3, side * patch_size, side * patch_size)  # (N, 3, H, W)
