"""Pipelines of the diffusers library as generators: text-to-image, and image-to-image for the mixture.

Image-to-image at ``strength`` is SDEdit (arXiv 2108.01073): the mixture of sigma = 1 - strength. The pipeline itself
samples, with its own scheduler and guidance. Three things differ from its usual call: it gets latents instead of
pixels (those of the posterior's mode), it returns latents, and its prompts were encoded before.

Labels are numbers of prompts. A prompt is encoded once; the text encoders are dropped before the denoiser is loaded.
"""

import gc
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from safetensors.torch import save
from torch import Tensor, nn

from robustok.backbones import unscale_latents
from robustok.config import Config
from robustok.console import track
from robustok.data.captions import caption_digest
from robustok.errors import UserError
from robustok.files import load_tensors, write_file
from robustok.generators.pipeline_families import check_mixes, family_of, fetch_pipeline, weights_digest
from robustok.generators.pipeline_loading import (
    call,
    default_of,
    empty_autoencoder,
    load_parts,
    other_scheduler,
    text_to_image,
)
from robustok.generators.pipeline_prompts import NEGATIVE, Condition, encode, no_prompt, stacked
from robustok.generators.pipeline_start import Start, find_start
from robustok.generators.sampling import check_labels, check_mixture
from robustok.randomness import per_image

LEVELS = ("dim_mult", "encoder_block_out_channels", "block_out_channels")  # of autoencoders; each but one halves
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}


class PipelineSampling(Config):
    """How a pipeline samples; null takes what the pipeline does by itself."""

    name: Literal["pipeline"] = "pipeline"
    steps: int | None = Field(
        None, ge=1, description="steps of the scheduler from pure noise; null: the pipeline's own"
    )
    guidance_scale: float | None = Field(
        None, ge=0, description="guidance; null: the pipeline's own, and none where all prompts are empty"
    )
    scheduler: str | None = Field(
        None, description="class of another scheduler of diffusers, such as DPMSolverMultistepScheduler"
    )
    sigma_by: Literal["strength", "level"] = Field(
        "strength",
        description="what sigma means: strength: 1 - the pipeline's strength, the share of steps skipped; level: "
        "signal / (signal + noise) where sampling starts, to the nearest step, the same for every scheduler",
    )
    height: int | None = Field(
        None, ge=1, description="of the images, in pixels; null: the pipeline's own size; latents are then on a grid"
    )
    width: int | None = Field(None, ge=1, description="of the images, in pixels; with height")
    arguments: dict[str, Any] = Field({}, description="further arguments of the pipeline's call, such as eta")

    @field_validator("arguments")
    @classmethod
    def _without_prompts(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        own = ("image", "strength", "num_inference_steps", "generator", "output_type", "height", "width", "latents")
        if wrong := [key for key in arguments if key in own or "prompt" in key]:
            raise ValueError(f"{wrong[0]} is set by robustok; drop it")
        return arguments

    @model_validator(mode="after")
    def _height_and_width(self) -> "PipelineSampling":
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width go together; set both or neither")
        return self


class PipelineConfig(Config):
    """A pipeline in its folder."""

    name: Literal["pipeline"] = "pipeline"
    folder: Path = Field(description="of the pipeline, or hf://ORG/REPO")
    image_size: int = Field(512, ge=1, description="height and width of the images, in pixels")
    precision: Literal["auto", "bf16", "fp16", "float32"] = Field(
        "auto", description="type of the weights; auto: bf16 on a GPU, else float32"
    )
    offload: bool = Field(
        False,
        description="keep text encoders and denoiser in the CPU's memory, and on the device only while they run "
        "(enable_model_cpu_offload)",
    )


class PipelineGenerator(nn.Module):
    """A pipeline of diffusers. See :class:`robustok.types.Generator` for the contract; labels are numbers of prompts.

    Nothing large is loaded before it is needed: by :meth:`embed` the text encoders, by sampling the denoiser.

    Args:
        config: folder, image size, precision.
        prompts: the prompt of each label; ``null_label`` is the empty prompt.
        identity: what :meth:`state_dict` has of another object for the same; None computes it.
        cache: folder in which encoded prompts are kept, by digest; None keeps them in memory.

    Attributes:
        conditions: encoded prompts in memory by digest, and that of NEGATIVE.

    Raises:
        UserError: no pipeline of a known family, or not all of its folder.
    """

    kind = "continuous"
    codebook_size = None
    objective = "noise_prediction"
    sampling_type = PipelineSampling
    licence = "that of the pipeline's model card"

    def __init__(
        self,
        config: PipelineConfig,
        prompts: Sequence[str] = ("",),
        identity: Tensor | None = None,
        cache: Path | None = None,
    ) -> None:
        super().__init__()
        self.config, self.prompts, self.cache = config, [*prompts, ""], cache
        self.classes = self.null_label = len(prompts)
        self.family, self.folder = family_of(config.folder), fetch_pipeline(config.folder)
        self.sampling, self.latent_space = PipelineSampling(), None
        self.conditions: dict[str, Condition] = {}
        self._plans: dict[tuple[str, float], Start] = {}
        self.__dict__["_vae"] = empty_autoencoder(self.folder, self._next_latents)  # no submodule
        settings = self._vae.config
        channels = settings.z_dim if self.family.video else settings.latent_channels
        if self.family.denoiser == "unet" and channels != 4:
            raise UserError(f"{config.folder} has latents of {channels} channels; {self.family.image} takes 4 only")
        self.factor = next(2 ** (len(settings[name]) - 1) for name in LEVELS if name in settings)
        self._check_divides("image_size", config.image_size)
        self.latent_shape = ((config.image_size // self.factor) ** 2, channels)
        if identity is None:
            said = {"prompts": list(prompts), "weights": weights_digest(self.folder, self.family)}
            identity = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        self.register_buffer("identity", identity)  # all that there is of weights: a digest, and the prompts

    def _check_divides(self, name: str, size: int) -> None:
        if size % (2 * self.factor):
            raise UserError(f"{name} {size} is not divisible by {2 * self.factor}; choose a multiple")

    def sizes(self, sampling: PipelineSampling) -> tuple[int, int]:
        """Height and width of the images, in pixels.

        Raises:
            UserError: the sampling's own do not divide.
        """
        if sampling.height is None:
            return self.config.image_size, self.config.image_size
        self._check_divides("sampling.height", sampling.height)
        self._check_divides("sampling.width", sampling.width)
        return sampling.height, sampling.width

    def shape_of(self, sampling: PipelineSampling) -> tuple[int, ...]:
        """Shape of the latents of an image: (L, D), or (rows, columns, D) where the sampling has a size."""
        if sampling.height is None:
            return self.latent_shape
        return (*(size // self.factor for size in self.sizes(sampling)), self.latent_shape[1])

    @property
    def device(self) -> torch.device:
        """Where it samples."""
        return self.identity.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the pipeline's weights."""
        auto = "bf16" if self.device.type == "cuda" else "float32"
        return DTYPES[auto if self.config.precision == "auto" else self.config.precision]

    # Parts of the pipeline

    @cached_property
    def pipe(self) -> Any:
        """The image-to-image pipeline, without text encoders and autoencoder."""
        return self._load(texts=False)

    @cached_property
    def twin(self) -> Any:
        """The text-to-image pipeline, with the same parts."""
        return text_to_image(self.pipe, self.family)

    def _load(self, texts: bool) -> Any:
        options = self.dtype, self.device, self.config.offload
        return load_parts(self.folder, self.family, self._vae, texts, *options)

    def to(self, device: torch.device) -> "PipelineGenerator":
        """Move it; what is loaded later is loaded there."""
        before = self.device
        super().to(device)
        if self.device != before:
            self._drop()  # it is loaded again, in the precision of the device
        return self

    def _drop(self) -> None:
        """Free the memory of the denoiser, if it is loaded."""
        self.__dict__.pop("pipe", None)
        self.__dict__.pop("twin", None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def embed(self, labels: Tensor) -> None:
        """Encode the prompts of these labels (N,), those that are not yet, and drop the text encoders.

        Raises:
            UserError: the pipeline has no text encoder, or cannot be loaded.
        """
        texts = {caption_digest(text): text for text in (self.prompts[label] for label in labels.unique().tolist())}
        missing = [key for key in (*texts, NEGATIVE) if key not in self.conditions and not self._file(key).is_file()]
        if not missing:
            return
        self._drop()
        pipe = self._load(texts=True)
        for i in track(range(len(missing)), "encode prompts"):
            key = missing[i]
            condition = encode(pipe, self.family, texts.get(key), self.device)
            if self.cache is None:
                self.conditions[key] = condition
            else:
                write_file(self._file(key), save(condition), shared=True)
        del pipe
        self._drop()

    def _file(self, key: str) -> Path:
        """Where an encoded prompt is kept; nowhere without a cache."""
        return Path(os.devnull) if self.cache is None else self.cache / f"{key}.safetensors"

    # Sampling

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,
        sampling: PipelineSampling,
        rng: torch.Generator | Sequence[torch.Generator],
        reference: Tensor | None = None,
        sigma: float | None = None,
    ) -> Tensor:
        """Sample latents, or mix them with the latents of real images by image-to-image.

        Args:
            labels: numbers of prompts (N,) int64; ``null_label`` is the empty prompt.
            sampling: steps, guidance, scheduler, meaning of sigma, size.
            rng: one CPU generator per image (:func:`robustok.randomness.image_rngs`), or one that seeds them.
            reference: latents (N, L, D) of real images, as the tokenizer makes them; with the size in ``sampling`` on a
                grid, (N, rows, columns, D), and so is what is returned.
            sigma: in [0, 1]; 1 returns the reference, 0 or None is a free sample.

        Returns:
            Latents (N, L, D) float32 on the generator's device, as the tokenizer makes them.

        Raises:
            UserError: labels, sampling, reference, sigma or the number of generators do not fit; the pipeline cannot be
                loaded, or makes latents that are not finite.
        """
        check_labels(labels, self.classes)
        shape, (height, width) = self.shape_of(sampling), self.sizes(sampling)
        check_mixture(sigma, reference, (len(labels), *shape), None)
        rngs = per_image(rng, len(labels))
        if reference is not None and 0 < (sigma or 0) < 1:
            check_mixes(self.config.folder, self.family)
        if reference is not None and sigma == 1:
            return reference.to(self.device, torch.float32, copy=True)
        self.embed(labels)
        if reference is None or not sigma:
            pipe, given = self.twin, {"height": height, "width": width}
            given["use_resolution_binning"] = False  # of PixArt and Sana, which would choose another size
            given |= {} if sampling.steps is None else {"num_inference_steps": sampling.steps}
        else:
            start, pipe = self.plan(sampling, sigma), self.pipe
            given = self._arguments(sampling, start.strength, start.schedule, len(labels))
            grids = reference.reshape(len(labels), height // self.factor, width // self.factor, -1)
            grids = grids.permute(0, 3, 1, 2).contiguous()  # (N, D, h, w)
            grids = grids.unsqueeze(2) if self.family.video else grids  # (N, D, 1, h, w)
            self._given = iter(grids.to(self.device, self.dtype).split(1))
        given |= {"generator": rngs, "output_type": "latent"} | self._guidance(sampling) | sampling.arguments
        given |= self._condition(labels, self._is_guided(pipe, given))
        with other_scheduler(pipe, sampling.scheduler):
            latents = self._unscaled(call(pipe, given).images, height, width)
        return latents.view(len(latents), *shape)

    def _arguments(self, sampling: PipelineSampling, strength: float, schedule: int, count: int) -> dict[str, Any]:
        """Arguments of image-to-image; the pixels are never looked at."""
        height, width = self.sizes(sampling)
        given = {"image": torch.zeros(count, 3, height, width), "strength": strength, "num_inference_steps": schedule}
        return given | {"height": height, "width": width}

    def _next_latents(self, _image: Tensor) -> SimpleNamespace:
        """In the place of encoding: the latents of the next reference."""
        return SimpleNamespace(latents=next(self._given))

    def _guidance(self, sampling: PipelineSampling) -> dict[str, float]:
        """The guidance scale as an argument: as set, none where all prompts are empty, else the pipeline's own."""
        scale = sampling.guidance_scale
        if scale is None and not any(self.prompts):
            scale = self.family.unguided
        return {} if scale is None else {self.family.guidance: scale}

    def _is_guided(self, pipe: Any, given: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments needs what guidance moves away from."""
        true = "true_cfg_scale"  # of families whose guidance_scale is an input of a distilled denoiser
        scale = self.family.guidance if default_of(pipe, true) is None else true
        return given.get(scale, default_of(pipe, scale)) > self.family.unguided

    def _condition(self, labels: Tensor, guided: bool) -> dict[str, Any]:
        """The arguments of a call for these labels (N,), with those of guidance if there is some."""
        keys = [caption_digest(self.prompts[label]) for label in labels.tolist()]
        needed = {*keys, NEGATIVE} if guided else {*keys}  # each is read once, and not kept: all together may be large
        found = {key: self.conditions.get(key) or load_tensors(self._file(key)) for key in needed}
        batch = stacked([found[key] for key in keys], self.family, self.dtype, self.device)
        batch["negative_prompt"] = None  # of PixArt and Sana it is a text, which would be encoded
        if guided:
            batch |= stacked([found[NEGATIVE]] * len(labels), self.family, self.dtype, self.device)
        return batch

    def _unscaled(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Latents as a pipeline returns them to those of the tokenizer (N, L, D) float32."""
        if self.family.packed:
            latents = self.pipe._unpack_latents(latents, height, width, self.factor)  # (N, D, h, w), or (N, D, 1, h, w)
        rows = latents.float().flatten(2).transpose(1, 2)  # (N, L, D)
        if not rows.isfinite().all():
            raise UserError(
                f"latents of {self.config.folder} are not finite in {self.dtype}; set precision of the generator to "
                "bf16 or float32 (generator.config.precision)"
            )
        return unscale_latents(rows, self._vae.config)

    # What sigma means

    def plan(self, sampling: PipelineSampling, sigma: float) -> Start:
        """Where image-to-image starts so that the share ``sigma``, below 1, is kept; at least one step is run.

        Raises:
            UserError: the pipeline cannot be loaded, or refuses the settings.
        """
        key = sampling.model_dump_json(), sigma
        if key not in self._plans:
            prompt, by_level = no_prompt(self.family, self.dtype, self.device), sampling.sigma_by == "level"
            arguments = lambda *start: self._arguments(sampling, *start, 1) | prompt  # noqa: E731
            with other_scheduler(self.pipe, sampling.scheduler):
                found = find_start(self.pipe, self.family, arguments, sigma, by_level, sampling.steps)
            self._plans[key] = found
        return self._plans[key]

    def mixture_details(self, sampling: PipelineSampling, sigma: float) -> dict[str, Any]:
        """What sigma means with these settings, for the manifest of pairs: strength, steps, the true noise level."""
        if sigma in (0, 1):
            return {"noise_level": float(1 - sigma)}
        start = self.plan(sampling, sigma)
        return {
            "strength": round(start.strength, 6),
            "noise_level": start.level,
            "sampler_steps": start.steps,
            "scheduler": sampling.scheduler or type(self.pipe.scheduler).__name__,
        }

    def compile_sampling(self) -> None:
        """Not available.

        Raises:
            UserError: always.
        """
        raise UserError("cache.compile=true is for generators of tokens, a pipeline is none; set cache.compile=false")

    def check(self, latents: Tensor | None = None) -> list[str]:
        """Sentences on latents that do not fit; empty if they do."""
        if latents is not None and latents.ndim == 3 and latents.shape[1:] != self.latent_shape:
            return [f"Latents of shape {tuple(latents.shape[1:])} do not fit a pipeline of {self.latent_shape}."]
        return []


def prompts_in(identity: Tensor) -> list[str]:
    """The prompts in the identity of a generator."""
    return json.loads(identity.numpy().tobytes())["prompts"]
