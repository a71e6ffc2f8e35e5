"""AutoencoderDC of the diffusers library, the deep compression autoencoder, read from its folder and written back.

Source: Chen et al., "Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models" (arXiv 2410.10733).
It has no posterior: an image has one latent.
"""

from pathlib import Path
from typing import Literal

from torch import Tensor

from robustok.tokenizers.conv import check_images, to_row
from robustok.tokenizers.diffusers_base import ContinuousDiffusersTokenizer, DiffusersConfig, read_tokenizer, to_folder

__all__ = ["DiffusersDC", "DiffusersDCConfig", "from_folder", "to_folder"]


class DiffusersDCConfig(DiffusersConfig):
    """An AutoencoderDC."""

    name: Literal["diffusers_dc"] = "diffusers_dc"


class DiffusersDC(ContinuousDiffusersTokenizer):
    """AutoencoderDC behind the contract of :class:`robustok.types.Tokenizer`."""

    class_name = "AutoencoderDC"
    levels = ("encoder_block_out_channels", 6)

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to raw latents (N, L, D).

        Raises:
            UserError: images of a size that the factor does not divide.
        """
        check_images(images, self.factor)
        return to_row(self.vae.encode(images).latent)  # (N, L, D)


def from_folder(path: str | Path, image_size: int | None = None) -> DiffusersDC:
    """Load an AutoencoderDC: :func:`robustok.tokenizers.diffusers_base.read_tokenizer`."""
    return read_tokenizer(DiffusersDC, DiffusersDCConfig, path, image_size)
