"""The adversarial part of main training and post-training: the decoder's term and the discriminator's own step."""

from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robustok.devices import rank_rows
from robustok.errors import UserError
from robustok.losses.adversarial import (
    AdversarialConfig,
    LeCam,
    adaptive_weight,
    generator_loss,
    hinge_loss,
    lecam_loss,
)
from robustok.losses.discriminators import (
    DISCRIMINATORS,
    DiscriminatorConfig,
    augment,
    augmentation_draw,
    frozen_features,
)
from robustok.precision import autocast, cast_weights
from robustok.randomness import step_rng
from robustok.snapshots import check_finite_weights, read_weights
from robustok.training.common import TrainingConfig, adversary_learning_rate, made, set_learning_rate
from robustok.training.finite import FiniteCheck, step_optimizer
from robustok.training.prepared import differentiated


class Adversary:
    """A discriminator, its optimiser and its LeCam averages.

    In each step :meth:`term` gives the decoder's adversarial term; then :meth:`step` trains the discriminator.

    Args:
        run: seed, batch size, schedule and precision.
        config: weights and learning rate.
        discriminator: which network.
        accelerator: devices and processes.
        weights: file of a trained discriminator; None for a new one.

    Raises:
        UserError: the weights do not fit the network.
    """

    def __init__(
        self,
        run: TrainingConfig,
        config: AdversarialConfig,
        discriminator: DiscriminatorConfig,
        accelerator: Accelerator,
        weights: Path | None = None,
    ) -> None:
        self.run, self.config, self.settings, self.accelerator = run, config, discriminator, accelerator
        self.backbone = frozen_features(discriminator, accelerator.device)
        if isinstance(self.backbone, nn.Module):
            cast_weights(self.backbone, run.precision)
        network = made(lambda: DISCRIMINATORS[discriminator.name][0](discriminator), "the settings discriminator.*")
        if weights is not None:
            trained = read_weights(weights)
            check_finite_weights(trained, weights)
            try:
                network.load_state_dict(trained)
            except RuntimeError as error:  # torch's long list of keys
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"{weights} does not fit the configured discriminator ({reason}); "
                    "set discriminator.*, or start afresh"
                ) from None
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=config.learning_rate, betas=run.betas, weight_decay=config.weight_decay, fused=True
        )
        self.prepared, self.optimizer = accelerator.prepare(network, optimizer)
        self.network = accelerator.unwrap_model(self.prepared)
        self.finite = FiniteCheck(run.out, accelerator)
        self.lecam = LeCam()
        self.rows = rank_rows(run.batch_size, accelerator.process_index, accelerator.num_processes)

    def started(self, step: int) -> bool:
        """Whether ``adversarial.start`` is reached; before, the discriminator neither trains nor counts."""
        return step >= self.config.start

    def features(self, images: Tensor, step: int, side: Literal["real", "fake"]) -> Tensor:
        """Input of the network: the images augmented, then passed through the frozen backbone, if there is one.

        Args:
            images: (N, 3, H, W) in [-1, 1].
            step: seeds the augmentation, together with the side.
            side: real images, or reconstructions.
        """
        rng = step_rng(self.run.seed, step, f"augment/{side}")
        images = images.float()
        if self.settings.augment:
            draw = augmentation_draw(self.run.batch_size, rng)  # (7, batch, 1, 1)
            images = augment(images, draw[:, self.rows])
        with autocast(images.device, self.run.precision):
            return self.backbone(images, rng)

    def term(
        self, fake: Tensor, reconstructions: Tensor, reconstruction_loss: Tensor, layer: nn.Parameter
    ) -> tuple[Tensor, Tensor]:
        """The decoder's adversarial term, weighted, and its adaptive weight.

        Args:
            fake: :meth:`features` of the reconstructions; their graph is freed.
            reconstructions: (N, 3, H, W) with gradients.
            reconstruction_loss: pixel plus perceptual terms, for the adaptive weight.
            layer: weight of the decoder's last layer.
        """
        # Without DDP: no gradients of the network's weights are needed here.
        self.network.requires_grad_(False)
        with autocast(reconstructions.device, self.run.precision):
            loss = generator_loss(self.network(fake))
        self.network.requires_grad_(True)
        loss = differentiated(loss, reconstructions)
        weight = torch.ones((), device=loss.device)
        if self.config.adaptive:
            gradients = [torch.autograd.grad(part, layer, retain_graph=True)[0] for part in (reconstruction_loss, loss)]
            averaged = self.accelerator.reduce(torch.stack([g.float() for g in gradients]), "mean")
            weight = adaptive_weight(*averaged, self.config.max_adaptive)
        return self.config.weight * weight * loss, weight

    def step(self, images: Tensor, fake: Tensor, step: int) -> dict[str, Tensor]:
        """One step of the discriminator, on images and reconstructions.

        Args:
            images: (N, 3, H, W).
            fake: :meth:`features` of the reconstructions.
            step: of the training; negative before it, with the peak learning rate.

        Returns:
            Values for the log.

        Raises:
            UserError: the loss of the step before was not finite.
        """
        rate = adversary_learning_rate(self.run, self.config, step) if step >= 0 else self.config.learning_rate
        set_learning_rate(self.optimizer, rate)
        real = self.features(images, step, "real")
        with autocast(images.device, self.run.precision):
            real, fake = self.prepared(real, fake.detach()).float().chunk(2)  # logits (N, positions) each
        means = self.accelerator.reduce(torch.stack([real.detach().mean(), fake.detach().mean()]), "mean")
        self.lecam.update(*means.double(), self.config.lecam_decay)
        terms = {
            "d_hinge": hinge_loss(real, fake),
            "d_lecam": self.config.lecam_weight * lecam_loss(real, fake, self.lecam),
        }
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(sum(terms.values()))
        step_optimizer(self.optimizer, self.finite.add(terms, step))
        return {**terms, "d_real": means[0], "d_fake": means[1]}

    def state(self) -> dict[str, Any]:
        """Everything that resume needs."""
        lecam = {"real": float(self.lecam.real), "fake": float(self.lecam.fake)}
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "lecam": lecam}

    def load_state(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lecam = LeCam(**state["lecam"])


def last_layer(tokenizer: nn.Module) -> nn.Parameter:
    """Weight of the decoder's last layer, where the adaptive weight compares gradients."""
    return [p for p in tokenizer.decoder_modules()[-1].parameters() if p.ndim >= 2][-1]
