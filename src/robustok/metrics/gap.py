"""The gap between two sets of latents of one tokenizer: those a generator makes, and those the encoder makes.

The second set are the tokens of real images, or the re-encoded tokens of the generated images themselves (then paired).
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from robustok.metrics.codebook import codebook_usage, count_tokens, token_agreement, token_divergence
from robustok.metrics.frechet import GaussianStatistics, frechet_distance


@dataclass(frozen=True)
class LatentGap:
    """How far generated latents lie from encoded ones.

    Attributes:
        generated_usage: share of the codes that the generated tokens use, in [0, 1].
        encoded_usage: share of the codes that the encoded tokens use, in [0, 1].
        divergence: Jensen-Shannon divergence of their token frequencies, in bits, [0, 1].
        distance: Frechet distance between the images' mean code vectors.
        agreement: share of equal tokens, in [0, 1]; None for sets that are not paired.
    """

    generated_usage: float
    encoded_usage: float
    divergence: float
    distance: float
    agreement: float | None


def latent_gap(generated: Tensor, encoded: Tensor, codebook: Tensor, paired: bool = False) -> LatentGap:
    """Compare generated with encoded tokens.

    Args:
        generated: (N, L) int64.
        encoded: (M, L) int64; with ``paired``, row i is the re-encoded image of row i of ``generated``.
        codebook: (K, D).
        paired: whether to count agreeing tokens too.

    Raises:
        UserError: tokens outside the codebook, fewer than two images, or pairs of different shape.
    """
    counts = [count_tokens(tokens, len(codebook)) for tokens in (generated, encoded)]
    statistics = [GaussianStatistics.of(mean_vectors(tokens, codebook)) for tokens in (generated, encoded)]
    return LatentGap(
        generated_usage=codebook_usage(counts[0]),
        encoded_usage=codebook_usage(counts[1]),
        divergence=token_divergence(*counts),
        distance=frechet_distance(*statistics),
        agreement=token_agreement(generated, encoded) if paired else None,
    )


def mean_vectors(tokens: Tensor, codebook: Tensor) -> Tensor:
    """The mean over positions of an image's code vectors: tokens (N, L) and codebook (K, D) to (N, D).

    One vector an image, rather than one a position: their covariance sees how the tokens of an image go together, which
    token frequencies cannot.
    """
    return F.embedding_bag(tokens, codebook.detach().float(), mode="mean")  # (N, D)
