"""Generators: models of latents. One family a file; to add one, write the file and add a line to ``GENERATORS``.

A family of tokens inherits from ``TokenGenerator`` and is built from (config, codebook_size, length, classes). One of
continuous latents inherits from ``ContinuousGenerator`` and is built from (config, latent_shape, classes).
"""

from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from robustok.config import Config, validate
from robustok.errors import UserError
from robustok.generators.ddpm import DDPMSampling
from robustok.generators.dit import DiT, DiTConfig
from robustok.generators.flow import DiffusionSampling
from robustok.generators.gpt import GPT, GPTConfig
from robustok.generators.lightningdit import LightningDiT, LightningDiTConfig
from robustok.generators.pipeline import PipelineConfig, PipelineGenerator, PipelineSampling, prompts_in
from robustok.generators.rar import RAR, RARConfig
from robustok.generators.sampling import Sampling
from robustok.generators.sit import SiT, SiTConfig
from robustok.snapshots import Snapshot, build, read_snapshot
from robustok.types import Generator

GENERATORS = {
    "rar": (RAR, RARConfig),
    "gpt": (GPT, GPTConfig),
    "sit": (SiT, SiTConfig),
    "lightningdit": (LightningDiT, LightningDiTConfig),
    "dit": (DiT, DiTConfig),
}
GeneratorConfig = Annotated[reduce(or_, (config for _, config in GENERATORS.values())), Field(discriminator="name")]
"""The families that can be trained."""
FAMILIES = GENERATORS | {"pipeline": (PipelineGenerator, PipelineConfig)}
"""Those and other people's pipelines."""


def _sampling_name(value: Any) -> str | None:
    """The variant of sampling settings; early snapshots have no name, and are of tokens."""
    return value.get("name", "tokens") if isinstance(value, dict) else getattr(value, "name", None)


SamplingConfig = Annotated[
    Annotated[Sampling, Tag("tokens")]
    | Annotated[DiffusionSampling, Tag("diffusion")]
    | Annotated[DDPMSampling, Tag("ddpm")]
    | Annotated[PipelineSampling, Tag("pipeline")],
    Discriminator(_sampling_name),
]


def build_generator(
    config: Config, latent_shape: tuple[int, int], classes: int, codebook_size: int | None = None
) -> Generator:
    """A generator with fresh weights.

    Args:
        config: of one of the ``GENERATORS``.
        latent_shape: (L, D), latents per image and their width.
        classes: number of classes.
        codebook_size: K for tokens, None for continuous latents.

    Raises:
        UserError: the family models the other kind of latents, or not of this shape.
    """
    family = GENERATORS[config.name][0]
    check_kind(config.name, "continuous" if codebook_size is None else "discrete", "the cache")
    if codebook_size is None:
        return family(config, latent_shape, classes)
    generator = family(config, codebook_size, latent_shape[0], classes)
    generator.latent_shape = tuple(latent_shape)
    return generator


def check_kind(name: str, kind: str, source: str) -> None:
    """Refuse latents of a kind that the family ``name`` does not model.

    Raises:
        UserError: the kind that ``source`` holds, and the one that the family models.
    """
    models = FAMILIES[name][0].kind
    if kind != models:
        words = {"discrete": "tokens", "continuous": "continuous latents"}
        remedy = ", ".join(n for n, (family, _) in GENERATORS.items() if family.kind == kind)
        raise UserError(
            f"{source} holds {words[kind]}, generator {name} models {words[models]}; "
            f"encode with a {models} tokenizer, or set generator.name to one of {remedy}"
        )


def default_sampling(name: str) -> Config:
    """Sampling settings of a family for which nothing else is known: unguided, or as a pipeline samples by itself."""
    return FAMILIES[name][0].sampling_type()


def check_sampling(name: str, sampling: Config) -> None:
    """Refuse the sampling settings of another kind of generator.

    Raises:
        UserError: another ``sampling.name`` is needed.
    """
    expected = default_sampling(name).name
    if sampling.name != expected:
        raise UserError(f"generator {name} takes sampling.name={expected}, got {sampling.name}; set that one")


def load_generator(path: str | Path) -> Generator:
    """Load a generator from a snapshot, a run folder (its newest one) or ``hf://ORG/NAME``; in eval mode, on the CPU.

    Raises:
        UserError: no snapshot, another kind, an unknown family, or weights that do not fit.
    """
    snapshot = read_snapshot(path, kind="generator")
    header = snapshot.header
    name = header["config"].get("name")
    if name not in FAMILIES:
        raise UserError(f"{path}: unknown generator family {name!r}; known: {', '.join(FAMILIES)}")
    lacking = [key for key in ("codebook_size", "latent_shape", "classes", "latent_space") if key not in header]
    if lacking:
        raise UserError(f"{snapshot.path}/config.yaml lacks {', '.join(lacking)}; copy or train the generator again")
    config = validate(FAMILIES[name][1], header["config"], source=str(path))
    if name == "pipeline":
        generator = _pipeline(config, snapshot)
    else:
        sizes = tuple(header["latent_shape"]), header["classes"], header["codebook_size"]
        generator = build(lambda: build_generator(config, *sizes), snapshot)
    generator.latent_space = header["latent_space"]
    generator.sampling = validate(generator.sampling_type, header.get("sampling") or {}, source=str(path))
    return generator.eval().requires_grad_(False)


def _pipeline(config: PipelineConfig, snapshot: Snapshot) -> PipelineGenerator:
    """The pipeline that a snapshot refers to, with encoded prompts beside the snapshot.

    Raises:
        UserError: the pipeline is gone, or the snapshot is damaged.
    """
    identity = snapshot.weights.get("identity")
    try:
        prompts = prompts_in(identity)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{snapshot.path}/model.safetensors holds no prompts; make the snapshot again") from None
    return PipelineGenerator(config, prompts, identity, snapshot.path / "prompts")
