"""Sampling of continuous latents: what flow matching and DDPM share. Settings, guidance, and mixtures by sigma.

All latents here are normalised, as the transformer receives them. Source: Meng et al., "SDEdit" (arXiv 2108.01073).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from robustok.config import Config
from robustok.generators.sampling import guide

Strategy = Literal["sdedit", "sdedit_snr", "linear_mix", "noise_only", "token_mix"]
Model = Callable[[Tensor, float], Tensor]
"""State (N, L, D) float64 and time to the model's prediction (N, L, D) float64: a velocity, or the noise."""


class ContinuousSampling(Config):
    """Guidance, and how much of real latents a mixture keeps: what all samplers of continuous latents have."""

    name: str
    guidance_scale: float = Field(1.0, ge=0, description="classifier-free guidance; 1 switches it off")
    guided_channels: int | None = Field(
        None,
        ge=1,
        description="only the first so many channels are guided; null is all (the authors of LightningDiT and DiT: 3)",
    )
    strategy: Strategy = Field(
        "sdedit",
        description="what sigma means for pairs: sdedit: share of sampler steps skipped; sdedit_snr: share of signal, "
        "for ddpm of its variance (alpha bar); linear_mix: weighted mean of real and sampled latents; noise_only: no "
        "generator, noise of 1 - sigma; token_mix: share of latents kept while the others are sampled",
    )

    @property
    def guided(self) -> bool:
        """Whether sampling needs a second, unconditional pass."""
        return self.guidance_scale != 1

    def guides(self, time: float) -> bool:
        """Whether a step at this time, in the family's own convention, is guided."""
        return self.guided


def guided_model(
    model: Callable[[Tensor, Tensor, Tensor], Tensor], labels: Tensor, null_label: int, sampling: ContinuousSampling
) -> Model:
    """Classifier-free guidance at its times and on its channels; both passes are one batch.

    Args:
        model: latents (N, L, D) float64, times (N,) float64 and labels (N,) to the prediction (N, L, D).
        labels: classes (N,) int64.
        null_label: the label of "no class".
        sampling: scale, times, channels.
    """
    both = torch.cat([labels, torch.full_like(labels, null_label)])  # (2N,)

    def predict(x: Tensor, time: float) -> Tensor:
        times = x.new_full((len(both),), time)
        if not sampling.guides(time):
            return model(x, times[: len(x)], labels).double()
        conditional, unconditional = model(torch.cat([x, x]), times, both).double().chunk(2)  # each (N, L, D)
        guided = guide(conditional, unconditional, sampling.guidance_scale)
        channels = sampling.guided_channels
        if channels is None:
            return guided
        return torch.cat([guided[..., :channels], conditional[..., channels:]], dim=-1)

    return predict


@dataclass(frozen=True)
class MixturePlan:
    """What a sigma means for a sampler.

    Attributes:
        times: times that the sampler visits, in the family's own convention; a single one if it makes no step.
        noise_level: noise level of the real latents where the sampler starts: 1 is pure noise, 0 none.
        guided_share: share of the remaining steps that are guided; 0 if none remain.
    """

    times: Tensor
    noise_level: float
    guided_share: float

    def details(self) -> dict[str, Any]:
        """For the manifest of a cache of pairs."""
        return {
            "noise_level": self.noise_level,
            "sampler_steps": len(self.times) - 1,
            "guided_share": self.guided_share,
        }


class Process(Protocol):
    """A way from latents to noise, with the sampler that goes back.

    Attributes:
        sampling: the sampler's settings.
    """

    sampling: ContinuousSampling

    def plan(self, sigma: float) -> MixturePlan:
        """Where sampling starts so that the share ``sigma`` of real latents is kept."""
        ...

    def noised(self, latents: Tensor, noise: Tensor, time: float) -> Tensor:
        """Latents (N, L, D) mixed with noise (N, L, D) as at a time."""
        ...

    def solve(self, model: Model, start: Tensor, times: Tensor, draw: Callable[[], Tensor] | None) -> Iterator[Tensor]:
        """The state (N, L, D) float64 after each step from ``start``; ``draw`` returns the noise of a step."""
        ...


def sample_mixture(
    model: Model,
    process: Process,
    noise: Tensor,
    reference: Tensor | None = None,
    sigma: float | None = None,
    keep: Tensor | None = None,
    draw: Callable[[], Tensor] | None = None,
) -> Tensor:
    """A free sample, or its mixture with real latents by ``sampling.strategy`` (see the plan of the process).

    Args:
        model: predicts the velocity or the noise, guided or not.
        process: flow or DDPM.
        noise: standard normal (N, L, D) float64.
        reference: normalised real latents (N, L, D) float64.
        sigma: in [0, 1]; 0 or None ignores the reference.
        keep: for ``token_mix``, which latents (N, L, 1) are kept.
        draw: for samplers that add noise, standard normal (N, L, D) of the next step.

    Returns:
        Normalised latents (N, L, D) float64.
    """
    mixed = reference is not None and bool(sigma)
    plan, strategy = process.plan(sigma if mixed else 0.0), process.sampling.strategy if mixed else None
    if strategy == "noise_only":
        return reference + plan.noise_level * noise

    def with_kept(x: Tensor, time: float) -> Tensor:
        # Kept latents get the noise level of the others before every prediction, so that the sampled ones fit them.
        return model(torch.where(keep, process.noised(reference, noise, time), x), time)

    start = noise
    if strategy in ("sdedit", "sdedit_snr"):
        start = process.noised(reference, noise, plan.times[0].item())
    x = start
    for state in process.solve(with_kept if strategy == "token_mix" else model, start, plan.times, draw):
        x = state
    if strategy == "token_mix":
        return torch.where(keep, reference, x)
    return sigma * reference + (1 - sigma) * x if strategy == "linear_mix" else x


def image_normals(rngs: Sequence[torch.Generator], shape: tuple[int, int]) -> Tensor:
    """The next standard normal numbers of each image: (N, L, D) float32 on the CPU."""
    if not rngs:
        return torch.empty(0, *shape)
    return torch.stack([torch.randn(shape, generator=rng) for rng in rngs])
