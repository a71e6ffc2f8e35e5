"""The networks of post-training's losses: those that are frozen, and the discriminator."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from robustok.data.order import bucket_steps
from robustok.errors import UserError
from robustok.evaluation.held_out import real_statistics
from robustok.losses.discriminators import DiscriminatorConfig, carried_config, frozen_features
from robustok.losses.frechet import FrechetTerm
from robustok.losses.reconstruction import ReconstructionTerms
from robustok.metrics.features import load_extractor
from robustok.precision import autocast
from robustok.snapshots import read_header, resolve
from robustok.training.adversary import Adversary
from robustok.training.common import processes_of
from robustok.training.decoder_settings import DecoderTrainingRun, adversary_policy
from robustok.training.objectives import Examples, Material, Steps, rows_of
from robustok.training.prepared import adamw
from robustok.types import Tokenizer


def check_networks(run: DecoderTrainingRun) -> None:
    """Load the networks of the losses and the held-out score once: errors come before the hours that pairs take.

    Raises:
        UserError: perceptual networks, discriminators or extractors are missing or unusable; names all of them, since
            without a network all their files have to be brought.
    """
    device = torch.device("cpu")
    needed: list[Callable[[], Any]] = [lambda: ReconstructionTerms(run.reconstruction, device)]
    if adversary_policy(run) != "none":
        needed.append(lambda: frozen_features(_discriminator(run)[0], device))
    accelerator = torch.accelerator.current_accelerator(check_available=True) or device
    needed.append(lambda: adamw(run, accelerator))
    if run.held_out is not None:
        needed.append(lambda: load_extractor(run.held_out.extractor, device))
    if run.frechet.weight:
        needed.append(lambda: frechet_term(run, device, data=""))
    problems = []
    for load_network in needed:
        try:
            load_network()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; and ".join(problems))


def frechet_term(run: DecoderTrainingRun, device: torch.device, data: str) -> FrechetTerm | None:
    """The Frechet term for the images with this fingerprint, or none."""
    if not run.frechet.weight:
        return None
    evaluator = None if run.held_out is None else load_extractor(run.held_out.extractor, device).name
    return FrechetTerm(run.frechet, device, evaluator, data)


def start_frechet(
    term: FrechetTerm, run: DecoderTrainingRun, buckets: Sequence[Material], accelerator: Accelerator
) -> None:
    """Start its moments with all real images, and with as many samples of the untouched decoder as they remember."""
    rank, world = accelerator.process_index, accelerator.num_processes
    data, processes = [material.data for material in buckets], processes_of(accelerator)
    real = real_statistics(data, term.extractors, accelerator.device, processes, run.workers)
    rows = rows_of(run.objective, run.batch_size, world * run.gradient_accumulation)["free"]
    steps = Steps(rows, run.seed, 0, round(1 / (1 - run.frechet.decay)), rank, world, repeats=len(buckets) > 1)
    chosen, own = bucket_steps([len(material.caches["samples"]) for material in buckets], run.seed, steps.count)

    def decoded(material: Material, step: int) -> Tensor:
        cache = material.caches["samples"]
        return material.decode(cache.read(steps.records(len(cache), step)).latents.to(accelerator.device))

    term.start(real, (decoded(buckets[i], step) for i, step in zip(chosen, own.tolist(), strict=True)))


def make_adversary(run: DecoderTrainingRun, accelerator: Any) -> Adversary | None:
    """The discriminator of the tokenizer's snapshot, or a new one, or none."""
    if adversary_policy(run) == "none":
        return None
    config, weights = _discriminator(run)
    return Adversary(run, run.adversarial, config, accelerator, weights)


def _discriminator(run: DecoderTrainingRun) -> tuple[DiscriminatorConfig, Path | None]:
    """Its settings, and the file of its weights if it is carried over."""
    if adversary_policy(run) != "carried":
        return run.discriminator, None
    folder, header = resolve(run.tokenizer), read_header(run.tokenizer)
    if "discriminator" not in header:
        raise UserError(f"{folder} holds no discriminator to carry over; set adversary=fresh, or adversarial.weight=0")
    config = carried_config(header["discriminator"], run.discriminator, source=str(folder))
    return config, folder / "discriminator.safetensors"


def warm_up(
    adversary: Adversary, original: Tokenizer, batches: Iterable[Examples], run: DecoderTrainingRun
) -> dict[str, float]:
    """Train a new discriminator on the original decoder's images: untrained it would damage the decoder.

    Returns:
        Values for the log: the discriminator's terms at the last step.
    """
    device = adversary.accelerator.device
    for step, batch in enumerate(batches, start=-run.adversary_warmup):
        with torch.no_grad(), autocast(device, run.precision):
            decoded = batch.cut.decoded(original.decode(batch.latents))
        last = adversary.step(batch.real, adversary.features(decoded, step, "fake"), step)
    adversary.finite.settle()
    return {"adversary_warmup": run.adversary_warmup} | {name: value.item() for name, value in last.items()}
