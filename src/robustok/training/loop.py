"""What the three trainings do alike, as functions: settings, run folder, schedule, EMA, state for resume, log.

Same command again = resume. Randomness is a function of (seed, step), drawn for the global batch, so that neither an
interruption nor the number of processes changes a run: nothing random is saved because nothing random outlives a
step.
"""

import copy
import hashlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from PIL import Image
from pydantic import Field, model_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from robustok.config import Config, differences, plain, read_yaml, save, validate
from robustok.images import rank_rows, to_pixels
from robustok.snapshots import atomic_folder, read_weights
from robustok.training.states import pack, unpack
from robustok.types import UserError

console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")  # of several processes the first one speaks


class TrainingConfig(Config):
    """Settings that the three trainings share. Time is in steps."""

    out: Path = Field(description="run folder; an existing one of the same configuration is resumed")
    seed: int = Field(0, ge=0, description="seed of everything random in this run")
    steps: int = Field(ge=1, description="number of training steps")
    batch_size: int = Field(ge=1, description="images in the global batch, all processes together")
    learning_rate: float = Field(gt=0, description="peak learning rate")
    min_learning_rate: float = Field(0.0, ge=0, description="learning rate at the last step of the cosine")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from 0")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW betas")
    clip_norm: float = Field(0.0, ge=0, description="clip the gradient norm to this; 0 is off")
    ema_decay: float = Field(
        0.9999, ge=0, lt=1, description="decay of the averaged weights, which snapshots hold; 0 keeps the last"
    )
    precision: Literal["auto", "bf16", "float32"] = Field(
        "auto", description="autocast dtype; auto is bf16 where the hardware multiplies it fast, else float32"
    )
    gradient_accumulation: int = Field(
        1, ge=1, description="parts in which a process goes through its share of the batch; more need less memory"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute the activations of transformer blocks again in the backward pass: less memory"
    )
    compile: bool = Field(False, description="compile the transformer blocks with torch.compile; a slower start")
    fsdp: bool = Field(False, description="shard the blocks' weights and optimiser among the processes (FSDP2)")
    workers: int = Field(
        0, ge=0, description="data loader processes for each training process; 0 reads in the process itself"
    )
    log_every: int = Field(50, ge=1, description="steps between lines of log.jsonl")
    state_every: int = Field(1000, ge=1, description="steps between states for resume; the two newest are kept")
    snapshot_every: int = Field(0, ge=0, description="steps between snapshots; 0 writes one, at the end")

    @model_validator(mode="after")
    def _warmup_fits(self) -> "TrainingConfig":
        if self.warmup_steps >= self.steps and self.warmup_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} does not leave any of the {self.steps} steps; lower it")
        return self


def start_accelerator(batch_size: int = 0, parts: int = 1) -> Accelerator:
    """The accelerator of this process: one device, or its share of `torchrun` / `accelerate launch`.

    Args:
        batch_size: global batch.
        parts: in which every process goes through its share (gradient accumulation).

    Raises:
        UserError: the global batch does not divide among the processes, or their shares into parts.
    """
    # PyTorch's float32 is TF32 in a GPU's convolutions, and float32 in its products: here it is float32 in both.
    torch.backends.cudnn.allow_tf32 = False
    # Without a GPU accelerate has to be told so, or every process of a `torchrun` takes itself for the only one.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    share = rank_rows(batch_size, accelerator.process_index, accelerator.num_processes)
    if (share.stop - share.start) % parts:
        raise UserError(
            f"gradient_accumulation {parts} does not divide the {share.stop - share.start} samples of each process; "
            "choose a divisor"
        )
    return accelerator


def leave_processes() -> None:
    """Leave the group of processes, if there is one, as the last thing of a program that went well.

    A thread of gloo that still frees what it sent while the interpreter shuts down ends the process with SIGABRT,
    however complete the run is. Not for a program that failed: the others may wait for it inside a collective, and
    only its exit lets the launcher end them.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def autocast(device: torch.device, precision: str) -> Any:
    """Context that multiplies in bf16 where asked for, and where ``auto`` finds hardware for it."""
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(device) else "float32"
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 products run in hardware: recent GPUs, and CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def step_rng(seed: int, step: int, purpose: str) -> torch.Generator:
    """CPU random generator of one purpose at one step, the same in every process."""
    key = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generator, which dropout and stochastic depth draw from."""
    torch.manual_seed(step_rng(seed, step, f"global/{rank}").initial_seed())


def learning_rate(run: TrainingConfig, step: int, peak: float | None = None) -> float:
    """Linear warm-up, then half a cosine from the peak to ``min_learning_rate`` at the end. Steps count from 0."""
    peak = run.learning_rate if peak is None else peak
    if step < run.warmup_steps:
        return peak * (step + 1) / (run.warmup_steps + 1)
    low = min(run.min_learning_rate, peak)
    progress = (step - run.warmup_steps) / max(1, run.steps - run.warmup_steps)
    return low + (peak - low) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set it in every group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def average_copy(model: nn.Module) -> nn.Module:
    """The model whose weights will be the exponential moving average: starts equal, eval mode, no gradients."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Set average = decay * average + (1 - decay) * model for trainable parameters; everything else is copied."""
    pairs = list(zip(average.parameters(), model.parameters(), strict=True))
    trained = [(a, p.detach()) for a, p in pairs if p.requires_grad]
    plain_pairs = [(a, p) for a, p in trained if not isinstance(p, DTensor)]
    if plain_pairs:
        torch._foreach_lerp_([a for a, _ in plain_pairs], [p for _, p in plain_pairs], 1 - decay)
    for a, p in trained:
        if isinstance(p, DTensor):  # the average is whole in every process; gathers one parameter at a time
            a.lerp_(p.full_tensor(), 1 - decay)
    for a, b in zip(average.buffers(), model.buffers(), strict=True):
        a.copy_(b)


def check_finite(loss: Tensor, terms: Mapping[str, Tensor], step: int, out: Path) -> None:
    """Stop before a broken loss reaches the weights.

    Raises:
        UserError: names the step and the terms that are not finite.
    """
    if not torch.isfinite(loss):
        broken = [f"{name} = {value.item()}" for name, value in terms.items() if not math.isfinite(value.item())]
        states = sorted((out / "state").glob("[0-9]*"))
        raise UserError(
            f"the loss is not finite at step {step} ({', '.join(broken) or loss.item()}); "
            f"{f'the last good state, {states[-1]}, is kept' if states else 'no state was saved before'}; "
            "lower learning_rate, set clip_norm, or precision=float32, in a new run folder"
        )


class Meter:
    """Means of scalars over the steps since the last line of the log; part of the state."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add one step's values."""
        for name, value in values.items():
            value = value.detach() if isinstance(value, Tensor) else value
            self.sums[name] = self.sums.get(name, 0.0) + (value.item() if isinstance(value, Tensor) else value)
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over steps and processes; forgets them."""
        names = sorted(self.sums)
        values = torch.tensor([self.sums[n] / self.counts[n] for n in names], dtype=torch.float64)
        if names and accelerator.num_processes > 1:
            values = accelerator.reduce(values.to(accelerator.device, torch.float32), "mean")
        self.sums, self.counts = {}, {}
        return dict(zip(names, values.tolist(), strict=True))

    def state(self) -> dict[str, dict[str, float]]:
        """Everything that resume needs."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state(self, state: dict[str, dict[str, Any]]) -> None:
        """Undo :meth:`state`."""
        self.sums, self.counts = state["sums"], state["counts"]


class RunFolder:
    """A run folder: config.yaml, log.jsonl, state/ for resume, snapshot/ for users.

    Nothing is written before :meth:`start`, so that a run that cannot begin leaves no folder behind.

    Args:
        run: configuration, compared with the one that is there.
        main: whether this process writes.

    Raises:
        UserError: the folder holds a run of another configuration (the keys that differ are named).
    """

    def __init__(self, run: Config, main: bool = True) -> None:
        self.run, self.path, self.main = run, Path(run.out), main
        self.started = time.monotonic()
        file = self.path / "config.yaml"
        if file.exists():
            found = differences(_settings(run, file) | {"out": None}, plain(run) | {"out": None})  # folders may move
            if found:
                raise UserError(
                    f"{self.path} holds a run of another configuration: {'; '.join(found[:5])}; "
                    "choose another out=FOLDER"
                )
        elif self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file, a run needs a folder; choose another out=FOLDER")
        elif self.path.exists() and any(self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no run (no config.yaml); choose another out=FOLDER")

    def start(self) -> None:
        """Make the folder and write config.yaml, once everything that the run needs is at hand.

        Raises:
            UserError: the folder cannot be written.
        """
        file = self.path / "config.yaml"
        if not self.main or file.exists():
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".tmp")
            save(self.run, temporary)
            temporary.replace(file)
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {self.path}: {error.strerror}; "
                "free some space or choose another out=FOLDER"
            ) from None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to log.jsonl."""
        if self.main:
            append_line(
                self.path / "log.jsonl", {"step": step, **values, "seconds": round(time.monotonic() - self.started, 2)}
            )

    def save_state(self, step: int, state: dict[str, Any]) -> None:
        """Write the state for resume, whole or not at all; the two newest are kept.

        Raises:
            UserError: no space, or weights that are not finite, with which nothing could be resumed.
        """
        if not self.main:
            return
        tensors: dict[str, Tensor] = {}
        skeleton = pack(state, "", tensors)
        broken = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
        if broken:
            raise UserError(
                f"{broken[0].strip('/')} is not finite after step {step}; the state before is kept: "
                f"lower learning_rate, "
                "set clip_norm, or precision=float32, in a new run folder"
            )
        with atomic_folder(self.path / "state" / f"{step:08d}") as folder:
            save_file(tensors, folder / "state.safetensors")
            (folder / "state.json").write_text(json.dumps({"step": step, "state": skeleton}))
        for old in sorted((self.path / "state").glob("[0-9]*"))[:-2]:
            shutil.rmtree(old)

    def load_state(self) -> tuple[int, dict[str, Any]] | None:
        """The newest state that reads well, as (step, state); None at the start. Later log lines are dropped."""
        for folder in sorted((self.path / "state").glob("[0-9]*"), reverse=True):
            try:
                content = json.loads((folder / "state.json").read_text())
                state = unpack(content["state"], read_weights(folder / "state.safetensors"))
            except (OSError, ValueError, KeyError, UserError) as error:
                console.print(f"[yellow]skipping the state {folder}, which cannot be read: {error}[/]", soft_wrap=True)
                continue
            self._truncate_log(content["step"])
            return content["step"], state
        self._truncate_log(-1)
        return None

    def _truncate_log(self, step: int) -> None:
        file = self.path / "log.jsonl"
        if not (self.main and file.exists()):
            return
        kept = []
        for line in file.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # half a line, written when the process was killed
        temporary = file.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(file)


def _settings(run: Config, file: Path) -> dict[str, Any]:
    """The settings in a run's config.yaml; those that were not known when it was written have their defaults."""
    settings = read_yaml(file)
    try:
        return plain(validate(type(run), settings))
    except UserError:  # of another verb, perhaps: the keys that differ say so
        return settings


def append_line(file: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line."""
    try:
        with file.open("a") as handle:
            handle.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write {file}: {error.strerror}; free some space and run the same command again"
        ) from None


def save_picture(path: Path, images: Tensor) -> None:
    """Write a sheet of images (rows, columns, 3, H, W) in [-1, 1] as PNG, every pixel as it is."""
    rows, columns, _, height, width = images.shape
    pixels = to_pixels(images.flatten(0, 1)).view(rows, columns, 3, height, width)
    sheet = pixels.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)  # (rows * H, columns * W, 3)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet.cpu().numpy()).save(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; free some space and run the same command again"
        ) from None


class Stopped(SystemExit):
    """Raised after SIGTERM, once the state is saved: a clean exit, the same command goes on."""

    def __init__(self, step: int) -> None:
        super().__init__(0)
        console.print(
            f"stopped by SIGTERM after step {step}; the state is saved, run the same command to go on", soft_wrap=True
        )


@contextmanager
def termination() -> Iterator[list[bool]]:
    """Note SIGTERM instead of dying from it: yields a list that is non-empty once the signal has come."""
    received: list[bool] = []
    try:
        previous = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    except ValueError:  # not the main thread, as in some notebooks
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set in any process, so that all of them stop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def track(steps: range, description: str, show: bool = True) -> Iterator[int]:
    """Go through the steps with a progress bar and the time left on stderr."""
    if not show or not (console.is_terminal or console.is_jupyter) or os.environ.get("ROBUSTOK_PROGRESS") == "0":
        yield from steps
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{description:<28}", total=steps.stop, completed=steps.start)
        for step in steps:
            yield step
            progress.advance(task)
