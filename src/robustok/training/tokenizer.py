"""Main training of a tokenizer, with latent perturbation."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import Field, model_validator
from torch import Tensor, nn

from robustok.config import plain
from robustok.data.dataset import Augmentation, open_images
from robustok.data.loader import training_batches
from robustok.data.pixels import save_picture, sheet_of
from robustok.data.sources import Data
from robustok.devices import rank_rows, start_accelerator
from robustok.losses.adversarial import AdversarialConfig
from robustok.losses.discriminators import DiscriminatorConfig, PatchConfig
from robustok.losses.guides import guide_names
from robustok.losses.reconstruction import ReconstructionConfig, ReconstructionTerms
from robustok.losses.semantic import Teacher, TeacherConfig
from robustok.metrics.codebook import codebook_perplexity, codebook_usage
from robustok.metrics.features import ExtractorConfig
from robustok.precision import autocast, cast_weights
from robustok.randomness import seed_step, step_rng
from robustok.runs import RunFolder
from robustok.snapshots import write_snapshot
from robustok.tokenizers import TOKENIZERS, TokenizerConfig, encoder_digest
from robustok.tokenizers.kl import KL, KLOutput
from robustok.tokenizers.maetok import AutoencoderOutput
from robustok.tokenizers.perturbation import PerturbationConfig, draw_perturbation
from robustok.tokenizers.robustok import RobusTokConfig, load_pretrained_backbones
from robustok.training.adversary import Adversary, last_layer
from robustok.training.common import TrainingConfig, average_copy, made, quantizer_terms
from robustok.training.finite import FiniteCheck
from robustok.training.inputs import input_digests, may_change
from robustok.training.prepared import PreparedInParts
from robustok.training.state import TrainingState, optimise
from robustok.training.tracking import check_tracker, start_tracking
from robustok.types import Tokenizer, TokenizerOutput


class TokenizerTrainingRun(TrainingConfig):
    """Settings of the main training of a tokenizer; the defaults are the paper's ImageNet run, in steps."""

    steps: int = Field(250_200, ge=1, description="number of training steps")
    batch_size: int = Field(1024, ge=1, description="images in the global batch, all processes together")
    learning_rate: float = Field(2.4e-4, gt=0, description="peak learning rate")
    min_learning_rate: float = Field(5e-5, ge=0, description="learning rate at the last step of the cosine")
    data: Data = Field(description="training images")
    augmentation: Augmentation = Augmentation()
    tokenizer: TokenizerConfig = RobusTokConfig()
    perturbation: PerturbationConfig = Field(
        PerturbationConfig(), description="of tokens; continuous latents have latent_noise"
    )
    latent_noise: float = Field(
        0.0,
        ge=0,
        description="largest noise on continuous latents, in standard deviations of the image's latents; the level of "
        "each image is uniform from 0 to this; 0 is off",
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
        UserError: data, configuration or run folder are not usable; the loss is not finite.
    """
    check_tracker(run)
    accelerator = start_accelerator(run.batch_size, run.gradient_accumulation, run.precision)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    rows = rank_rows(run.batch_size, rank, world)  # of the global batch
    data = open_images(run.data, run.tokenizer.image_size, split="train", augment=run.augmentation)
    reconstruction_terms = ReconstructionTerms(run.reconstruction, device, run.precision)
    teacher = _teacher(run, device)
    folder = RunFolder(run, accelerator.is_main_process, later=may_change(run))

    seed_step(run.seed, step=0, rank=0)  # the same initial weights in every process
    bare = _build(run, teacher).to(device)
    average, layer = average_copy(bare), last_layer(bare)
    tokenizer = PreparedInParts(bare if run.discrete else ContinuousPass(bare), run, accelerator, layer)
    optimizer = tokenizer.optimizer()
    adversary = Adversary(run, run.adversarial, run.discriminator, accelerator) if run.adversarial.weight else None
    codes = CodeCounts(run, accelerator)
    state = TrainingState("tokenizer", bare, average, optimizer, FiniteCheck(run.out, accelerator), adversary, [codes])
    first = folder.restore(state, input_digests(run, data))
    draw = partial(draw_inputs, run, bare.latent_shape, rows=rows)
    span = run.batch_size, run.seed, first, run.steps - first, rank, world
    batches = training_batches(data, *span, run.workers, device, draw)
    write = partial(_write_snapshot, folder, run, average, adversary, data.describe(), _guides(run))
    folder.start()
    start_tracking(folder, first)

    for step in folder.steps(range(first, run.steps), state, run.state_every, accelerator):
        batch = next(batches)
        images, inputs = batch.images, batch.draws  # (N, 3, H, W)
        seed_step(run.seed, step, rank)
        tokenizer.train()

        # 1. Reconstruct the images from perturbed latents.
        if teacher is not None:
            with autocast(device, run.precision):
                inputs = (*inputs, teacher(images))
        output = tokenizer(images, *inputs)
        terms = tokenizer.means(reconstruction_terms, images, output.reconstructions)
        reconstruction_loss = sum(terms.values())
        terms |= latent_terms(run, output)

        # 2. One step of the tokenizer, then one of the discriminator on the same reconstructions.
        if adversary is not None and adversary.started(step):
            fake = adversary.features(output.reconstructions, step, "fake")
            terms["adversarial"], weight = adversary.term(fake, output.reconstructions, reconstruction_loss, layer)
            state.meter.add({"adaptive_weight": weight})
        optimise(tokenizer, state, [terms], step)
        if adversary is not None and adversary.started(step):
            state.meter.add(adversary.step(images, fake, step))

        # 3. Count the codes in use; log, picture, snapshot.
        done = step + 1
        if run.discrete:
            codes.add(output.tokens)
            if codes.revival_due(done):
                codes.revive(bare, average, output.features.detach(), step_rng(run.seed, step, "revive"))
        if run.due(run.log_every, done):
            folder.log(done, state.means() | codes.usage())
        if (run.picture_every and done % run.picture_every == 0) or run.due(run.snapshot_every, done):
            state.settle()
            _picture(folder, run, done, images[:8], average)
        if run.due(run.snapshot_every, done):
            state.settle()
            if accelerator.is_main_process:
                write(done)
            accelerator.wait_for_everyone()
    return folder.last_snapshot(write, accelerator)


class ContinuousPass(nn.Module):
    """A continuous tokenizer whose forward is a training pass, for DDP to wrap.

    Random numbers are inputs, so that they do not depend on how the batch is divided among processes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(
        self, images: Tensor, sample: Tensor, noise: Tensor | None = None, levels: Tensor | None = None
    ) -> AutoencoderOutput | KLOutput:
        """Reconstruct images (N, 3, H, W) in [-1, 1] from their latents, with noise added.

        Args:
            images: in [-1, 1].
            sample: standard normal (N, L, D), which draws the latents of a variational autoencoder from its posterior.
            noise: standard normal (N, L, D) to add to the latents; None adds nothing.
            levels: (N,), standard deviation of the noise in standard deviations of the image's latents.
        """
        posterior = self.tokenizer.posterior(images) if isinstance(self.tokenizer, KL) else None
        latents = self.tokenizer.encode(images) if posterior is None else posterior.mean + posterior.std * sample
        noisy = latents  # (N, L, D)
        if noise is not None:
            std = latents.detach().float().std(dim=(1, 2), keepdim=True)  # (N, 1, 1)
            noisy = latents + levels[:, None, None] * std * noise
        reconstructions = self.tokenizer.decode(noisy)
        if posterior is None:
            return AutoencoderOutput(reconstructions, latents)
        return KLOutput(reconstructions, latents, posterior, posterior.divergence())


def draw_inputs(run: TokenizerTrainingRun, latent_shape: tuple[int, int], step: int, rows: slice) -> tuple:
    """Inputs of the tokenizer's forward after the images, drawn for the global batch; ``rows`` are this process's.

    Returns:
        For tokens the perturbation's settings, draw and strength; else ``sample``, ``noise`` and ``levels`` of
        :class:`ContinuousPass`.
    """
    if run.discrete:
        p = run.perturbation
        rate, strength = p.at(step)
        if not p.active:
            return p, None, strength
        rng = step_rng(run.seed, step, "perturb")
        draw = draw_perturbation(
            run.batch_size, latent_shape[0], rate, p.proportion, rng, p.selection, p.image_selection
        )
        return p, draw.rows(rows.start, rows.stop), strength
    rng = step_rng(run.seed, step, "latents")
    sample = torch.randn(run.batch_size, *latent_shape, generator=rng)[rows]  # (N, L, D)
    if not run.latent_noise:
        return (sample,)
    noise = torch.randn(run.batch_size, *latent_shape, generator=rng)[rows]  # (N, L, D)
    levels = run.latent_noise * torch.rand(run.batch_size, generator=rng)[rows]  # (N,)
    return sample, noise, levels


def latent_terms(
    run: TokenizerTrainingRun, output: TokenizerOutput | AutoencoderOutput | KLOutput
) -> dict[str, Tensor]:
    """Weighted terms of the latents: those of the quantiser and the teacher, the KL divergence, or none."""
    if isinstance(output, KLOutput):
        return {"kl": run.kl_weight * output.kl_loss}
    if isinstance(output, AutoencoderOutput):
        return {}
    return quantizer_terms(run.tokenizer.quantizer, run.teacher, output)


class CodeCounts:
    """How often each of the K codes was used: since the last line of the log, and since the last revival.

    Continuous latents have none, K = 0.
    """

    def __init__(self, run: TokenizerTrainingRun, accelerator: Accelerator) -> None:
        self.run, self.accelerator = run, accelerator
        size = run.tokenizer.quantizer.size if run.discrete else 0
        self.logged = torch.zeros(size, dtype=torch.long, device=accelerator.device)  # (K,), of this process
        self.recent = torch.zeros_like(self.logged)

    def add(self, tokens: Tensor) -> None:
        """Count tokens (N, L)."""
        codes = tokens.flatten()  # (N * L,)
        for counts in (self.logged, self.recent):
            counts.scatter_add_(0, codes, torch.ones_like(codes))  # bincount would wait for the largest code

    def usage(self) -> dict[str, float]:
        """Usage and perplexity of the codebook over all processes; starts counting again."""
        if not len(self.logged):
            return {}
        used = self.accelerator.reduce(self.logged.float(), "sum")
        self.logged.zero_()
        return {"codebook_usage": codebook_usage(used), "codebook_perplexity": codebook_perplexity(used)}

    def revival_due(self, done: int) -> bool:
        """Whether unused codes are revived after so many steps."""
        every = self.run.tokenizer.quantizer.revive_every
        return every > 0 and done % every == 0 and done < self.run.steps

    def revive(self, tokenizer: nn.Module, average: nn.Module, features: Tensor, rng: torch.Generator) -> None:
        """Move unused codes onto features (N, L, D), at once in the averaged weights too; starts counting again."""
        unused = self.accelerator.reduce(self.recent.float(), "sum") == 0  # (K,)
        tokenizer.quantizer.revive(unused, self.accelerator.gather(features), rng)
        weight = average.quantizer.embedding.weight
        weight.copy_(torch.where(unused[:, None], tokenizer.quantizer.embedding.weight.detach(), weight))
        self.recent.zero_()

    def state(self) -> dict[str, Tensor]:
        """Counts over all processes."""
        return {
            "hits": self.accelerator.reduce(self.logged, "sum"),
            "recent": self.accelerator.reduce(self.recent, "sum"),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state`: the first process has the counts of all."""
        if self.accelerator.is_main_process:
            self.logged.copy_(state["hits"])
            self.recent.copy_(state["recent"])


def _teacher(run: TokenizerTrainingRun, device: torch.device) -> Teacher | None:
    if run.teacher.name == "none":
        return None
    teacher = Teacher(run.teacher, run.tokenizer.image_size, run.tokenizer.patch_size).to(device)
    return cast_weights(teacher, run.precision)


def _guides(run: TokenizerTrainingRun) -> list[str]:
    """Names of the feature spaces that guide the training."""
    teacher = [ExtractorConfig(path=run.teacher.path)] if run.teacher.name == "classifier" else []
    return guide_names(run.reconstruction, run.discriminator if run.adversarial.weight else None, teacher)


def _build(run: TokenizerTrainingRun, teacher: Teacher | None) -> nn.Module:
    """The tokenizer, with a projection of the teacher's features where the teacher's width differs from its own."""
    config, family = run.tokenizer, TOKENIZERS[run.tokenizer.name][0]
    own = config.encoder.width if config.name == "robustok" else None
    if teacher is not None and teacher.width != own:
        config = config.model_copy(update={"teacher_width": teacher.width})
    tokenizer = made(lambda: family(config), "the settings tokenizer.*")
    if config.name == "robustok":
        load_pretrained_backbones(tokenizer)
    return tokenizer


@torch.no_grad()
def _picture(folder: RunFolder, run: TokenizerTrainingRun, step: int, images: Tensor, average: nn.Module) -> None:
    """Images above their reconstructions: in samples/ when it is due, in a tracker with each snapshot, too."""
    saved = folder.main and run.picture_every > 0 and step % run.picture_every == 0
    tracked = folder.tracker is not None and (saved or run.due(run.snapshot_every, step))
    if not (saved or tracked):
        return
    grid = torch.stack([images, average.decode(average.encode(images))])  # (2, n, 3, H, W)
    if saved:
        save_picture(folder.path / "samples" / f"{step:08d}.png", grid)
    if tracked:
        folder.tracker.picture(step, "reconstructions", sheet_of(grid))


def _write_snapshot(
    folder: RunFolder,
    run: TokenizerTrainingRun,
    average: nn.Module,
    adversary: Adversary | None,
    data: str,
    guides: list[str],
    step: int,
) -> None:
    """Write the averaged weights, and the discriminator for post-training."""
    header = {
        "kind": "tokenizer",
        "config": plain(average.config),
        "step": step,
        "trained_on": data,
        "latent_space": encoder_digest(average),
        **({"guides": guides} if guides else {}),
    }
    extra = {} if adversary is None else {"discriminator": adversary.network.state_dict()}
    if adversary is not None:
        header["discriminator"] = plain(run.discriminator)
    write_snapshot(folder.path / "snapshot" / f"{step:08d}", header, average.state_dict(), extra)
