"""What the vector-quantised tokenizers share: the contract of a discrete tokenizer and its training forward."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from robustok.errors import UserError
from robustok.tokenizers.conv import GridConfig, check_images, image_problems, to_grid, to_row
from robustok.tokenizers.perturbation import PerturbationConfig, PerturbationDraw, perturb_latents
from robustok.tokenizers.quantizer import QuantizerConfig
from robustok.tokenizers.quantizers import AnyQuantizerConfig, build_quantizer
from robustok.types import TokenizerOutput


class QuantizedTokenizer(nn.Module):
    """A tokenizer with a codebook. See :class:`robustok.types.DiscreteTokenizer` for the contract.

    Subclasses have the modules ``to_latent``, ``quantizer``, ``from_latent`` and ``decoder`` and define ``features``,
    ``decode``, ``decode_vectors`` and ``project_teacher``.

    Attributes:
        licence: of the published weights.
        image_range: values of the images that the authors' code takes; here they are always in [-1, 1].
        latent_space: digest of the tokenizer whose latents it decodes, where its own weights do not determine it.
    """

    kind = "discrete"
    licence: str
    latent_space: str | None = None
    image_range = (-1.0, 1.0)

    @property
    def codebook(self) -> Tensor:
        """(K, D) in the geometry in which neighbours are meant."""
        return self.quantizer.codebook

    @property
    def code_levels(self) -> tuple[int, ...] | None:
        """Numbers of levels of codes on a grid; None for a learned codebook."""
        return getattr(self.quantizer.config, "levels", None)

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to tokens (N, L) int64."""
        return self.quantizer(self.features(images)).tokens

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (N, L) to code vectors (N, L, D)."""
        return self.quantizer.embed(tokens)

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
        targets = None if teacher_features is None else self.project_teacher(teacher_features)  # (N, D)
        quantized = self.quantizer(self.features(images))
        vectors = quantized.vectors  # (N, L, D)
        if perturbation is not None and draw is not None:
            vectors, _ = perturb_latents(
                quantized.features, quantized.tokens, self.codebook.detach(), draw, strength, perturbation,
                self.code_levels,
            )  # fmt: skip
        perturbed = perturbation is not None and perturbation.semantic_on == "perturbed"
        return TokenizerOutput(
            reconstructions=self.decode_vectors(vectors),
            tokens=quantized.tokens,
            features=quantized.features,
            codebook_loss=quantized.codebook_loss,
            commitment_loss=quantized.commitment_loss,
            entropy_loss=quantized.entropy_loss,
            semantic_latents=(vectors if perturbed else quantized.vectors).mean(1),  # (N, D)
            semantic_targets=targets,
        )

    @torch.no_grad()
    def check(self, images: Tensor | None = None) -> list[str]:
        """Problems with the weights, or with a few images (N, 3, H, W), as sentences; empty if there are none."""
        if not all(p.isfinite().all() for p in self.parameters()):
            return ["Some weights are infinite or no numbers: the file is damaged."]
        learned = getattr(self, "code_levels", None) is None
        if learned and (self.codebook.norm(dim=1) == 0).any():
            return ["Some codes are zero: the codebook was not trained or not loaded."]
        if learned and len(self.codebook.unique(dim=0)) < len(self.codebook) / 2:
            return ["More than half of the codes are copies of others: the codebook has collapsed."]
        return [] if images is None else image_problems(images, self.decode(self.encode(images)))


class VQConfig(GridConfig):
    """A convolutional tokenizer with a codebook."""

    quantizer: AnyQuantizerConfig = QuantizerConfig(size=16384, dim=8)
    teacher_width: int | None = Field(
        None, ge=1, description="width of the semantic teacher's features, for training with one; adds a projection"
    )


class VQTokenizer(QuantizedTokenizer):
    """A convolutional discrete tokenizer, whose latents are on a grid.

    Nothing depends on the size of the images: ``encode`` takes every size that the factor divides, and ``decode`` every
    number of tokens; ``image_size`` and ``latent_shape`` are those that the model was trained for.
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.latent_shape = (config.length, config.quantizer.dim)
        self.to_latent: nn.Module = nn.Identity()
        self.from_latent: nn.Module = nn.Identity()
        self.quantizer = build_quantizer(config.quantizer)
        self.from_teacher = nn.Linear(config.teacher_width, config.quantizer.dim) if config.teacher_width else None

    def features(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to features (N, L, D) before the quantiser, row by row.

        Raises:
            UserError: images of a size that the factor does not divide.
        """
        check_images(images, self.config.patch_size)
        return to_row(self.to_latent(self.encoder(images)))  # (N, L, D)

    def decode(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Tokens (N, L) to images (N, 3, H, W), nominally in [-1, 1], not clamped.

        Args:
            latents: tokens, row by row.
            grid: (rows, columns); a square where it is not given.

        Raises:
            UserError: no tokens (N, L), or another number than the grid has.
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

    def project_teacher(self, features: Tensor) -> Tensor:
        """Features (N, teacher width) of the semantic teacher to (N, D)."""
        if self.from_teacher is None:
            raise UserError("got a teacher's features without a projection for them; set the tokenizer's teacher_width")
        return self.from_teacher(features)
