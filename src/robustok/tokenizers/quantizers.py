"""The quantisers, chosen by ``name``: a learned codebook (vq), or codes on a grid without one (fsq, lfq).

FSQ is finite scalar quantisation (Mentzer et al., arXiv 2309.15505), LFQ lookup-free quantisation (Yu et al.,
"Language Model Beats Diffusion", arXiv 2310.05737).
"""

from math import atanh, prod
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from robustok.config import Config
from robustok.tokenizers.levels import digits_of, tokens_of
from robustok.tokenizers.perturbation import straight_through
from robustok.tokenizers.quantizer import Quantized, QuantizerConfig, VectorQuantizer, at_least_float32

MOST_BITS = 20  # 2^20 codes: every generator has as many logits
ENTROPY_BITS = 8  # bits of LFQ whose joint entropy is estimated together


def _few_codes(levels: tuple[int, ...]) -> tuple[int, ...]:
    if prod(levels) > 2**MOST_BITS:
        raise ValueError(f"the product is {prod(levels):,} codes, expected at most 2^{MOST_BITS}; lower levels")
    return levels


class FSQConfig(Config):
    """Finite scalar quantisation: each dimension is bounded and rounded to one of a few levels; no codebook loss."""

    name: Literal["fsq"] = "fsq"
    levels: Annotated[tuple[Annotated[int, Field(ge=2)], ...], AfterValidator(_few_codes)] = Field(
        (7, 5, 5, 5, 5),
        min_length=1,
        max_length=MOST_BITS,
        description="numbers of levels of the dimensions, whose product is the number of codes (K)",
    )
    revive_every: ClassVar[int] = 0

    @property
    def size(self) -> int:
        """K, number of codes."""
        return prod(self.levels)

    @property
    def dim(self) -> int:
        """D, width of a code."""
        return len(self.levels)


class LFQConfig(Config):
    """Lookup-free quantisation: the code is the signs of the features."""

    name: Literal["lfq"] = "lfq"
    bits: int = Field(12, ge=1, le=MOST_BITS, description="width of a code (D), of which there are 2^bits (K)")
    entropy_weight: float = Field(
        0.1, ge=0, description="weight of the loss that makes each code certain and all codes used"
    )
    commitment_weight: float = Field(0.25, ge=0, description="weight of the loss that moves features towards codes")
    revive_every: ClassVar[int] = 0

    @property
    def levels(self) -> tuple[int, ...]:
        """Two for each bit."""
        return (2,) * self.bits

    @property
    def size(self) -> int:
        """K, number of codes."""
        return 2**self.bits

    @property
    def dim(self) -> int:
        """D, width of a code."""
        return self.bits


AnyQuantizerConfig = Annotated[QuantizerConfig | FSQConfig | LFQConfig, Field(discriminator="name")]


class GridQuantizer(nn.Module):
    """What FSQ and LFQ share: codes whose values follow from their digits."""

    def __init__(self, config: FSQConfig | LFQConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def codebook(self) -> Tensor:
        """(K, D) float32."""
        return self.embed(torch.arange(self.config.size, device=self.units.device))

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (N, L) to code vectors (N, L, D)."""
        return self.values(digits_of(tokens, self.config.levels))


class FSQ(GridQuantizer):
    """Finite scalar quantisation.

    The features z are bounded by (l - 1) / 2 tanh(z + shift) - offset and rounded to one of l integers around 0; offset
    is 1/2 for even l and 0 for odd ones, and shift keeps z = 0 at 0. The decoder receives them divided by floor(l / 2),
    in [-1, 1]. For l = 2, which the paper does not use, there is no shift: it would be infinite. Equal to
    vector-quantize-pytorch 1.24 without its margin of 0.1 % in the range; the margin changes 2 to 5 tokens in 1,000.
    """

    def __init__(self, config: FSQConfig) -> None:
        super().__init__(config)
        shifts = [atanh(1 / (count - 1)) if count > 2 and count % 2 == 0 else 0.0 for count in config.levels]
        self.register_buffer("counts", torch.tensor(config.levels), persistent=False)  # (D,)
        self.register_buffer("shifts", torch.tensor(shifts), persistent=False)  # (D,)

    @property
    def units(self) -> Tensor:
        """(D,): the integers at the ends of the range."""
        return self.counts // 2

    def values(self, digits: Tensor) -> Tensor:
        """Digits (..., D) to what the decoder receives, in [-1, 1]."""
        return (digits - self.units) / self.units

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, features: Tensor) -> Quantized:
        """Quantise features (N, L, D)."""
        z = at_least_float32(features)
        bounded = (self.counts - 1) / 2 * (z + self.shifts).tanh() - (self.counts % 2 == 0) / 2  # (N, L, D)
        # Only features that are not finite leave the range; the loss will say so.
        digits = (bounded.detach().round().long() + self.units).clamp(torch.zeros_like(self.counts), self.counts - 1)
        bounded = bounded / self.units
        vectors = straight_through(bounded, self.values(digits).to(bounded))
        return Quantized(vectors, tokens_of(digits, self.config.levels), bounded)


class LFQ(GridQuantizer):
    """Lookup-free quantisation: 1 where a feature is positive, else -1; bit i of the token is that of dimension i.

    The entropy loss is E[H(q(z))] - H[E[q(z)]] in nats. q(z) gives code c the probability softmax(-|z - c|^2), which is
    sigmoid(4 z) for each bit: the paper states no temperature, here it is 1. Means are over the features of a batch in
    one process. Values and both entropies equal vector-quantize-pytorch 1.24 (inv_temperature=1; its tokens have the
    bits in the opposite order). The second entropy is that of all bits together; beyond 8 bits it is the sum over
    groups of up to 8 neighbouring bits, an upper bound: a distribution over all codes for each feature does not fit
    into memory.
    """

    def __init__(self, config: LFQConfig) -> None:
        super().__init__(config)
        self.register_buffer("units", torch.ones(config.bits), persistent=False)

    def values(self, digits: Tensor) -> Tensor:
        """Bits (..., D) to -1 and 1."""
        return (2 * digits - 1) * self.units

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, features: Tensor) -> Quantized:
        """Quantise features (N, L, D)."""
        z = at_least_float32(features)
        bits = (z > 0).long()
        vectors = self.values(bits).to(z)
        return Quantized(
            vectors=straight_through(z, vectors),
            tokens=tokens_of(bits, self.config.levels),
            features=z,
            commitment_loss=(vectors - z).square().mean(),
            entropy_loss=entropy_loss(z.flatten(0, -2)),
        )


def entropy_loss(z: Tensor) -> Tensor:
    """Mean entropy of the codes less the entropy of the mean code, of features (M, D); see :class:`LFQ`."""
    logits = 4 * z  # (M, D)
    mean = (F.softplus(logits) - logits * logits.sigmoid()).sum(dim=1).mean()  # of the bits, which are independent
    total = torch.zeros_like(mean)
    for group in logits.split(ENTROPY_BITS, dim=1):
        joint = torch.ones_like(group[:, :1])  # (M, 1)
        for bit in group.sigmoid().unbind(1):
            joint = torch.cat([joint * (1 - bit[:, None]), joint * bit[:, None]], dim=1)  # (M, 2 to the bits so far)
        total = total + torch.special.entr(joint.mean(dim=0)).sum()
    return mean - total


def build_quantizer(config: AnyQuantizerConfig) -> VectorQuantizer | FSQ | LFQ:
    """The quantiser of these settings, with fresh weights where it has any."""
    return {"vq": VectorQuantizer, "fsq": FSQ, "lfq": LFQ}[config.name](config)
