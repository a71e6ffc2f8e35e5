"""The semantic regularisation: a frozen teacher and the contrastive loss between its features and the latents."""

from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from robustok.backbones import ImageNetRange, pretrained_backbone
from robustok.config import Config
from robustok.errors import UserError
from robustok.metrics.features.classifier import load_classifier


def contrastive_loss(a: Tensor, b: Tensor, logit_scale: float = 1.0) -> Tensor:
    """Symmetric InfoNCE between paired vectors, over the global batch.

    Args:
        a: (N, D) teacher side.
        b: (N, D) student side.
        logit_scale: multiplies the dot products; the paper normalises neither side and uses 1.
    """
    a, b = gather_with_gradient(a.float()), gather_with_gradient(b.float())  # (world * N, D)
    logits = logit_scale * a @ b.T  # (world * N, world * N)
    own = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def gather_with_gradient(x: Tensor) -> Tensor:
    """Rows of all processes, gradients flowing back to each. The identity in a single process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    return torch.cat(all_gather(x))


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
            # A vision transformer gets the tokenizer's patch size; other networks take any image size.
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
