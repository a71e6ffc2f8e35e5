"""Vector quantiser: nearest code, its two losses, usage statistics and the revival of dead codes."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from robustok.config import Config
from robustok.devices import to_device
from robustok.precision import exact_float32
from robustok.tokenizers.perturbation import straight_through


class QuantizerConfig(Config):
    """A learned codebook. The defaults are the paper's."""

    name: Literal["vq"] = "vq"
    size: int = Field(4096, ge=2, description="number of codes (K)")
    dim: int = Field(64, ge=1, description="width of a code (D)")
    normalize: bool = Field(True, description="compare features and codes at unit length (l2-normalised quantiser)")
    codebook_weight: float = Field(1.0, ge=0, description="weight of the loss that moves codes towards features")
    commitment_weight: float = Field(0.25, ge=0, description="weight of the loss that moves features towards codes")
    revive_every: int = Field(
        0,
        ge=0,
        description="steps between revivals of codes that were not used since the last one; 0 is off, as in the paper",
    )


@dataclass(frozen=True)
class Quantized:
    """Features after quantisation.

    Attributes:
        vectors: (N, L, D), codes with the straight-through gradient of the features.
        tokens: (N, L) int64.
        features: (N, L, D), the features as compared with the codebook (unit length if it is l2-normalised).
        codebook_loss: mean over all elements of (code - sg(feature))^2, unweighted; None for codes that do not move.
        commitment_loss: mean over all elements of (sg(code) - feature)^2, unweighted; None without such a loss.
        entropy_loss: of LFQ, unweighted.
    """

    vectors: Tensor
    tokens: Tensor
    features: Tensor
    codebook_loss: Tensor | None = None
    commitment_loss: Tensor | None = None
    entropy_loss: Tensor | None = None


class VectorQuantizer(nn.Module):
    """Nearest-code quantiser; the search is in float32 whatever the autocast dtype (bf16 changes 1 % of the codes)."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        weight = torch.empty(config.size, config.dim).uniform_(-1 / config.size, 1 / config.size)
        self.embedding = nn.Embedding(
            config.size, config.dim, _weight=F.normalize(weight) if config.normalize else weight
        )

    @property
    def codebook(self) -> Tensor:
        """(K, D) float32, rows of unit length if the quantiser is l2-normalised; carries gradients."""
        weight = at_least_float32(self.embedding.weight)
        return F.normalize(weight, dim=-1) if self.config.normalize else weight

    def normalize(self, features: Tensor) -> Tensor:
        """Features (..., D) in the geometry of the codebook."""
        features = at_least_float32(features)
        return F.normalize(features, dim=-1) if self.config.normalize else features

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, features: Tensor) -> Quantized:
        """Quantise features (N, L, D)."""
        features, codebook = self.normalize(features), self.codebook
        tokens = nearest_code(features, codebook)  # (N, L)
        vectors = codebook[tokens]  # (N, L, D)
        return Quantized(
            vectors=straight_through(features, vectors),
            tokens=tokens,
            features=features,
            codebook_loss=(vectors - features.detach()).square().mean(),
            commitment_loss=(vectors.detach() - features).square().mean(),
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (N, L) to code vectors (N, L, D)."""
        return self.codebook[tokens]

    @torch.no_grad()
    def revive(self, dead: Tensor, features: Tensor, rng: torch.Generator) -> None:
        """Move dead codes onto random features of this batch: a documented addition to the paper, off by default.

        All processes must pass the same arguments.

        Args:
            dead: (K,) bool, codes that were not used since the last revival.
            features: (N, L, D) features of the current batch, in the geometry of the codebook.
            rng: CPU random generator.
        """
        pool, weight = features.flatten(0, -2), self.embedding.weight  # (N * L, D) and (K, D)
        # One draw for each code: how many are dead only the device knows. The first dead code takes the first draw.
        draws = to_device(torch.randint(len(pool), (len(dead),), generator=rng), pool.device)  # (K,)
        chosen = draws[(dead.cumsum(0) - 1).clamp(min=0)]  # (K,)
        weight.copy_(torch.where(dead[:, None], pool[chosen].to(weight.dtype), weight))


def at_least_float32(x: Tensor) -> Tensor:
    """float32 for bf16 and float16, which are too coarse to compare with codes."""
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def nearest_code(features: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code, the first one on ties.

    Args:
        features: (..., D) float32.
        codebook: (K, D) float32.

    Returns:
        (...) int64.
    """
    flat = features.reshape(-1, features.shape[-1])
    squares = codebook.square().sum(1)  # (K,)
    with exact_float32(features.device):  # TF32 keeps 10 bits of a distance
        chunks = [torch.addmm(squares, chunk, codebook.T, alpha=-2).argmin(1) for chunk in flat.split(16384)]
    return torch.cat(chunks).reshape(features.shape[:-1])
