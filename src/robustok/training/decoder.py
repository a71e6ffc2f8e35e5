"""Post-training: the decoder alone learns to decode what the generator makes.

Latents come from a cache of pairs: real latents mixed with the generator's samples. Each is decoded and compared with
the real image it stems from, by the losses of main training, with the discriminator of main training. Encoder and
quantiser are frozen, in eval mode, and a digest before and after proves it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.config import load, plain
from robustok.console import console, track
from robustok.data.dataset import ImageDataset, open_images
from robustok.data.latent_cache import LatentCache, LatentRecords, check_cache, training_latents
from robustok.data.sources import Data
from robustok.devices import any_process, autocast, start_accelerator
from robustok.errors import UserError
from robustok.evaluation.held_out import HeldOut, HeldOutScore
from robustok.files import tensor_digest
from robustok.losses.adversarial import AdversarialConfig
from robustok.losses.discriminators import DiscriminatorConfig, PatchConfig, carried_config, frozen_features
from robustok.losses.reconstruction import ReconstructionConfig, ReconstructionTerms
from robustok.losses.semantic import TeacherConfig
from robustok.metrics.features import load_extractor
from robustok.randomness import seed_step
from robustok.runs import RunFolder, Stopped, termination
from robustok.snapshots import read_extra, read_header, resolve, write_snapshot
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.training.adversary import Adversary, last_layer
from robustok.training.authors import AuthorsStep
from robustok.training.common import (
    Meter,
    TrainingConfig,
    average_copy,
    check_finite,
    learning_rate,
    set_learning_rate,
    update_average,
)
from robustok.training.prepared import PreparedInParts
from robustok.training.states import load_module, load_optimizer, whole
from robustok.types import Tokenizer

# Of a cache of pairs, for the model card.
PAIR_FACTS = ("strategy", "noise_level", "sampler_steps", "guided_share", "generator", "sampling", "seed")


class DecoderTrainingRun(TrainingConfig):
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
    adversary: Literal["auto", "carried", "fresh", "reinit_warmup", "none"] = Field(
        "auto",
        description="carried: the discriminator in the tokenizer's snapshot goes on; fresh: a new one (release); "
        "reinit_warmup: a new one, which first learns from the untouched decoder; none: no adversarial term; "
        "auto: carried where the snapshot has one, else reinit_warmup",
    )
    adversary_warmup: int = Field(
        500, ge=1, description="steps for which reinit_warmup trains the new discriminator before the decoder learns"
    )
    trainable: Literal["decoder", "authors"] = Field(
        "decoder",
        description="decoder: it alone; authors: all but the encoder's transformer, on images that are encoded again",
    )
    teacher: TeacherConfig = TeacherConfig()  # of trainable=authors
    discriminator: DiscriminatorConfig = Field(
        PatchConfig(), description="a new discriminator; a carried one brings its settings, all but weights"
    )
    held_out: HeldOut | None = Field(
        None, description="keep the best snapshot, the untouched decoder included; null keeps the last"
    )
    continue_from: Path | None = Field(
        None,
        description="post-training run whose weights, averages, optimiser, discriminator and step this one goes on "
        "from, with its own settings: other pairs, more steps",
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


def train_decoder(run: DecoderTrainingRun) -> Path:
    """Post-train a decoder; resume if the run folder holds a state.

    Returns:
        The folder of the best snapshot if held-out samples judge, else of the last one.

    Raises:
        UserError: tokenizer, pairs, data, configuration or run folder do not fit; the loss stops being finite.
    """
    accelerator = start_accelerator(run.batch_size, run.gradient_accumulation)
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

    bare.latent_space = before if run.trainable == "authors" else None  # whose latents it decodes, though it moves
    released = AuthorsStep(run, bare, pairs.manifest.source.get("mode")) if run.trainable == "authors" else None
    model = LatentDecoder(bare) if released is None else released.model
    frozen = {name for name, p in bare.named_parameters() if not p.requires_grad}
    untouched = _digest(bare, frozen)
    average, layer = average_copy(bare), last_layer(bare)
    decoder = PreparedInParts(model, run, accelerator, layer)
    optimizer = decoder.optimizer()
    seed_step(run.seed, step=0, rank=0)  # decides the first weights of a fresh discriminator, alike in every process
    adversary = _adversary(run, accelerator)
    meter, best = Meter(), {"step": 0, "value": float("inf")}

    first, found = 0, folder.load_state()
    fresh = found is None
    if fresh and run.continue_from is not None:
        found = _previous_state(run.continue_from)
    if found is not None:
        first, state = found
        load_module(bare, state["tokenizer"])
        average.load_state_dict(state["average"])
        load_optimizer(optimizer, state["optimizer"])
        if adversary is not None:
            adversary.load_state(state["adversary"])
        meter.load_state(state["meter"])
        best = best if fresh else state["best"]

    def keep(step: int) -> None:
        """Write the snapshot of this step, and judge it."""
        if accelerator.is_main_process:
            header = _header(run, step, average, adversary, pairs)
            if step:
                _write_snapshot(folder.path / "snapshot" / f"{step:08d}", header, average, adversary, run.tokenizer)
            if judge is not None:
                value = judge(average.decode)
                folder.log(step, {"held_out": value})
                best.setdefault("first", {"step": step, "value": value})
                if value < best["value"]:
                    best.update(step=step, value=value)
                    header |= {"held_out": {"distance": value, "at_the_start": best["first"]["value"]}}
                    _write_snapshot(folder.path / "snapshot" / "best", header, average, adversary, run.tokenizer)
        accelerator.wait_for_everyone()

    records = training_latents(pairs, run.batch_size, run.seed, first, run.steps - first, rank, world)
    folder.start()
    if fresh:
        if adversary is not None and found is None and _policy(run) == "reinit_warmup":
            warmup = training_latents(pairs, run.batch_size, run.seed, 0, run.adversary_warmup, rank, world)
            folder.log(0, _warm_up(adversary, average, warmup, lambda batch: _targets(data, batch).to(device), run))
        keep(first)
    with termination() as terminated:
        for step in track(range(first, run.steps), f"post-train {folder.path.name}", accelerator.is_main_process):
            batch = next(records)
            images = _targets(data, batch).to(device)  # (N, 3, H, W)
            seed_step(run.seed, step, rank)
            set_learning_rate(optimizer, learning_rate(run, step))
            decoder.train()

            # 1. Decode the mixtures; compare them with the real images.
            latents = batch.latents.to(device)
            output = decoder(latents) if released is None else decoder(*released.inputs(latents))
            decoded = output if released is None else output.reconstructions  # (N, 3, H, W)
            terms = decoder.means(reconstruction_terms, images, decoded)
            reconstruction_loss, statistics = sum(terms.values()), {"lr": learning_rate(run, step)}
            terms |= {} if released is None else released.terms(output)
            if adversary is not None and adversary.started(step):
                fake = adversary.see(decoded, step, "fake")
                terms["adversarial"], statistics["adaptive_weight"] = adversary.term(
                    fake, decoded, reconstruction_loss, layer
                )

            # 2. One step of the decoder, one of the discriminator.
            total = sum(terms.values())
            check_finite(total, terms, step, folder.path)
            optimizer.zero_grad(set_to_none=True)
            decoder.backward(total)
            if run.clip_norm:
                statistics["gradient_norm"] = decoder.clip(run.clip_norm)
            optimizer.step()
            update_average(average, bare, run.ema_decay)
            if adversary is not None and adversary.started(step):
                statistics |= adversary.step(images, fake, step, folder.path)

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
                folder.save_state(done, whole(state, keep=accelerator.is_main_process) | {"best": best})
            if stop and done < run.steps:
                raise Stopped(done)
    for model in (bare, average):
        if _digest(model, frozen) != untouched:
            raise RuntimeError("what is frozen changed during post-training: this is a bug, please report it")
    if run.held_out is None:
        return folder.path / "snapshot" / f"{run.steps:08d}"
    if accelerator.is_main_process and best["step"] == best["first"]["step"]:
        console.print(
            f"[yellow]no snapshot was better on the held-out samples than the decoder it started from: "
            f"{folder.path} keeps that one[/]"
        )
    return folder.path / "snapshot" / "best"


def _digest(tokenizer: nn.Module, names: set[str]) -> str:
    return tensor_digest({name: p for name, p in tokenizer.named_parameters() if name in names})


def _targets(data: ImageDataset, records: LatentRecords) -> Tensor:
    """The real images (N, 3, H, W) of pairs, mirrored where they were mirrored before encoding.

    A broken image is replaced by the next good one, as it was when the latents were encoded.
    """
    images = data.read(records.indices, seeds=np.zeros(len(records.indices), dtype=np.int64)).images
    return torch.where(records.flips.bool()[:, None, None, None], images.flip(-1), images)


def _judge(
    run: DecoderTrainingRun, tokenizer: nn.Module, data: ImageDataset, device: torch.device
) -> Callable[[Callable], float]:
    """Function of a decoder: Frechet distance of its images of the held-out samples to the real images."""
    judge = HeldOutScore(run.held_out, tokenizer, data, device)
    return lambda decode: judge(decode)[0]


def _policy(run: DecoderTrainingRun) -> str:
    """Where the discriminator comes from: ``run.adversary``, decided where it is auto."""
    if not run.adversarial.weight:
        return "none"
    if run.adversary == "auto":
        return "carried" if "discriminator" in read_header(run.tokenizer) else "reinit_warmup"
    return run.adversary


def check_networks(run: DecoderTrainingRun) -> None:
    """Load what judges images, and drop it again: before hours of making pairs, not after them.

    Raises:
        UserError: a perceptual network, a discriminator or an extractor is missing or unusable.
    """
    device = torch.device("cpu")
    ReconstructionTerms(run.reconstruction, device)
    if _policy(run) != "none":
        frozen_features(_discriminator(run)[0], device)
    if run.held_out is not None:
        load_extractor(run.held_out.extractor, device)


def _adversary(run: DecoderTrainingRun, accelerator: Any) -> Adversary | None:
    """The discriminator that main training left in the snapshot, or a new one, or none."""
    if _policy(run) == "none":
        return None
    config, weights = _discriminator(run)
    return Adversary(run, run.adversarial, config, accelerator, weights)


def _discriminator(run: DecoderTrainingRun) -> tuple[DiscriminatorConfig, Path | None]:
    """Its settings, and the file of its weights where it is carried over."""
    if _policy(run) != "carried":
        return run.discriminator, None
    folder, header = resolve(run.tokenizer), read_header(run.tokenizer)
    if "discriminator" not in header:
        raise UserError(f"{folder} holds no discriminator to carry over; set adversary=fresh, or adversarial.weight=0")
    config = carried_config(header["discriminator"], run.discriminator, source=str(folder))
    return config, folder / "discriminator.safetensors"


def _warm_up(
    adversary: Adversary,
    untouched: nn.Module,
    records: Iterator[LatentRecords],
    targets: Callable[[LatentRecords], Tensor],
    run: DecoderTrainingRun,
) -> dict[str, float]:
    """Train a new discriminator on the untouched decoder's images: at its first guesses a decoder would unlearn.

    Returns:
        What to log: the discriminator's terms at the last step.
    """
    for step, batch in enumerate(records, start=-run.adversary_warmup):
        images = targets(batch)  # (N, 3, H, W)
        with torch.no_grad(), autocast(images.device, run.precision):
            decoded = untouched.decode(batch.latents.to(images.device))
        last = adversary.step(images, adversary.see(decoded, step, "fake"), step, run.out)
    return {"adversary_warmup": run.adversary_warmup} | {name: value.item() for name, value in last.items()}


def _previous_state(path: Path) -> tuple[int, dict[str, Any]]:
    """The newest state of another post-training run.

    Raises:
        UserError: there is no such run, or it has none.
    """
    found = RunFolder(load(DecoderTrainingRun, path / "config.yaml", [f"out={path}"]), main=False).load_state()
    if found is None:
        raise UserError(f"{path} holds no state to continue from; give the folder of a post-training run")
    return found


def _header(
    run: DecoderTrainingRun, step: int, average: nn.Module, adversary: Adversary | None, pairs: LatentCache
) -> dict[str, Any]:
    """What a snapshot says: all that the original says, and how its decoder was post-trained."""
    original, source = read_header(run.tokenizer), pairs.manifest.source
    if licence := original.get("licence") or average.licence:
        original["licence"] = licence
    policy = _policy(run)
    header = original | {
        "latent_space": encoder_digest(average),
        "post_trained": {
            "steps": step,
            "pairs": pairs.manifest.count,
            "sigma": source.get("sigma"),
            "mode": source.get("mode"),
            **({"trainable": run.trainable} if run.trainable != "decoder" else {}),
        },
        "protocol": {
            "adversary": f"{policy}, {run.adversary_warmup} steps" if policy == "reinit_warmup" else policy,
            "batch_size": run.batch_size,
            "learning_rate": run.learning_rate,
            **{key: source[key] for key in PAIR_FACTS if source.get(key) is not None},
        },
    }
    for of_the_original in ("discriminator", "delta", "held_out"):
        header.pop(of_the_original, None)
    return header if adversary is None else header | {"discriminator": plain(adversary.settings)}


def _write_snapshot(
    path: Path, header: dict[str, Any], average: nn.Module, adversary: Adversary | None, original: Path
) -> None:
    """EMA weights for users: the same tokenizer, another decoder."""
    extra = {} if adversary is None else {"discriminator": adversary.network.state_dict()}
    extra |= read_extra(original, "released")  # for the way back to the release's layout
    write_snapshot(path, header, average.state_dict(), extra)
