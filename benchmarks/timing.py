"""Where a benchmark runs, and what a call costs there."""

import argparse
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch


@dataclass(frozen=True)
class Cost:
    """What a call cost.

    Attributes:
        cpu: CPU seconds of this process.
        wall: seconds until the device had finished.
        peak: largest memory of tensors on a GPU, or of the process until then on a CPU, in GB.
        device: "cpu" or "cuda".
    """

    cpu: float
    wall: float
    peak: float
    device: str

    @property
    def seconds(self) -> float:
        """What ratios are of: on a CPU its time, so that other load matters less, on a GPU the time that passed."""
        return self.cpu if self.device == "cpu" else self.wall

    def __str__(self) -> str:
        return f"{1e3 * self.cpu:9.1f} ms CPU {1e3 * self.wall:9.1f} ms wall, peak {self.peak:.2f} GB"


def arguments(doc: str) -> argparse.ArgumentParser:
    """The parser of a benchmark with ``--device``."""
    words = argparse.ArgumentParser(description=doc.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    words.add_argument("--device", choices=["cpu", "cuda"], default=default, help="default: a GPU if there is one")
    return words


def measure(function: Callable[[], Any], device: str) -> tuple[Any, Cost]:
    """The result of a call, and its cost."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.process_time(), time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 1e9
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return result, Cost(time.process_time() - start[0], time.perf_counter() - start[1], peak, device)


def median(function: Callable[[], Any], repeats: int, device: str) -> Cost:
    """The median cost of a call, after one that warms up."""
    function()
    costs = sorted((measure(function, device)[1] for _ in range(repeats)), key=lambda cost: cost.seconds)
    return costs[len(costs) // 2]


def trainings_on(device: str) -> AbstractContextManager:
    """Context: the library's commands use this device, though there may be a GPU."""
    hidden = mock.patch.object(torch.accelerator, "is_available", return_value=False)
    return hidden if device == "cpu" else nullcontext()
