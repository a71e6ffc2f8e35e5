"""The adversarial losses of decoder and discriminator."""

from dataclasses import dataclass

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from robustok.config import Config


class AdversarialConfig(Config):
    """The adversarial term."""

    weight: float = Field(0.5, ge=0, description="weight of the adversarial term; 0 trains without a discriminator")
    start: int = Field(0, ge=0, description="first step with a discriminator; before it, nothing of it runs")
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


def generator_loss(fake: Tensor) -> Tensor:
    """The decoder's term: minus the mean logit of its images."""
    return -fake.float().mean()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss, without LeCam."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2


@dataclass
class LeCam:
    """Moving averages of the mean logits; part of the training state. Those of a device are scalars in float64 on it.

    Attributes:
        real: of real images.
        fake: of reconstructions.
    """

    real: Tensor | float = 0.0
    fake: Tensor | float = 0.0

    def update(self, real: Tensor | float, fake: Tensor | float, decay: float) -> None:
        """Update the averages. The authors' code does this before using them."""
        self.real = decay * self.real + (1 - decay) * real
        self.fake = decay * self.fake + (1 - decay) * fake


def lecam_loss(real: Tensor, fake: Tensor, averages: LeCam) -> Tensor:
    """LeCam: squared distances of the logits from the moving averages of the other side, one-sided."""
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
