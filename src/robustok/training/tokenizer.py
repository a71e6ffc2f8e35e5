"""Main training of a tokenizer, with latent perturbation."""

from pathlib import Path

import torch
from accelerate import Accelerator
from pydantic import Field, model_validator
from torch import Tensor, nn

from robustok.config import plain
from robustok.console import track
from robustok.data.dataset import Augmentation, open_images
from robustok.data.loader import training_batches
from robustok.data.pixels import save_picture
from robustok.data.sources import Data
from robustok.devices import any_process, autocast, rank_rows, start_accelerator
from robustok.losses.adversarial import AdversarialConfig
from robustok.losses.discriminators import DiscriminatorConfig, PatchConfig
from robustok.losses.reconstruction import ReconstructionConfig, ReconstructionTerms
from robustok.losses.semantic import Teacher, TeacherConfig
from robustok.metrics.codebook import codebook_perplexity, codebook_usage
from robustok.randomness import seed_step, step_rng
from robustok.runs import RunFolder, Stopped, termination
from robustok.snapshots import write_snapshot
from robustok.tokenizers import TOKENIZERS, TokenizerConfig, encoder_digest
from robustok.tokenizers.perturbation import PerturbationConfig
from robustok.tokenizers.robustok import RobusTokConfig, load_pretrained_backbones
from robustok.training.adversary import Adversary, last_layer
from robustok.training.common import (
    Meter,
    TrainingConfig,
    average_copy,
    check_finite,
    learning_rate,
    set_learning_rate,
    update_average,
)
from robustok.training.latent_inputs import ContinuousPass, draw_inputs, latent_terms
from robustok.training.prepared import PreparedInParts
from robustok.training.states import load_module, load_optimizer, whole


class TokenizerTrainingRun(TrainingConfig):
    """Everything about the main training of a tokenizer; the defaults are the paper's ImageNet run, in steps."""

    steps: int = Field(250_200, ge=1, description="number of training steps")
    batch_size: int = Field(1024, ge=1, description="images in the global batch, all processes together")
    learning_rate: float = Field(2.4e-4, gt=0, description="peak learning rate")
    min_learning_rate: float = Field(5e-5, ge=0, description="learning rate at the last step of the cosine")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from 0")
    data: Data = Field(description="training images")
    augmentation: Augmentation = Augmentation()
    tokenizer: TokenizerConfig = RobusTokConfig()
    perturbation: PerturbationConfig = Field(PerturbationConfig(), description="of tokens; others have latent_noise")
    latent_noise: float = Field(
        0.0,
        ge=0,
        description="largest noise on continuous latents, as a share of the deviation of an image's own; each image "
        "draws a level below; 0 is off",
    )
    kl_weight: float = Field(1e-6, ge=0, description="weight of the KL divergence of a variational autoencoder (kl)")
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    discriminator: DiscriminatorConfig = PatchConfig()
    teacher: TeacherConfig = TeacherConfig()
    picture_every: int = Field(0, ge=0, description="steps between pictures of reconstructions in samples/; 0 is none")

    @model_validator(mode="after")
    def _latents_fit(self) -> "TokenizerTrainingRun":
        if not self.discrete:
            if self.teacher.name != "none":
                raise ValueError(
                    f"tokenizer {self.tokenizer.name} learns without a semantic teacher; set teacher.name=none"
                )
            return self
        if self.latent_noise:
            raise ValueError(f"latent_noise is for continuous latents, {self.tokenizer.name} makes tokens; set it to 0")
        size, strength = self.tokenizer.quantizer.size, self.perturbation.strength
        most = size - (not self.perturbation.include_self)
        if self.perturbation.active and strength > most:
            raise ValueError(
                f"perturbation.strength {strength} asks for more neighbours than a codebook of {size} codes has "
                f"({most}); lower it"
            )
        return self

    @property
    def discrete(self) -> bool:
        """Whether the tokenizer makes tokens."""
        return TOKENIZERS[self.tokenizer.name][0].kind == "discrete"


def train_tokenizer(run: TokenizerTrainingRun) -> Path:
    """Train a tokenizer; resume if the run folder holds a state.

    Returns:
        The folder of the last snapshot.

    Raises:
        UserError: data, configuration or run folder are not usable; the loss stops being finite.
    """
    accelerator = start_accelerator(run.batch_size, run.gradient_accumulation)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    rows = rank_rows(run.batch_size, rank, world)  # of the global batch

    data = open_images(run.data, run.tokenizer.image_size, split="train", augment=run.augmentation)
    reconstruction_terms = ReconstructionTerms(run.reconstruction, device)
    teacher = (
        Teacher(run.teacher, run.tokenizer.image_size, run.tokenizer.patch_size).to(device)
        if run.teacher.name != "none"
        else None
    )
    folder = RunFolder(run, accelerator.is_main_process)

    seed_step(run.seed, step=0, rank=0)  # the same initial weights in every process
    bare = _build(run, teacher).to(device)
    average = average_copy(bare)
    layer = last_layer(bare)
    tokenizer = PreparedInParts(bare if run.discrete else ContinuousPass(bare), run, accelerator, layer)
    optimizer = tokenizer.optimizer()
    adversary = Adversary(run, run.adversarial, run.discriminator, accelerator) if run.adversarial.weight else None
    meter, quantizer = Meter(), run.tokenizer.quantizer if run.discrete else None
    # Of every code since the last line of the log; continuous latents have none.
    hits = torch.zeros(quantizer.size if run.discrete else 0, dtype=torch.long, device=device)
    recent = torch.zeros_like(hits)  # since the last revival

    first = 0
    if (found := folder.load_state()) is not None:
        first, state = found
        load_module(bare, state["tokenizer"])
        average.load_state_dict(state["average"])
        load_optimizer(optimizer, state["optimizer"])
        if adversary is not None:
            adversary.load_state(state["adversary"])
        meter.load_state(state["meter"])
        if rank == 0:  # the sums of all processes
            hits.copy_(state["hits"])
            recent.copy_(state["recent"])

    batches = training_batches(data, run.batch_size, run.seed, first, run.steps - first, rank, world, run.workers)
    folder.start()
    with termination() as terminated:
        for step in track(range(first, run.steps), f"main-train {folder.path.name}", accelerator.is_main_process):
            images = next(batches).images.to(device)  # (N, 3, H, W)
            seed_step(run.seed, step, rank)
            set_learning_rate(optimizer, learning_rate(run, step))
            tokenizer.train()

            # 1. Reconstruct, with the drawn tokens perturbed.
            inputs = draw_inputs(run, bare.latent_shape, step, rows, device)
            with autocast(device, run.precision):
                seen = () if teacher is None else (teacher(images),)
            output = tokenizer(images, *inputs, *seen)
            terms = tokenizer.means(reconstruction_terms, images, output.reconstructions)
            reconstruction_loss = sum(terms.values())
            terms |= latent_terms(run, output)
            statistics: dict[str, Tensor | float] = {"lr": learning_rate(run, step)}
            if adversary is not None and adversary.started(step):
                fake = adversary.see(output.reconstructions, step, "fake")
                terms["adversarial"], statistics["adaptive_weight"] = adversary.term(
                    fake, output.reconstructions, reconstruction_loss, layer
                )

            # 2. One step of the tokenizer: what is trained is the sum of what is logged.
            total = sum(terms.values())
            check_finite(total, terms, step, folder.path)
            optimizer.zero_grad(set_to_none=True)
            tokenizer.backward(total)
            if run.clip_norm:
                statistics["gradient_norm"] = tokenizer.clip(run.clip_norm)
            optimizer.step()
            update_average(average, bare, run.ema_decay)

            # 3. One step of the discriminator, on the same reconstructions.
            if adversary is not None and adversary.started(step):
                statistics |= adversary.step(images, fake, step, folder.path)

            # 4. Codes in use; log, picture, snapshot, state.
            done = step + 1
            if quantizer is not None:
                counts = torch.bincount(output.tokens.flatten(), minlength=quantizer.size)  # (K,)
                hits += counts
                recent += counts
                if quantizer.revive_every and done % quantizer.revive_every == 0 and done < run.steps:
                    dead = accelerator.reduce(recent.float(), "sum") == 0  # (K,)
                    features = accelerator.gather(output.features.detach())  # (batch, L, D)
                    _revive(bare, average, dead, features, step_rng(run.seed, step, "revive"))
                    recent.zero_()
            meter.add({**terms, "total": total, **statistics})
            if done % run.log_every == 0 or done == run.steps:
                folder.log(done, meter.means(accelerator) | _usage(accelerator, hits))
                hits.zero_()
            if run.picture_every and done % run.picture_every == 0 and accelerator.is_main_process:
                _picture(folder.path / "samples" / f"{done:08d}.png", images[:8], average)
            if done == run.steps or (run.snapshot_every and done % run.snapshot_every == 0):
                if accelerator.is_main_process:
                    _write_snapshot(folder, run, done, average, adversary, data.describe())
                accelerator.wait_for_everyone()
            stop = any_process(accelerator, bool(terminated))
            if done % run.state_every == 0 or done == run.steps or stop:
                state = {
                    "tokenizer": bare.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
                state |= {"adversary": adversary.state() if adversary is not None else None, "meter": meter.state()}
                state |= {"hits": accelerator.reduce(hits, "sum"), "recent": accelerator.reduce(recent, "sum")}
                folder.save_state(done, whole(state, keep=accelerator.is_main_process))
            if stop and done < run.steps:
                raise Stopped(done)
    return folder.path / "snapshot" / f"{run.steps:08d}"


def _build(run: TokenizerTrainingRun, teacher: Teacher | None) -> nn.Module:
    """The tokenizer, with a projection of the teacher where it needs one."""
    config, family = run.tokenizer, TOKENIZERS[run.tokenizer.name][0]
    own = config.encoder.width if config.name == "robustok" else None  # whose own projection serves such a teacher too
    if teacher is not None and teacher.width != own:
        config = config.model_copy(update={"teacher_width": teacher.width})
    tokenizer = family(config)
    if config.name == "robustok":
        load_pretrained_backbones(tokenizer)
    return tokenizer


def _usage(accelerator: Accelerator, hits: Tensor) -> dict[str, float]:
    """Which of the codes (K,) are in use, over all processes; nothing where there are none."""
    if not len(hits):
        return {}
    used = accelerator.reduce(hits.float(), "sum")
    return {"codebook_usage": codebook_usage(used), "codebook_perplexity": codebook_perplexity(used)}


def _revive(bare: nn.Module, average: nn.Module, dead: Tensor, features: Tensor, rng: torch.Generator) -> None:
    """Move unused codes onto features, in the average too: it would otherwise drift there for long."""
    bare.quantizer.revive(dead, features, rng)
    average.quantizer.embedding.weight[dead] = bare.quantizer.embedding.weight[dead].detach()


@torch.no_grad()
def _picture(path: Path, images: Tensor, average: nn.Module) -> None:
    """Images above their reconstructions."""
    save_picture(path, torch.stack([images, average.decode(average.encode(images))]))  # (2, n, 3, H, W)


def _write_snapshot(
    folder: RunFolder, run: TokenizerTrainingRun, step: int, average: nn.Module, adversary: Adversary | None, data: str
) -> None:
    """EMA weights for users; the discriminator goes along for post-training."""
    header = {
        "kind": "tokenizer",
        "config": plain(average.config),
        "step": step,
        "trained_on": data,
        "latent_space": encoder_digest(average),
    }
    extra = {} if adversary is None else {"discriminator": adversary.network.state_dict()}
    if adversary is not None:
        header["discriminator"] = plain(run.discriminator)
    write_snapshot(folder.path / "snapshot" / f"{step:08d}", header, average.state_dict(), extra)
