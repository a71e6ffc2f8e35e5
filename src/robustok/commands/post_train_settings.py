"""Settings of the command `post-train`, and the candidates among which it chooses."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from robustok.commands.generate import SampleCacheSettings
from robustok.commands.pretrained_sources import GeneratorSource, Pretrained, TokenizerSource
from robustok.config import Config
from robustok.evaluation.held_out import IMAGES
from robustok.generators import SamplingConfig
from robustok.losses.frechet import FrechetConfig
from robustok.training.decoder_settings import DecoderTrainingRun, check_objective
from robustok.training.objectives import Objective, needed_caches

# What objective=auto tries.
BANK: list[dict[str, float]] = [
    *({name: 1.0} for name in ("clean", "noise", "paired", "free")),
    {"free": 1.0, "clean": 1.0},
]


@dataclass(frozen=True)
class Candidate:
    """One way to post-train among several.

    Attributes:
        objective: weights of the objectives.
        sigma: of the pairs; None without ``paired``.
    """

    objective: Mapping[str, float]
    sigma: float | None

    @property
    def objectives(self) -> str:
        """For example ``free+clean``, or ``1free+3clean``."""
        return objective_name(self.objective)

    @property
    def name(self) -> str:
        """For folders: ``0.9`` of the paper's objective, else such as ``clean``."""
        if self.objectives == "paired":
            return f"{self.sigma:g}"
        return self.objectives + ("" if self.sigma is None else f"-{self.sigma:g}")


def objective_name(objective: Mapping[str, float]) -> str:
    """The objectives of a mixture, with their weights where these differ."""
    equal = len(set(objective.values())) == 1
    return "+".join(name if equal else f"{weight:g}{name}" for name, weight in objective.items())


class Mixture(Config):
    """How the pairs are made; every sigma has the same images and random numbers."""

    count: int = Field(200_000, ge=1, description="number of pairs; never more than the training uses are made")
    mode: Literal["direct", "reencoded"] = Field(
        "direct",
        description="direct: the mixture itself; reencoded: decoded to uint8 and encoded again (the authors)",
    )
    sampling: SamplingConfig | None = Field(None, description="null takes the settings stored with the generator")

    @model_validator(mode="after")
    def _size_of_its_images(self) -> "Mixture":
        if getattr(self.sampling, "height", None) is not None:
            raise ValueError("mixtures have the size of their images; drop sampling.height and sampling.width")
        return self


class Sweep(Config):
    """How objective=auto and sigma=auto search for the best decoder."""

    objectives: list[Objective] | None = Field(
        None,
        min_length=1,
        description="candidates of objective=auto; null: [clean, noise, paired, free, {free: 1, clean: 1}], without "
        "those that the adversary's settings do not allow",
    )
    sigmas: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(
        None,
        min_length=1,
        description="candidates of paired; null: [0.7, 0.8, 0.9, 1] for family robustok, else [0.8, 0.9, 0.95, 1]; "
        "objective=auto leaves out 1, which is clean",
    )
    steps: int | None = Field(None, ge=1, description="training steps of a candidate; null is a tenth of steps")
    sets: int = Field(4, ge=2, description="held-out sets, over which differences have a standard error")
    samples: int = Field(2_500, ge=2, description="samples in a held-out set, if held_out.latents does not give them")
    images: int = Field(
        IMAGES, ge=2, description="test images by whose reconstructions rFD, PSNR and LPIPS are measured"
    )
    patience: int = Field(
        3,
        ge=1,
        description="objective=auto: stop after so many snapshots that gained no more than a standard error",
    )


class PostTrainRun(DecoderTrainingRun):
    """Everything about post-training, and about the pairs where they are not given."""

    objective: Literal["auto"] | Objective = Field(
        {"paired": 1.0},
        description="paired, free, noise or clean, or a mixture by weight, as {free: 1, clean: 1}; auto tries those of "
        "sweep.objectives on held-out samples and goes on with the best",
    )
    pipeline: Path | None = Field(
        None,
        description="folder of a diffusers pipeline, or hf://ORG/REPO, which is tokenizer and generator: short for "
        "tokenizer.weights and generator.weights of the families diffusers and pipeline",
    )
    tokenizer: TokenizerSource = Field(description="tokenizer snapshot or run folder; or pretrained weights, as below")
    pairs: Path | None = Field(
        None, description="paired: cache of pairs, made by `robustok make-pairs`; null makes them"
    )
    samples: Path | None = Field(
        None, description="free: cache of free samples, made by `robustok generate`; null makes them"
    )
    generator: GeneratorSource | None = Field(
        None,
        description="generator whose samples are mixed with real latents, or free, where pairs or samples are null: a "
        "path, or pretrained weights",
    )
    latents: Path | None = Field(
        None,
        description="cache of the real images' latents, for noise, clean, and for pairs where they are null; null "
        "encodes as many as are needed",
    )
    sigma: float | Literal["auto"] | None = Field(
        None, description="share of the real latents that is kept; auto tries a few; only where pairs are made"
    )
    mixture: Mixture = Mixture()
    cache: SampleCacheSettings = SampleCacheSettings()
    sweep: Sweep = Sweep()

    @model_validator(mode="before")
    @classmethod
    def _pipeline_is_both(cls, settings: Any) -> Any:
        pipeline = settings.get("pipeline") if isinstance(settings, dict) else None
        if pipeline is None:
            return settings
        both = {}
        for name, family in (("tokenizer", "diffusers"), ("generator", "pipeline")):
            given = settings.get(name)
            if given is None or (isinstance(given, dict) and given.get("weights") is None):
                both[name] = {"family": family} | (given or {}) | {"weights": pipeline}
        return settings | both

    @model_validator(mode="after")
    def _caches_fit(self) -> "PostTrainRun":
        if self.frechet.weight and "free" not in self.used:
            check_objective(self.model_copy(update={"objective": self.used}))
        for objective in self.bank:
            check_objective(self.tried(objective))
        own_samples = self.objective == "auto" and (self.held_out is None or self.held_out.latents is None)
        uses = {
            "pairs": "paired" in self.used and self.objective != "auto",
            "samples": "free" in self.used,
            "generator": self.makes_pairs or ("free" in self.used and self.samples is None) or own_samples,
            "latents": self.needs_latents,
            "sigma": self.makes_pairs,
        }
        if self.objective == "auto" and self.pairs is not None:
            raise ValueError("objective=auto makes the pairs of each sigma itself; drop pairs (pairs=null drops it)")
        for name in (name for name, used in uses.items() if not used and getattr(self, name) is not None):
            if self.pairs is not None and name != "samples" and uses["pairs"]:
                raise ValueError(
                    f"pairs are given, and so is {name}, which would make them; drop one ({name}=null drops it)"
                )
            raise ValueError(f"objective {' and '.join(self.used)} does not use {name}; drop it ({name}=null)")
        wanted = ("generator",) if self.objective == "auto" else ("generator", "sigma")
        missing = [name for name in wanted if uses[name] and getattr(self, name) is None]
        if missing and self.objective == "auto":
            raise ValueError("objective=auto compares decoders on samples of a generator; give generator")
        if missing and self.makes_pairs:
            raise ValueError(f"no pairs: give pairs=PATH, or generator and sigma ({', '.join(missing)} missing)")
        if missing:
            raise ValueError("objective free has no samples: give samples=PATH, or generator")
        if isinstance(self.sigma, float) and not 0 <= self.sigma <= 1:
            raise ValueError(f"sigma {self.sigma} is to be a share from 0 to 1, or auto")
        if self.searches and self.held_out is None:
            name = "objective" if self.objective == "auto" else "sigma"
            raise ValueError(
                f"{name}=auto compares decoders on held-out samples; set held_out.extractor.path, the folder of a "
                "saved classifier, or held_out.extractor.name=inception"
            )
        return self

    @property
    def sources(self) -> dict[str, Any]:
        """What tokenizer and generator are read from, by these names."""
        return {"tokenizer": self.tokenizer, "generator": self.generator}

    @property
    def searches(self) -> bool:
        """Whether the best of several candidates is to be found."""
        return "auto" in (self.objective, self.sigma)

    @property
    def bank(self) -> list[dict[str, float]]:
        """The objectives that are tried."""
        if self.objective != "auto":
            return [self.objective]
        return self.sweep.objectives or [objective for objective in BANK if not self.obstacle(objective)]

    def obstacle(self, objective: dict[str, float]) -> str:
        """Why nothing can be learned from an objective with these settings; "" if it can."""
        try:
            check_objective(self.tried(objective))
        except ValueError as error:
            return str(error)
        return ""

    def tried(self, objective: dict[str, float]) -> "PostTrainRun":
        """With another objective; without free samples there is no Frechet term."""
        frechet = self.frechet if "free" in objective or self.objective != "auto" else FrechetConfig()
        return self.model_copy(update={"objective": objective, "frechet": frechet})

    @property
    def used(self) -> dict[str, float]:
        """All objectives that are tried, as if they were one mixture."""
        return {name: 1.0 for objective in self.bank for name in objective} if self.searches else self.objective

    @property
    def makes_pairs(self) -> bool:
        """Whether pairs are needed and not given."""
        return "paired" in self.used and self.pairs is None

    @property
    def needs_latents(self) -> bool:
        """Whether latents of the real images are needed."""
        return self.makes_pairs or "latents" in needed_caches(self.used)

    @property
    def complete(self) -> bool:
        """Whether nothing has to be made before the training."""
        caches = (getattr(self, name) for name in needed_caches(self.used))
        return None not in caches and not isinstance(self.tokenizer, Pretrained) and not self.searches

    @property
    def candidate_steps(self) -> int:
        """Training steps of a candidate."""
        return min(self.sweep.steps or max(1, self.steps // 10), self.steps)

    def candidates(self, family: str | None) -> list[Candidate]:
        """What is tried for a tokenizer of this family."""
        sigmas = [self.sigma] if isinstance(self.sigma, float) else self.sigmas(family)
        if self.objective == "auto":
            sigmas = [sigma for sigma in sigmas if sigma != 1]
        return [
            Candidate(objective, sigma)
            for objective in self.bank
            for sigma in (sigmas if "paired" in objective else [None])
        ]

    def sigmas(self, family: str | None) -> list[float]:
        """The values of sigma that are tried for a tokenizer of this family; 1 is the control."""
        # A tokenizer trained with perturbation decodes wrong tokens better, so lower values are worth trying.
        default = [0.7, 0.8, 0.9, 1.0] if family == "robustok" else [0.8, 0.9, 0.95, 1.0]
        return self.sweep.sigmas or default

    def pairs_used(self, steps: int | None = None) -> int:
        """Pairs that so many training steps use (by default all steps), if there are as many images."""
        return min(self.mixture.count, (steps or self.steps) * self.batch_size)

    def training(self, objective: Mapping[str, float] | None = None, **changes: Any) -> DecoderTrainingRun:
        """The settings of a training alone, with changes, among them its objective."""
        run = self if objective is None else self.tried(objective)
        made_from = {"pairs", "samples", "latents"} - {*needed_caches(run.objective)}
        kept = DecoderTrainingRun.model_fields.keys() - made_from
        return DecoderTrainingRun(**{name: value for name, value in [*run, *changes.items()] if name in kept})
