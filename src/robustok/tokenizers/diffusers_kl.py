"""AutoencoderKL of the diffusers library, read from its folder and written back as such a folder.

    tokenizer = from_folder("sd-vae-ft-ema")
    ... post-train its decoder ...
    to_folder(tokenizer, Path("sd-vae-ft-ema-post"))

The folder holds ``config.json`` and ``diffusion_pytorch_model.safetensors``; that of a pipeline has it as ``vae/``.
"""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from robustok.tokenizers.conv import check_images, to_row
from robustok.tokenizers.diffusers_base import ContinuousDiffusersTokenizer, DiffusersConfig, read_tokenizer, to_folder
from robustok.tokenizers.kl import KLOutput, Posterior

__all__ = ["DiffusersKL", "DiffusersKLConfig", "from_folder", "to_folder"]


class DiffusersKLConfig(DiffusersConfig):
    """An AutoencoderKL."""

    name: Literal["diffusers_kl"] = "diffusers_kl"


class DiffusersKL(ContinuousDiffusersTokenizer):
    """AutoencoderKL behind the contract of :class:`robustok.types.Tokenizer`."""

    class_name = "AutoencoderKL"

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

    def forward(self, images: Tensor, rng: torch.Generator | None = None) -> KLOutput:
        """Training forward: reconstruct from a sample of the posterior, or from its mean without ``rng``."""
        posterior = self.posterior(images)
        latents = posterior.mean if rng is None else posterior.sample(rng)
        return KLOutput(self.decode(latents), latents, posterior, posterior.divergence())


def from_folder(path: str | Path, image_size: int | None = None) -> DiffusersKL:
    """Load an AutoencoderKL: :func:`robustok.tokenizers.diffusers_base.read_tokenizer`."""
    return read_tokenizer(DiffusersKL, DiffusersKLConfig, path, image_size)
