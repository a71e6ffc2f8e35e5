"""AutoencoderKL of the diffusers library, read from its folder and written back as such a folder.

    tokenizer = from_folder("sd-vae-ft-ema")
    ... post-train its decoder ...
    to_folder(tokenizer, Path("sd-vae-ft-ema-post"))

The folder holds ``config.json`` and ``diffusion_pytorch_model.safetensors``; that of a pipeline has it as ``vae/``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.config import Config, validate
from robustok.diffusers_folders import build_network, component, latent_side, load_network, write_network
from robustok.tokenizers.conv import check_images, image_problems, to_grid, to_row
from robustok.tokenizers.kl import KLOutput, Posterior
from robustok.types import UserError


class DiffusersKLConfig(Config):
    """An AutoencoderKL."""

    name: Literal["diffusers_kl"] = "diffusers_kl"
    image_size: int = Field(256, ge=1, description="height and width of the images it is used at, in pixels")
    settings: dict[str, Any] = Field({}, description="what its config.json holds, under the names of diffusers")


class DiffusersKL(nn.Module):
    """AutoencoderKL behind the contract of :class:`robustok.types.Tokenizer`; latents are raw, row by row.

    Diffusion models see :meth:`normalise` of them: ``(z - latent_mean) / latent_std * latent_multiplier``, from the
    configuration's ``shift_factor`` or ``latents_mean``, ``latents_std``, and ``scaling_factor``.

    Args:
        config: image size and the library's own settings.
        pretrained: for the signature's sake; only tokenizers with a backbone start from pretrained weights.

    Raises:
        UserError: diffusers is not installed, or does not take the settings.
    """

    kind = "continuous"
    licence = "that of the model card which came with the weights"
    image_range = (-1.0, 1.0)

    def __init__(self, config: DiffusersKLConfig, pretrained: bool = False) -> None:
        super().__init__()
        self.config = config
        self.vae = build_network("AutoencoderKL", config.settings)
        facts = self.vae.config
        self.factor = 2 ** (len(facts.block_out_channels) - 1)
        if config.image_size % self.factor:
            raise UserError(f"image_size {config.image_size} is not divisible by {self.factor}; choose a multiple")
        self.image_size = config.image_size
        self.latent_shape = ((config.image_size // self.factor) ** 2, facts.latent_channels)
        self.latent_multiplier: float = facts.scaling_factor
        self.latent_mean: float | list[float] = facts.latents_mean or facts.shift_factor or 0.0
        self.latent_std: float | list[float] = facts.latents_std or 1.0

    def posterior(self, images: Tensor) -> Posterior:
        """Images (N, 3, H, W) in [-1, 1] to the Gaussian of their latents.

        Raises:
            UserError: images of a size that the factor does not divide.
        """
        check_images(images, self.factor)
        found = self.vae.encode(images).latent_dist
        return Posterior(to_row(found.mean), to_row(found.logvar))  # (N, L, D) each

    def encode(self, images: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to raw latents (N, L, D): the posterior's mean, or a sample with ``rng``."""
        posterior = self.posterior(images)
        return posterior.mean if rng is None else posterior.sample(rng)

    def decode(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Raw latents (N, L, D) to images (N, 3, H, W), nominally in [-1, 1], not clamped.

        Args:
            latents: row by row.
            grid: (rows, columns); a square where it is not given.

        Raises:
            UserError: latents of another width, or not as many as the grid has places.
        """
        dim = self.latent_shape[1]
        if latents.ndim != 3 or latents.shape[2] != dim:
            raise UserError(f"got latents of shape {tuple(latents.shape)}, this tokenizer decodes (N, L, {dim})")
        return self.vae.decode(to_grid(latents, grid)).sample

    def normalise(self, latents: Tensor) -> Tensor:
        """Raw latents (N, L, D) to what diffusion models of this autoencoder see."""
        mean, std = (latents.new_tensor(value) for value in (self.latent_mean, self.latent_std))
        return (latents - mean) / std * self.latent_multiplier

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo :meth:`normalise`."""
        mean, std = (latents.new_tensor(value) for value in (self.latent_mean, self.latent_std))
        return latents / self.latent_multiplier * std + mean

    def decoder_modules(self) -> Sequence[nn.Module]:
        """What post-training may train."""
        return [module for module in (self.vae.post_quant_conv, self.vae.decoder) if module is not None]

    def forward(self, images: Tensor, rng: torch.Generator | None = None) -> KLOutput:
        """Training forward: reconstruct from a sample of the posterior, or from its mean without ``rng``."""
        posterior = self.posterior(images)
        latents = posterior.mean if rng is None else posterior.sample(rng)
        return KLOutput(self.decode(latents), latents, posterior, posterior.divergence())

    @torch.no_grad()
    def check(self, images: Tensor | None = None) -> list[str]:
        """What is wrong with the settings, or with a few images (N, 3, H, W): plain sentences, none if all is well.

        The deviation of normalised latents can only be judged with images.
        """
        facts, found = self.vae.config, []
        if (facts.latents_mean is None) != (facts.latents_std is None):
            found.append("Of latents_mean and latents_std one is missing; they go together.")
        if images is None:
            return found
        latents = self.encode(images)
        std = self.normalise(latents).std().item()
        if not 0.25 < std < 4:
            found.append(
                f"Normalised latents have a standard deviation of {std:.3g}, far from 1: scaling_factor "
                f"{facts.scaling_factor:g} or latents_std is left at its default, inverted, or another model's."
            )
        return found + image_problems(images, self.decode(latents))


def from_folder(path: str | Path, image_size: int | None = None) -> DiffusersKL:
    """Load an AutoencoderKL from its folder, or from the folder of a pipeline; in eval mode, frozen, on the CPU.

    Args:
        path: the folder.
        image_size: in pixels; by default the one that the pipeline's transformer makes latents of, or its configuration
            names.

    Raises:
        UserError: no such folder, another class, or weights that do not fit.
    """
    found = component(path, "AutoencoderKL")
    size, side = found.settings.get("sample_size") or 256, latent_side(path)
    if side is not None:
        size = side * 2 ** (len(found.settings.get("block_out_channels", (64,))) - 1)
    settings = {"image_size": image_size or size, "settings": found.settings}
    model = DiffusersKL(validate(DiffusersKLConfig, settings, source=str(found.folder)))
    load_network(model.vae, found)
    return model.eval().requires_grad_(False)


def to_folder(model: DiffusersKL, path: Path) -> Path:
    """Write a folder that ``AutoencoderKL.from_pretrained`` loads.

    Raises:
        UserError: it exists, or cannot be written.
    """
    return write_network(model.vae, path)
