"""What the generators of continuous latents share: the statistics of these latents, and sampling.

Letters are those of ``robustok.types``.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.config import Config
from robustok.errors import UserError
from robustok.generators.diffusion_sampling import (
    ContinuousSampling,
    Model,
    Process,
    image_normals,
    sample_mixture,
)
from robustok.generators.flow import DiffusionSampling
from robustok.generators.sampling import check_labels, check_mixture
from robustok.randomness import image_uniforms, per_image


class ContinuousConfig(Config):
    """Training and latent statistics of a generator of continuous latents."""

    name: str
    label_dropout: float = Field(0.1, ge=0, le=1, description="share of training labels dropped, for guidance")
    noise_levels: Literal["uniform", "logit_normal"] = Field("uniform", description="distribution in training")
    latent_mean: float | list[float] | None = Field(
        None, description="mean of the tokenizer's latents, one or one per channel; null: training measures it"
    )
    latent_std: float | list[float] | None = Field(
        None, description="their standard deviation, by which they are divided; null: training measures it"
    )
    latent_multiplier: float = Field(1.0, gt=0, description="what the normalised latents are multiplied with")


class ContinuousGenerator(nn.Module):
    """A class-conditional model of continuous latents. Families implement ``_model`` and ``_process``.

    Args:
        config: size, training, latent statistics.
        latent_shape: (L, D), latents per image and their width.
        classes: number of classes.

    The attributes are those of :class:`robustok.types.Generator`.
    """

    kind = "continuous"
    codebook_size = None
    objective = "flow_matching"
    sampling_type: type[ContinuousSampling] = DiffusionSampling
    licence: str

    def __init__(self, config: ContinuousConfig, latent_shape: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.config = config
        self.latent_shape = tuple(latent_shape)
        self.classes = self.null_label = classes
        self.latent_space: str | None = None
        self.sampling = self.sampling_type()
        self.register_buffer("latent_mean", None)
        self.register_buffer("latent_std", None)
        if config.latent_mean is not None or config.latent_std is not None:
            self.set_latent_statistics(config.latent_mean, config.latent_std, config.latent_multiplier)

    @property
    def device(self) -> torch.device:
        """Device of its weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of noise and latents: that of its weights, at least float32, as some weights may be rounded."""
        return torch.promote_types(next(self.parameters()).dtype, torch.float32)

    # Normalised latents

    def set_latent_statistics(self, mean: Any, std: Any, multiplier: float = 1.0) -> None:
        """Set how the tokenizer's latents z are normalised: ``(z - mean) / std * multiplier``.

        Args:
            mean: a number, or one per channel in any shape, such as (1, D, 1, 1).
            std: likewise; a standard deviation, not a scale to multiply with.
            multiplier: a number.

        Raises:
            UserError: one of them is missing, not finite, not positive, or of another number of channels.
        """
        found, device = {}, next((p.device for p in self.parameters()), None)
        for name, value in (("latent_mean", mean), ("latent_std", std)):
            if value is None:
                raise UserError(f"{name} is missing; latent_mean and latent_std go together, give both or neither")
            tensor = torch.as_tensor(value, dtype=torch.float64, device=device).flatten()
            if len(tensor) not in (1, self.latent_shape[1]):
                raise UserError(
                    f"{name} has {len(tensor)} values; this generator's latents have {self.latent_shape[1]} channels"
                )
            if not tensor.is_meta and (not tensor.isfinite().all() or (name == "latent_std" and (tensor <= 0).any())):
                raise UserError(f"{name} = {tensor.tolist()}: expected finite numbers, and positive ones for the std")
            self.register_buffer(name, tensor, persistent=False)  # they are part of the configuration
            found[name] = value if isinstance(value, float | list) else [float(v) for v in tensor.tolist()]
        self.config = self.config.model_copy(update=found | {"latent_multiplier": float(multiplier)})

    def normalise(self, latents: Tensor) -> Tensor:
        """Normalise the tokenizer's latents (N, L, D), to float64.

        Raises:
            UserError: no statistics are known.
        """
        self._need_statistics()
        return (latents.double() - self.latent_mean) / self.latent_std * self.config.latent_multiplier

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo :meth:`normalise`."""
        self._need_statistics()
        return latents.double() / self.config.latent_multiplier * self.latent_std + self.latent_mean

    def _need_statistics(self) -> None:
        if self.latent_mean is None:
            raise UserError(
                f"this {self.config.name} has no latent statistics; give latent_mean and latent_std, which are in the "
                "tokenizer's configuration (vq_mean, vq_std) or beside its weights (latents_stats.pt)"
            )

    # Sampling

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,
        sampling: ContinuousSampling,
        rng: torch.Generator | Sequence[torch.Generator],
        reference: Tensor | None = None,
        sigma: float | None = None,
    ) -> Tensor:
        """Sample latents, or mix them with the latents of real images by ``sampling.strategy``.

        Every image has its own noise, so it is the same in any batch, up to the rounding of the model.

        Args:
            labels: (N,) int64; ``null_label`` samples without a class.
            sampling: sampler, guidance, strategy.
            rng: one CPU generator per image (:func:`robustok.randomness.image_rngs`), or one that seeds them.
            reference: latents (N, L, D) of real images, as the tokenizer makes them.
            sigma: share in [0, 1] of the reference that is kept; 1 returns the reference, 0 or None ignores it.

        Returns:
            Latents (N, L, D) on the model's device, as the tokenizer makes them.

        Raises:
            UserError: labels, sampling, reference, sigma or the number of generators do not fit, or no latent
                statistics are known.
        """
        if not isinstance(sampling, self.sampling_type):
            expected = self.sampling_type().name
            raise UserError(f"{self.config.name} samples by {expected}; got sampling.name={sampling.name}")
        check_labels(labels, self.classes)
        check_mixture(sigma, reference, (len(labels), *self.latent_shape), None)
        device, dtype, rngs = self.device, self.dtype, per_image(rng, len(labels))
        if reference is not None and sigma == 1:
            return reference.to(device, copy=True)
        # Drawn whatever the strategy and sigma: an image has the same noise in all of them.
        keep = image_uniforms(rngs, self.latent_shape[0]).to(device)[..., None] < (sigma or 0.0)  # (N, L, 1)
        draw = lambda: image_normals(rngs, self.latent_shape).to(device)  # noqa: E731
        clean = None if reference is None else self.normalise(reference.to(device))
        noise = draw().double()  # (N, L, D)
        model, process = self._model(labels.to(device), sampling), self._process(sampling)
        latents = self.denormalise(sample_mixture(model, process, noise, clean, sigma, keep, draw)).to(dtype)
        if clean is not None and sigma and sampling.strategy == "token_mix":
            return torch.where(keep, reference.to(device, dtype), latents)  # kept bit for bit
        return latents

    def _model(self, labels: Tensor, sampling: ContinuousSampling) -> Model:
        """The guided prediction of a state at a time, for these labels (N,)."""
        raise NotImplementedError

    def _process(self, sampling: ContinuousSampling) -> Process:
        """The process from latents to noise that the model was trained on, with its sampler."""
        raise NotImplementedError

    def mixture_details(self, sampling: ContinuousSampling, sigma: float) -> dict[str, Any]:
        """What sigma means here, for the manifest of pairs: strategy, noise level, steps and their guided share."""
        return {"strategy": sampling.strategy, **self._process(sampling).plan(sigma).details()}

    def compile_sampling(self) -> None:
        """Not available.

        Raises:
            UserError: always.
        """
        name = self.config.name
        raise UserError(f"cache.compile=true is for generators of tokens, {name} is none; set cache.compile=false")

    def _check_shape(self, latents: Tensor) -> None:
        if latents.shape[1:] != self.latent_shape:
            raise UserError(
                f"got latents of shape {tuple(latents.shape)}; this {self.config.name} models (N, *{self.latent_shape})"
            )

    def check(self, latents: Tensor | None = None) -> list[str]:
        """Sentences on what is wrong with the latent statistics or their shape; empty if nothing is.

        Args:
            latents: some of the tokenizer's latents (N, L, D), with which the statistics are compared.
        """
        if latents is not None and latents.shape[1:] != self.latent_shape:
            return [f"Latents of shape {tuple(latents.shape[1:])} do not fit a generator of {self.latent_shape}."]
        if self.latent_mean is None:
            return ["No latent statistics are known (latent_mean, latent_std); sampling needs them."]
        problems = []
        if (self.latent_mean == 0).all() and (self.latent_std == 1).all() and self.config.latent_multiplier == 1:
            problems.append("The latent statistics are the defaults 0 and 1, which leave latents as they are.")
        typical = self.latent_std.log().mean().exp().item()
        if latents is None:
            if typical > 10:
                problems.append(
                    f"The latent_std of about {typical:.3g} looks inverted: it divides latents, so it should be their "
                    f"standard deviation, perhaps {1 / typical:.3g}."
                )
            return problems
        latents = latents.to(self.device).double()
        normalised, raw = self.normalise(latents), latents.std().item()
        mean, spread = normalised.mean().item(), normalised.std().item() / self.config.latent_multiplier
        if not 0.5 < spread < 2 and 0.5 < raw * typical < 2:
            problems.append(
                f"The latent_std of about {typical:.3g} looks inverted: the latents have {raw:.3g}, its inverse."
            )
        elif not 0.5 < spread < 2 or abs(mean) > 0.5:
            problems.append(
                f"Normalised latents have mean {mean:.3g} and standard deviation {spread:.3g} instead of about 0 and "
                "1; the statistics are those of another tokenizer."
            )
        return problems
