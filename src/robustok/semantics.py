"""The frozen teacher of the semantic regularisation: a timm model, or a small classifier trained on the data.

The teacher lives outside the tokenizer and never enters its snapshots.
"""

from pathlib import Path
from typing import Literal

import timm
import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.classifier import load_classifier
from robustok.config import Config
from robustok.types import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TeacherConfig(Config):
    """The semantic teacher."""

    name: Literal["none", "timm", "classifier"] = Field(
        "none", description="kind of teacher; none switches the term off"
    )
    model: str = Field("vit_base_patch14_dinov2.lvd142m", description="timm model name")
    path: Path | None = Field(None, description="timm: local weights file; classifier: folder of a saved classifier")
    weight: float = Field(0.1, ge=0, description="weight of the contrastive term")


class Teacher(nn.Module):
    """Frozen network from images to one vector each.

    Attributes:
        width: width of the vector.
    """

    def __init__(self, config: TeacherConfig, image_size: int, patch_size: int) -> None:
        super().__init__()
        if config.name == "classifier":
            if config.path is None:
                raise UserError("teacher.name=classifier needs teacher.path, the folder of a saved classifier")
            self.network = load_classifier(config.path)
            self.width = self.network.config.features
        else:
            self.network = _timm_model(config, image_size, patch_size)
            self.width = self.network.num_features
            self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.config = config
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to features (N, width)."""
        if self.config.name == "classifier":
            return self.network.features(images)
        return self.network(((images * 0.5 + 0.5) - self.mean) / self.std)


def _timm_model(config: TeacherConfig, image_size: int, patch_size: int) -> nn.Module:
    overlay = {"file": str(config.path)} if config.path else None
    size = {"img_size": image_size, "patch_size": patch_size} if "patch14" in config.model else {}
    try:
        return timm.create_model(config.model, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **size)
    except Exception as error:  # timm and the hub raise many kinds, all of which the user can act on
        raise UserError(
            f"cannot load the teacher {config.model}: {' '.join(str(error).split())[:200]}; "
            "give a local file as teacher.path"
        ) from None
