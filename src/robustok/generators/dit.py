"""DiT, the diffusion transformer that predicts the noise of a DDPM, as the diffusers library has it.

    generator = load_pretrained("dit", "DiT-XL-2-256")
    generator.set_latent_statistics(0.0, 1.0, 0.18215)  # of its autoencoder
    latents = generator.generate(labels, generator.sampling, image_rngs(seed, indices))

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748). The network is the library's
``DiTTransformer2DModel``; the chain of noise levels is that of its pipeline's scheduler. If the network predicts a
variance too, only ancestral sampling uses it, and training does not change it.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.backbones import diffusers_network
from robustok.errors import UserError
from robustok.generators.continuous import ContinuousConfig, ContinuousGenerator
from robustok.generators.ddpm import DDPMProcess, DDPMSampling, add_noise, alpha_bars
from robustok.generators.diffusion_sampling import Model, guided_model
from robustok.types import GeneratorOutput


class DiTConfig(ContinuousConfig):
    """A DiT. The default size is DiT-XL/2."""

    name: Literal["dit"] = "dit"
    settings: dict[str, Any] = Field(
        {}, description="its config.json under the names of diffusers, without the sizes of latents and classes"
    )
    timesteps: int = Field(1000, ge=2, le=10**6, description="T, timesteps of the chain that training follows")
    beta_start: float = Field(1e-4, gt=0, lt=1, description="variance of the noise that its first step adds")
    beta_end: float = Field(0.02, gt=0, lt=1, description="of its last step")
    beta_schedule: Literal["linear", "scaled_linear"] = Field("linear", description="variances of the steps in between")
    clip: float | None = Field(None, gt=0, description="predictions of clean latents are clamped to this; null: never")


class DiT(ContinuousGenerator):
    """Class-conditional noise of a square grid of latents, passed as a sequence (N, L, D) in raster order.

    Attributes:
        bars: the alpha bar of every timestep and 1 for clean latents: (T + 1,) float64, on the model's device for
            training. Sampling computes them on the CPU, as it reads them one by one.

    Raises:
        UserError: L is no square number or not divisible into patches, the settings say otherwise, or diffusers is not
            installed.
    """

    sampling_type = DDPMSampling
    objective = "noise_prediction"
    licence = "CC-BY-NC-4.0, that of DiT's code and weights"

    def __init__(self, config: DiTConfig, latent_shape: tuple[int, int], classes: int) -> None:
        super().__init__(config, latent_shape, classes)
        length, channels = latent_shape
        self.side = round(length**0.5)
        if self.side**2 != length:
            raise UserError(f"dit models a square grid, got {length} latents per image; sit takes any number")
        derived = {"sample_size": self.side, "in_channels": channels, "num_embeds_ada_norm": classes}
        for key, value in derived.items():
            if config.settings.get(key, value) != value:
                raise UserError(
                    f"settings.{key} is {config.settings[key]}, but latents and classes make {value}; drop it"
                )
        if self.side % (patch := config.settings.get("patch_size", 2)):
            raise UserError(
                f"a grid of side {self.side} does not divide into patches of {patch}; set another patch_size"
            )
        self.transformer = diffusers_network("DiTTransformer2DModel", config.settings | derived)
        if (out := self.transformer.out_channels) not in (channels, 2 * channels):
            raise UserError(
                f"settings.out_channels is {out}; accepted is {channels}, or {2 * channels} with a variance"
            )
        nn.init.zeros_(self.transformer.proj_out_2.weight)
        for block in self.transformer.transformer_blocks:
            nn.init.zeros_(block.norm1.linear.weight)  # every block starts as the identity
            nn.init.zeros_(block.norm1.linear.bias)
            block.norm1.emb.class_embedder.dropout_prob = 0.0  # training drops labels itself, from a seed of each step
        self.register_buffer("bars", self._alpha_bars(), persistent=False)

    @property
    def learned_variance(self) -> bool:
        """Whether the network predicts a variance beside the noise."""
        return self.transformer.out_channels == 2 * self.latent_shape[1]

    def predict(self, latents: Tensor, timesteps: Tensor | int, labels: Tensor) -> Tensor:
        """The network's prediction for normalised latents.

        Args:
            latents: (N, L, D), normalised and noised.
            timesteps: (N,) in 0 to T - 1, or one for all.
            labels: (N,) int64; ``null_label`` is "no class".

        Returns:
            The noise (N, L, D) in the model's precision; (N, L, 2 D) if a variance in [-1, 1] follows it.

        Raises:
            UserError: latents of another shape.
        """
        self._check_shape(latents)
        timesteps = torch.as_tensor(timesteps, device=latents.device).expand(len(latents))  # (N,)
        grid = latents.to(self.dtype).transpose(1, 2).unflatten(2, (self.side, self.side))  # (N, D, h, w)
        predicted = self.transformer(grid, timestep=timesteps, class_labels=labels).sample  # (N, D or 2 D, h, w)
        return predicted.flatten(2).transpose(1, 2)  # (N, L, D or 2 D)

    def forward(self, latents: Tensor, labels: Tensor, noise_levels: Tensor, noise: Tensor) -> GeneratorOutput:
        """Predict the noise of noised latents, for the squared error of training (DDPM, equation 14).

        Args:
            latents: (N, L, D) float32 as the tokenizer makes them.
            labels: (N,) int64; ``null_label`` is "no class".
            noise_levels: (N,) in [0, 1], the timesteps as a share of all, the noisiest at 1.
            noise: standard normal (N, L, D).

        Returns:
            Predicted and true noise (N, L, D).
        """
        timesteps = (noise_levels * self.config.timesteps).long().clamp(max=self.config.timesteps - 1)  # (N,)
        bars = self.bars[timesteps][:, None, None]  # (N, 1, 1)
        noised = add_noise(self.normalise(latents), noise.double(), bars)  # (N, L, D)
        prediction = self.predict(noised, timesteps, labels)[..., : self.latent_shape[1]]
        return GeneratorOutput(prediction=prediction, targets=noise.to(self.dtype))

    def _model(self, labels: Tensor, sampling: DDPMSampling) -> Model:
        if sampling.variance == "learned" and not self.learned_variance:
            raise UserError("this dit predicts no variance; set sampling.variance=small or large")
        width = self.latent_shape[1]
        channels = min(sampling.guided_channels or width, width)  # a predicted variance is never guided
        guidance = sampling.model_copy(update={"guided_channels": channels})
        return guided_model(self.predict, labels, self.null_label, guidance)

    def _process(self, sampling: DDPMSampling) -> DDPMProcess:
        return DDPMProcess(sampling, self._alpha_bars(), self.config.clip)

    def _alpha_bars(self) -> Tensor:
        config = self.config
        return alpha_bars(config.timesteps, config.beta_start, config.beta_end, config.beta_schedule)
