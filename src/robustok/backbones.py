"""Pretrained networks of timm: a tokenizer's initial encoder, its semantic teacher, the discriminator's features."""

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from robustok.checkpoints import read_checkpoint
from robustok.errors import UserError
from robustok.files import one_line


class ImageNetRange(nn.Module):
    """Images in [-1, 1], normalised by ImageNet's mean and standard deviation."""

    def __init__(self) -> None:
        super().__init__()
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) to the same shape."""
        return ((images * 0.5 + 0.5) - self.mean) / self.std


def pretrained_backbone(name: str, weights: str | Path | None, role: str, setting: str, **sizes: Any) -> nn.Module:
    """A timm model without its classifier, with its pretrained weights.

    If ``sizes`` give a vision transformer another image or patch size than it was trained with, timm resamples its
    position embeddings (bicubic, antialiased, the class token's unchanged) and its patch embedding (FlexiViT's
    pseudo-inverse, arXiv 2212.08013).

    Args:
        name: timm's name, such as ``vit_base_patch14_dinov2.lvd142m``.
        weights: local file, in timm's layout or the authors' own; None downloads through timm.
        role: what the network is for, named in the error.
        setting: the setting that takes a local file, named in the error.
        sizes: ``img_size``, ``patch_size`` and the like.

    Raises:
        UserError: unknown name; no network, an unreadable file, or weights of another model.
    """
    try:
        overlay = {"state_dict": read_checkpoint(weights).weights} if weights else None
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **sizes)
    except Exception as error:  # timm and huggingface_hub raise many types
        reason = one_line(error).split("; ")[0].split(". ")[0]  # the rest is advice for other settings
        raise UserError(f"cannot load {role} {name}: {reason[:200]}; give a local file as {setting}") from None
    model.pretrained_cfg.pop("state_dict", None)  # timm keeps a copy of all weights there
    return model
