"""The frozen teacher of the semantic regularisation: a timm model, or a small classifier trained on the data.

The teacher lives outside the tokenizer and never enters its snapshots.
"""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.backbones import ImageNetRange, pretrained_backbone
from robustok.classifier import load_classifier
from robustok.config import Config
from robustok.types import UserError


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
            # A vision transformer sees the patches that the tokenizer sees; other networks take any image size.
            sizes = {"img_size": image_size, "patch_size": patch_size} if config.model.startswith("vit_") else {}
            network = pretrained_backbone(config.model, config.path, "the teacher", "teacher.path", **sizes)
            self.network = nn.Sequential(ImageNetRange(), network)
            self.width = network.num_features
        self.config = config
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to features (N, width)."""
        if self.config.name == "classifier":
            return self.network.features(images)
        return self.network(images)  # a vision transformer's class token after its last norm
