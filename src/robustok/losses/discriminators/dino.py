"""The paper's discriminator: trainable heads on the activations of a frozen DINO vision transformer.

    images -> crop or resize -> frozen ViT-S/16 -> activations at five depths -> a convolutional head each -> logits

States and snapshots hold the heads only. Source: projected discriminators, arXiv 2111.01007 and 2301.09515; sizes and
names of the weights are those of RobusTok's authors.
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
from robustok.config import Config, Heads, validate
from robustok.errors import UserError
from robustok.files import one_line
from robustok.snapshots import check_finite_weights


class DinoConfig(Config):
    """Heads on a frozen DINO vision transformer; the defaults are the paper's."""

    name: Literal["dino"] = "dino"
    model: str = Field("vit_small_patch16_224.dino", description="timm model name of the frozen backbone")
    weights: Path | None = Field(
        None,
        description="local file of its weights, such as dino_deitsmall16_pretrain.pth; null downloads through timm",
    )
    image_size: int = Field(224, ge=1, description="height and width of the backbone's input in pixels")
    patch_size: int = Field(16, ge=1, description="height and width of the backbone's patches in pixels")
    width: int = Field(384, ge=1, description="width of the backbone and of the heads")
    depth: int = Field(12, ge=1, le=10_000, description="number of the backbone's blocks")
    heads: Heads = 6
    mlp_ratio: float = Field(4.0, gt=0, description="width of the backbone's MLPs as a multiple of its own")
    gelu: Literal["tanh", "exact"] = Field(
        "tanh",
        description="GELU of the backbone; tanh: the approximation in the authors' code; exact: as in DINO",
    )
    read_after: tuple[int, ...] = Field(
        (2, 5, 8, 11),
        description="blocks, counted from 0, whose output has a head; one more takes the embedding",
    )
    kernel_size: int = Field(9, ge=1, description="width of the heads' circular convolution in patches; odd")
    augment: bool = Field(True, description="differentiable augmentation of the images")

    @model_validator(mode="after")
    def _sizes_fit(self) -> "DinoConfig":
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} has no middle; choose an odd one")
        if sorted(set(self.read_after)) != list(self.read_after) or not set(self.read_after) <= set(range(self.depth)):
            raise ValueError(
                f"read_after {list(self.read_after)} must rise, within 0 to depth - 1, which is {self.depth - 1}"
            )
        return self


class DinoBackbone(nn.Module):
    """Frozen vision transformer from images to the activations that the heads take.

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
        """Copy weights in DINO's layout, also timm's; the bias of the keys becomes 0, as in the authors' code."""
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
            images: any size; resized to that of the backbone.
            rng: decides whether larger images are cropped or reduced, and where; None reduces them.
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
    """Resize or crop images (N, 3, H, W) to (N, 3, size, size).

    Larger ones are cropped or reduced by area averaging, each with probability 0.5 and the same for the whole batch;
    others are enlarged, bicubic. Without ``rng`` nothing is cropped.
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
    """The trainable part: one convolutional head for each depth of the backbone that is used."""

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

        Each side has batch statistics of its own: those of a mixed batch would reveal which images are real.
        """
        return torch.cat([self._logits(activations) for activations in sides])  # (sides * N, heads * P)

    def _logits(self, activations: Tensor) -> Tensor:
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, activations, strict=True)], 1)


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
    so the same vectors would lead to another estimate than in the authors' checkpoints.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int) -> None:
        super().__init__()
        start = nn.Conv1d(inputs, outputs, kernel_size)
        self.weight_orig, self.bias = start.weight, start.bias  # (out, in, k), (out,)
        self.register_buffer("weight_u", F.normalize(torch.randn(outputs), dim=0))
        self.register_buffer("weight_v", F.normalize(torch.randn(inputs * kernel_size), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, length) to (N, out, length)."""
        weight = self.weight_orig / self._largest_singular_value()
        if reach := weight.shape[-1] // 2:
            x = F.pad(x, (reach, reach), mode="circular")
        return F.conv1d(x, weight, self.bias)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def _largest_singular_value(self) -> Tensor:
        matrix = self.weight_orig.flatten(1)  # (out, in * k)
        if self.training:
            with torch.no_grad():
                self.weight_v.copy_(F.normalize(matrix.T @ self.weight_u, dim=0, eps=1e-12))
                self.weight_u.copy_(F.normalize(matrix @ self.weight_v, dim=0, eps=1e-12))
        # Copies, since backward needs them and the next forward changes the buffers.
        return self.weight_u.clone() @ matrix @ self.weight_v.clone()


class LocalBatchNorm(nn.Module):
    """Batch norm over groups of at most eight images and all positions, the same in training and evaluation.

    Groups of a batch that does not divide evenly differ in size by one image.
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
        setting="discriminator.weights with discriminator.name=dino",
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
    )
    return DinoBackbone(config).load(model.state_dict())


def load_heads(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> DinoHeads:
    """Trained heads, in training mode.

    Args:
        settings: fields of :class:`DinoConfig`.
        weights: ``heads.0.0.0.weight_orig`` and so on.

    Raises:
        UserError: settings that are not accepted; tensors that are missing, unexpected, misshapen or not finite.
    """
    config = validate(DinoConfig, settings, source="config")
    check_finite_weights(weights, "the discriminator")
    count = len({name.split(".")[1] for name in weights if name.startswith("heads.")})
    if len(config.read_after) + 1 != count:
        raise UserError(
            f"the weights have {count} heads, config reads after blocks {list(config.read_after)} and the embedding; "
            "give key_depths"
        )
    heads = DinoHeads(config)
    try:
        heads.load_state_dict(weights)
    except RuntimeError as error:
        reason = one_line(error, 200)
        raise UserError(f"the weights are not those of the discriminator's heads: {reason}; check the file") from None
    return heads
