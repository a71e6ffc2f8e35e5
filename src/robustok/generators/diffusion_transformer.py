"""What the diffusion transformers share: settings, the velocity field, its training pass and its sampling.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748): time and class shift, scale and
gate every block (adaLN-zero). Parameters carry the released names. Letters beside those of ``robustok.types``: W width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from robustok.checkpoints import depth_of, shape_of
from robustok.config import Config, validate
from robustok.generators.diffusion import (
    DiffusionPath,
    DiffusionSampling,
    check_reference,
    guided_velocity,
    image_normals,
    interpolate,
    noise_level,
    plan_preservation,
    sample_mixture,
    target_velocity,
)
from robustok.generators.diffusion_blocks import NORM_EPSILON, TimeEmbedder
from robustok.generators.sampling import check_labels, image_uniforms, per_image
from robustok.types import GeneratorOutput, UserError


class DiffusionTransformerConfig(Config):
    """Size, training and latent statistics of a diffusion transformer. The default size is XL."""

    name: str
    width: int = Field(1152, gt=0, description="width of the transformer, a multiple of heads")
    depth: int = Field(28, gt=0, description="number of transformer blocks")
    heads: int = Field(16, gt=0, description="attention heads; must divide width")
    mlp_width: int | None = Field(None, gt=0, description="hidden width of the MLP; null is 4 widths, 8/3 with SwiGLU")
    qk_norm: bool = Field(False, description="normalise the queries and keys of each head")
    learn_sigma: bool = Field(False, description="the head predicts a variance too, which is not used (released code)")
    label_dropout: float = Field(0.1, ge=0, le=1, description="share of training labels dropped, for guidance")
    path: DiffusionPath = Field("linear", description="path from data to noise that training follows")
    noise_levels: Literal["uniform", "logit_normal"] = Field("uniform", description="distribution in training")
    latent_mean: float | list[float] | None = Field(
        None, description="mean of the tokenizer's latents, one or one per channel; null: training measures it"
    )
    latent_std: float | list[float] | None = Field(
        None, description="their standard deviation, by which they are divided; null: training measures it"
    )
    latent_multiplier: float = Field(1.0, gt=0, description="what the normalised latents are multiplied with")

    @field_validator("heads")
    @classmethod
    def _heads_divide_width(cls, heads: int, info: ValidationInfo) -> int:
        width = info.data.get("width")
        if width is not None and width % heads:
            raise ValueError(f"heads must divide width, which is {width}")
        return heads


class DiffusionTransformer(nn.Module):
    """Class-conditional velocity field of continuous latents. Families say in ``_assemble`` what their blocks are.

    Args:
        config: size, training, latent statistics.
        latent_shape: (L, D), latents per image and their width.
        classes: number of classes.

    Attributes:
        noise_time: the time, in the family's own convention, at which latents are pure noise: 1 or 0.
        null_label: the label that stands for "no class"; equals ``classes``.
        licence: of the released weights.
        latent_space: names the tokenizer whose latents these are; None where unknown.
        sampling: settings that go with the weights.
    """

    kind = "continuous"
    codebook_size = None
    noise_time: float
    licence: str

    def __init__(self, config: DiffusionTransformerConfig, latent_shape: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.config = config
        self.latent_shape = tuple(latent_shape)
        self.classes = self.null_label = classes
        self.latent_space: str | None = None
        self.sampling = DiffusionSampling()
        self.x_embedder = nn.Linear(self.latent_shape[1], config.width)
        self.t_embedder = TimeEmbedder(config.width)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, config.width)})
        self._assemble()  # pos_embed, blocks and final_layer
        self._initialise()
        self.register_buffer("latent_mean", None)
        self.register_buffer("latent_std", None)
        if config.latent_mean is not None or config.latent_std is not None:
            self.set_latent_statistics(config.latent_mean, config.latent_std, config.latent_multiplier)

    def _assemble(self) -> None:
        raise NotImplementedError

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for weight in (self.y_embedder["embedding_table"].weight, *(self.t_embedder.mlp[i].weight for i in (0, 2))):
            nn.init.normal_(weight, std=0.02)
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)  # every block starts as the identity
        nn.init.zeros_(self.final_layer.linear.weight)

    # Latents as the tokenizer makes them, and as the transformer sees them

    def set_latent_statistics(self, mean: Any, std: Any, multiplier: float = 1.0) -> None:
        """Say how the tokenizer's latents z are normalised: ``(z - mean) / std * multiplier``.

        Args:
            mean: a number, or one per channel in any shape, such as (1, D, 1, 1).
            std: likewise; a standard deviation, not a scale to multiply with.
            multiplier: a number.

        Raises:
            UserError: one of them is missing, not finite, not positive, or of another number of channels.
        """
        found = {}
        for name, value in (("latent_mean", mean), ("latent_std", std)):
            if value is None:
                raise UserError(f"{name} is missing; latent_mean and latent_std go together, give both or neither")
            tensor = torch.as_tensor(value, dtype=torch.float64, device=self.pos_embed.device).flatten()
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
        """The tokenizer's latents (N, L, D) as the transformer sees them, in float64.

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
                f"this {self.config.name} knows no latent statistics; give latent_mean and latent_std, which stand in "
                "the tokenizer's configuration (vq_mean, vq_std) or beside its weights (latents_stats.pt)"
            )

    # Velocity and training

    def velocity(self, latents: Tensor, times: Tensor | float, labels: Tensor) -> Tensor:
        """Derivative of normalised latents by the family's own time.

        Args:
            latents: (N, L, D), normalised.
            times: (N,) in [0, 1], or one for all.
            labels: (N,) int64; ``null_label`` is "no class".

        Returns:
            (N, L, D) in the model's precision.

        Raises:
            UserError: latents of another shape.
        """
        if latents.shape[1:] != self.latent_shape:
            raise UserError(
                f"got latents of shape {tuple(latents.shape)}; this {self.config.name} models (N, *{self.latent_shape})"
            )
        dtype = self.pos_embed.dtype
        times = torch.as_tensor(times, dtype=dtype, device=latents.device).expand(len(latents))  # (N,)
        condition = self.t_embedder(times) + self.y_embedder["embedding_table"](labels)  # (N, W)
        condition = condition[:, None]  # (N, 1, W)
        x = self.x_embedder(latents.to(dtype)) + self.pos_embed  # (N, L, W)
        for block in self.blocks:
            x = block(x, condition, self._rotate)
        return self.final_layer(x, condition)[..., : self.latent_shape[1]]  # (N, L, D)

    def _rotate(self, x: Tensor) -> Tensor:
        return x

    def forward(self, latents: Tensor, labels: Tensor, noise_levels: Tensor, noise: Tensor) -> GeneratorOutput:
        """Predict the velocity at noised latents: what flow matching takes the squared error of in training.

        Args:
            latents: (N, L, D) float32 as the tokenizer makes them.
            labels: (N,) int64; ``null_label`` is "no class".
            noise_levels: (N,) in [0, 1], 1 is pure noise whatever the family's time
                (:func:`robustok.generators.diffusion.draw_noise_levels`).
            noise: standard normal (N, L, D).

        Returns:
            Predicted and true velocity (N, L, D), in the family's own time.
        """
        clean, noise, levels = self.normalise(latents), noise.double(), noise_levels.double()[:, None, None]
        noised = interpolate(clean, noise, levels, self.config.path)  # (N, L, D)
        target = target_velocity(clean, noise, levels, self.config.path, self.noise_time)
        prediction = self.velocity(noised, noise_level(noise_levels, self.noise_time), labels)
        return GeneratorOutput(prediction=prediction, targets=target.to(self.pos_embed.dtype))

    # Sampling

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,
        sampling: DiffusionSampling,
        rng: torch.Generator | Sequence[torch.Generator],
        reference: Tensor | None = None,
        preservation: float | None = None,
    ) -> Tensor:
        """Sample latents, or mix them with the latents of real images by ``sampling.strategy``.

        Every image has noise of its own, so it is the same in whatever batch, up to the rounding of the model.

        Args:
            labels: (N,) int64; ``null_label`` samples without a class.
            sampling: sampler, guidance, strategy.
            rng: one CPU generator per image (:func:`robustok.generators.sampling.image_rngs`), or one that seeds them.
            reference: latents (N, L, D) of real images, as the tokenizer makes them.
            preservation: sigma in [0, 1]; 1 returns the reference, 0 or None ignores it.

        Returns:
            Latents (N, L, D) on the model's device, as the tokenizer makes them.

        Raises:
            UserError: labels, sampling, reference, preservation or the number of generators do not fit, or no latent
                statistics are known.
        """
        if not isinstance(sampling, DiffusionSampling):
            raise UserError(f"{self.config.name} samples by diffusion; got sampling.name={sampling.name}")
        check_labels(labels, self.classes)
        check_reference(preservation, reference, (len(labels), *self.latent_shape))
        device, rngs = self.pos_embed.device, per_image(rng, len(labels))
        if reference is not None and preservation == 1:
            return reference.to(device, copy=True)
        labels, dtype = labels.to(device), self.pos_embed.dtype
        # Drawn whatever the strategy and sigma: an image has the same noise in all of them.
        keep = image_uniforms(rngs, self.latent_shape[0]).to(device) < (preservation or 0.0)  # (N, L)
        draw = lambda: image_normals(rngs, self.latent_shape).to(device)  # noqa: E731
        clean = None if reference is None else self.normalise(reference.to(device))
        latents = sample_mixture(
            guided_velocity(self.velocity, labels, self.null_label, sampling),
            draw().double(),
            sampling,
            self.noise_time,
            sampling.path or self.config.path,
            clean,
            preservation,
            keep[..., None],
            draw,
        )
        latents = self.denormalise(latents).to(dtype)  # (N, L, D)
        if clean is not None and preservation and sampling.strategy == "token_mix":
            return torch.where(keep[..., None], reference.to(device, dtype), latents)  # kept bit for bit
        return latents

    def preservation_facts(self, sampling: DiffusionSampling, preservation: float) -> dict[str, Any]:
        """What sigma means here, for the manifest of pairs: strategy, noise level, steps and their guided share."""
        plan = plan_preservation(sampling, preservation, self.noise_time, sampling.path or self.config.path)
        return {"strategy": sampling.strategy, **plan.facts()}

    def check(self, latents: Tensor | None = None) -> list[str]:
        """Plain sentences on what is wrong with the latent statistics or layout; empty where all is well.

        Args:
            latents: some of the tokenizer's latents (N, L, D), against which the statistics are held.
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
        latents = latents.to(self.pos_embed.device).double()
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


# Released checkpoints

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width: the published sizes S, B, L, XL


def released_facts(weights: Mapping[str, Tensor], channels: int) -> dict[str, Any]:
    """What the tensors tell of every released diffusion transformer."""
    rows, width = shape_of(weights, "y_embedder.embedding_table.weight", 2)
    return {
        "width": width,
        "depth": depth_of(weights, "blocks."),
        "classes": rows - 1,
        "null_label": rows - 1,
        "channels": channels,
        "patch_size": 1,
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        "learn_sigma": shape_of(weights, "final_layer.linear.weight", 2)[0] == 2 * channels,
        "norm_epsilon": NORM_EPSILON,
    }


def build_released(
    family: type[DiffusionTransformer],
    config: type[DiffusionTransformerConfig],
    weights: Mapping[str, Tensor],
    settings: dict[str, Any],
    latent_shape: tuple[int, int],
) -> DiffusionTransformer:
    """The model that settled settings describe.

    Raises:
        UserError: the number of heads is unknown, or a setting is not accepted.
    """
    if settings["qk_norm"]:
        settings["heads"] = settings["width"] // shape_of(weights, "blocks.0.attn.q_norm.weight", 1)[0]
    settings.setdefault("heads", HEADS.get(settings["width"]))
    if settings["heads"] is None:
        raise UserError(f"config lacks num_heads, which a width of {settings['width']} does not tell; give it")
    for name in ("latent_mean", "latent_std"):
        if name in settings:  # a number, a list, or a tensor such as (1, D, 1, 1)
            settings[name] = torch.as_tensor(settings[name], dtype=torch.float64).flatten().tolist()
    if "path" in settings:
        settings["path"] = str(settings["path"]).lower()
    ours = {key: value for key, value in settings.items() if key in config.model_fields}
    return family(validate(config, ours, source="config"), latent_shape, settings["classes"])


def check_tables(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fixed tables that a release stores must be ours up to rounding: another table is another model.

    Raises:
        UserError: names the table.
    """
    for name, ours in model.named_buffers():
        given = weights.get(name)
        if given is None or given.shape != ours.shape:
            continue  # the strict check of all shapes says so
        if not torch.allclose(given.cpu().float(), ours, rtol=0, atol=5e-3):  # half precision keeps that much
            raise UserError(f"{name} has other values than the fixed table of a {model.config.name}; check the file")
