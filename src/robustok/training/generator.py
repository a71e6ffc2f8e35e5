"""Training of a generator on a cache of latents: tokens or continuous."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.config import plain
from robustok.console import note
from robustok.data.latent_cache import LatentCache
from robustok.data.latent_checks import check_squares
from robustok.data.loader import ahead, worker_count
from robustok.data.order import batch_indices
from robustok.devices import rank_rows, start_accelerator
from robustok.generators import (
    GeneratorConfig,
    SamplingConfig,
    build_generator,
    check_kind,
    check_sampling,
    default_sampling,
)
from robustok.generators.continuous import ContinuousConfig
from robustok.generators.flow import draw_noise_levels
from robustok.generators.rar import RARConfig, draw_orders, drop_labels, random_share
from robustok.randomness import seed_step, step_rng
from robustok.runs import RunFolder
from robustok.snapshots import write_snapshot
from robustok.training.common import Meter, TrainingConfig, average_copy, made
from robustok.training.finite import FiniteCheck
from robustok.training.inputs import input_digests, may_change
from robustok.training.prepared import Prepared
from robustok.training.state import TrainingState, optimise
from robustok.training.tracking import check_tracker, start_tracking
from robustok.types import GeneratorOutput

# Parameters without weight decay: parts of names, from the authors' code.
UNDECAYED = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")


class GeneratorTrainingRun(TrainingConfig):
    """Settings of the training of a generator; the defaults are the paper's RAR-B."""

    steps: int = Field(250_000, ge=1, description="number of training steps")
    batch_size: int = Field(2048, ge=1, description="images in the global batch, all processes together")
    learning_rate: float = Field(4e-4, gt=0, description="peak learning rate")
    min_learning_rate: float = Field(1e-5, ge=0, description="learning rate at the last step of the cosine")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from 0 (the paper: 62,500)")
    weight_decay: float = Field(0.03, ge=0, description="AdamW weight decay of the weight matrices")
    betas: tuple[float, float] = Field((0.9, 0.96), description="AdamW betas")
    clip_norm: float = Field(1.0, ge=0, description="clip the gradient norm to this; 0 is off")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="decay of the averaged weights; 0, as in the paper, keeps the last"
    )
    latents: Path = Field(description="cache of latents, made by `robustok encode`")
    generator: GeneratorConfig = RARConfig()
    random_until: float = Field(
        0.5, ge=0, le=1, description="share of the steps in which RAR has a random order for every sequence"
    )
    raster_from: float = Field(
        0.75, ge=0, le=1, description="share of the steps after which RAR has every sequence in raster order"
    )
    sampling: SamplingConfig | None = Field(
        None, description="sampling settings stored with the generator; null: the family's defaults, without guidance"
    )

    def schedule(self, step: int) -> tuple[float, ...]:
        """Also the share of random orders."""
        share = random_order_share(self, step) if isinstance(self.generator, RARConfig) else 0.0
        return *super().schedule(step), share


def random_order_share(run: GeneratorTrainingRun, step: int) -> float:
    """Share of the sequences that RAR has in a random order at a step."""
    return random_share(step, int(run.random_until * run.steps), int(run.raster_from * run.steps))


def train_generator(run: GeneratorTrainingRun) -> Path:
    """Train a generator; resume if the run folder holds a state.

    Returns:
        The folder of the last snapshot.

    Raises:
        UserError: latents, configuration or run folder are not usable; the loss is not finite.
    """
    check_tracker(run)
    accelerator = start_accelerator(run.batch_size, run.gradient_accumulation, run.precision)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    rows = rank_rows(run.batch_size, rank, world)  # of the global batch
    cache = LatentCache(run.latents)
    manifest = cache.manifest
    if manifest.source.get("sigma") is not None:
        note(f"{run.latents} holds samples of a generator, or mixtures with them: the generator learns these", "yellow")
    check_kind(run.generator.name, manifest.kind, str(run.latents))
    check_squares(cache, f"generator {run.generator.name}")
    check_sampling(run.generator.name, run.sampling or default_sampling(run.generator.name))
    folder = RunFolder(run, accelerator.is_main_process, later=may_change(run))

    seed_step(run.seed, step=0, rank=0)  # the same initial weights in every process
    sizes = manifest.latent_shape, manifest.classes, manifest.codebook_size
    bare = made(lambda: build_generator(run.generator, *sizes), "the settings generator.*").to(device)
    if manifest.kind == "continuous" and bare.latent_mean is None:
        bare.set_latent_statistics(*latent_statistics(cache), run.generator.latent_multiplier)
    objective = bare.objective if manifest.kind == "continuous" else None
    average = average_copy(bare)
    generator = Prepared(bare, run, accelerator)
    optimizer = generator.optimizer(parameter_groups(bare, run.weight_decay))
    state = TrainingState("generator", bare, average, optimizer, FiniteCheck(run.out, accelerator))
    first = folder.restore(state, input_digests(run))
    batch_indices(len(cache), run.batch_size, run.seed, first)  # raise now rather than at the first batch
    make = partial(step_inputs, run, cache, rows, bare.null_label)
    workers = worker_count(run.workers, most=1 if device.type == "cuda" else 0)
    batches = ahead(make, range(first, run.steps), workers, device)
    write = partial(_write_snapshot, folder, run, average, cache)
    folder.start()
    start_tracking(folder, first)

    for step in folder.steps(range(first, run.steps), state, run.state_every, accelerator):
        inputs, statistics = next(batches)
        seed_step(run.seed, step, rank)
        generator.train()

        # 1. Predict the latents from labels, orders or noise; one step of the generator.
        optimise(generator, state, _losses(generator, inputs, objective, statistics, state.meter), step)

        # 2. Log, snapshot.
        done = step + 1
        if run.due(run.log_every, done):
            folder.log(done, state.means())
        if run.due(run.snapshot_every, done):
            state.settle()
            if accelerator.is_main_process:
                write(done)
            accelerator.wait_for_everyone()
    return folder.last_snapshot(write, accelerator)


def _losses(
    generator: Prepared, inputs: Sequence[Tensor], objective: str | None, statistics: dict[str, float], meter: Meter
) -> Iterator[dict[str, Tensor]]:
    """Terms of the loss of each part of the batch; without an objective, for tokens. The meter gets the statistics."""
    for part in generator.parts(len(inputs[0])):
        output = generator(*(x[part] for x in inputs))
        meter.add(statistics)
        if objective is None:
            meter.add({"accuracy": accuracy(output)})
            yield cross_entropy(output)
        else:
            yield squared_error(output, objective)


def cross_entropy(output: GeneratorOutput) -> dict[str, Tensor]:
    """Mean cross-entropy over all predicted tokens, in nats."""
    logits = output.prediction.float().flatten(0, 1)  # (N * L, K)
    return {"cross_entropy": nn.functional.cross_entropy(logits, output.targets.flatten())}


def squared_error(output: GeneratorOutput, objective: str = "flow_matching") -> dict[str, Tensor]:
    """Mean squared error of a velocity (flow matching, arXiv 2210.02747, 2209.03003) or of noise (2006.11239)."""
    return {objective: nn.functional.mse_loss(output.prediction.float(), output.targets.float())}


def accuracy(output: GeneratorOutput) -> Tensor:
    """Share of the tokens that the most likely prediction hits."""
    return (output.prediction.detach().argmax(-1) == output.targets).float().mean()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: weight matrices with weight decay, all other parameters without."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        plain_weight = parameter.ndim >= 2 and not any(part in name for part in UNDECAYED)
        (decayed if plain_weight else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


@dataclass(frozen=True)
class Draws:
    """Random numbers of a step, drawn for the global batch, of which a process takes its N rows.

    Attributes:
        dropped: (N,) bool, labels to drop: classifier-free guidance needs a model without class.
        inputs: inputs of the generator's forward after latents and labels. RAR: orders (N, L). Diffusion: noise levels
            (N,) and noise (N, L, D).
        statistics: for the log.
    """

    dropped: Tensor
    inputs: tuple[Tensor, ...]
    statistics: dict[str, float] = field(default_factory=dict)


def step_inputs(
    run: GeneratorTrainingRun, cache: LatentCache, rows: slice, null_label: int, step: int
) -> tuple[tuple[Tensor, ...], dict[str, float]]:
    """What a process learns from in a step, read and drawn by data workers if wanted.

    Args:
        run: settings.
        cache: of latents.
        rows: of the global batch.
        null_label: replaces labels that are dropped.
        step: counted from 0.

    Returns:
        The inputs of the generator's forward, and what the log says of them.
    """
    records = cache.read(batch_indices(len(cache), run.batch_size, run.seed, step)[rows])
    draws = draw_step(run, cache.manifest.latent_shape, step, rows)
    labels = records.labels.masked_fill(draws.dropped, null_label)  # (N,)
    return (records.latents, labels, *draws.inputs), draws.statistics


def draw_step(run: GeneratorTrainingRun, latent_shape: tuple[int, int], step: int, rows: slice = slice(None)) -> Draws:
    """The draws of a step, a function of the seed and the step, for these rows of the global batch."""
    inputs, statistics = (), {}
    if isinstance(run.generator, ContinuousConfig):
        rng = step_rng(run.seed, step, "noise")
        levels = draw_noise_levels(run.batch_size, run.generator.noise_levels, rng)
        inputs = (levels[rows], torch.randn(run.batch_size, *latent_shape, generator=rng)[rows])
    else:
        rng = step_rng(run.seed, step, "order")
    if isinstance(run.generator, RARConfig):
        share = random_order_share(run, step)
        inputs = (draw_orders(run.batch_size, latent_shape[0], share, rng, rows),)
        statistics = {"random_order": share}
    zeros = torch.zeros(run.batch_size, dtype=torch.long)
    dropped = drop_labels(zeros, run.generator.label_dropout, 1, rng).bool()[rows]
    return Draws(dropped, inputs, statistics)


def latent_statistics(cache: LatentCache, rows: int = 4096) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over a cache of continuous latents, read ``rows`` at a time.

    The standard deviation of a constant channel is given as 1. Those that came with the latents of another project are
    kept.
    """
    if "latent_mean" in cache.manifest.source:
        return cache.manifest.source["latent_mean"], cache.manifest.source["latent_std"]
    count, total, squares = 0, 0.0, 0.0
    shift = cache.read(slice(0, 1)).latents.double().mean(dim=(0, 1))  # near the mean, for precise squares
    for start in range(0, len(cache), rows):
        latents = cache.read(slice(start, start + rows)).latents.double() - shift  # (n, L, D)
        count += latents.shape[0] * latents.shape[1]
        total, squares = total + latents.sum(dim=(0, 1)), squares + latents.square().sum(dim=(0, 1))  # (D,) each
    mean = total / count
    std = (squares / count - mean**2).clamp(min=0).sqrt()
    return (mean + shift).tolist(), torch.where(std > 0, std, 1.0).tolist()


def _write_snapshot(
    folder: RunFolder, run: GeneratorTrainingRun, average: nn.Module, cache: LatentCache, step: int
) -> None:
    """Write the averaged weights with the settings that sampling needs."""
    manifest = cache.manifest
    header = {
        "kind": "generator",
        "config": plain(average.config),
        "codebook_size": manifest.codebook_size,
        "latent_shape": list(manifest.latent_shape),
        "classes": manifest.classes,
        **({"class_names": manifest.class_names} if manifest.class_names else {}),
        "latent_space": manifest.tokenizer,
        "sampling": plain(run.sampling or default_sampling(run.generator.name)),
        "step": step,
        "trained_on": f"{manifest.count} sequences, data {manifest.data}",
    }
    write_snapshot(folder.path / "snapshot" / f"{step:08d}", header, average.state_dict(), {})
