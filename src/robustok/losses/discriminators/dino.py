"""The paper's discriminator: small heads that learn, on the activations of a DINO vision transformer that does not.

    images -> crop or resize -> frozen ViT-S/16 -> activations at five depths -> a convolutional head each -> logits

Only the heads learn, so they alone enter states and snapshots. Source: projected discriminators, arXiv 2111.01007 and
2301.09515; sizes and names of the weights are those of the RobusTok release.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from robustok.backbones import ImageNetRange, pretrained_backbone
from robustok.checkpoints import depth_of, flatten_config, ratio_of, settle, shape_of
from robustok.config import Config, validate
from robustok.errors import UserError
from robustok.files import one_line


class DinoConfig(Config):
    """Heads on a frozen DINO vision transformer; the defaults are the paper's."""

    name: Literal["dino"] = "dino"
    model: str = Field("vit_small_patch16_224.dino", description="timm model name of the frozen backbone")
    weights: Path | None = Field(
        None,
        description="local file of its weights, such as dino_deitsmall16_pretrain.pth; null downloads through timm",
    )
    image_size: int = Field(224, ge=1, description="height and width in pixels of what the backbone sees")
    patch_size: int = Field(16, ge=1, description="height and width of the backbone's patches in pixels")
    width: int = Field(384, ge=1, description="width of the backbone and of the heads")
    depth: int = Field(12, ge=1, description="number of the backbone's blocks")
    heads: int = Field(6, ge=1, description="attention heads of the backbone")
    mlp_ratio: float = Field(4.0, gt=0, description="width of the backbone's MLPs as a multiple of its own")
    gelu: Literal["tanh", "exact"] = Field(
        "tanh", description="form of the backbone's GELU; tanh: the approximation of the release, exact: DINO's own"
    )
    read_after: tuple[int, ...] = Field(
        (2, 5, 8, 11), description="blocks, counted from 0, after which a head reads; one more reads the embedding"
    )
    kernel_size: int = Field(9, ge=1, description="width of the heads' circular convolution in patches; odd")
    augment: bool = Field(True, description="differentiable augmentation of what is judged")

    @model_validator(mode="after")
    def _sizes_fit(self) -> "DinoConfig":
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} do not divide width {self.width}; choose a divisor")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} has no middle; choose an odd one")
        if sorted(set(self.read_after)) != list(self.read_after) or not set(self.read_after) <= set(range(self.depth)):
            raise ValueError(f"read_after {list(self.read_after)} must rise, within 0 to {self.depth - 1}")
        return self


class DinoBackbone(nn.Module):
    """Frozen vision transformer from images to the activations that the heads read.

    Args:
        config: sizes; the weights are random until :meth:`load`.
    """

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.config = config
        self.to_range = ImageNetRange()
        self.vit = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            act_layer="gelu_tanh" if config.gelu == "tanh" else "gelu",
            num_classes=0,
        )
        self.eval().requires_grad_(False)

    def load(self, weights: Mapping[str, Tensor]) -> "DinoBackbone":
        """Take weights in DINO's layout, which is timm's too; keys lose their bias, as the release has it."""
        state = {name: tensor.clone() for name, tensor in weights.items()}
        for name in state:
            if name.endswith("attn.qkv.bias"):  # queries, keys, values; a bias of all keys cancels in the softmax
                state[name][self.config.width : 2 * self.config.width] = 0
        try:
            self.vit.load_state_dict(state)
        except RuntimeError as error:
            reason = one_line(error, 200)
            raise UserError(f"the weights do not fit the discriminator's backbone: {reason}; set its sizes") from None
        return self

    def forward(self, images: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to activations (heads, N, width, patches).

        Args:
            images: any size; brought to the size that the backbone takes.
            rng: decides by a coin whether larger images are cropped or reduced, and where; None reduces them.
        """
        x = self.to_range(fit(images, self.config.image_size, rng))  # (N, 3, image_size, image_size)
        x = self.vit.patch_embed(x)  # (N, P, width)
        x = torch.cat([self.vit.cls_token.expand(len(x), -1, -1), x], 1) + self.vit.pos_embed  # (N, 1 + P, width)
        read = [x]
        for i, block in enumerate(self.vit.blocks[: max(self.config.read_after, default=-1) + 1]):
            x = block(x)
            if i in self.config.read_after:
                read.append(x)
        return torch.stack([(x[:, 1:] + x[:, :1]).transpose(1, 2) for x in read])  # (heads, N, width, P)


def fit(images: Tensor, size: int, rng: torch.Generator | None = None) -> Tensor:
    """Bring images (N, 3, H, W) to (N, 3, size, size).

    Larger ones are cropped or reduced by area averaging, as a coin decides, the whole batch alike; others are enlarged,
    bicubic. Without ``rng`` nothing is cropped.
    """
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    if height <= size or width <= size:
        return F.interpolate(images, (size, size), mode="bicubic")
    if rng is not None:
        coin, top, left = torch.rand(3, generator=rng).tolist()
        if coin < 0.5:
            top, left = int(top * (height - size + 1)), int(left * (width - size + 1))
            return images[:, :, top : top + size, left : left + size]
    return F.interpolate(images, (size, size), mode="area")


class DinoHeads(nn.Module):
    """What learns: one head for each depth at which the backbone is read."""

    def __init__(self, config: DinoConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = nn.ModuleList(
            nn.Sequential(
                _convolution(config.width, 1),
                Residual(_convolution(config.width, config.kernel_size)),
                SpectralConv1d(config.width, 1, 1),
            )
            for _ in range(1 + len(config.read_after))
        )

    def forward(self, *sides: Tensor) -> Tensor:
        """Activations of one or more sides, each (heads, N, width, patches), to logits (sides * N, heads * patches).

        Each side is judged by itself: batch statistics of real images mixed with reconstructions would give them away.
        """
        return torch.cat([self._judge(activations) for activations in sides])  # (sides * N, heads * P)

    def _judge(self, activations: Tensor) -> Tensor:
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, activations, strict=True)], 1)


class DinoDiscriminator(nn.Module):
    """Backbone and heads in one: images to logits.

    Args:
        backbone: frozen.
        heads: trainable.
    """

    def __init__(self, backbone: DinoBackbone, heads: DinoHeads) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, heads

    def forward(self, images: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to logits (N, heads * patches); ``rng`` as in :class:`DinoBackbone`."""
        return self.heads(self.backbone(images, rng))


def _convolution(width: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(SpectralConv1d(width, width, kernel_size), LocalBatchNorm(width), nn.LeakyReLU(0.2))


class Residual(nn.Module):
    """x to (fn(x) + x) / sqrt(2), which keeps the variance."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """Any shape that ``fn`` keeps."""
        return (self.fn(x) + x) / math.sqrt(2)


class SpectralConv1d(nn.Module):
    """Circular convolution whose weight is divided by its largest singular value.

    One power iteration a training forward, right vector first. PyTorch's own parametrization moves the left one first,
    so the same vectors would lead to another estimate than in released checkpoints.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int) -> None:
        super().__init__()
        start = nn.Conv1d(inputs, outputs, kernel_size)
        self.weight_orig, self.bias = start.weight, start.bias  # (out, in, k), (out,)
        self.register_buffer("weight_u", F.normalize(torch.randn(outputs), dim=0))
        self.register_buffer("weight_v", F.normalize(torch.randn(inputs * kernel_size), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, length) to (N, out, length)."""
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight_orig / self._largest_singular_value()
        if reach := weight.shape[-1] // 2:
            x = F.pad(x, (reach, reach), mode="circular")
        return F.conv1d(x, weight, self.bias)

    def _largest_singular_value(self) -> Tensor:
        matrix = self.weight_orig.flatten(1)  # (out, in * k)
        if self.training:
            with torch.no_grad():
                self.weight_v.copy_(F.normalize(matrix.T @ self.weight_u, dim=0, eps=1e-12))
                self.weight_u.copy_(F.normalize(matrix @ self.weight_v, dim=0, eps=1e-12))
        # Copies, since backward needs them and the next forward moves the buffers.
        return self.weight_u.clone() @ matrix @ self.weight_v.clone()


class LocalBatchNorm(nn.Module):
    """Batch norm over groups of at most eight images and all places, the same in training and evaluation.

    Statistics of few images keep a discriminator from comparing a batch with itself. Batches that do not divide evenly
    have groups that differ by one.
    """

    group_size, eps = 8, 1e-6

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, length) to the same in float32."""
        groups = math.ceil(len(x) / self.group_size)
        size, larger = divmod(len(x), groups)
        more, rest = x.float().split([larger * (size + 1), (groups - larger) * size])
        parts = [self._standardise(part, n) for part, n in ((more, size + 1), (rest, size)) if len(part)]
        return torch.cat(parts) * self.weight[:, None] + self.bias[:, None]

    def _standardise(self, x: Tensor, size: int) -> Tensor:
        x = x.unflatten(0, (-1, size))  # (groups, size, width, length)
        variance, mean = torch.var_mean(x, (1, 3), correction=0, keepdim=True)
        return ((x - mean) * (variance + self.eps).rsqrt()).flatten(0, 1)


# From files


def load_backbone(config: DinoConfig) -> DinoBackbone:
    """The frozen backbone with its pretrained weights, from a local file or through timm.

    Raises:
        UserError: the weights cannot be had, or are of other sizes than configured.
    """
    model = pretrained_backbone(
        config.model,
        config.weights,
        role="the discriminator's backbone",
        setting="discriminator.weights",
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
    )
    return DinoBackbone(config).load(model.state_dict())


NAMES = {  # the release's: ours
    "embed_dim": "width",
    "num_heads": "heads",
    "depth": "depth",
    "key_depths": "read_after",
    "patch_size": "patch_size",
    "input_size": "image_size",
    "mlp_ratio": "mlp_ratio",
    "kernel_size": "kernel_size",
    "norm_type": "norm_type",
    "spectral_norm": "spectral_norm",
    "norm_eps": "norm_eps",
    "gelu": "gelu",
}
FIXED = {"norm_type": "bn", "spectral_norm": True, "norm_eps": LocalBatchNorm.eps}  # variants that we do not have


def load_heads(weights: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> DinoHeads:
    """The heads in a released training checkpoint, where they stand under ``discriminator``; in training mode.

    Their ``state_dict`` and ``config`` are what a snapshot holds of a discriminator.

    Args:
        weights: ``heads.0.0.0.weight_orig`` and so on.
        config: what the shapes do not tell, under the release's names or ours; a backbone defaults to ViT-S/16.

    Raises:
        UserError: missing, unexpected or misshapen tensors; a configuration that contradicts them.
    """
    count = depth_of(weights, "heads.")
    facts = FIXED | {
        "width": shape_of(weights, "heads.0.0.0.weight_orig", 3)[0],
        "kernel_size": shape_of(weights, "heads.0.1.fn.0.weight_orig", 3)[-1],
    }
    settings = settle(facts, dict(flatten_config(config or {})), NAMES)
    ours = validate(DinoConfig, {key: value for key, value in settings.items() if key not in FIXED}, source="config")
    if len(ours.read_after) + 1 != count:
        raise UserError(
            f"the weights have {count} heads, config reads after blocks {list(ours.read_after)} and the embedding; "
            "give key_depths"
        )
    heads = DinoHeads(ours)
    try:
        heads.load_state_dict(weights)
    except RuntimeError as error:
        reason = one_line(error, 200)
        raise UserError(f"the weights are not those of the discriminator's heads: {reason}; check the file") from None
    return heads


def load_dino(weights: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> DinoDiscriminator:
    """A whole discriminator from one mapping; in evaluation mode.

    Args:
        weights: the backbone under ``dino.*`` in DINO's own layout, the heads under ``disc.*`` as in a released
            training checkpoint.
        config: what the shapes do not tell, under the release's names (``num_heads``, ``key_depths``) or ours.

    Raises:
        UserError: as :func:`load_heads`.
    """
    parts: dict[str, dict[str, Tensor]] = {"dino": {}, "disc": {}}
    for name, tensor in weights.items():
        prefix, _, rest = name.partition(".")
        if prefix not in parts:
            raise UserError(f"unexpected {name}; a discriminator has dino.* and disc.*")
        if rest not in ("x_scale", "x_shift"):  # the release's constants of the ImageNet range
            parts[prefix][rest] = tensor
    dino = parts["dino"]
    width, patch = shape_of(dino, "cls_token", 3)[-1], shape_of(dino, "patch_embed.proj.weight", 4)[-1]
    settings = dict(flatten_config(config or {}))
    facts = {
        "width": width,
        "depth": depth_of(dino, "blocks."),
        "patch_size": patch,
        "image_size": round((shape_of(dino, "pos_embed", 3)[1] - 1) ** 0.5) * patch,
        "mlp_ratio": ratio_of(dino, "blocks.0.mlp.fc1.bias", width, settings.get("mlp_ratio")),
    }
    heads = load_heads(parts["disc"], settle(facts, settings, NAMES))
    return DinoDiscriminator(DinoBackbone(heads.config).load(dino), heads).eval()
