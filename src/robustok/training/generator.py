"""Training of a generator on a cache of tokens, or of continuous latents."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.config import plain
from robustok.console import track
from robustok.data.latent_cache import LatentCache, training_latents
from robustok.devices import any_process, rank_rows, start_accelerator
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
from robustok.runs import RunFolder, Stopped, termination
from robustok.snapshots import write_snapshot
from robustok.training.common import (
    Meter,
    TrainingConfig,
    average_copy,
    check_finite,
    learning_rate,
    set_learning_rate,
    update_average,
)
from robustok.training.prepared import Prepared
from robustok.training.states import load_module, load_optimizer, whole
from robustok.types import GeneratorOutput

# Weight decay leaves alone what is no weight matrix: parts of the names that the released training excludes.
UNDECAYED = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma", "embed")


class GeneratorTrainingRun(TrainingConfig):
    """Everything about the training of a generator; the defaults are the paper's RAR-B."""

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
    latents: Path = Field(description="cache of tokens or latents, made by `robustok encode`")
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


def train_generator(run: GeneratorTrainingRun) -> Path:
    """Train a generator; resume if the run folder holds a state.

    Returns:
        The folder of the last snapshot.

    Raises:
        UserError: latents, configuration or run folder are not usable; the loss stops being finite.
    """
    accelerator = start_accelerator(run.batch_size, run.gradient_accumulation)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    rows = rank_rows(run.batch_size, rank, world)  # of the global batch

    cache = LatentCache(run.latents)
    manifest = cache.manifest
    check_kind(run.generator.name, manifest.kind, str(run.latents))
    check_sampling(run.generator.name, run.sampling or default_sampling(run.generator.name))
    folder = RunFolder(run, accelerator.is_main_process)

    seed_step(run.seed, step=0, rank=0)  # the same initial weights in every process
    bare = build_generator(run.generator, manifest.latent_shape, manifest.classes, manifest.codebook_size).to(device)
    if manifest.kind == "continuous" and bare.latent_mean is None:
        bare.set_latent_statistics(*latent_statistics(cache), run.generator.latent_multiplier)
    average = average_copy(bare)
    generator = Prepared(bare, run, accelerator)
    optimizer = generator.optimizer(parameter_groups(bare, run.weight_decay))
    meter, first = Meter(), 0
    if (found := folder.load_state()) is not None:
        first, state = found
        load_module(bare, state["generator"])
        average.load_state_dict(state["average"])
        load_optimizer(optimizer, state["optimizer"])
        meter.load_state(state["meter"])

    records = training_latents(cache, run.batch_size, run.seed, first, run.steps - first, rank, world)
    folder.start()
    with termination() as terminated:
        for step in track(range(first, run.steps), f"train-generator {folder.path.name}", accelerator.is_main_process):
            batch = next(records)
            seed_step(run.seed, step, rank)
            set_learning_rate(optimizer, learning_rate(run, step))
            generator.train()

            draws = draw_step(run, manifest.latent_shape, step)
            labels = batch.labels.masked_fill(draws.dropped[rows], bare.null_label)  # (N,)
            inputs = [x.to(device) for x in (batch.latents, labels, *(x[rows] for x in draws.inputs))]
            statistics = {"lr": learning_rate(run, step), **draws.statistics}
            optimizer.zero_grad(set_to_none=True)
            for part in generator.parts(len(labels)):
                output = generator(*(x[part] for x in inputs))
                if manifest.kind == "discrete":
                    terms, statistics["accuracy"] = cross_entropy(output), accuracy(output)
                else:
                    terms = squared_error(output, bare.objective)
                total = sum(terms.values())
                check_finite(total, terms, step, folder.path)
                generator.backward(total / run.gradient_accumulation)
                meter.add({**terms, "total": total, **statistics})
            if run.clip_norm:
                meter.add({"gradient_norm": generator.clip(run.clip_norm)})
            optimizer.step()
            update_average(average, bare, run.ema_decay)

            done = step + 1
            if done % run.log_every == 0 or done == run.steps:
                folder.log(done, meter.means(accelerator))
            if done == run.steps or (run.snapshot_every and done % run.snapshot_every == 0):
                if accelerator.is_main_process:
                    _write_snapshot(folder, run, done, average, cache)
                accelerator.wait_for_everyone()
            stop = any_process(accelerator, bool(terminated))
            if done % run.state_every == 0 or done == run.steps or stop:
                state = {"generator": bare.state_dict(), "average": average.state_dict()}
                state |= {"optimizer": optimizer.state_dict(), "meter": meter.state()}
                folder.save_state(done, whole(state, keep=accelerator.is_main_process))
            if stop and done < run.steps:
                raise Stopped(done)
    return folder.path / "snapshot" / f"{run.steps:08d}"


def cross_entropy(output: GeneratorOutput) -> dict[str, Tensor]:
    """Mean cross-entropy over all predicted tokens, in nats."""
    logits = output.prediction.float().flatten(0, 1)  # (N * L, K)
    return {"cross_entropy": nn.functional.cross_entropy(logits, output.targets.flatten())}


def squared_error(output: GeneratorOutput, objective: str = "flow_matching") -> dict[str, Tensor]:
    """Mean squared error of a velocity (flow matching, arXiv 2210.02747, 2209.03003) or of noise (2006.11239)."""
    return {objective: nn.functional.mse_loss(output.prediction.float(), output.targets.float())}


def accuracy(output: GeneratorOutput) -> Tensor:
    """Share of tokens whose most likely prediction is right."""
    return (output.prediction.detach().argmax(-1) == output.targets).float().mean()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weight matrices with decay, everything else without."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        plain_weight = parameter.ndim >= 2 and not any(part in name for part in UNDECAYED)
        (decayed if plain_weight else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


@dataclass(frozen=True)
class Draws:
    """What is random in a step, for the global batch of B; every process takes its rows.

    Attributes:
        dropped: (B,) bool, whose labels are dropped: guidance needs a model without class.
        inputs: what the generator's forward takes after latents and labels: RAR orders (B, L); a diffusion model noise
            levels (B,) and noise (B, L, D).
        statistics: for the log.
    """

    dropped: Tensor
    inputs: tuple[Tensor, ...]
    statistics: dict[str, float] = field(default_factory=dict)


def draw_step(run: GeneratorTrainingRun, latent_shape: tuple[int, int], step: int) -> Draws:
    """The draws of a step, a function of the seed and the step."""
    inputs, statistics = (), {}
    if isinstance(run.generator, ContinuousConfig):
        rng = step_rng(run.seed, step, "noise")
        levels = draw_noise_levels(run.batch_size, run.generator.noise_levels, rng)
        inputs = (levels, torch.randn(run.batch_size, *latent_shape, generator=rng))
    else:
        rng = step_rng(run.seed, step, "order")
    if isinstance(run.generator, RARConfig):
        share = random_share(step, int(run.random_until * run.steps), int(run.raster_from * run.steps))
        inputs, statistics = (draw_orders(run.batch_size, latent_shape[0], share, rng),), {"random_order": share}
    everyone = torch.zeros(run.batch_size, dtype=torch.long)
    dropped = drop_labels(everyone, run.generator.label_dropout, 1, rng).bool()
    return Draws(dropped, inputs, statistics)


def latent_statistics(cache: LatentCache, rows: int = 4096) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over a cache of continuous latents, read ``rows`` at a time.

    A channel that never varies gets the deviation 1.
    """
    count, total, squares = 0, 0.0, 0.0
    shift = cache.read(slice(0, 1)).latents.double().mean(dim=(0, 1))  # near the mean, or the squares lose their digits
    for start in range(0, len(cache), rows):
        latents = cache.read(slice(start, start + rows)).latents.double() - shift  # (n, L, D)
        count += latents.shape[0] * latents.shape[1]
        total, squares = total + latents.sum(dim=(0, 1)), squares + latents.square().sum(dim=(0, 1))  # (D,) each
    mean = total / count
    std = (squares / count - mean**2).clamp(min=0).sqrt()
    return (mean + shift).tolist(), torch.where(std > 0, std, 1.0).tolist()


def _write_snapshot(
    folder: RunFolder, run: GeneratorTrainingRun, step: int, average: nn.Module, cache: LatentCache
) -> None:
    """Averaged weights for users, with what sampling needs to know."""
    manifest = cache.manifest
    header = {
        "kind": "generator",
        "config": plain(average.config),
        "codebook_size": manifest.codebook_size,
        "latent_shape": list(manifest.latent_shape),
        "classes": manifest.classes,
        "latent_space": manifest.tokenizer,
        "sampling": plain(run.sampling or default_sampling(run.generator.name)),
        "step": step,
        "trained_on": f"{manifest.count} sequences, data {manifest.data}",
    }
    write_snapshot(folder.path / "snapshot" / f"{step:08d}", header, average.state_dict(), {})
