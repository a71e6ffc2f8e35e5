"""How seeds become random numbers."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from robustok.errors import UserError


def step_rng(seed: int, step: int, purpose: str) -> torch.Generator:
    """CPU random generator of one purpose at one step, the same in every process."""
    key = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generator, which dropout and stochastic depth draw from."""
    torch.manual_seed(step_rng(seed, step, f"global/{rank}").initial_seed())


def image_rngs(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One random generator per image, a function of the run's seed and the image's index alone.

    The pair is hashed, because ``seed + index`` would repeat the images of one seed, shifted, under the next.

    Args:
        seed: seed of the whole sample set.
        indices: place of each image in the sample set.
    """
    rngs = []
    for index in indices:
        digest = hashlib.sha256(f"{int(seed)}:{int(index)}".encode()).digest()
        rngs.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1))  # 63 bits
    return rngs


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
