"""Autoencoders of the diffusers library: AutoencoderKL, that of Qwen-Image, AutoencoderDC and VQModel.

Their latents are on a grid.

Source of AutoencoderDC: Chen et al., "Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models"
(arXiv 2410.10733).
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.backbones import diffusers_network, unscale_latents
from robustok.config import Config
from robustok.errors import UserError
from robustok.tokenizers.conv import check_images, image_problems, to_grid, to_row
from robustok.tokenizers.kl import Posterior, VariationalAutoencoder
from robustok.tokenizers.vq import VQTokenizer


class DiffusersConfig(Config):
    """An autoencoder of the library."""

    name: Literal["diffusers_kl", "diffusers_qwen", "diffusers_dc", "diffusers_vq"]
    image_size: int = Field(256, ge=1, description="height and width of the images it is used at, in pixels")
    settings: dict[str, Any] = Field({}, description="content of its config.json, under the names of diffusers")


class DiffusersTokenizer(nn.Module):
    """An autoencoder of the library. Subclasses define ``encode`` and ``decode``.

    Args:
        config: image size and the library's own settings.

    Attributes:
        class_name: of the library.
        factor: pixels along one side of a latent. Sizes of images are free but for it.
        levels: the setting that lists the widths of the encoder's levels, each but the first of which halves the
            image, and how many there are by default.
        default_size: of the images, in pixels, where no settings say it.

    Raises:
        UserError: diffusers is not installed, or does not accept the settings; the image size does not divide.
    """

    class_name: str
    levels: tuple[str, int] = ("block_out_channels", 1)
    default_size = 256
    licence = "that of the model card which came with the weights"
    image_range = (-1.0, 1.0)
    latent_space: str | None = None

    def __init__(self, config: DiffusersConfig) -> None:
        super().__init__()
        self.config = config
        self.vae = diffusers_network(self.class_name, config.settings)
        self.factor = self.factor_of(config.settings)
        if config.image_size % self.factor:
            raise UserError(f"image_size {config.image_size} is not divisible by {self.factor}; choose a multiple")
        self.image_size = config.image_size
        self.latent_shape = ((config.image_size // self.factor) ** 2, self.width)

    @classmethod
    def factor_of(cls, settings: dict[str, Any]) -> int:
        """Pixels along one side of a latent."""
        name, default = cls.levels
        return 2 ** ((len(settings[name]) if name in settings else default) - 1)

    @property
    def width(self) -> int:
        """Channels of a latent (D)."""
        return self.vae.config.latent_channels

    def decoder_modules(self) -> Sequence[nn.Module]:
        """What post-training may train."""
        found = (getattr(self.vae, name, None) for name in ("post_quant_conv", "decoder"))
        return [module for module in found if module is not None]


class ContinuousDiffusersTokenizer(DiffusersTokenizer):
    """One whose latents are vectors, not normalised, row by row, or on a grid (N, rows, columns, D).

    Diffusion models take :meth:`normalise` of them: ``(z - latent_mean) / latent_std * latent_multiplier``, from the
    configuration's ``shift_factor`` or ``latents_mean``, ``latents_std``, and ``scaling_factor``.
    """

    kind = "continuous"

    def __init__(self, config: DiffusersConfig) -> None:
        super().__init__(config)
        settings = self.vae.config
        self.latent_multiplier: float = settings.get("scaling_factor", 1.0)
        self.latent_mean: float | list[float] = settings.get("latents_mean") or settings.get("shift_factor") or 0.0
        self.latent_std: float | list[float] = settings.get("latents_std") or 1.0

    def decode(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Latents (N, L, D), not normalised, to images (N, 3, H, W), nominally in [-1, 1], not clamped.

        Args:
            latents: row by row; or (N, rows, columns, D).
            grid: (rows, columns) of the former; a square where it is not given.

        Raises:
            UserError: latents of another width, or another number than the grid has.
        """
        self.check_width(latents)
        return self.vae.decode(to_grid(latents, grid)).sample

    def encode_grid(self, images: Tensor) -> Tensor:
        """As ``encode``, to latents (N, rows, columns, D): those of images that are not square."""
        return self.encode(images).unflatten(1, (images.shape[2] // self.factor, images.shape[3] // self.factor))

    def check_width(self, latents: Tensor) -> None:
        """Refuse latents that are neither (N, L, D) nor (N, rows, columns, D).

        Raises:
            UserError: they have another shape.
        """
        if latents.ndim not in (3, 4) or latents.shape[-1] != self.width:
            raise UserError(f"got latents of shape {tuple(latents.shape)}, this tokenizer decodes (N, L, {self.width})")

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents (N, L, D) of :meth:`encode` to those that diffusion models of this autoencoder take."""
        mean, std = (latents.new_tensor(value) for value in (self.latent_mean, self.latent_std))
        return (latents - mean) / std * self.latent_multiplier

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo :meth:`normalise`."""
        return unscale_latents(latents, self.vae.config)

    @torch.no_grad()
    def check(self, images: Tensor | None = None) -> list[str]:
        """Problems with the settings, or with a few images (N, 3, H, W), as sentences; empty if there are none."""
        found = []
        if (self.vae.config.get("latents_mean") is None) != (self.vae.config.get("latents_std") is None):
            found.append("Of latents_mean and latents_std one is missing; they go together.")
        if images is None:
            return found
        latents = self.encode(images)
        std = self.normalise(latents).std().item()
        if not 0.25 < std < 4:
            found.append(
                f"Normalised latents have a standard deviation of {std:.3g}, far from 1: scaling_factor "
                f"{self.latent_multiplier:g} or latents_std is left at its default, inverted, or another model's."
            )
        return found + image_problems(images, self.decode(latents))


class DiffusersKL(VariationalAutoencoder, ContinuousDiffusersTokenizer):
    """AutoencoderKL. See :class:`robustok.types.Tokenizer` for the contract."""

    class_name = "AutoencoderKL"

    def posterior(self, images: Tensor) -> Posterior:
        """Images (N, 3, H, W) in [-1, 1] to the Gaussian of their latents.

        Raises:
            UserError: images of a size that the factor does not divide.
        """
        check_images(images, self.factor)
        found = self.vae.encode(images).latent_dist
        return Posterior(to_row(found.mean), to_row(found.logvar))  # (N, L, D) each


class DiffusersQwen(VariationalAutoencoder, ContinuousDiffusersTokenizer):
    """AutoencoderKLQwenImage, which takes an image as a video of one frame. See :class:`robustok.types.Tokenizer`."""

    class_name = "AutoencoderKLQwenImage"
    levels = ("dim_mult", 4)
    default_size = 1024

    @property
    def width(self) -> int:
        """Channels of a latent (D)."""
        return self.vae.config.z_dim

    def posterior(self, images: Tensor) -> Posterior:
        """Images (N, 3, H, W) in [-1, 1] to the Gaussian of their latents.

        Raises:
            UserError: images of a size that the factor does not divide.
        """
        check_images(images, self.factor)
        found = self.vae.encode(images.unsqueeze(2)).latent_dist
        return Posterior(to_row(found.mean.squeeze(2)), to_row(found.logvar.squeeze(2)))  # (N, L, D) each

    def decode(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """As that of the other tokenizers here. The library's own would clamp, where nothing is learned, and caches."""
        self.check_width(latents)
        video = self.vae.post_quant_conv(to_grid(latents, grid).unsqueeze(2))  # (N, D, 1, h, w)
        return self.vae.decoder(video).squeeze(2)  # (N, 3, H, W)


class DiffusersDC(ContinuousDiffusersTokenizer):
    """AutoencoderDC. See :class:`robustok.types.Tokenizer` for the contract. It has no posterior."""

    class_name = "AutoencoderDC"
    levels = ("encoder_block_out_channels", 6)

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to latents (N, L, D).

        Raises:
            UserError: images of a size that the factor does not divide.
        """
        check_images(images, self.factor)
        return to_row(self.vae.encode(images).latent)  # (N, L, D)


class DiffusersVQ(DiffusersTokenizer):
    """VQModel. See :class:`robustok.types.DiscreteTokenizer` for the contract.

    The library's settings ``lookup_from_codebook`` and ``force_not_quantize`` only change what its own pipelines pass
    on; code vectors, and so images, are the same.
    """

    kind = "discrete"
    class_name = "VQModel"

    @property
    def width(self) -> int:
        """Width of a code (D), which may differ from that of the encoder's latents."""
        return self.vae.config.vq_embed_dim or self.vae.config.latent_channels

    @property
    def codebook(self) -> Tensor:
        """(K, D); neighbours are meant by the Euclidean distance."""
        return self.vae.quantize.embedding.weight

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to tokens (N, L) int64, row by row.

        Raises:
            UserError: images of a size that the factor does not divide.
        """
        check_images(images, self.factor)
        _, _, (_, _, tokens) = self.vae.quantize(self.vae.encode(images).latents)
        return tokens.view(len(images), -1)  # (N, L)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (N, L) to code vectors (N, L, D)."""
        return self.vae.quantize.embedding(tokens)

    decode, check = VQTokenizer.decode, VQTokenizer.check  # both use the methods here

    def decode_vectors(self, vectors: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Code vectors (N, L, D) to images (N, 3, H, W). Norms of type "spatial" (MoVQ) take the vectors, too."""
        codes = to_grid(vectors, grid)  # (N, D, h, w)
        spatial = self.vae.config.norm_type == "spatial"
        return self.vae.decoder(self.vae.post_quant_conv(codes), codes if spatial else None)
