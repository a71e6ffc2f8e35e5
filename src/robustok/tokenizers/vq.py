"""What the vector-quantised tokenizers of other people share: the contract of a discrete tokenizer and its training.

A family gives ``encoder``, ``to_latent``, ``quantizer``, ``from_latent``, ``decoder``; here is the rest.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.errors import UserError
from robustok.tokenizers.conv import GridConfig, check_images, image_problems, to_grid, to_row
from robustok.tokenizers.perturbation import PerturbationConfig, PerturbationDraw, perturbed_pass
from robustok.tokenizers.quantizer import QuantizerConfig, VectorQuantizer
from robustok.types import TokenizerOutput


class VQConfig(GridConfig):
    """A convolutional tokenizer with a codebook."""

    quantizer: QuantizerConfig = QuantizerConfig(size=16384, dim=8)
    teacher_width: int | None = Field(
        None, ge=1, description="width of the semantic teacher's features, for training with one; adds a projection"
    )


class VQTokenizer(nn.Module):
    """A discrete tokenizer whose latents are a grid. See :class:`robustok.types.DiscreteTokenizer` for the contract.

    Nothing depends on the size of the images: ``encode`` takes every size that the factor divides, and ``decode`` every
    number of tokens; ``image_size`` and ``latent_shape`` say what the model was trained for.

    Attributes:
        licence: of the release.
        image_range: values of images in the release; here they are always in [-1, 1].
    """

    kind = "discrete"
    licence: str
    latent_space: str | None = None
    image_range = (-1.0, 1.0)

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.latent_shape = (config.length, config.quantizer.dim)
        self.to_latent: nn.Module = nn.Identity()
        self.from_latent: nn.Module = nn.Identity()
        self.quantizer = VectorQuantizer(config.quantizer)
        self.from_teacher = nn.Linear(config.teacher_width, config.quantizer.dim) if config.teacher_width else None

    @property
    def codebook(self) -> Tensor:
        """(K, D) in the geometry in which neighbours are meant."""
        return self.quantizer.codebook

    def features(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to features (N, L, D) before the quantiser, row by row.

        Raises:
            UserError: images of a size that the factor does not divide.
        """
        check_images(images, self.config.patch_size)
        return to_row(self.to_latent(self.encoder(images)))  # (N, L, D)

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to tokens (N, L) int64, row by row."""
        return self.quantizer(self.features(images)).tokens

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (N, L) to code vectors (N, L, D)."""
        return self.quantizer.embed(tokens)

    def decode(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Tokens (N, L) to images (N, 3, H, W), nominally in [-1, 1], not clamped.

        Args:
            latents: tokens, row by row.
            grid: (rows, columns); a square where it is not given.

        Raises:
            UserError: no tokens (N, L), or not as many as the grid has places.
        """
        if latents.ndim != 2 or latents.is_floating_point():
            raise UserError(
                f"got latents of shape {tuple(latents.shape)} and type {latents.dtype}, "
                "this tokenizer decodes tokens (N, L) int64"
            )
        return self.decode_vectors(self.embed(latents), grid)

    def decode_vectors(self, vectors: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Code vectors (N, L, D) to images (N, 3, H, W)."""
        return self.decoder(self.from_latent(to_grid(vectors, grid)))

    def decoder_modules(self) -> Sequence[nn.Module]:
        """What post-training may train."""
        return [self.from_latent, self.decoder]

    def forward(
        self,
        images: Tensor,
        perturbation: PerturbationConfig | None = None,
        draw: PerturbationDraw | None = None,
        strength: int = 0,
        teacher_features: Tensor | None = None,
    ) -> TokenizerOutput:
        """Training forward: reconstruct, with the drawn tokens perturbed after the quantiser's losses.

        Args:
            images: (N, 3, H, W) in [-1, 1]; square.
            perturbation: settings, or None for no perturbation.
            draw: the random choices for these images.
            strength: annealed delta.
            teacher_features: (N, teacher width) of the frozen semantic teacher.

        Raises:
            UserError: features of a teacher without ``teacher_width`` in the configuration.
        """
        if teacher_features is not None and self.from_teacher is None:
            raise UserError("got a teacher's features without a projection for them; set the tokenizer's teacher_width")
        targets = None if teacher_features is None else self.from_teacher(teacher_features)  # (N, D)
        return perturbed_pass(self, images, perturbation, draw, strength, targets)

    @torch.no_grad()
    def check(self, images: Tensor | None = None) -> list[str]:
        """What is wrong with the weights, or with a few images (N, 3, H, W): plain sentences, none if all is well."""
        weight, found = self.quantizer.embedding.weight, []
        if not all(p.isfinite().all() for p in self.parameters()):
            found.append("Some weights are infinite or no numbers: the file is damaged.")
        if not found and (weight.norm(dim=1) == 0).any():
            found.append("Some codes are zero: the codebook was not trained or not loaded.")
        if not found and len(weight.unique(dim=0)) < len(weight) / 2:
            found.append("More than half of the codes are copies of others: the codebook has collapsed.")
        return found if images is None or found else image_problems(images, self.decode(self.encode(images)))


def without_teacher(model: VQTokenizer, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the projection of a teacher, which releases have no place for and only training uses."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith("from_teacher.")}
