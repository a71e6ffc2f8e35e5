"""What the diffusion transformers share: settings, the velocity, its training pass and its sampling.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748): time and class shift, scale and
gate every block (adaLN-zero). Parameters have the names of the authors' code. Letters beside those of
``robustok.types``: W width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.checkpoints import depth_of, shape_of
from robustok.config import Heads, validate
from robustok.errors import UserError
from robustok.generators.continuous import ContinuousConfig, ContinuousGenerator
from robustok.generators.diffusion_blocks import NORM_EPSILON, Attention, Block, FinalLayer, TimeEmbedder
from robustok.generators.diffusion_sampling import Model, guided_model
from robustok.generators.flow import (
    DiffusionPath,
    DiffusionSampling,
    FlowProcess,
    interpolate,
    noise_level,
    target_velocity,
)
from robustok.types import GeneratorOutput

NormOf = Callable[[int], nn.Module]


class DiffusionTransformerConfig(ContinuousConfig):
    """Size, training and latent statistics of a diffusion transformer. The default size is XL."""

    width: int = Field(1152, gt=0, description="width of the transformer, a multiple of heads")
    depth: int = Field(28, gt=0, description="number of transformer blocks")
    heads: Heads = 16
    mlp_width: int | None = Field(None, gt=0, description="hidden width of the MLP; null is 4 widths, 8/3 with SwiGLU")
    qk_norm: bool = Field(False, description="normalise the queries and keys of each head")
    learn_sigma: bool = Field(False, description="the head predicts a variance too, which is not used (authors' code)")
    path: DiffusionPath = Field("linear", description="path from data to noise that training follows")


class DiffusionTransformer(ContinuousGenerator):
    """Class-conditional velocity of continuous latents. Families build their blocks in ``_assemble``.

    Attributes:
        noise_time: the time at which latents are pure noise in the family's own convention: 1 or 0.
    """

    noise_time: float

    def __init__(self, config: DiffusionTransformerConfig, latent_shape: tuple[int, int], classes: int) -> None:
        super().__init__(config, latent_shape, classes)
        self.x_embedder = nn.Linear(self.latent_shape[1], config.width)
        self.t_embedder = TimeEmbedder(config.width)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, config.width)})
        self._assemble()  # pos_embed, blocks and final_layer
        self._initialise()

    def _assemble(self) -> None:
        raise NotImplementedError

    def _stack(
        self, norm: NormOf, head_norm: NormOf, mlp: Callable[[int, int], nn.Module], hidden: int, shift: bool = True
    ) -> None:
        """Build ``blocks`` and ``final_layer``: norms by width, and MLPs by width and hidden width."""
        config, width = self.config, self.config.width
        self.blocks = nn.ModuleList(
            Block(
                Attention(width, config.heads, head_norm if config.qk_norm else None),
                mlp(width, hidden),
                norm,
                width,
                shift,
            )
            for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(width, self.latent_shape[1] * (1 + config.learn_sigma), norm)

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
        self._check_shape(latents)
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
        """Predict the velocity at noised latents, for the squared error of flow matching in training.

        Args:
            latents: (N, L, D) float32 as the tokenizer makes them.
            labels: (N,) int64; ``null_label`` is "no class".
            noise_levels: (N,) in [0, 1]; 1 is pure noise in every family
                (:func:`robustok.generators.flow.draw_noise_levels`).
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

    def _model(self, labels: Tensor, sampling: DiffusionSampling) -> Model:
        return guided_model(self.velocity, labels, self.null_label, sampling)

    def _process(self, sampling: DiffusionSampling) -> FlowProcess:
        return FlowProcess(sampling, self.noise_time, sampling.path or self.config.path)


# Pretrained checkpoints

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width: the published sizes S, B, L, XL


def pretrained_facts(weights: Mapping[str, Tensor], channels: int) -> dict[str, Any]:
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


def build_pretrained(
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
