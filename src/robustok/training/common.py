"""What the three trainings share: settings, learning rate, averaged weights, and the means in the log."""

import copy
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from robustok.config import Config
from robustok.data.loader import Workers
from robustok.losses.adversarial import AdversarialConfig
from robustok.losses.semantic import TeacherConfig, contrastive_loss
from robustok.metrics.processes import ALONE, Processes
from robustok.precision import DESCRIPTION, Precision
from robustok.snapshots import outline_of
from robustok.tokenizers.quantizers import AnyQuantizerConfig
from robustok.types import TokenizerOutput

STATISTICS = "statistics"  # folder of a run with those of the real images

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(Config):
    """Settings of all three trainings. Time is in steps."""

    out: Path = Field(description="run folder; an existing one of the same configuration is resumed")
    seed: int = Field(0, ge=0, description="seed of everything random in this run")
    steps: int = Field(ge=1, description="number of training steps")
    batch_size: int = Field(ge=1, description="images in the global batch, all processes together")
    learning_rate: float = Field(gt=0, description="peak learning rate")
    min_learning_rate: float = Field(0.0, ge=0, description="learning rate at the last step of the cosine")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from 0")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW betas")
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw8bit: moments of 8 bits, a quarter of their memory; needs a GPU and bitsandbytes"
    )
    clip_norm: float = Field(0.0, ge=0, description="clip the gradient norm to this; 0 is off")
    ema_decay: float = Field(
        0.9999, ge=0, lt=1, description="decay of the averaged weights, which snapshots hold; 0 keeps the last"
    )
    precision: Precision = Field("bf16", description=f"of products and convolutions: {DESCRIPTION}")
    gradient_accumulation: int = Field(
        1, ge=1, description="parts in which a process goes through its share of the batch; more need less memory"
    )
    gradient_checkpointing: bool = Field(
        False,
        description="compute the activations of blocks again in the backward pass: less memory, a third more work",
    )
    compile: bool = Field(
        False,
        description="torch.compile of transformer blocks and whole convolutional encoders and decoders; a slow start",
    )
    fsdp: bool = Field(False, description="shard the blocks' weights and optimiser among the processes (FSDP2)")
    workers: Workers = None
    log_every: int = Field(50, ge=1, description="steps between lines of log.jsonl")
    state_every: int = Field(1000, ge=1, description="steps between states for resume; the two newest are kept")
    snapshot_every: int = Field(0, ge=0, description="steps between snapshots; 0 writes one, at the end")
    tracker: Literal["tensorboard", "wandb", "trackio", "swanlab", "comet_ml"] | None = Field(
        None, description="also send the log, pictures and these settings to a tracker of experiments"
    )

    def due(self, every: int, done: int) -> bool:
        """Whether what happens every so many steps (0: never) and after the last one happens after ``done`` steps."""
        return done == self.steps or (every > 0 and done % every == 0)

    def schedule(self, step: int) -> tuple[float, ...]:
        """Everything in a step that depends on ``steps``: where it stays the same, ``steps`` may change on resume."""
        adversarial = getattr(self, "adversarial", None)
        return learning_rate(self, step), adversary_learning_rate(self, adversarial, step) if adversarial else 0.0

    @model_validator(mode="after")
    def _warmup_fits(self) -> "TrainingConfig":
        if self.warmup_steps >= self.steps and self.warmup_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} does not leave any of the {self.steps} steps; lower it")
        return self


def learning_rate(run: TrainingConfig, step: int, peak: float | None = None) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then a cosine from the peak to ``min_learning_rate``."""
    peak = run.learning_rate if peak is None else peak
    if step < run.warmup_steps:
        return peak * (step + 1) / (run.warmup_steps + 1)
    low = min(run.min_learning_rate, peak)
    progress = (step - run.warmup_steps) / max(1, run.steps - run.warmup_steps)
    return low + (peak - low) * (1 + math.cos(math.pi * progress)) / 2


def adversary_learning_rate(run: TrainingConfig, config: AdversarialConfig, step: int) -> float:
    """The discriminator's: the run's schedule with its own peak; with ``warmup_steps`` one that begins at its start."""
    if config.warmup_steps is None:
        return learning_rate(run, step, config.learning_rate)
    own = {"steps": run.steps - config.start, "warmup_steps": config.warmup_steps}
    return learning_rate(run.model_copy(update=own), step - config.start, config.learning_rate)


def made(make: Callable[[], nn.Module], settings: str) -> nn.Module:
    """A model with fresh weights, if it fits into the memory of this machine.

    Args:
        make: makes it.
        settings: its settings, for the error.

    Raises:
        UserError: it does not fit; nothing was allocated.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63
    limit = f"this machine's memory of {memory / 1e9:.3g} GB; lower its sizes"
    outline_of(make, 10**5, memory // 4, f"{settings} ask for", limit)
    return make()


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = value


def average_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode without gradients, to hold the exponential moving average of the weights."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Set average = decay * average + (1 - decay) * model for trainable parameters; copy the buffers."""
    pairs = list(zip(average.parameters(), model.parameters(), strict=True))
    trained = [(a, p.detach()) for a, p in pairs if p.requires_grad]
    whole = [(a, p) for a, p in trained if not isinstance(p, DTensor)]
    if whole:
        torch._foreach_lerp_([a for a, _ in whole], [p for _, p in whole], 1 - decay)
    for a, p in trained:
        if isinstance(p, DTensor):  # the average is not sharded; gather one parameter at a time
            a.lerp_(p.full_tensor(), 1 - decay)
    for a, b in zip(average.buffers(), model.buffers(), strict=True):
        a.copy_(b)


def processes_of(accelerator: Accelerator) -> Processes:
    """The processes of an accelerator, as metrics share images among them."""
    if accelerator.num_processes == 1:
        return ALONE
    return Processes(
        accelerator.process_index,
        accelerator.num_processes,
        lambda tensor: accelerator.reduce(tensor.to(accelerator.device), "sum").cpu(),
        gather_object,
    )


def quantizer_terms(
    quantizer: AnyQuantizerConfig, teacher: TeacherConfig, output: TokenizerOutput
) -> dict[str, Tensor]:
    """Weighted terms of the quantiser, and of the semantic teacher where there is one."""
    losses = {name: getattr(output, f"{name}_loss") for name in ("codebook", "commitment", "entropy")}
    terms = {name: getattr(quantizer, f"{name}_weight") * loss for name, loss in losses.items() if loss is not None}
    if output.semantic_targets is not None:
        terms["semantic"] = teacher.weight * contrastive_loss(output.semantic_targets, output.semantic_latents)
    return terms


class Meter:
    """Means of scalars over the steps since the last line of the log.

    Values on a device are summed there, in float64, and read when a line or a state is due: the host does not wait for
    them in between.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add one step's values."""
        for name, value in values.items():
            number = value.detach().double() if isinstance(value, Tensor) else value
            self.sums[name] = self.sums.get(name, 0.0) + number
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over steps and processes. The values are forgotten."""
        sums = self._read()
        names = sorted(sums)
        values = torch.tensor([sums[n] / self.counts[n] for n in names], dtype=torch.float64)
        if names and accelerator.num_processes > 1:
            values = accelerator.reduce(values.to(accelerator.device, torch.float32), "mean")
        self.sums, self.counts = {}, {}
        return dict(zip(names, values.tolist(), strict=True))

    def state(self) -> dict[str, dict[str, float]]:
        """Everything that resume needs."""
        return {"sums": self._read(), "counts": dict(self.counts)}

    def load_state(self, state: dict[str, dict[str, Any]]) -> None:
        """Undo :meth:`state`."""
        self.sums, self.counts = state["sums"], state["counts"]

    def _read(self) -> dict[str, float]:
        """The sums, all read from the device at once."""
        there = [name for name, value in self.sums.items() if isinstance(value, Tensor)]
        read = torch.stack([self.sums[name] for name in there]).tolist() if there else []
        return self.sums | dict(zip(there, read, strict=True))
