"""Random numbers are functions of a key, and stay the same from version to version."""

import pytest
import torch

from robustok.commands.encode import random_subset
from robustok.randomness import image_draws, image_rngs, seeded, step_rng


def test_numbers_stay_the_same():
    """A run that a later version resumes must continue with the same numbers."""
    assert step_rng(3, 7, "noise").initial_seed() == 1233607004604264526
    assert [rng.initial_seed() for rng in image_rngs(5, [0, 4711])] == [6084975277003664473, 1498448587378778064]
    draws = image_draws(torch.rand, "pfid 0 0.9 4", torch.tensor([0, 9]), (2,)).tolist()
    assert draws == [[0.6850618124008179, 0.4646296501159668], [0.44014638662338257, 0.1491391658782959]]


@pytest.mark.parametrize("seed", [0, 7, 2**63, 2**64 - 1])
def test_seeds_of_64_bits_are_those_of_torch(seed):
    own = torch.Generator().manual_seed(seed)
    assert torch.equal(torch.rand(3, generator=seeded(seed)), torch.rand(3, generator=own))


def test_seeds_of_more_bits_are_seeds_too():
    draws = [torch.rand(4, generator=seeded(seed)) for seed in (0, 1, 2**64, 2**64 + 1, 10**400)]
    assert len(torch.stack(draws).unique(dim=0)) == 5
    assert len(random_subset(9, 4, seed=2**64)) == 4


def test_draws_of_an_image_do_not_depend_on_the_others():
    many = image_draws(torch.randn, "a", torch.arange(500), (4,))
    assert len(many.unique(dim=0)) == 500
    assert torch.equal(many[[7, 3]], image_draws(torch.randn, "a", torch.tensor([7, 3]), (4,)))
    assert not torch.equal(many, image_draws(torch.randn, "b", torch.arange(500), (4,)))
