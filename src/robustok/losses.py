"""Terms of the training objectives: functions that take tensors and return scalars.

A training loop puts its terms into a dictionary, trains their sum and logs the same dictionary: no term is trained
unseen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from robustok.config import Config
from robustok.metrics.perceptual import check_sides, load_lpips


class ReconstructionConfig(Config):
    """How reconstructions are compared with images."""

    pixel: Literal["l1", "l2"] = Field("l2", description="pixel loss, mean over all elements")
    pixel_weight: float = Field(1.0, ge=0, description="weight of the pixel loss")
    perceptual: Literal["none", "lpips", "classifier"] = Field(
        "lpips",
        description="lpips: VGG features, needs the extra robustok[lpips]; classifier: a small one trained on the data",
    )
    perceptual_weight: float = Field(1.0, ge=0, description="weight of the perceptual loss")
    perceptual_weights: str | None = Field(
        None, description="local file of VGG weights for lpips, or folder of a saved classifier"
    )


class AdversarialConfig(Config):
    """The adversarial term."""

    weight: float = Field(0.5, ge=0, description="weight of the adversarial term; 0 trains without a discriminator")
    start: int = Field(
        0, ge=0, description="step from which the discriminator learns and its term counts; before, nothing of it runs"
    )
    adaptive: bool = Field(True, description="scale by the ratio of gradient norms at the decoder's last layer")
    max_adaptive: float = Field(1e4, gt=0, description="upper clamp of the adaptive weight")
    lecam_weight: float = Field(0.001, ge=0, description="weight of the LeCam regularisation of the discriminator")
    lecam_decay: float = Field(0.999, ge=0, lt=1, description="decay of its moving averages of the logits")
    learning_rate: float = Field(8e-4, gt=0, description="discriminator's peak learning rate")
    warmup_steps: int | None = Field(
        None,
        ge=0,
        description="steps of the discriminator's warm-up, with a cosine of its own from its start on (the paper's 4 "
        "epochs); null follows the run's schedule",
    )
    weight_decay: float = Field(5e-4, ge=0, description="discriminator's weight decay")


def pixel_loss(kind: Literal["l1", "l2"], images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean absolute or squared difference of images (N, 3, H, W)."""
    difference = reconstructions.float() - images
    return difference.abs().mean() if kind == "l1" else difference.square().mean()


def perceptual_loss(maps: Callable[[Tensor], Sequence[Tensor]], images: Tensor, reconstructions: Tensor) -> Tensor:
    """Squared distance of channel-normalised feature maps, mean over places, sum over layers.

    LPIPS without its learned channel weights, for any network: used with a small classifier where VGG makes no sense.

    Args:
        maps: images (N, 3, H, W) in [-1, 1] to feature maps, each (N, C, h, w).
        images: targets, no gradient.
        reconstructions: (N, 3, H, W).
    """
    with torch.no_grad():
        targets = [F.normalize(m.float(), dim=1) for m in maps(images)]
    found = [F.normalize(m.float(), dim=1) for m in maps(reconstructions)]
    return sum((a - b).square().sum(1).mean() for a, b in zip(targets, found, strict=True))


class LPIPSLoss(nn.Module):
    """LPIPS with VGG-16 from the lpips package, in eval mode: the released code leaves its dropout on.

    Args:
        weights: local file with torchvision's vgg16 state dict; None uses torchvision's cache or download.

    Raises:
        UserError: the package or the weights are missing; images of fewer than 16 pixels a side.
    """

    REMEDY = "set reconstruction.perceptual=classifier or none"

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self.network, _ = load_lpips("vgg", weights, setting="perceptual_weights")
        self.eval()

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Mean LPIPS of images (N, 3, H, W) in [-1, 1]."""
        check_sides("vgg", images.shape, self.REMEDY)
        return self.network(reconstructions, images).mean()


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


def generator_loss(fake: Tensor) -> Tensor:
    """What the decoder minimises: minus the mean logit of its images."""
    return -fake.float().mean()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises, before LeCam."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


@dataclass
class LeCam:
    """Moving averages of the mean logits; part of the training state.

    Attributes:
        real: of real images.
        fake: of reconstructions.
    """

    real: float = 0.0
    fake: float = 0.0

    def update(self, real: float, fake: float, decay: float) -> None:
        """Move the averages, before they are used, as the release does."""
        self.real = decay * self.real + (1 - decay) * real
        self.fake = decay * self.fake + (1 - decay) * fake


def lecam_loss(real: Tensor, fake: Tensor, averages: LeCam) -> Tensor:
    """Keep logits near the moving averages of the other side (LeCam)."""
    return F.relu(real.float() - averages.fake).square().mean() + F.relu(averages.real - fake.float()).square().mean()


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor, maximum: float = 1e4) -> Tensor:
    """Ratio of the gradient norms at the decoder's last layer, in float32, detached.

    Args:
        reconstruction_gradient: gradient of pixel plus perceptual loss with respect to the last layer's weight.
        adversarial_gradient: gradient of the unweighted adversarial term.
        maximum: upper clamp.

    Returns:
        Scalar in [0, maximum].
    """
    ratio = reconstruction_gradient.float().norm() / (adversarial_gradient.float().norm() + 1e-4)
    return ratio.clamp(0, maximum).detach()
