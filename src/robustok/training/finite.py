"""The finite check: a loss that is not finite changes no weights and ends the run, and the host never waits for it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from robustok.devices import Reading
from robustok.errors import UserError


@dataclass
class _Pending:
    step: int
    names: list[str]
    reading: Reading  # the flag, then the terms


class FiniteCheck:
    """Finds a loss that is not finite one step late, because the host does not wait for the loss of the last step.

    A GPU computes what the host has queued. To read a loss in the step in which it is computed, the host would wait
    until the queue is empty, and then the GPU would wait for the host. So the terms of a step are copied to the host
    while both go on, and looked at in the next step. Until then two things keep the weights good:

    * :meth:`add` returns a flag on the device, with which :func:`step_optimizer` leaves weights and moments as they
      are;
    * :meth:`settle` looks at the last terms, and has to be called before anything is written.

    Args:
        out: run folder, for the error.
        accelerator: the processes. A loss that is not finite in one of them is the error of all.
    """

    def __init__(self, out: Path, accelerator: Accelerator) -> None:
        self.out, self.accelerator = out, accelerator
        self._pending: _Pending | None = None

    def add(self, terms: Mapping[str, Tensor], step: int) -> Tensor:
        """Note the terms of a step, and look at those of the step before.

        Returns:
            (), on the device: 1 if the sum of the terms is not finite in any process, else 0.

        Raises:
            UserError: as :meth:`settle`.
        """
        self.settle()
        values = torch.stack([term.detach().float() for term in terms.values()])  # (T,)
        broken = (~values.sum().isfinite()).float()
        if self.accelerator.num_processes > 1:
            broken = self.accelerator.reduce(broken, "sum").clamp(max=1)
        self._pending = _Pending(step, list(terms), Reading(torch.cat([broken[None], values])))
        return broken

    def settle(self) -> None:
        """Look at the terms that were noted last.

        Raises:
            UserError: the loss was not finite; names the step and the terms.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        broken, *values = pending.reading.numbers()
        if not broken:
            return
        found = [f"{name} = {x}" for name, x in zip(pending.names, values, strict=True) if not math.isfinite(x)]
        states = sorted((self.out / "state").glob("[0-9]*"))
        raise UserError(
            f"the loss is not finite at step {pending.step} ({', '.join(found) or 'in another process'}); "
            f"{f'the last good state, {states[-1]}, is kept' if states else 'no state was saved before'}; "
            "lower learning_rate, set clip_norm, or precision=float32, in a new run folder, from step 0"
        )


def step_optimizer(optimizer: torch.optim.Optimizer, broken: Tensor) -> None:
    """One step, or none if ``broken``, a scalar on the device, is 1. The host does not read it.

    The kernels of PyTorch's fused optimisers do so themselves, for loss scaling.

    Args:
        optimizer: fused, prepared by accelerate.
        broken: from :meth:`FiniteCheck.add`.
    """
    optimizer.optimizer.found_inf = broken
    optimizer.step()
