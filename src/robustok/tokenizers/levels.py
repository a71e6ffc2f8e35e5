"""Codes on a grid of levels: code k has the digits of k, the first digit the least significant.

FSQ has such a grid with its levels, LFQ with two levels a bit. Neighbours are counted, not searched: nothing here has
the size of the codebook, of which there may be 2^18 and more codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

BLOCK = 4096  # tokens at a time


def digits_of(tokens: Tensor, levels: Sequence[int]) -> Tensor:
    """Tokens (...) int64 to their digits (..., D), digit i in 0 to levels[i] - 1."""
    return torch.stack([tokens // prod(levels[:i]) % count for i, count in enumerate(levels)], dim=-1)  # (..., D)


def tokens_of(digits: Tensor, levels: Sequence[int]) -> Tensor:
    """Digits (..., D) int64 to tokens (...)."""
    return sum(digits[..., i] * prod(levels[:i]) for i in range(len(levels)))  # (...)


@dataclass(frozen=True)
class GridNeighbours:
    """The ``strength`` nearest codes of every code of a grid, in Euclidean distance between digits.

    With two levels that is the order of the Hamming distance. Many codes are equally far, so the farthest ones are as
    a rule more than are wanted: then each of them is drawn with the same probability, such that they together are
    drawn as often as the number of them that is wanted.

    Attributes:
        levels: number of levels of each of the D digits.
        strength: delta, number of nearest codes.
        include_self: whether the code itself is the first of them.
    """

    levels: tuple[int, ...]
    strength: int
    include_self: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(K, strength), as that of a table of neighbours."""
        return prod(self.levels), self.strength

    def drawn(self, tokens: Tensor, uniforms: Tensor) -> Tensor:
        """One of the neighbours of each token.

        Args:
            tokens: (M,) int64.
            uniforms: (M,) in [0, 1): which neighbour, nearer ones first.

        Returns:
            (M,) int64.
        """
        radius = self._radius()
        parts = zip(tokens.split(BLOCK), uniforms.split(BLOCK), strict=True)
        return torch.cat([self._drawn(*part, radius) for part in parts]) if len(tokens) else tokens

    def _drawn(self, tokens: Tensor, uniforms: Tensor, radius: int) -> Tensor:
        own, first = digits_of(tokens, self.levels), int(not self.include_self)  # the code itself is at distance 0
        counts = self._counts(own, radius)
        ends = counts[-1].cumsum(dim=1)  # (M, R + 1), codes that are at most so far
        wanted = first + uniforms.double() * self.strength  # (M,), in [first, first + strength)
        left = torch.searchsorted(ends, wanted[:, None], right=True)  # (M, 1), squared distance
        size = counts[-1].gather(1, left)  # (M, 1), codes at this distance
        start = ends.gather(1, left) - size
        inside = (first + self.strength - start).clamp(max=size)  # how many of them are wanted
        rank = ((wanted[:, None] - start) * size / inside).long().clamp(max=size - 1)  # (M, 1)
        found = [own[:, :0]]
        for i in reversed(range(len(self.levels))):  # the codes at a distance, in the order of their last digits
            squares = self._squares(own, i)  # (M, levels[i])
            ways = _at(counts[i], left - squares)  # (M, levels[i]), codes of this distance that have this digit
            ends = ways.cumsum(dim=1)
            digit = torch.searchsorted(ends, rank, right=True)  # (M, 1)
            rank = rank - (ends - ways).gather(1, digit)
            left = left - squares.gather(1, digit)
            found.append(digit)
        return tokens_of(torch.cat(found[::-1], dim=1), self.levels)

    def _counts(self, own: Tensor, radius: int) -> list[Tensor]:
        """How many choices of the first 0, 1, ..., D digits are at each squared distance up to R, (M, R + 1) each."""
        distances = torch.arange(radius + 1, device=own.device)
        counts = [(distances == 0).long().expand(len(own), -1)]
        for i in range(len(self.levels)):
            before = [_at(counts[-1], distances - square[:, None]) for square in self._squares(own, i).unbind(1)]
            counts.append(sum(before))
        return counts

    def _squares(self, own: Tensor, i: int) -> Tensor:
        """(M, levels[i]): squared distances of digit i to all its values."""
        return (torch.arange(self.levels[i], device=own.device) - own[:, i : i + 1]).square()

    def _radius(self) -> int:
        """Squared distance within which every code has enough neighbours. The corner has the fewest."""
        most = sum((count - 1) ** 2 for count in self.levels)
        corner = self._counts(torch.zeros(1, len(self.levels), dtype=torch.int64), most)[-1].cumsum(dim=1)
        return int((corner < self.strength + (not self.include_self)).sum())


def _at(counts: Tensor, indices: Tensor) -> Tensor:
    """Counts (M, R + 1) at indices (M, n); none below 0."""
    return counts.gather(1, indices.clamp(min=0)) * (indices >= 0)
