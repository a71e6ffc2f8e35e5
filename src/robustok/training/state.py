"""What a training saves for resume, and one step of its optimiser."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from robustok.training.adversary import Adversary
from robustok.training.common import Meter, learning_rate, set_learning_rate, update_average
from robustok.training.finite import FiniteCheck, step_optimizer
from robustok.training.prepared import Prepared


class Extra(Protocol):
    """Anything else that a training saves."""

    def state(self) -> dict[str, Any]:
        """Keys and values for the state. All processes call this."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state`, given the whole state."""
        ...


@dataclass
class TrainingState:
    """Everything that resume needs.

    Random number generators are not among it: random numbers are a function of the seed and the step.

    Attributes:
        name: key of the weights, ``tokenizer`` or ``generator``.
        model: the weights; its parameters may be sharded.
        average: their exponential moving average.
        optimizer: of the model.
        finite: check of the model's losses.
        adversary: the discriminator with its optimiser, if there is one.
        extras: what only this training saves.
        meter: values since the last line of the log.
        last_is_due: whether the average, of decay 0, is yet to become the last weights.
    """

    name: str
    model: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    finite: FiniteCheck
    adversary: Adversary | None = None
    extras: Sequence[Extra] = ()
    meter: Meter = field(default_factory=Meter)
    last_is_due: bool = False

    def settle(self) -> None:
        """Look at the last losses; needed before anything that the weights make is written. All processes call this.

        An average of decay 0 is the last weights: they are copied, and gathered where they are sharded, only here.

        Raises:
            UserError: a loss was not finite.
        """
        self.finite.settle()
        if self.adversary is not None:
            self.adversary.finite.settle()
        if self.last_is_due:
            update_average(self.average, self.model, 0.0)
            self.last_is_due = False

    def means(self) -> dict[str, float]:
        """Values for a line of the log: means since the last one. All processes call this.

        Raises:
            UserError: a loss was not finite.
        """
        self.settle()
        return self.meter.means(self.finite.accelerator)

    def save(self, keep: bool) -> dict[str, Any]:
        """The state with shards gathered. All processes call this; only those with ``keep`` get the weights.

        Raises:
            UserError: a loss was not finite.
        """
        self.settle()
        state = {
            self.name: self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "adversary": None if self.adversary is None else self.adversary.state(),
            "meter": self.meter.state(),
        }
        for extra in self.extras:
            state |= extra.state()
        return gather(state, keep)

    def load(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`save`."""
        load_module(self.model, state[self.name])
        self.average.load_state_dict(state["average"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.meter.load_state(state["meter"])
        if self.adversary is not None:
            self.adversary.load_state(state["adversary"])
        for extra in self.extras:
            extra.load_state(state)


def optimise(model: Prepared, state: TrainingState, losses: Iterable[Mapping[str, Tensor]], step: int) -> None:
    """One step of the optimiser and of the averaged weights. The loss is the sum of the terms that are logged.

    Args:
        model: computes the gradients.
        state: what changes.
        losses: terms of the loss, weighted; one mapping for each part of the batch.
        step: counted from 0; decides the learning rate.

    The gradients are freed at the end, so that the next step's activations have their memory.

    Raises:
        UserError: a loss of the step before was not finite. That step has changed no weights, nor does this one if its
            own loss is not finite.
    """
    run, sums = model.run, {}
    rate = learning_rate(run, step)
    set_learning_rate(state.optimizer, rate)
    for terms in losses:
        total = sum(terms.values())
        model.backward(total)
        state.meter.add({**terms, "total": total, "lr": rate})
        sums = {name: term.detach() + sums.get(name, 0.0) for name, term in terms.items()}
    if run.clip_norm:
        state.meter.add({"gradient_norm": model.clip(run.clip_norm)})
    step_optimizer(state.optimizer, state.finite.add(sums, step))
    state.optimizer.zero_grad(set_to_none=True)
    if run.ema_decay:
        update_average(state.average, state.model, run.ema_decay)
    else:
        state.last_is_due = True


def gather(tree: Any, keep: bool = True) -> Any:
    """Gather the shards in a tree of dicts, lists, tensors and scalars. All processes call this.

    Args:
        tree: for example a ``state_dict``.
        keep: whether this process needs the gathered tensors; otherwise they are dropped one by one.
    """
    if isinstance(tree, DTensor):
        full = tree.detach().full_tensor()
        return full.cpu() if keep else None
    if isinstance(tree, Mapping):
        return {key: gather(value, keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [gather(value, keep) for value in tree]
    return tree


def load_module(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load gathered weights into a module whose parameters may be sharded."""
    own = module.state_dict()
    module.load_state_dict({name: _shard_like(own.get(name), value) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a gathered state into an optimiser whose parameters may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {name: _shard_like(parameters[index], value) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})


def _shard_like(reference: Tensor | None, value: Any) -> Any:
    """This process's shard of ``value``, where ``reference`` is a shard of the same shape; else ``value``."""
    if isinstance(reference, DTensor) and isinstance(value, Tensor) and value.shape == reference.shape:
        return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)
    return value
