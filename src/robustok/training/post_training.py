"""Post-training: the decoder alone learns to decode what the generator makes.

Latents come from a cache of pairs: real latents mixed with the generator's samples. Each is decoded and compared with
the real image it stems from, by the losses of main training, with the discriminator of main training. Encoder and
quantiser are frozen, in eval mode, and a digest before and after proves it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.config import Config, plain, validate
from robustok.discriminators import DiscriminatorConfig, PatchConfig
from robustok.images import Data, ImageDataset, batches_in_order, open_images, to_pixels
from robustok.latents import LatentCache, LatentRecords, check_cache, training_latents
from robustok.losses import AdversarialConfig, ReconstructionConfig
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.metrics.frechet import GaussianStatistics, covariance_factor, frechet_distance
from robustok.metrics.perturbed import decoded_statistics
from robustok.snapshots import read_snapshot, write_snapshot
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.training.loop import (
    Meter,
    RunFolder,
    Stopped,
    TrainingConfig,
    any_process,
    autocast,
    average_copy,
    check_finite,
    console,
    learning_rate,
    seed_step,
    set_learning_rate,
    start_accelerator,
    termination,
    track,
    update_average,
)
from robustok.training.objective import Adversary, ReconstructionTerms, last_layer
from robustok.types import Tokenizer, UserError


class HeldOut(Config):
    """Free samples on which the snapshots are judged. Report results on other samples than these."""

    latents: Path = Field(description="cache of free samples, made by `robustok generate`")
    extractor: ExtractorConfig = Field(description="feature space of the Frechet distance to the real images")


class PostTrainingRun(TrainingConfig):
    """Everything about post-training; the defaults are the released settings, in steps."""

    steps: int = Field(19_500, ge=1, description="number of training steps")
    batch_size: int = Field(1024, ge=1, description="pairs in the global batch, all processes together")
    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate")
    min_learning_rate: float = Field(1e-5, ge=0, description="learning rate at the last step of the cosine")
    tokenizer: Path = Field(description="tokenizer snapshot, or run folder of main training")
    pairs: Path = Field(description="cache of pairs, made by `robustok make-pairs`")
    data: Data = Field(description="the images that the pairs name")
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    adversarial: AdversarialConfig = AdversarialConfig(learning_rate=5e-5)
    adversary: Literal["carried", "fresh"] = Field(
        "carried", description="carried: the discriminator of main training goes on; fresh: a new one (release)"
    )
    discriminator: DiscriminatorConfig = Field(
        PatchConfig(), description="the fresh discriminator; a carried one brings its own settings"
    )
    held_out: HeldOut | None = Field(
        None, description="keep the best snapshot, the untouched decoder included; null keeps the last"
    )


class LatentDecoder(nn.Module):
    """A tokenizer whose forward is its decoder and whose other weights are frozen: what DDP may wrap."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer.requires_grad_(False)
        for module in tokenizer.decoder_modules():
            module.requires_grad_(True)

    def train(self, mode: bool = True) -> "LatentDecoder":
        """Train mode for the decoder; encoder and quantiser stay in eval mode."""
        super().train(False)
        for module in self.tokenizer.decoder_modules():
            module.train(mode)
        return self

    def forward(self, latents: Tensor) -> Tensor:
        """Latents to images (N, 3, H, W)."""
        return self.tokenizer.decode(latents)


def post_train(run: PostTrainingRun) -> Path:
    """Post-train a decoder; resume if the run folder holds a state.

    Returns:
        The folder of the best snapshot if held-out samples judge, else of the last one.

    Raises:
        UserError: tokenizer, pairs, data, configuration or run folder do not fit; the loss stops being finite.
    """
    accelerator = start_accelerator(run.batch_size)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    bare = load_tokenizer(run.tokenizer).to(device)
    before = encoder_digest(bare)
    pairs = LatentCache(run.pairs)
    check_cache(pairs, before)
    data = open_images(run.data, bare.image_size, split="train")
    if pairs.manifest.data != data.fingerprint:
        raise UserError(
            f"{run.pairs} pairs latents with other images than {data.describe()}; give the data they were encoded from"
        )
    reconstruction_terms = ReconstructionTerms(run.reconstruction, device)
    judge = _judge(run, bare, data, device) if run.held_out is not None and accelerator.is_main_process else None
    folder = RunFolder(run, accelerator.is_main_process)

    model = LatentDecoder(bare)
    average = average_copy(bare)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=run.learning_rate, betas=run.betas, weight_decay=run.weight_decay, fused=True
    )
    decoder, optimizer = accelerator.prepare(model, optimizer)
    seed_step(run.seed, step=0, rank=0)  # decides the first weights of a fresh discriminator, alike in every process
    adversary = _adversary(run, accelerator) if run.adversarial.weight else None
    meter, layer, best = Meter(), last_layer(bare), {"step": 0, "value": float("inf")}

    first = 0
    if (found := folder.load_state()) is not None:
        first, state = found
        bare.load_state_dict(state["tokenizer"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        if adversary is not None:
            adversary.load_state(state["adversary"])
        meter.load_state(state["meter"])
        best = state["best"]

    def keep(step: int) -> None:
        """Write the snapshot of this step, and judge it."""
        if accelerator.is_main_process:
            write = lambda name: _write_snapshot(folder.path / "snapshot" / name, run, step, average, adversary, pairs)  # noqa: E731
            if step:
                write(f"{step:08d}")
            if judge is not None:
                value = judge(average.decode)
                folder.log(step, {"held_out": value})
                if value < best["value"]:
                    best.update(step=step, value=value)
                    write("best")
        accelerator.wait_for_everyone()

    records = training_latents(pairs, run.batch_size, run.seed, first, run.steps - first, rank, world)
    folder.start()
    if first == 0:
        keep(0)
    with termination() as terminated:
        for step in track(range(first, run.steps), f"post-train {folder.path.name}", accelerator.is_main_process):
            batch = next(records)
            images = _targets(data, batch).to(device)  # (N, 3, H, W)
            seed_step(run.seed, step, rank)
            set_learning_rate(optimizer, learning_rate(run, step))
            decoder.train()

            # 1. Decode the mixtures; compare them with the real images.
            with autocast(device, run.precision):
                decoded = decoder(batch.latents.to(device))
                terms = reconstruction_terms(images, decoded)
            reconstruction_loss, statistics = sum(terms.values()), {"lr": learning_rate(run, step)}
            if adversary is not None and adversary.started(step):
                terms["adversarial"], statistics["adaptive_weight"] = adversary.term(
                    decoded, reconstruction_loss, layer, step
                )

            # 2. One step of the decoder, one of the discriminator.
            total = sum(terms.values())
            check_finite(total, terms, step, folder.path)
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(total)
            if run.clip_norm:
                statistics["gradient_norm"] = accelerator.clip_grad_norm_(trained, run.clip_norm)
            optimizer.step()
            update_average(average, bare, run.ema_decay)
            if adversary is not None and adversary.started(step):
                statistics |= adversary.step(images, decoded, step, folder.path)

            # 3. Log, judge, snapshot, state.
            done = step + 1
            meter.add({**terms, "total": total, **statistics})
            if done % run.log_every == 0 or done == run.steps:
                folder.log(done, meter.means(accelerator))
            if done == run.steps or (run.snapshot_every and done % run.snapshot_every == 0):
                keep(done)
            stop = any_process(accelerator, bool(terminated))
            if done % run.state_every == 0 or done == run.steps or stop:
                state = {
                    "tokenizer": bare.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
                state |= {"adversary": adversary.state() if adversary is not None else None, "meter": meter.state()}
                folder.save_state(done, state | {"best": best})
            if stop and done < run.steps:
                raise Stopped(done)
    for model in (bare, average):
        if encoder_digest(model) != before:
            raise RuntimeError("encoder or quantiser changed during post-training: this is a bug, please report it")
    if run.held_out is None:
        return folder.path / "snapshot" / f"{run.steps:08d}"
    if best["step"] == 0 and accelerator.is_main_process:
        console.print(
            f"[yellow]no snapshot was better than the untouched decoder on the held-out samples: "
            f"{folder.path} keeps that one[/]"
        )
    return folder.path / "snapshot" / "best"


def _targets(data: ImageDataset, records: LatentRecords) -> Tensor:
    """The real images (N, 3, H, W) of pairs, mirrored where they were mirrored before encoding.

    A broken image is replaced by the next good one, as it was when the latents were encoded.
    """
    images = data.read(records.indices, seeds=np.zeros(len(records.indices), dtype=np.int64)).images
    return torch.where(records.flips.bool()[:, None, None, None], images.flip(-1), images)


def _judge(
    run: PostTrainingRun, tokenizer: nn.Module, data: ImageDataset, device: torch.device
) -> Callable[[Callable], float]:
    """Function of a decoder: Frechet distance of its images of the held-out samples to the real images."""
    extractor, samples = load_extractor(run.held_out.extractor, device), LatentCache(run.held_out.latents)
    check_cache(samples, encoder_digest(tokenizer))
    reference = GaussianStatistics(extractor.dim)
    for batch in batches_in_order(data, batch_size=64):
        reference.update(extractor(to_pixels(batch.images).to(device)).cpu())
    factor = covariance_factor(reference)
    latents = samples.read(slice(None)).latents

    @torch.no_grad()
    def judge(decode: Callable[[Tensor], Tensor]) -> float:
        found = decoded_statistics(latents, lambda part: to_pixels(decode(part.to(device))), extractor)
        return frechet_distance(found, reference, factor)

    return judge


def _adversary(run: PostTrainingRun, accelerator: Any) -> Adversary:
    """The discriminator that main training left in the snapshot, or a fresh one."""
    if run.adversary == "fresh":
        return Adversary(run, run.adversarial, run.discriminator, accelerator)
    snapshot = read_snapshot(run.tokenizer, kind="tokenizer")
    if "discriminator" not in snapshot.header:
        raise UserError(
            f"{snapshot.path} holds no discriminator to carry over; set adversary=fresh, or adversarial.weight=0"
        )
    config = validate(type(run.discriminator), snapshot.header["discriminator"], source=str(snapshot.path))
    return Adversary(run, run.adversarial, config, accelerator, weights=snapshot.path / "discriminator.safetensors")


def _write_snapshot(
    path: Path, run: PostTrainingRun, step: int, average: nn.Module, adversary: Adversary | None, pairs: LatentCache
) -> None:
    """EMA weights for users: the same tokenizer, another decoder."""
    original = read_snapshot(run.tokenizer, kind="tokenizer")
    source = pairs.manifest.source
    header = original.header | {
        "latent_space": encoder_digest(average),
        "post_trained": {
            "steps": step,
            "pairs": pairs.manifest.count,
            "sigma": source.get("sigma"),
            "mode": source.get("mode"),
        },
    }
    extra = {}
    if adversary is not None:
        extra["discriminator"] = adversary.network.state_dict()
        header["discriminator"] = plain(adversary.settings)
    write_snapshot(path, header, average.state_dict(), extra)
