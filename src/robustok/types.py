"""The types that all packages share: protocols of tokenizers, generators and extractors, and a few records.

Letters used in all docstrings: N images, C H W image, L latents per image, D latent width, K codebook size, F features.

Images inside the library are float32 in [-1, 1]; at the borders (disk, metrics) they are uint8 ``pixels``.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from robustok.config import Config


@runtime_checkable
class Tokenizer(Protocol):
    """Images to latents and back; every implementation is an ``nn.Module``.

    Attributes:
        kind: "discrete" (latents are tokens (N, L) int64) or "continuous" (latents are (N, L, D) float32).
        config: its settings; ``config.name`` is its family.
        image_size: height and width of its square images, in pixels.
        latent_shape: (L, D), latents per image and their width.
        latent_space: digest of the tokenizer whose latents it decodes; None if that follows from its own weights.
        image_range: range of the images in the authors' code.
        licence: of the pretrained weights.

    Those of diffusers take images of any size: they have ``factor``, pixels along one side of a latent, and
    ``encode_grid``, whose latents (N, rows, columns, D) ``decode`` takes too.
    """

    kind: Literal["discrete", "continuous"]
    config: Config
    image_size: int
    latent_shape: tuple[int, int]
    latent_space: str | None
    image_range: tuple[float, float]
    licence: str

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) float32 in [-1, 1] to latents: tokens (N, L) int64, or (N, L, D) float32."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images (N, 3, H, W) float32, nominally in [-1, 1] and not clamped."""
        ...

    def decoder_modules(self) -> Sequence[nn.Module]:
        """The modules that turn latents into images, which post-training may train."""
        ...


@runtime_checkable
class DiscreteTokenizer(Tokenizer, Protocol):
    """A tokenizer with a codebook.

    Attributes:
        codebook: (K, D), in the geometry that defines neighbours (unit rows for an l2-normalised quantiser).

    Codes on a grid have ``code_levels`` too, the numbers of levels of their dimensions: then neighbours are counted in
    levels.
    """

    codebook: Tensor

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (N, L) int64 to code vectors (N, L, D) float32, as the decoder receives them."""
        ...

    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Code vectors (N, L, D), or others near them, to images (N, 3, H, W); ``decode`` does this of ``embed``."""
        ...


@dataclass(frozen=True)
class TokenizerOutput:
    """What a discrete tokenizer's training forward returns.

    Attributes:
        reconstructions: (N, 3, H, W), not clamped.
        tokens: (N, L) int64, before perturbation.
        features: (N, L, D), the encoder's features in the geometry of the codebook.
        codebook_loss: scalar, unweighted; None where the quantiser has none, as the next two.
        commitment_loss: scalar, unweighted.
        entropy_loss: scalar, unweighted.
        semantic_latents: (N, D), mean over the latents, for the semantic loss.
        semantic_targets: (N, D), the teacher's features projected to latent width; None without a teacher.
    """

    reconstructions: Tensor
    tokens: Tensor
    features: Tensor
    codebook_loss: Tensor | None
    commitment_loss: Tensor | None
    entropy_loss: Tensor | None
    semantic_latents: Tensor
    semantic_targets: Tensor | None


@dataclass(frozen=True)
class GeneratorOutput:
    """What a generator's training forward returns.

    Attributes:
        prediction: logits (N, L, K) for token generators; a field of the latents' shape for diffusion.
        targets: tokens (N, L) int64 in the order in which they were predicted; or the diffusion target.
    """

    prediction: Tensor
    targets: Tensor


@runtime_checkable
class Generator(Protocol):
    """A class-conditional model of latents; every implementation is an ``nn.Module``.

    Attributes:
        kind: "discrete" (tokens) or "continuous" (vectors).
        config: its settings; ``config.name`` is its family.
        classes: number of classes.
        null_label: the label of "no class"; equals ``classes``.
        latent_shape: (L, D), latents per image and their width.
        codebook_size: K; None for continuous latents.
        latent_space: digest of the tokenizer whose latents these are; None where unknown.
        sampling_type: class of its sampling settings.
        sampling: sampling settings stored with the weights.
        objective: name of its training loss.
        licence: of the pretrained weights.
    """

    kind: Literal["discrete", "continuous"]
    config: Config
    classes: int
    null_label: int
    latent_shape: tuple[int, int]
    codebook_size: int | None
    latent_space: str | None
    sampling_type: type[Config]
    sampling: Config
    objective: str
    licence: str

    def generate(
        self,
        labels: Tensor,
        sampling: Config,
        rng: torch.Generator | Sequence[torch.Generator],
        reference: Tensor | None = None,
        sigma: float | None = None,
    ) -> Tensor:
        """Sample latents, or the mixture of samples and real latents that post-training learns from.

        Args:
            labels: classes (N,) int64; ``null_label`` samples without a class.
            sampling: of ``sampling_type``.
            rng: one random generator for each image (a sequence of N), or a single one that seeds each image in turn.
            reference: latents of real images, tokens (N, L) int64 or (N, L, D) float32, needed with ``sigma``.
            sigma: share in [0, 1] of the reference that is kept. 1 returns the reference, 0 (or None) is a free sample.

        Returns:
            Latents: tokens (N, L) int64, or (N, L, D) float32.
        """
        ...

    def mixture_details(self, sampling: Config, sigma: float) -> dict[str, Any]:
        """What sigma means with these settings, for the manifest of pairs; empty for tokens."""
        ...

    def compile_sampling(self) -> None:
        """Compile the sampling step from now on.

        Raises:
            UserError: this family or device does not support it.
        """
        ...

    def check(self, latents: Tensor | None = None) -> list[str]:
        """Sentences on what is wrong with converted weights or, given some, with the latents; empty if nothing is."""
        ...

    def to(self, device: torch.device) -> "Generator":
        """As in ``nn.Module``."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """As in ``nn.Module``."""
        ...


@runtime_checkable
class FeatureExtractor(Protocol):
    """Pixels to the feature space in which a distance is measured.

    Attributes:
        name: name of the space in results, for example ``classifier-64-3f9a12bc`` (with a digest of the weights).
        dim: F.
    """

    name: str
    dim: int

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) uint8 to features (N, F) float32."""
        ...


@dataclass(frozen=True)
class Measurement:
    """One number with its protocol: one line of metrics.jsonl.

    Attributes:
        metric: name of the metric, for example ``gfid``.
        value: the number.
        standard_error: standard error of ``value`` over independent sets or seeds; None if there was only one.
        samples: number of samples behind the value.
        seed: seed of the run that measured it.
        extractor: name of the feature space with a digest of its weights; None for pixel metrics.
        reference: the images compared with: name, split, crop, count and digest in one string.
        details: further keys of the line: tokenizer, decoder, rate, strength, sigma, versions.
    """

    metric: str
    value: float
    standard_error: float | None
    samples: int
    seed: int
    extractor: str | None
    reference: str | None
    details: dict[str, Any] = field(default_factory=dict)

    def line(self) -> dict[str, Any]:
        """A flat dictionary for one JSON line, in which no detail replaces a field."""
        record = asdict(self)
        details: dict[str, Any] = record.pop("details")
        return record | details | record

    @classmethod
    def from_line(cls, record: dict[str, Any]) -> "Measurement":
        """Undo :meth:`line`."""
        names = [f.name for f in fields(cls) if f.name != "details"]
        details = {key: value for key, value in record.items() if key not in names}
        return cls(**{name: record[name] for name in names}, details=details)
