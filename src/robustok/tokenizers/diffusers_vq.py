"""VQModel of the diffusers library, read from its folder and written back as such a folder.

Its latents are tokens here. The library hands them on in three ways, by settings that matter to its own pipelines
alone (``lookup_from_codebook``, ``force_not_quantize``); code vectors, and so images, are the same in all of them.
"""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from robustok.tokenizers.conv import check_images, image_problems, to_grid
from robustok.tokenizers.diffusers_base import DiffusersConfig, DiffusersTokenizer, read_tokenizer, to_folder
from robustok.tokenizers.vq import VQTokenizer

__all__ = ["DiffusersVQ", "DiffusersVQConfig", "from_folder", "to_folder"]


class DiffusersVQConfig(DiffusersConfig):
    """A VQModel."""

    name: Literal["diffusers_vq"] = "diffusers_vq"


class DiffusersVQ(DiffusersTokenizer):
    """VQModel behind the contract of :class:`robustok.types.DiscreteTokenizer`."""

    kind = "discrete"
    class_name = "VQModel"

    @property
    def width(self) -> int:
        """Of a code (D), which may differ from that of the encoder's latents."""
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

    decode = VQTokenizer.decode  # which embeds the tokens and decodes their vectors, as below

    def decode_vectors(self, vectors: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Code vectors (N, L, D) to images (N, 3, H, W). Norms of the kind "spatial" (MoVQ) see the vectors too."""
        codes = to_grid(vectors, grid)  # (N, D, h, w)
        spatial = self.vae.config.norm_type == "spatial"
        return self.vae.decoder(self.vae.post_quant_conv(codes), codes if spatial else None)

    @torch.no_grad()
    def check(self, images: Tensor | None = None) -> list[str]:
        """What is wrong with the weights, or with a few images (N, 3, H, W): plain sentences, none if all is well."""
        if not all(p.isfinite().all() for p in self.parameters()):
            return ["Some weights are infinite or no numbers: the file is damaged."]
        if len(self.codebook.unique(dim=0)) < len(self.codebook) / 2:
            return ["More than half of the codes are copies of others: the codebook has collapsed."]
        return [] if images is None else image_problems(images, self.decode(self.encode(images)))


def from_folder(path: str | Path, image_size: int | None = None) -> DiffusersVQ:
    """Load a VQModel: :func:`robustok.tokenizers.diffusers_base.read_tokenizer`."""
    return read_tokenizer(DiffusersVQ, DiffusersVQConfig, path, image_size)
