"""Settings of post-training."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from robustok.data.sources import Data
from robustok.evaluation.held_out import HeldOut
from robustok.losses.adversarial import AdversarialConfig
from robustok.losses.discriminators import DiscriminatorConfig, PatchConfig
from robustok.losses.frechet import FrechetConfig
from robustok.losses.reconstruction import ReconstructionConfig
from robustok.losses.semantic import TeacherConfig
from robustok.snapshots import read_header
from robustok.training.common import TrainingConfig
from robustok.training.latent_crops import LatentCrop
from robustok.training.objectives import LatentNoise, Objective, needed_caches


class DecoderTrainingRun(TrainingConfig):
    """Settings of the training of a decoder on pairs; the defaults are the paper's, in steps."""

    steps: int = Field(7_800, ge=1, description="number of training steps")
    batch_size: int = Field(1024, ge=1, description="pairs in the global batch, all processes together")
    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate")
    min_learning_rate: float = Field(1e-5, ge=0, description="learning rate at the last step of the cosine")
    tokenizer: Path = Field(description="tokenizer snapshot, or run folder of main training")
    objective: Objective = Field(
        {"paired": 1.0},
        description="what the decoder learns from, one of paired (the paper: mixtures and their real images), free "
        "(free samples: adversary, and consistency with the original decoder), noise (real latents with noise), clean "
        "(real latents, the control); or a mixture by weight: {free: 1, clean: 1}",
    )
    pairs: Path | None = Field(None, description="paired: cache of pairs, made by `robustok make-pairs`")
    samples: Path | None = Field(None, description="free: cache of free samples, made by `robustok generate`")
    latents: Path | None = Field(
        None, description="noise, clean: cache of the real images' latents, made by `robustok encode`"
    )
    consistency: float = Field(
        1.0, gt=0, description="free: weight of the consistency, as a multiple of the weights in reconstruction"
    )
    frechet: FrechetConfig = FrechetConfig()
    noise: LatentNoise = LatentNoise()
    crop: LatentCrop = LatentCrop()
    data: Data = Field(description="images of the pairs")
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    adversarial: AdversarialConfig = AdversarialConfig(learning_rate=5e-5)
    adversary: Literal["auto", "carried", "fresh", "reinit_warmup", "none"] = Field(
        "auto",
        description="carried: the discriminator in the tokenizer's snapshot; fresh: a new one (the authors' code); "
        "reinit_warmup: a new one, first trained on images of the original decoder; none: no adversarial term; "
        "auto: carried if the snapshot has one, else reinit_warmup",
    )
    adversary_warmup: int = Field(
        500, ge=1, description="steps for which reinit_warmup trains the new discriminator alone"
    )
    trainable: Literal["decoder", "authors"] = Field(
        "decoder",
        description="decoder: the paper; authors: the authors' code, which encodes images again and freezes only the "
        "encoder's transformer",
    )
    teacher: TeacherConfig = TeacherConfig()  # of trainable=authors
    discriminator: DiscriminatorConfig = Field(
        PatchConfig(), description="a new discriminator; a carried one has its own settings, but the path of weights"
    )
    held_out: HeldOut | None = Field(
        None, description="choose the best snapshot, or the original decoder, on held-out samples; null: the last one"
    )
    max_reconstruction_loss: float | None = Field(
        None,
        ge=0,
        description="refuse decoders that cost more than this: PSNR in dB which reconstructions of the test images "
        "lose against the decoder at the start, which is kept where all cost more; null: no limit",
    )
    continue_from: Path | None = Field(
        None,
        description="post-training run whose weights, averages, optimiser, discriminator and step this run starts "
        "from, with its own settings (other pairs, more steps)",
    )

    @model_validator(mode="after")
    def _caches_fit(self) -> "DecoderTrainingRun":
        check_objective(self)
        needed = needed_caches(self.objective)
        for name in ("pairs", "samples", "latents"):
            if (getattr(self, name) is not None) != (name in needed):
                says = f"needs {name}=PATH" if name in needed else f"does not use {name}; drop it"
                raise ValueError(f"objective {' and '.join(self.objective)} {says}")
        return self


def check_objective(run: DecoderTrainingRun) -> None:
    """Check that the objectives can learn with these settings.

    Raises:
        ValueError: they cannot, as validators raise it.
    """
    if run.trainable == "authors" and set(run.objective) != {"paired"}:
        raise ValueError("trainable=authors has one objective; set objective=paired")
    if run.trainable == "authors" and run.crop.size is not None:
        raise ValueError("trainable=authors encodes whole images; set crop.size=null")
    if run.frechet.weight and run.crop.size is not None:
        raise ValueError("the Frechet term compares whole images; set crop.size=null, or frechet.weight=0")
    if run.frechet.weight and "free" not in run.objective:
        raise ValueError("the Frechet term needs free samples; add free to objective, or set frechet.weight=0")
    if set(run.objective) != {"free"}:
        return
    if not run.adversarial.weight or run.adversary == "none":
        if run.frechet.weight:
            return
        raise ValueError(
            "objective free learns from the adversary, or the Frechet term; set adversarial.weight or frechet.weight, "
            "or mix it with another"
        )
    if run.adversarial.adaptive:
        raise ValueError(
            "an adaptive weight of the adversary stays 0 with objective free alone, where the other terms begin at 0; "
            "set adversarial.adaptive=false, or mix it with another"
        )


def adversary_policy(run: DecoderTrainingRun) -> str:
    """Where the discriminator comes from: ``run.adversary`` with ``auto`` resolved."""
    if not run.adversarial.weight:
        return "none"
    if run.adversary == "auto":
        return "carried" if "discriminator" in read_header(run.tokenizer) else "reinit_warmup"
    return run.adversary
