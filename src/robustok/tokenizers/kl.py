"""Convolutional autoencoder with a Gaussian posterior, as in latent diffusion and VA-VAE.

Sources: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752); Yao et al.,
"Reconstruction vs. Generation" (VA-VAE and LightningDiT, arXiv 2501.01423).

Latents are not normalised here. The statistics with which a diffusion model normalises them belong to that model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.errors import UserError
from robustok.tokenizers.conv import Decoder, Encoder, GridConfig, check_images, image_problems, to_grid, to_row


class KLConfig(GridConfig):
    """A KL autoencoder; the defaults are VA-VAE's f16d32."""

    name: Literal["kl"] = "kl"
    dim: int = Field(32, ge=1, description="channels of a latent (D)")
    z_channels: int = Field(32, ge=1, description="channels between the network and the projections to the latents")


@dataclass(frozen=True)
class Posterior:
    """A Gaussian for every latent.

    Attributes:
        mean: (N, L, D).
        logvar: (N, L, D), logarithm of the variance, clamped to [-30, 20].
    """

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviation (N, L, D)."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, rng: torch.Generator) -> Tensor:
        """Latents (N, L, D); the noise is drawn where ``rng`` lives."""
        noise = torch.randn(self.mean.shape, generator=rng, device=rng.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def divergence(self) -> Tensor:
        """Kullback-Leibler divergence from the standard normal: summed over an image's latents, mean over images."""
        terms = self.mean.square() + self.logvar.exp() - 1 - self.logvar  # (N, L, D)
        return 0.5 * terms.flatten(1).sum(1).mean()


@dataclass(frozen=True)
class KLOutput:
    """What the training forward returns.

    Attributes:
        reconstructions: (N, 3, H, W), not clamped.
        latents: (N, L, D), those that were decoded.
        posterior: of these images.
        kl_loss: :meth:`Posterior.divergence`, unweighted; 1e-6 is the usual weight.
    """

    reconstructions: Tensor
    latents: Tensor
    posterior: Posterior
    kl_loss: Tensor


class VariationalAutoencoder(nn.Module):
    """What autoencoders with a posterior share; subclasses define ``posterior`` and ``decode``."""

    latent_space: str | None = None

    def encode(self, images: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to latents (N, L, D), row by row.

        Args:
            images: to encode.
            rng: draws the latents from their posterior; without it they are its mean, the same at every call.
        """
        posterior = self.posterior(images)
        return posterior.mean if rng is None else posterior.sample(rng)

    def forward(self, images: Tensor, rng: torch.Generator | None = None) -> KLOutput:
        """Training forward: reconstruct from a sample of the posterior, or from its mean without ``rng``.

        Args:
            images: (N, 3, H, W) in [-1, 1]; square.
            rng: draws the sample.
        """
        posterior = self.posterior(images)
        latents = posterior.mean if rng is None else posterior.sample(rng)
        return KLOutput(self.decode(latents), latents, posterior, posterior.divergence())


class KL(VariationalAutoencoder):
    """A convolutional KL autoencoder. See :class:`robustok.types.Tokenizer` for the contract.

    ``encode`` takes images of every size that the factor divides, ``decode`` every grid; ``image_size`` and
    ``latent_shape`` are those that the model was trained for.

    Attributes:
        licence: of VA-VAE's weights.
        image_range: values of the images that the authors' code takes.
        latent_mean, latent_std, latent_multiplier: statistics of its latents, which it does not store.
    """

    kind = "continuous"
    latent_mean, latent_std, latent_multiplier = 0.0, 1.0, None
    licence = "MIT"
    latent_space: str | None = None
    image_range = (-1.0, 1.0)

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.latent_shape = (config.length, config.dim)
        self.encoder = Encoder(config.encoder, 2 * config.z_channels)
        self.to_latent = nn.Conv2d(2 * config.z_channels, 2 * config.dim, 1)
        self.from_latent = nn.Conv2d(config.dim, config.z_channels, 1)
        self.decoder = Decoder(config.decoder, config.z_channels, config.decoder.blocks + 1)

    def posterior(self, images: Tensor) -> Posterior:
        """Images (N, 3, H, W) in [-1, 1] to the Gaussian of their latents.

        Raises:
            UserError: images of a size that the factor does not divide.
        """
        check_images(images, self.config.patch_size)
        mean, logvar = to_row(self.to_latent(self.encoder(images))).chunk(2, dim=2)  # (N, L, D) each
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Latents (N, L, D) to images (N, 3, H, W), nominally in [-1, 1], not clamped.

        Args:
            latents: row by row.
            grid: (rows, columns); a square where it is not given.

        Raises:
            UserError: latents of another width, or another number than the grid has.
        """
        if latents.ndim != 3 or latents.shape[2] != self.config.dim:
            raise UserError(
                f"got latents of shape {tuple(latents.shape)}, this tokenizer decodes (N, L, {self.config.dim})"
            )
        return self.decoder(self.from_latent(to_grid(latents, grid)))

    def decoder_modules(self) -> Sequence[nn.Module]:
        """What post-training may train."""
        return [self.from_latent, self.decoder]

    @torch.no_grad()
    def check(self, images: Tensor | None = None) -> list[str]:
        """Problems with the weights, or with a few images (N, 3, H, W), as sentences; empty if there are none."""
        if not all(p.isfinite().all() for p in self.parameters()):
            return ["Some weights are infinite or no numbers: the file is damaged."]
        return [] if images is None else image_problems(images, self.decode(self.encode(images)))
