"""How a codebook is used: from int64 counts of its codes, which add up over batches and processes."""

import math

import torch
from torch import Tensor

from robustok.errors import UserError


def count_tokens(tokens: Tensor, codebook_size: int) -> Tensor:
    """Occurrences (K,) int64 of each code in tokens of any shape.

    Raises:
        UserError: tokens outside [0, K).
    """
    if tokens.numel() and not 0 <= tokens.min() <= tokens.max() < codebook_size:
        span = f"{tokens.min().item()} to {tokens.max().item()}"
        raise UserError(f"got tokens from {span}, the codebook has codes 0 to {codebook_size - 1}; use its own tokens")
    return torch.bincount(tokens.flatten(), minlength=codebook_size)


def codebook_usage(counts: Tensor) -> float:
    """Share in [0, 1] of the codes that occur at all, from counts (K,); it grows with the number of tokens.

    Raises:
        UserError: nothing was counted.
    """
    return (_frequencies(counts) > 0).double().mean().item()


def codebook_perplexity(counts: Tensor) -> float:
    """The exp of the entropy of the code frequencies, in [1, K], from counts (K,).

    Raises:
        UserError: nothing was counted.
    """
    return _entropy(_frequencies(counts)).exp2().item()


def codebook_use(tokens: Tensor, codebook_size: int) -> dict[str, float]:
    """Usage and perplexity of tokens of any shape, by their names in metrics.jsonl."""
    counts = count_tokens(tokens, codebook_size)
    return {"codebook_usage": codebook_usage(counts), "codebook_perplexity": codebook_perplexity(counts)}


def token_divergence(counts: Tensor, other: Tensor) -> float:
    """Jensen-Shannon divergence of two token frequencies in bits: 0 for equal ones, 1 where no code is in both.

    Sets of n and m tokens of one distribution differ by about (K - 1) / (8 ln 2) * (1/n + 1/m) bits.

    Args:
        counts: (K,) of one set.
        other: (K,) of the other.

    Raises:
        UserError: codebooks of different size, or nothing was counted.
    """
    if counts.shape != other.shape:
        raise UserError(f"got counts of {len(counts)} and {len(other)} codes, expected those of one codebook")
    p, q = _frequencies(counts), _frequencies(other)
    middle = (p + q) / 2
    bits = _entropy(middle) - (_entropy(p) + _entropy(q)) / 2
    return bits.clamp(0, 1).item()


def _frequencies(counts: Tensor) -> Tensor:
    total = counts.sum()
    if total == 0:
        raise UserError("got counts of no tokens, expected at least one; encode some images first")
    return counts.double() / total


def _entropy(frequencies: Tensor) -> Tensor:
    """In bits."""
    return -torch.xlogy(frequencies, frequencies).sum() / math.log(2)
