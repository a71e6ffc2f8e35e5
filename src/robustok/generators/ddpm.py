"""DDPM: a chain of noise levels, the steps left of it, two samplers and sigma as pure functions.

Time is a whole number here: 0 is the least noisy of T timesteps, T - 1 the noisiest, and -1 stands for clean latents.
How noisy they are is said by alpha bar (a), the share of the signal's variance: sqrt(a) latents + sqrt(1 - a) noise.

All latents here are normalised. Sources: Ho et al., "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239);
Song et al., "Denoising Diffusion Implicit Models" (arXiv 2010.02502); Nichol & Dhariwal, "Improved DDPM" (arXiv
2102.09672) for fewer steps and the learned variance; Lin et al. (arXiv 2305.08891) for the names of the spacings.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from robustok.config import Config
from robustok.errors import UserError
from robustok.generators.flow import MixturePlan, Strategy, Velocity, mix


class DDPMSampling(Config):
    """How latents are drawn from a model that predicts noise, and how much of real latents a mixture keeps."""

    name: Literal["ddpm"] = "ddpm"
    sampler: Literal["ddim", "ancestral"] = Field(
        "ddim",
        description="ddim is deterministic unless eta says otherwise; ancestral is that of DDPM, which adds noise",
    )
    steps: int = Field(
        50, ge=1, description="steps of the sampler; at most the timesteps that the model was trained on"
    )
    spacing: Literal["leading", "linspace", "trailing"] = Field(
        "leading",
        description="which timesteps are visited: leading: multiples of T / steps, so not the noisiest (diffusers); "
        "linspace: the first, the last and what is evenly between (DiT's release); trailing: the last and those below",
    )
    eta: float = Field(0.0, ge=0, le=1, description="noise of ddim, as a share of that of ancestral")
    variance: Literal["small", "large", "learned"] = Field(
        "small",
        description="noise of ancestral: small: of the posterior; large: of the step; learned: between the two, as the "
        "model says (DiT's release)",
    )
    guidance_scale: float = Field(1.0, ge=0, description="classifier-free guidance; 1 switches it off")
    guided_channels: int | None = Field(
        None, ge=1, description="only the first so many channels are guided; null is all (DiT's release: 3)"
    )
    strategy: Strategy = Field(
        "sdedit",
        description="what sigma means for pairs: sdedit: share of sampler steps skipped; sdedit_snr: alpha bar, the "
        "signal's share of the variance; linear_mix: weighted mean of real and sampled latents; noise_only: no "
        "generator, noise of 1 - sigma; token_mix: share of latents kept while the others are sampled",
    )

    @property
    def guided(self) -> bool:
        """Whether sampling needs a second, unconditional pass."""
        return self.guidance_scale != 1

    def guides(self, time: float) -> bool:
        """Whether a step at this timestep is guided: all are."""
        return self.guided


# Time


def alpha_bars(
    timesteps: int, beta_start: float, beta_end: float, schedule: Literal["linear", "scaled_linear"]
) -> Tensor:
    """The alpha bar of every timestep, and 1 for clean latents.

    Args:
        timesteps: T.
        beta_start: variance of the noise that the first step of training's chain adds.
        beta_end: of the last.
        schedule: whether the variances in between are evenly spaced, or their roots.

    Returns:
        (T + 1,) float64, decreasing but for the last, so that index -1 is that of clean latents.
    """
    power = {"linear": 1.0, "scaled_linear": 0.5}[schedule]
    betas = torch.linspace(beta_start**power, beta_end**power, timesteps, dtype=torch.float64) ** (1 / power)
    return torch.cat([(1 - betas).cumprod(0), betas.new_ones(1)])  # (T + 1,)


def visited_timesteps(steps: int, timesteps: int, spacing: Literal["leading", "linspace", "trailing"]) -> Tensor:
    """The timesteps that a sampler visits from noise to data, and -1, where it arrives.

    Returns:
        (steps + 1,) int64.

    Raises:
        UserError: more steps than there are timesteps.
    """
    if steps > timesteps:
        raise UserError(
            f"sampling.steps is {steps}, and the model knows {timesteps} timesteps; take that many or fewer"
        )
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


def chain(
    model: Velocity,
    start: Tensor,
    times: Tensor,
    bars: Tensor,
    sampling: DDPMSampling,
    draw: Callable[[], Tensor] | None = None,
    clip: float | None = None,
) -> Iterator[Tensor]:
    """Walk from noise to data: each step guesses the clean latents, then adds the noise that the next timestep has.

    DDIM keeps the direction of the predicted noise (its equation 12). Ancestral sampling draws from the posterior
    (DDPM, equations 6 and 7), with T replaced by the timesteps visited. The state is float64 throughout.

    Args:
        model: predicts the noise of a state (N, L, D) at a timestep; a learned variance in [-1, 1] may follow it:
            (N, L, D) or (N, L, 2 D), guided or not.
        start: state (N, L, D) at the first time.
        times: from :func:`visited_timesteps`, or the rest of them.
        bars: from :func:`alpha_bars`.
        sampling: which sampler, and how much noise it adds.
        draw: standard normal noise (N, L, D) of the next step; the last step takes none.
        clip: guesses of clean latents are clamped to -clip and clip.

    Yields:
        The state (N, L, D) float64 after each step.
    """
    x, width = start.double(), start.shape[2]
    for i, (time, level, following) in enumerate(
        zip(times.tolist(), bars[times].tolist(), bars[times[1:]].tolist(), strict=False)
    ):
        predicted = model(x, time).double()
        noise, learned = predicted[..., :width], predicted[..., width:]
        clean = (x - math.sqrt(1 - level) * noise) / math.sqrt(level)
        clean = clean if clip is None else clean.clamp(-clip, clip)
        beta = 1 - level / following  # variance that the skipped steps of training's chain add together
        posterior = (1 - following) / (1 - level) * beta
        if sampling.sampler == "ddim":
            spread = sampling.eta * math.sqrt(posterior)
            x = math.sqrt(following) * clean + math.sqrt(max(0.0, 1 - following - spread**2)) * noise
        else:
            x = (
                math.sqrt(following) * beta / (1 - level) * clean
                + math.sqrt(1 - beta) * (1 - following) / (1 - level) * x
            )
            spread = _deviation(sampling.variance, posterior, beta, learned)
        if i < len(times) - 2 and (sampling.sampler == "ancestral" or sampling.eta):
            x = x + spread * draw().double()
        yield x


def _deviation(variance: str, posterior: float, beta: float, learned: Tensor) -> float | Tensor:
    """Of an ancestral step's noise; learned: a point between both on a scale of logarithms (Improved DDPM, 15)."""
    if variance == "learned" and posterior:
        share = (learned + 1) / 2  # (N, L, D)
        return torch.exp((share * math.log(beta) + (1 - share) * math.log(posterior)) / 2)
    return math.sqrt(beta if variance == "large" else posterior)


# Mixtures of samples with real latents


def plan_ddpm(sampling: DDPMSampling, sigma: float, bars: Tensor) -> MixturePlan:
    """Where sampling starts so that the share ``sigma`` of real latents is kept; its noise level is a deviation.

    * ``sdedit``: round((1 - sigma) * steps) steps are left. With linear betas little noise is left early: at sigma 0.9
      latents keep an amplitude of about 0.95.
    * ``sdedit_snr``: sampling starts at the timestep, visited or not, whose alpha bar is nearest to sigma.
    * ``linear_mix``, ``token_mix``: all steps from pure noise.
    * ``noise_only``: no steps; noise of the deviation 1 - sigma is added.

    Args:
        sampling: steps, spacing, guidance, strategy.
        sigma: sigma in [0, 1].
        bars: from :func:`alpha_bars`.
    """
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


def sample_ddpm(
    model: Velocity,
    noise: Tensor,
    sampling: DDPMSampling,
    bars: Tensor,
    reference: Tensor | None = None,
    sigma: float | None = None,
    keep: Tensor | None = None,
    draw: Callable[[], Tensor] | None = None,
    clip: float | None = None,
) -> Tensor:
    """A free sample, or its mixture with real latents by ``sampling.strategy`` (see :func:`plan_ddpm`).

    Args:
        model: as :func:`chain` asks it.
        noise: standard normal (N, L, D) float64.
        sampling: sampler and strategy.
        bars: from :func:`alpha_bars`.
        reference: normalised real latents (N, L, D) float64.
        sigma: sigma in [0, 1]; 0 or None ignores the reference.
        keep: for ``token_mix``, which latents (N, L, 1) stay as they are.
        draw: noise (N, L, D) of the sampler's next step.
        clip: as in :func:`chain`.

    Returns:
        Normalised latents (N, L, D) float64.
    """
    if reference is None or not sigma:
        reference, sigma = None, 0.0
    plan = plan_ddpm(sampling, sigma, bars)

    def noised(time: float) -> Tensor:
        return add_noise(reference, noise, bars[int(time)])

    def solve(model: Velocity, start: Tensor) -> Iterator[Tensor]:
        return chain(model, start, plan.times, bars, sampling, draw, clip)

    return mix(model, solve, noised, plan, sampling.strategy, noise, reference, sigma, keep)
