"""Convolutional autoencoder with a Gaussian posterior, and VA-VAE, the release that has its weights.

Sources: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752); Yao et al.,
"Reconstruction vs. Generation" (VA-VAE and LightningDiT, arXiv 2501.01423).

Latents are raw here. The statistics with which a diffusion model normalises them belong to that model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.checkpoints import settle, shape_of
from robustok.config import validate
from robustok.errors import UserError
from robustok.tokenizers.conv import (
    NORM_EPSILON,
    Decoder,
    Encoder,
    GridConfig,
    check_images,
    conv_sizes,
    image_problems,
    rename,
    to_grid,
    to_row,
)

NAMES = (  # ours, the release's
    (r"encoder\.levels", "encoder.down"),
    (r"decoder\.levels", "decoder.up"),
    (r"\.blocks\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.middle\.0\.", ".mid.block_1."),
    (r"\.middle\.1\.", ".mid.attn_1."),
    (r"\.middle\.2\.", ".mid.block_2."),
    (r"\.shortcut\.", ".nin_shortcut."),
    ("to_latent", "quant_conv"),
    ("from_latent", "post_quant_conv"),
)
CONFIG_NAMES = {  # the release's, ours
    "ch": "width",
    "ch_mult": "multipliers",
    "num_res_blocks": "blocks",
    "z_channels": "z_channels",
    "embed_dim": "dim",
    "use_variational": "variational",
    "double_z": "double_z",
    "resolution": "image_size",
    "image_size": "image_size",
    "norm_groups": "groups",
    "norm_eps": "norm_eps",
    "dropout": "dropout",
    "downsample": "factor",
}
# What VA-VAE's training checkpoints hold besides, and encoding and decoding do not need.
DROPPED = ("foundation_model.", "linear_proj.", "loss.")


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


class KL(nn.Module):
    """A convolutional KL autoencoder. See :class:`robustok.types.Tokenizer` for the contract.

    ``encode`` takes images of every size that the factor divides, ``decode`` every grid; ``image_size`` and
    ``latent_shape`` say what the model was trained for.

    Attributes:
        licence: of the release.
        image_range: values of images in the release.
    """

    kind = "continuous"
    licence = "MIT"
    latent_space: str | None = None
    image_range = (-1.0, 1.0)

    def __init__(self, config: KLConfig, pretrained: bool = False) -> None:
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

    def encode(self, images: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to latents (N, L, D), row by row.

        Args:
            images: to encode.
            rng: draws the latents from their posterior; without it they are its mean, the same at every call.
        """
        posterior = self.posterior(images)
        return posterior.mean if rng is None else posterior.sample(rng)

    def decode(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Latents (N, L, D) to images (N, 3, H, W), nominally in [-1, 1], not clamped.

        Args:
            latents: raw, row by row.
            grid: (rows, columns); a square where it is not given.

        Raises:
            UserError: latents of another width, or not as many as the grid has places.
        """
        if latents.ndim != 3 or latents.shape[2] != self.config.dim:
            raise UserError(
                f"got latents of shape {tuple(latents.shape)}, this tokenizer decodes (N, L, {self.config.dim})"
            )
        return self.decoder(self.from_latent(to_grid(latents, grid)))

    def decoder_modules(self) -> Sequence[nn.Module]:
        """What post-training may train."""
        return [self.from_latent, self.decoder]

    def forward(self, images: Tensor, rng: torch.Generator | None = None) -> KLOutput:
        """Training forward: reconstruct from a sample of the posterior, or from its mean without ``rng``.

        Args:
            images: (N, 3, H, W) in [-1, 1]; square.
            rng: draws the sample.
        """
        posterior = self.posterior(images)
        latents = posterior.mean if rng is None else posterior.sample(rng)
        return KLOutput(self.decode(latents), latents, posterior, posterior.divergence())

    @torch.no_grad()
    def check(self, images: Tensor | None = None) -> list[str]:
        """What is wrong with the weights, or with a few images (N, 3, H, W): plain sentences, none if all is well."""
        if not all(p.isfinite().all() for p in self.parameters()):
            return ["Some weights are infinite or no numbers: the file is damaged."]
        return [] if images is None else image_problems(images, self.decode(self.encode(images)))


def from_pretrained(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> KL:
    """A tokenizer of the sizes that VA-VAE's weights and a flat configuration tell; not yet with these weights.

    Raises:
        UserError: weights of another family, or a configuration that contradicts them.
    """
    encoder = conv_sizes(weights, "encoder", NAMES)
    decoder = conv_sizes(weights, "decoder", NAMES, extra_blocks=1)
    z_channels, dim = shape_of(weights, "post_quant_conv.weight", 4)[:2]
    facts = {
        "width": encoder["width"],
        "multipliers": encoder["multipliers"],
        "blocks": encoder["blocks"],
        "z_channels": z_channels,
        "dim": dim,
        "variational": shape_of(weights, "quant_conv.weight", 4)[0] == 2 * dim,
        "double_z": shape_of(weights, "encoder.conv_out.weight", 4)[0] == 2 * z_channels,
        "norm_eps": NORM_EPSILON,
        "factor": 2 ** (len(encoder["multipliers"]) - 1),
    }
    if not (facts["variational"] and facts["double_z"]):
        raise UserError(
            f"the encoder does not give mean and variance of {dim} channels; expected a variational autoencoder"
        )
    settings = settle(facts, dict(config), CONFIG_NAMES, groups=32, dropout=0.0, image_size=256)
    shared = {key: settings[key] for key in ("groups", "dropout")}
    ours = {key: settings[key] for key in ("image_size", "dim", "z_channels")}
    ours |= {"encoder": encoder | shared, "decoder": decoder | shared}
    return KL(validate(KLConfig, ours, source="config"))


def export_name(name: str) -> str:
    """VA-VAE's name of our weight."""
    return rename(name, NAMES)
