"""Flow matching: time, paths and samplers.

Two conventions of time are in use: t = 1 is noise for some models, t = 0 for others. A model declares its own as
``noise_time``, and its times are always in it. Formulas of the noise use the *noise level* instead, which is 1 for pure
noise and 0 for data in every family; :func:`noise_level` converts either way.

All latents here are normalised, as the transformer receives them. Sources: Lipman et al., "Flow Matching for Generative
Modeling" (arXiv 2210.02747); Liu et al., "Flow Straight and Fast" (arXiv 2209.03003); Ma et al., "SiT" (arXiv
2401.08740) for the stochastic sampler.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from robustok.generators.diffusion_sampling import ContinuousSampling, MixturePlan, Model

DiffusionPath = Literal["linear", "cosine"]


class DiffusionSampling(ContinuousSampling):
    """How latents are drawn from a flow-matching model, and how much of real latents a mixture keeps.

    Times are the family's own. ``steps`` are steps of the solver: LightningDiT's code counts the points of time
    instead, so its 250 are 249 here.
    """

    name: Literal["diffusion"] = "diffusion"
    sampler: Literal["euler", "heun", "euler_maruyama"] = Field(
        "euler", description="euler and heun solve the ODE; euler_maruyama the SDE, which adds noise on the way"
    )
    steps: int = Field(50, ge=1, le=10**6, description="steps of the sampler from noise to data")
    last_step: float = Field(0.04, gt=0, lt=1, description="noise level from which the last step of the SDE jumps to 0")
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0), description="first and last time that is guided, in the family's own time, both included"
    )
    timestep_shift: float = Field(
        1.0, gt=0, description="s of t' = s t / (1 + (s - 1) t) in the family's own time; 1 leaves steps equal"
    )
    path: DiffusionPath | None = Field(
        None, description="path from data to noise; null is the one the model was trained on"
    )

    @model_validator(mode="after")
    def _interval_is_one(self) -> "DiffusionSampling":
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval [{low}, {high}] must satisfy 0 <= low <= high <= 1")
        return self

    def guides(self, time: float) -> bool:
        """Whether a step at this time, in the family's own convention, is guided."""
        return self.guided and self.guidance_interval[0] <= time <= self.guidance_interval[1]


# Time


def noise_level(times: Tensor, noise_time: float) -> Tensor:
    """Times of a family to noise levels (1 noise, 0 data). Its own inverse, so noise levels to times as well."""
    return times if noise_time == 1 else 1 - times


def shift_times(times: Tensor, shift: float) -> Tensor:
    """Timestep shift ``s t / (1 + (s - 1) t)``: below 1 it moves the steps towards t = 0, above 1 towards t = 1."""
    return shift * times / (shift * times + (1 - times))  # the same, but exact at both ends


def sampling_times(sampling: DiffusionSampling, noise_time: float) -> Tensor:
    """The times that a sampler visits from noise to data, equally spaced before the shift.

    The SDE's steps are equally spaced down to the noise level ``last_step``, from which the last one jumps to data.

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
    """Coefficients of a path at a noise level u: ``x = signal * latents + noise * noise``.

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
    """The target of flow matching: the derivative of :func:`interpolate` by the family's own time."""
    point = path_point(level, path)
    sign = 1 if noise_time == 1 else -1  # with noise at t = 0, time decreases as the noise level increases
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


@dataclass(frozen=True)
class FlowProcess:
    """The flow between latents and noise, and its samplers.

    Attributes:
        sampling: sampler, steps, shift, guidance, strategy.
        noise_time: the family's convention.
        path: path of the model.
    """

    sampling: DiffusionSampling
    noise_time: float
    path: DiffusionPath = "linear"

    def noised(self, latents: Tensor, noise: Tensor, time: float) -> Tensor:
        """Latents (N, L, D) on the path to the noise (N, L, D), at a time."""
        level = noise_level(torch.tensor(time, dtype=torch.float64), self.noise_time)
        return interpolate(latents, noise, level, self.path)

    def plan(self, sigma: float) -> MixturePlan:
        """Where sampling starts so that the share ``sigma`` of real latents is kept.

        * ``sdedit``: the first round(sigma * steps) steps are skipped. The noise level is that of the time reached,
          which with a timestep shift or the SDE's last step differs from 1 - sigma.
        * ``sdedit_snr``: sampling starts at the noise level with sigma of the signal: the coefficient 1 - u of the
          linear path, the squared coefficient (the alpha bar of diffusion models) of the cosine path.
        * ``linear_mix``, ``token_mix``: all steps from pure noise.
        * ``noise_only``: no steps; noise of the standard deviation 1 - sigma is added.
        """
        sampling, times = self.sampling, sampling_times(self.sampling, self.noise_time)  # (S + 1,)
        if sampling.strategy == "noise_only" and sigma:
            return MixturePlan(times[-1:], 1 - sigma, 0.0)
        if sigma == 1:
            return MixturePlan(times[-1:], 0.0, 0.0)
        if sampling.strategy == "sdedit":
            times = times[round(sigma * sampling.steps) :]
        elif sampling.strategy == "sdedit_snr":
            level = 1 - sigma if self.path == "linear" else math.acos(math.sqrt(sigma)) * 2 / math.pi
            start = noise_level(torch.tensor([level], dtype=torch.float64), self.noise_time)
            times = torch.cat([start, times[noise_level(times, self.noise_time) < level - 1e-9]])
        steps = times[:-1].tolist()
        guided = sum(sampling.guides(time) for time in steps) / len(steps) if steps else 0.0
        return MixturePlan(times, noise_level(times[0], self.noise_time).item(), guided)

    def solve(
        self, model: Model, start: Tensor, times: Tensor, draw: Callable[[], Tensor] | None = None
    ) -> Iterator[Tensor]:
        """Solve ``dx/dt = v(x, t)`` along the times.

        Heun's method is of second order and evaluates the model twice a step. The SDE adds noise of the variance
        ``2 u |du|``, and the drift that compensates for it. The state is float64 throughout: hundreds of small steps
        would lose digits in float32.

        Args:
            model: velocity, guided or not.
            start: state (N, L, D) at the first time.
            times: (S + 1,) float64 from :func:`sampling_times`, or the rest of them.
            draw: for the SDE, standard normal noise (N, L, D) of the next step. The last step adds none.

        Yields:
            The state (N, L, D) float64 after each step.
        """
        x = start.double()
        for i, (now, following) in enumerate(zip(times.tolist(), times.tolist()[1:], strict=False)):
            dt = following - now
            v = model(x, now)
            if self.sampling.sampler == "euler":
                x = x + dt * v
            elif self.sampling.sampler == "heun":
                x = x + dt * (v + model(x + dt * v, following)) / 2
            else:
                level, next_level = noise_level(torch.tensor([now, following], dtype=torch.float64), self.noise_time)
                du = (next_level - level).item()
                v = v * dt / du  # by the noise level
                x = x + du * (v - level * score_of(x, v, level, self.path))
                if i < len(times) - 2:
                    x = x + math.sqrt(2 * level * -du) * draw().double()
            yield x
