"""Where image-to-image starts: which strength of a pipeline a sigma is, and how much noise that is in truth."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustok.generators.pipeline_families import PipelineFamily
from robustok.generators.pipeline_loading import call, default_of


@dataclass(frozen=True)
class Start:
    """Where image-to-image starts.

    Attributes:
        strength: of the pipeline's call.
        schedule: its ``num_inference_steps``.
        steps: how many of them are run.
        signal: what the clean latents are multiplied with there.
        noise: what standard normal noise is multiplied with before it is added.
    """

    strength: float
    schedule: int
    steps: int
    signal: float
    noise: float

    @property
    def level(self) -> float:
        """The share of the noise in the sum of both amplitudes: 0 is clean, 1 pure noise; the time of flow matching."""
        return self.noise / (self.signal + self.noise)


class _StartedError(Exception):
    """Ends a pipeline's call once it is known where sampling starts: ``timestep`` (1,)."""

    def __init__(self, timestep: Tensor) -> None:
        super().__init__()
        self.timestep = timestep


def find_start(
    pipe: Any,
    family: PipelineFamily,
    arguments: Callable[[float, int], dict[str, Any]],
    sigma: float,
    by_level: bool,
    steps: int | None = None,
) -> Start:
    """Where image-to-image starts so that the share ``sigma``, below 1, is kept; at least one step is run.

    Args:
        pipe: image-to-image.
        family: of the pipeline.
        arguments: strength and steps to the arguments of a call for one image.
        sigma: share of the reference that is kept.
        by_level: whether sigma is 1 - level of the start, to the nearest step; else 1 - strength.
        steps: of the scheduler from pure noise; None is the pipeline's own number.

    Raises:
        UserError: the pipeline refuses the arguments.
    """
    schedule = steps or default_of(pipe, "num_inference_steps")
    grid = pipe.scheduler.config.original_inference_steps if family.skips else schedule  # strength is a share of these
    if not by_level:
        least = (1 + 1e-6) / grid if family.floors else 0.5 / grid
        return _start(pipe, family, arguments, max(round(1 - sigma, 12), least), schedule, grid)

    def start(count: int) -> Start:
        strength = min(1.0, (count + (1e-6 if family.floors else -0.5)) / grid)
        return _start(pipe, family, arguments, strength, schedule, grid)

    level = 1 - sigma
    above = bisect_left(range(1, grid), level, key=lambda count: start(count).level) + 1  # the first, or all steps
    return min(map(start, {max(1, above - 1), above}), key=lambda found: abs(found.level - level))


def _start(
    pipe: Any,
    family: PipelineFamily,
    arguments: Callable[[float, int], dict[str, Any]],
    strength: float,
    schedule: int,
    grid: int,
) -> Start:
    """Where a pipeline starts at a strength: it is called, and stopped before it adds noise."""
    if family.skips:
        schedule = min(schedule, int(grid * strength))

    def stop(_image: Any, timestep: Tensor, *_rest: Any, **_options: Any) -> None:
        raise _StartedError(timestep[:1])

    pipe.prepare_latents = stop  # in the place of the method
    try:
        call(pipe, arguments(strength, schedule))
    except _StartedError as started:
        timestep = started.timestep
    finally:
        del pipe.prepare_latents
    one, zero = (torch.full((1, 1, 1, 1), value, device=timestep.device) for value in (1.0, 0.0))
    add = getattr(pipe.scheduler, "scale_noise", None)  # of flow matching
    add = add or (lambda sample, time, noise: pipe.scheduler.add_noise(sample, noise, time))
    signal, noise = (add(*pair).item() for pair in ((one, timestep, zero), (zero, timestep, one)))
    timesteps = pipe.scheduler.timesteps if family.skips else pipe.get_timesteps(schedule, strength, "cpu")[0]
    return Start(strength, schedule, len(timesteps) // pipe.scheduler.order, signal, noise)
