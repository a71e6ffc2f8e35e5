"""DDPM: a chain of noise levels, the timesteps that are sampled, and two samplers.

Time is an integer here: 0 is the least noisy of T timesteps, T - 1 the noisiest, and -1 means clean latents. The noise
is given by alpha bar (a), the signal's share of the variance: sqrt(a) latents + sqrt(1 - a) noise.

All latents here are normalised. Sources: Ho et al., "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239);
Song et al., "Denoising Diffusion Implicit Models" (arXiv 2010.02502); Nichol & Dhariwal, "Improved DDPM" (arXiv
2102.09672) for fewer steps and the learned variance; Lin et al. (arXiv 2305.08891) for the names of the spacings.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from robustok.errors import UserError
from robustok.generators.diffusion_sampling import ContinuousSampling, MixturePlan, Model


class DDPMSampling(ContinuousSampling):
    """How latents are drawn from a model that predicts noise, and how much of real latents a mixture keeps."""

    name: Literal["ddpm"] = "ddpm"
    sampler: Literal["ddim", "ancestral"] = Field(
        "ddim", description="ddim is deterministic where eta is 0; ancestral is that of DDPM, which adds noise"
    )
    steps: int = Field(
        50, ge=1, description="steps of the sampler; at most the timesteps that the model was trained on"
    )
    spacing: Literal["leading", "linspace", "trailing"] = Field(
        "leading",
        description="which timesteps are visited: leading: multiples of T / steps, so not the noisiest (diffusers); "
        "linspace: the first, the last and evenly between (the authors of DiT); trailing: the last and those below",
    )
    eta: float = Field(0.0, ge=0, le=1, description="noise of ddim, as a share of that of ancestral")
    variance: Literal["small", "large", "learned"] = Field(
        "small",
        description="noise of ancestral: small: of the posterior; large: of the step; learned: between the two, as the "
        "model predicts (the authors of DiT)",
    )


# Time


def alpha_bars(
    timesteps: int, beta_start: float, beta_end: float, schedule: Literal["linear", "scaled_linear"]
) -> Tensor:
    """The alpha bar of every timestep, and 1 for clean latents.

    Args:
        timesteps: T.
        beta_start: variance of the noise that the first step of training's chain adds.
        beta_end: of the last.
        schedule: the variances in between are evenly spaced (linear), or their square roots are (scaled_linear).

    Returns:
        (T + 1,) float64, decreasing except for the last, so that index -1 is that of clean latents.
    """
    power = {"linear": 1.0, "scaled_linear": 0.5}[schedule]
    betas = torch.linspace(beta_start**power, beta_end**power, timesteps, dtype=torch.float64) ** (1 / power)
    return torch.cat([(1 - betas).cumprod(0), betas.new_ones(1)])  # (T + 1,)


def visited_timesteps(steps: int, timesteps: int, spacing: Literal["leading", "linspace", "trailing"]) -> Tensor:
    """The timesteps that a sampler visits from noise to data, and -1 for the result.

    Returns:
        (steps + 1,) int64.

    Raises:
        UserError: more steps than there are timesteps.
    """
    if steps > timesteps:
        raise UserError(f"sampling.steps is {steps}, and the model has {timesteps} timesteps; take that many or fewer")
    if spacing == "leading":
        visited = torch.arange(steps).flip(0) * (timesteps // steps)
    elif spacing == "linspace":
        visited = torch.linspace(timesteps - 1, 0, steps, dtype=torch.float64).round().long()
    else:
        visited = (timesteps - torch.arange(steps, dtype=torch.float64) * timesteps / steps).round().long() - 1
    return torch.cat([visited, visited.new_full((1,), -1)])  # (steps + 1,)


# Sampling


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Latents as noisy as they are at an alpha bar: a scalar, or one that broadcasts to (N, L, D)."""
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


@dataclass(frozen=True)
class DDPMProcess:
    """The chain between latents and noise, and its samplers.

    Attributes:
        sampling: sampler, steps, spacing, guidance, strategy.
        bars: from :func:`alpha_bars`.
        clip: predictions of clean latents are clamped to -clip and clip; None leaves them.
    """

    sampling: DDPMSampling
    bars: Tensor
    clip: float | None = None

    def noised(self, latents: Tensor, noise: Tensor, time: float) -> Tensor:
        """Latents (N, L, D) as noisy as they are at a timestep."""
        return add_noise(latents, noise, self.bars[int(time)])

    def plan(self, sigma: float) -> MixturePlan:
        """Where sampling starts so that the share ``sigma`` of real latents is kept.

        The noise level is the standard deviation of the noise.

        * ``sdedit``: round((1 - sigma) * steps) steps are left. With linear betas little noise is left early: at sigma
          0.9 latents keep an amplitude of about 0.95.
        * ``sdedit_snr``: sampling starts at the timestep, visited or not, whose alpha bar is nearest to sigma.
        * ``linear_mix``, ``token_mix``: all steps from pure noise.
        * ``noise_only``: no steps; noise of the standard deviation 1 - sigma is added.
        """
        sampling, bars = self.sampling, self.bars
        times = visited_timesteps(sampling.steps, len(bars) - 1, sampling.spacing)  # (S + 1,)
        if sampling.strategy == "noise_only" and sigma:
            return MixturePlan(times[-1:], 1 - sigma, 0.0)
        if sigma == 1:
            return MixturePlan(times[-1:], 0.0, 0.0)
        if sampling.strategy == "sdedit":
            times = times[sampling.steps - round((1 - sigma) * sampling.steps) :]
        elif sampling.strategy == "sdedit_snr" and sigma:
            start = (bars - sigma).abs().argmin()  # T is that of clean latents
            times = torch.cat([start[None], times[times < start]]) if start < len(bars) - 1 else times[-1:]
        level = (1 - bars[times[0]]).sqrt().item()
        return MixturePlan(times, level, float(sampling.guided and len(times) > 1))

    def solve(
        self, model: Model, start: Tensor, times: Tensor, draw: Callable[[], Tensor] | None = None
    ) -> Iterator[Tensor]:
        """Go from noise to data: each step predicts the clean latents and adds the noise of the next timestep.

        DDIM keeps the direction of the predicted noise (its equation 12). Ancestral sampling draws from the posterior
        (DDPM, equations 6 and 7), with T replaced by the timesteps visited. The state is float64 throughout.

        Args:
            model: predicts the noise of a state (N, L, D) at a timestep; a learned variance in [-1, 1] may follow it:
                (N, L, D) or (N, L, 2 D), guided or not.
            start: state (N, L, D) at the first time.
            times: from :func:`visited_timesteps`, or the rest of them.
            draw: standard normal noise (N, L, D) of the next step; the last step adds none.

        Yields:
            The state (N, L, D) float64 after each step.
        """
        sampling, bars = self.sampling, self.bars
        x, width = start.double(), start.shape[2]
        for i, (time, level, following) in enumerate(
            zip(times.tolist(), bars[times].tolist(), bars[times[1:]].tolist(), strict=False)
        ):
            predicted = model(x, time).double()
            noise, learned = predicted[..., :width], predicted[..., width:]
            clean = (x - math.sqrt(1 - level) * noise) / math.sqrt(level)
            clean = clean if self.clip is None else clean.clamp(-self.clip, self.clip)
            beta = 1 - level / following  # variance that the skipped steps of training's chain add together
            posterior = (1 - following) / (1 - level) * beta
            if sampling.sampler == "ddim":
                std = sampling.eta * math.sqrt(posterior)
                x = math.sqrt(following) * clean + math.sqrt(max(0.0, 1 - following - std**2)) * noise
            else:
                x = (
                    math.sqrt(following) * beta / (1 - level) * clean
                    + math.sqrt(1 - beta) * (1 - following) / (1 - level) * x
                )
                std = _ancestral_std(sampling.variance, posterior, beta, learned)
            if i < len(times) - 2 and (sampling.sampler == "ancestral" or sampling.eta):
                x = x + std * draw().double()
            yield x


def _ancestral_std(variance: str, posterior: float, beta: float, learned: Tensor) -> float | Tensor:
    """Standard deviation of an ancestral step's noise; a learned variance is interpolated in logarithms.

    Source: Improved DDPM, equation 15.
    """
    if variance == "learned" and posterior:
        share = (learned + 1) / 2  # (N, L, D)
        return torch.exp((share * math.log(beta) + (1 - share) * math.log(posterior)) / 2)
    return math.sqrt(beta if variance == "large" else posterior)
