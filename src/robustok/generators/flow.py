"""Diffusion and flow matching: time, paths, samplers, guidance and sigma as pure functions.

Two conventions of time are in use: t = 1 is noise for some models, t = 0 for others. A model declares its own as
``noise_time`` and is always asked in it. What depends on the noise itself is computed from the *noise level*, which is
1 for pure noise and 0 for data in every family; :func:`noise_level` converts either way.

All latents here are normalised, as the transformer sees them. Sources: Lipman et al., "Flow Matching for Generative
Modeling" (arXiv 2210.02747); Liu et al., "Flow Straight and Fast" (arXiv 2209.03003); Ma et al., "SiT" (arXiv
2401.08740) for the stochastic sampler; Meng et al., "SDEdit" (arXiv 2108.01073) for sigma.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from robustok.config import Config
from robustok.errors import UserError
from robustok.generators.sampling import guide

DiffusionPath = Literal["linear", "cosine"]
Strategy = Literal["sdedit", "sdedit_snr", "linear_mix", "noise_only", "token_mix"]
Velocity = Callable[[Tensor, float], Tensor]
"""State (N, L, D) float64 and time, in the family's own convention, to its derivative (N, L, D) float64."""


class DiffusionSampling(Config):
    """How latents are drawn from a diffusion model, and how much of real latents a mixture keeps.

    Times are the family's own. What the releases call the number of steps differs: here it is the number of steps
    that the solver makes. LightningDiT counts points of time instead, so its 250 are 249 here.
    """

    name: Literal["diffusion"] = "diffusion"
    sampler: Literal["euler", "heun", "euler_maruyama"] = Field(
        "euler", description="euler and heun solve the ODE; euler_maruyama the SDE, which adds noise on the way"
    )
    steps: int = Field(50, ge=1, description="steps of the sampler from noise to data")
    last_step: float = Field(0.04, gt=0, lt=1, description="noise level from which the last step of the SDE jumps to 0")
    guidance_scale: float = Field(1.0, ge=0, description="classifier-free guidance; 1 switches it off")
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="first and last time that is guided, in the family's own time, both included"
    )
    guided_channels: int | None = Field(
        None, ge=1, description="only the first so many channels are guided; null is all (LightningDiT: 3)"
    )
    timestep_shift: float = Field(
        1.0, gt=0, description="s of t' = s t / (1 + (s - 1) t) in the family's own time; 1 leaves steps equal"
    )
    path: DiffusionPath | None = Field(
        None, description="path from data to noise; null is the one the model was trained on"
    )
    strategy: Strategy = Field(
        "sdedit",
        description="what sigma means for pairs: sdedit: share of sampler steps skipped; sdedit_snr: share of signal; "
        "linear_mix: weighted mean of real and sampled latents; noise_only: no generator, noise of 1 - sigma; "
        "token_mix: share of latents kept while the others are sampled",
    )

    @model_validator(mode="after")
    def _interval_is_one(self) -> "DiffusionSampling":
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval [{low}, {high}] must satisfy 0 <= low <= high <= 1")
        return self

    @property
    def guided(self) -> bool:
        """Whether sampling needs a second, unconditional pass."""
        return self.guidance_scale != 1

    def guides(self, time: float) -> bool:
        """Whether a step at this time, in the family's own convention, is guided."""
        return self.guided and self.guidance_interval[0] <= time <= self.guidance_interval[1]


# Time


def noise_level(times: Tensor, noise_time: float) -> Tensor:
    """Times of a family to noise levels (1 noise, 0 data). Its own inverse, so noise levels to times as well."""
    return times if noise_time == 1 else 1 - times


def shift_times(times: Tensor, shift: float) -> Tensor:
    """Timestep shift ``s t / (1 + (s - 1) t)``: below 1 it crowds the steps near t = 0, above 1 near t = 1."""
    return shift * times / (shift * times + (1 - times))  # the same, but exact at both ends


def sampling_times(sampling: DiffusionSampling, noise_time: float) -> Tensor:
    """The times that a sampler visits from noise to data, equally spaced before the shift.

    The SDE's steps are equally spaced down to the noise level ``last_step``, from where the last one jumps to data.

    Returns:
        (steps + 1,) float64 in the family's own convention.
    """
    if sampling.sampler == "euler_maruyama":
        levels = torch.linspace(1, sampling.last_step, sampling.steps, dtype=torch.float64)
        times = noise_level(torch.cat([levels, levels.new_zeros(1)]), noise_time)
    else:
        times = torch.linspace(noise_time, 1 - noise_time, sampling.steps + 1, dtype=torch.float64)
    return shift_times(times, sampling.timestep_shift)


def draw_noise_levels(count: int, distribution: Literal["uniform", "logit_normal"], rng: torch.Generator) -> Tensor:
    """Noise levels (N,) in [0, 1] for training: uniform, or the logistic function of a standard normal."""
    if distribution == "uniform":
        return torch.rand(count, generator=rng)
    return torch.randn(count, generator=rng).sigmoid()


# Paths


@dataclass(frozen=True)
class PathPoint:
    """Where a path stands at a noise level u: ``x = signal * latents + noise * noise``.

    Attributes:
        signal: coefficient of the latents.
        noise: coefficient of the noise.
        signal_rate: derivative of ``signal`` by u.
        noise_rate: derivative of ``noise`` by u.
    """

    signal: Tensor
    noise: Tensor
    signal_rate: Tensor
    noise_rate: Tensor


def path_point(level: Tensor, path: DiffusionPath) -> PathPoint:
    """Linear: 1 - u and u. Cosine: cos(pi u / 2) and sin(pi u / 2), which preserves the variance."""
    if path == "linear":
        ones = torch.ones_like(level)
        return PathPoint(1 - level, level, -ones, ones)
    angle = level * (math.pi / 2)
    return PathPoint(angle.cos(), angle.sin(), -math.pi / 2 * angle.sin(), math.pi / 2 * angle.cos())


def interpolate(latents: Tensor, noise: Tensor, level: Tensor, path: DiffusionPath) -> Tensor:
    """Latents noised to a level: a scalar, or one that broadcasts to (N, L, D)."""
    point = path_point(level, path)
    return point.signal * latents + point.noise * noise


def target_velocity(latents: Tensor, noise: Tensor, level: Tensor, path: DiffusionPath, noise_time: float) -> Tensor:
    """What flow matching learns: the derivative of :func:`interpolate` by the family's own time."""
    point = path_point(level, path)
    sign = 1 if noise_time == 1 else -1  # where noise lies at t = 0, time runs against the noise level
    return sign * (point.signal_rate * latents + point.noise_rate * noise)


def score_of(state: Tensor, velocity: Tensor, level: Tensor, path: DiffusionPath) -> Tensor:
    """Gradient of the log density at a noise level above 0, from the derivative of the state by the noise level.

    Linear: ``-(x + (1 - u) v) / u``. Cosine: ``-(x + v cot(pi u / 2) / (pi / 2))``.
    """
    point = path_point(level, path)
    ratio = point.signal / point.signal_rate
    variance = point.noise**2 - ratio * point.noise_rate * point.noise
    return (ratio * velocity - state) / variance


# Sampling


def trajectory(
    velocity: Velocity,
    start: Tensor,
    times: Tensor,
    sampler: Literal["euler", "heun", "euler_maruyama"],
    noise_time: float,
    path: DiffusionPath = "linear",
    draw: Callable[[], Tensor] | None = None,
) -> Iterator[Tensor]:
    """Solve ``dx/dt = v(x, t)`` along the times; the SDE adds noise of the variance ``2 u |du|`` and the drift for it.

    The state is float64 throughout: hundreds of small steps would lose digits in float32.

    Args:
        velocity: the model, guided or not.
        start: state (N, L, D) at the first time.
        times: (S + 1,) float64 from :func:`sampling_times`, or the rest of them.
        sampler: euler and heun (second order, two evaluations a step), or euler_maruyama.
        noise_time: the family's convention.
        path: for the SDE's score.
        draw: for the SDE, standard normal noise (N, L, D) of the next step. The last step takes none.

    Yields:
        The state (N, L, D) float64 after each step.
    """
    x = start.double()
    for i, (now, following) in enumerate(zip(times.tolist(), times.tolist()[1:], strict=False)):
        dt = following - now
        v = velocity(x, now)
        if sampler == "euler":
            x = x + dt * v
        elif sampler == "heun":
            x = x + dt * (v + velocity(x + dt * v, following)) / 2
        else:
            level, next_level = noise_level(torch.tensor([now, following], dtype=torch.float64), noise_time)
            du = (next_level - level).item()
            v = v * dt / du  # by the noise level
            x = x + du * (v - level * score_of(x, v, level, path))
            if i < len(times) - 2:
                x = x + math.sqrt(2 * level * -du) * draw().double()
        yield x


def guided_velocity(
    model: Callable[[Tensor, Tensor, Tensor], Tensor], labels: Tensor, null_label: int, sampling: DiffusionSampling
) -> Velocity:
    """Classifier-free guidance inside its interval and on its channels; both passes go in one batch.

    Args:
        model: latents (N, L, D) float64, times (N,) float64 and labels (N,) to the velocity (N, L, D).
        labels: classes (N,) int64.
        null_label: stands for "no class".
        sampling: scale, interval, channels.
    """
    both = torch.cat([labels, torch.full_like(labels, null_label)])  # (2N,)

    def velocity(x: Tensor, time: float) -> Tensor:
        times = x.new_full((len(both),), time)
        if not sampling.guides(time):
            return model(x, times[: len(x)], labels).double()
        conditional, unconditional = model(torch.cat([x, x]), times, both).double().chunk(2)  # each (N, L, D)
        guided = guide(conditional, unconditional, sampling.guidance_scale)
        channels = sampling.guided_channels
        if channels is None:
            return guided
        return torch.cat([guided[..., :channels], conditional[..., channels:]], dim=-1)

    return velocity


# Mixtures of samples with real latents


@dataclass(frozen=True)
class MixturePlan:
    """What a sigma means for a sampler.

    Attributes:
        times: those that the sampler visits, in the family's own convention; a single one where it has nothing to do.
        noise_level: of the real latents where the sampler starts: 1 is pure noise, 0 untouched.
        guided_share: share of the remaining steps that are guided; 0 where none remain.
    """

    times: Tensor
    noise_level: float
    guided_share: float

    def facts(self) -> dict[str, Any]:
        """For the manifest of a cache of pairs."""
        return {
            "noise_level": self.noise_level,
            "sampler_steps": len(self.times) - 1,
            "guided_share": self.guided_share,
        }


def plan_mixture(
    sampling: DiffusionSampling, sigma: float, noise_time: float, path: DiffusionPath = "linear"
) -> MixturePlan:
    """Where sampling starts so that the share ``sigma`` of real latents is kept.

    * ``sdedit``: the first round(sigma * steps) steps are skipped. The noise level is that of the time reached, which
      under a timestep shift or the SDE's last step differs from 1 - sigma.
    * ``sdedit_snr``: sampling starts at the noise level with sigma of the signal: the coefficient 1 - u of the linear
      path, the squared coefficient (the alpha bar of diffusion models) of the cosine path.
    * ``linear_mix``, ``token_mix``: all steps from pure noise.
    * ``noise_only``: no steps; the noise level is the deviation of the noise that is added, 1 - sigma.

    Args:
        sampling: sampler, steps, shift, guidance, strategy.
        sigma: sigma in [0, 1].
        noise_time: the family's convention.
        path: of the model.
    """
    times = sampling_times(sampling, noise_time)  # (S + 1,)
    if sampling.strategy == "noise_only" and sigma:
        return MixturePlan(times[-1:], 1 - sigma, 0.0)
    if sigma == 1:
        return MixturePlan(times[-1:], 0.0, 0.0)
    if sampling.strategy == "sdedit":
        times = times[round(sigma * sampling.steps) :]
    elif sampling.strategy == "sdedit_snr":
        level = 1 - sigma if path == "linear" else math.acos(math.sqrt(sigma)) * 2 / math.pi
        start = noise_level(torch.tensor([level], dtype=torch.float64), noise_time)
        times = torch.cat([start, times[noise_level(times, noise_time) < level - 1e-9]])
    steps = times[:-1].tolist()
    guided = sum(sampling.guides(time) for time in steps) / len(steps) if steps else 0.0
    return MixturePlan(times, noise_level(times[0], noise_time).item(), guided)


def sample_mixture(
    velocity: Velocity,
    noise: Tensor,
    sampling: DiffusionSampling,
    noise_time: float,
    path: DiffusionPath,
    reference: Tensor | None = None,
    sigma: float | None = None,
    keep: Tensor | None = None,
    draw: Callable[[], Tensor] | None = None,
) -> Tensor:
    """A free sample, or its mixture with real latents by ``sampling.strategy`` (see :func:`plan_mixture`).

    Args:
        velocity: the model, guided or not.
        noise: standard normal (N, L, D) float64.
        sampling: sampler and strategy.
        noise_time: the family's convention.
        path: of the model.
        reference: normalised real latents (N, L, D) float64.
        sigma: sigma in [0, 1]; 0 or None ignores the reference.
        keep: for ``token_mix``, which latents (N, L, 1) stay as they are.
        draw: for the SDE, noise (N, L, D) of its next step.

    Returns:
        Normalised latents (N, L, D) float64.
    """
    if reference is None or not sigma:
        reference, sigma = None, 0.0
    plan = plan_mixture(sampling, sigma, noise_time, path)

    def noised(time: float) -> Tensor:
        """The real latents on their straight way from the same noise."""
        return interpolate(reference, noise, noise_level(torch.tensor(time, dtype=torch.float64), noise_time), path)

    def solve(model: Velocity, start: Tensor) -> Iterator[Tensor]:
        return trajectory(model, start, plan.times, sampling.sampler, noise_time, path, draw)

    return mix(velocity, solve, noised, plan, sampling.strategy, noise, reference, sigma, keep)


def mix(
    model: Velocity,
    solve: Callable[[Velocity, Tensor], Iterator[Tensor]],
    noised: Callable[[float], Tensor],
    plan: MixturePlan,
    strategy: Strategy,
    noise: Tensor,
    reference: Tensor | None,
    sigma: float,
    keep: Tensor | None,
) -> Tensor:
    """What the strategies have in common whatever the sampler: :func:`sample_mixture` and its sibling for DDPM.

    Args:
        model: what the sampler asks at each step, guided or not.
        solve: the sampler: of a model and a start, the states (N, L, D) after each step of the plan.
        noised: the real latents as noisy as they are at a time.
        plan: where sampling starts.
        strategy: counts where there is a reference.
        noise: standard normal (N, L, D) float64.
        reference: normalised real latents (N, L, D) float64; None is a free sample.
        sigma: sigma.
        keep: for ``token_mix``, which latents (N, L, 1) stay as they are.
    """
    strategy = None if reference is None else strategy
    if strategy == "noise_only":
        return reference + plan.noise_level * noise
    # Kept latents are put in place before every look, as noisy as the others: what is sampled fits what is kept.
    around = (lambda x, time: model(torch.where(keep, noised(time), x), time)) if strategy == "token_mix" else model
    x = noised(plan.times[0].item()) if strategy in ("sdedit", "sdedit_snr") else noise
    for state in solve(around, x):
        x = state
    if strategy == "token_mix":
        return torch.where(keep, reference, x)
    return sigma * reference + (1 - sigma) * x if strategy == "linear_mix" else x


def image_normals(rngs: Sequence[torch.Generator], shape: tuple[int, int]) -> Tensor:
    """The next standard normal numbers of each image: (N, L, D) float32 on the CPU."""
    if not rngs:
        return torch.empty(0, *shape)
    return torch.stack([torch.randn(shape, generator=rng) for rng in rngs])


def check_reference(sigma: float | None, reference: Tensor | None, shape: tuple[int, int, int]) -> None:
    """Refuse a sigma or real latents that cannot be mixed with samples of ``shape`` (N, L, D).

    Raises:
        UserError: sigma outside [0, 1]; sigma above 0 without a reference; a reference of another shape or dtype.
    """
    if sigma is not None and not 0 <= sigma <= 1:
        raise UserError(f"sigma is {sigma}; accepted is 0 (free sample) to 1 (the reference itself)")
    if reference is None:
        if sigma:
            raise UserError(f"sigma is {sigma} but no reference is given; pass the latents of real images")
        return
    if reference.shape != shape or not reference.is_floating_point():
        raise UserError(
            f"the reference has shape {tuple(reference.shape)} and dtype {reference.dtype}; expected floats {shape}; "
            "encode the images with the tokenizer this generator was trained on"
        )
