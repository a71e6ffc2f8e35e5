"""How seeds become random numbers. All of them are functions of a key, never of what was drawn before.

A key is text, such as seed and image, and is hashed: ``seed + image`` would give one seed's images again, shifted,
under the next. torch's CPU generators draw what a model or an image needs; NumPy's PCG64, whose raw stream NumPy
promises never to change, draws the order of training.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from robustok.errors import UserError


def hashed_rng(key: str) -> torch.Generator:
    """A CPU random generator whose seed is a hash of the key (63 bits of its SHA-256)."""
    return torch.Generator().manual_seed(int.from_bytes(_hash(key)[:8], "little") >> 1)


def seeded(seed: int) -> torch.Generator:
    """A CPU random generator of this seed; one of more than 64 bits, too large for torch, is hashed."""
    return torch.Generator().manual_seed(seed) if seed < 2**64 else hashed_rng(str(seed))


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def step_rng(seed: int, step: int, purpose: str) -> torch.Generator:
    """CPU random generator of one purpose at one step, the same in every process."""
    return hashed_rng(f"{seed}/{step}/{purpose}")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generator, which dropout and stochastic depth draw from."""
    torch.manual_seed(step_rng(seed, step, f"global/{rank}").initial_seed())


def bucket_seed(seed: int, bucket: int) -> int:
    """The seed of the bucket of this number, so that no two draw the same; the first has that of the run.

    Seeds of runs are below 2^64.
    """
    return seed + bucket * 2**64


def image_rngs(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One random generator per image, a function of the run's seed and the image's index alone.

    Args:
        seed: seed of the whole sample set.
        indices: index of each image in the sample set.
    """
    return [hashed_rng(f"{int(seed)}:{int(index)}") for index in indices]


def image_draws(draw: Callable[..., Tensor], key: str, indices: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Random numbers (n, *shape) that depend on the key and each image's index alone, not on its batch or process.

    One generator is seeded anew for each image, which takes some 30 microseconds. A CPU generator uses 32 bits of its
    seed: an image's seed is its index, counted from a hash of the key, so that no two images of a key share their
    draws.

    Args:
        draw: ``torch.rand`` or ``torch.randn``.
        key: names what the draws are for, with its seed.
        indices: (n,) int64, indices of the images in the set.
        shape: of one image's draws.
    """
    start = int.from_bytes(_hash(key)[:4], "big")
    rng, draws = torch.Generator(), torch.empty(len(indices), *shape)
    for row, index in zip(draws, indices.tolist(), strict=True):
        draw(shape, generator=rng.manual_seed((start + index) % 2**32), out=row)
    return draws


def raw_numbers(key: Sequence[int], count: int) -> np.ndarray:
    """Random integers (count,) uint64 of PCG64, which hashes the key's integers to its seed."""
    return np.random.PCG64(list(key)).random_raw(count)


def per_image(rng: torch.Generator | Sequence[torch.Generator], count: int) -> list[torch.Generator]:
    """One CPU random generator per image: those given, or as many seeded in turn by a single one.

    Raises:
        UserError: the sequence has another length than the batch.
    """
    if isinstance(rng, torch.Generator):
        seeds = torch.randint(2**63 - 1, (count,), generator=rng)
        return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    if len(rng) != count:
        raise UserError(f"got {len(rng)} random generators for {count} images; give one per image, or a single one")
    return list(rng)


def image_uniforms(rngs: Sequence[torch.Generator], length: int) -> Tensor:
    """The next ``length`` uniform numbers in [0, 1) of each image: (N, L) float32 on the CPU."""
    if not rngs:
        return torch.empty(0, length)
    return torch.stack([torch.rand(length, generator=rng) for rng in rngs])
