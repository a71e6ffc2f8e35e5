"""What the diffusion transformers share: settings, the velocity, its training pass and its sampling.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748): time and class shift, scale and
gate every block (adaLN-zero). Parameters have the names of the authors' code. Letters beside those of
``robustok.types``: W width.
"""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.config import Heads
from robustok.generators.continuous import ContinuousConfig, ContinuousGenerator
from robustok.generators.diffusion_blocks import Attention, Block, FinalLayer, TimeEmbedder
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
