from math import comb, prod

import pytest
import torch

from robustok.errors import UserError
from robustok.tokenizers.levels import GridNeighbours, digits_of, tokens_of
from robustok.tokenizers.perturbation import (
    PerturbationConfig,
    PerturbationDraw,
    apply_draw,
    draw_perturbation,
    nearest_codes,
    perturb_latents,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def shares(neighbours, token, draws=3600):
    """How often each code (K,) is drawn for a token, as a share of all draws, over an even grid of uniforms."""
    uniforms = (torch.arange(draws) + 0.5) / draws
    found = neighbours.drawn(torch.full((draws,), token), uniforms)
    return torch.bincount(found, minlength=neighbours.shape[0]) / draws


def expected_shares(levels, token, strength, include_self):
    """The same from all distances: whole shells first, and the rest evenly among the codes of the last one."""
    digits = digits_of(torch.arange(prod(levels)), levels)
    distances = (digits - digits[token]).square().sum(1)
    if not include_self:
        distances[token] = 10**6
    found, left = torch.zeros(len(digits)), strength
    for distance in distances.unique():
        shell = distances == distance
        wanted = min(left, int(shell.sum()))
        found[shell], left = wanted / shell.sum() / strength, left - wanted
    return found


def test_digits_are_those_of_the_token_least_significant_first():
    assert digits_of(torch.tensor([0, 1, 3, 8]), (3, 3)).tolist() == [[0, 0], [1, 0], [0, 1], [2, 2]]
    assert digits_of(torch.tensor([[6]]), (2, 2, 2)).tolist() == [[[0, 1, 1]]]
    for levels in ((3, 3), (2, 2, 2), (4, 3, 2), (7, 5, 5)):
        tokens = torch.arange(prod(levels))
        assert torch.equal(tokens_of(digits_of(tokens, levels), levels), tokens)


def test_neighbours_on_a_grid_of_three_by_three_by_hand():
    """Around the middle, code 4, are four codes at distance 1 and four at distance sqrt(2)."""
    near = GridNeighbours((3, 3), 4)
    assert shares(near, 4).tolist() == pytest.approx([0, 0.25, 0, 0.25, 0, 0.25, 0, 0.25, 0])
    with_self = GridNeighbours((3, 3), 5, include_self=True)
    assert shares(with_self, 4).tolist() == pytest.approx([0, 0.2, 0, 0.2, 0.2, 0.2, 0, 0.2, 0])
    # Code 0, a corner: codes 1 and 3, then 4; of 2 and 6, which are equally far, one is wanted.
    assert shares(GridNeighbours((3, 3), 4), 0).tolist() == pytest.approx([0, 0.25, 0.125, 0.25, 0.25, 0, 0.125, 0, 0])


def test_neighbours_of_three_bits_by_hand():
    """Code 5 is 101: one bit away are 100, 111, 001; two bits away 110, 000, 011, of which two are wanted."""
    found = shares(GridNeighbours((2, 2, 2), 5), 0b101)
    expected = {0b100: 0.2, 0b111: 0.2, 0b001: 0.2, 0b110: 2 / 15, 0b000: 2 / 15, 0b011: 2 / 15}
    assert {code: share for code, share in enumerate(found.tolist()) if share} == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("levels", [(3, 3), (2, 2, 2), (4, 3, 2)])
@pytest.mark.parametrize("include_self", [True, False])
def test_every_strength_against_all_distances(levels, include_self):
    size = prod(levels)
    for strength in range(1, size + include_self):
        for token in range(0, size, 3):
            found = shares(GridNeighbours(levels, strength, include_self), token)
            expected = expected_shares(levels, token, strength, include_self)
            torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("levels", [(2,) * 18, (8, 8, 8, 8, 8, 8), (8, 8, 8, 5, 5, 5)])
def test_large_codebooks_have_neighbours_without_a_table(levels):
    size, count = prod(levels), 5000
    strength = size // 100
    tokens = torch.randint(size, (count,), generator=rng())
    near = GridNeighbours(levels, strength)
    found = near.drawn(tokens, torch.rand(count, generator=rng(1)))
    apart = (digits_of(found, levels) - digits_of(tokens, levels)).square().sum(1)
    assert apart.min() > 0
    if levels[0] == 2:  # 18 + 153 + 816 codes differ in up to 3 bits, 2,621 are wanted
        assert apart.max() == 4
        within = sum(comb(18, bits) for bits in (1, 2, 3)) / strength
        assert (apart <= 3).double().mean().item() == pytest.approx(within, abs=4 * (within / count) ** 0.5)
    else:
        middle = torch.tensor([[count // 2 for count in levels]])
        inner = near.drawn(tokens_of(middle, levels).expand(count), torch.rand(count, generator=rng(2)))
        assert (digits_of(inner, levels) - middle).square().sum(1).max() < apart.max()  # a corner looks farther


def test_perturbation_takes_the_grid_in_the_place_of_a_table():
    levels, tokens = (5, 4, 3), torch.randint(60, (40, 12), generator=rng())
    draw = draw_perturbation(40, 12, 0.5, 1.0, rng(1))
    near = nearest_codes(torch.zeros(60, 3), 6, include_self=False, levels=levels)
    found = apply_draw(tokens, near, draw)
    assert torch.equal(found != tokens, draw.mask)
    apart = (digits_of(found, levels) - digits_of(tokens, levels)).square().sum(-1)
    assert apart.max() <= 4  # a corner has 3 neighbours at 1, then 3 at 2
    # So does training, with straight-through gradients.
    codebook, features = digits_of(torch.arange(60), levels).float(), torch.randn(40, 12, 3, generator=rng(2))
    features.requires_grad_()
    config = PerturbationConfig(include_self=False)
    vectors, replaced = perturb_latents(features, tokens, codebook, draw, 6, config, levels)
    assert torch.equal(replaced, found)
    torch.testing.assert_close(vectors, codebook[found])
    vectors.sum().backward()
    assert torch.equal(features.grad, torch.ones_like(features))
    same = perturb_latents(features, tokens, codebook, draw, 0, config, levels)[1]
    assert torch.equal(same, tokens)


def test_neighbours_of_features_are_searched_in_the_codebook():
    codebook = digits_of(torch.arange(9), (3, 3)).float()
    features, tokens = torch.tensor([[[1.4, 1.0]]]), torch.tensor([[4]])
    yes = torch.ones(1, 1, dtype=torch.bool)
    everything = PerturbationDraw(yes[0], yes, torch.zeros(1, 1))
    config = PerturbationConfig(neighbour_of="feature", include_self=False)
    assert perturb_latents(features, tokens, codebook, everything, 1, config, (3, 3))[1].item() == 5  # (2, 1)


def test_more_neighbours_than_codes_are_refused():
    with pytest.raises(UserError, match="8 codes has 7 neighbours"):
        nearest_codes(torch.zeros(8, 3), 8, levels=(2, 2, 2))
    assert nearest_codes(torch.zeros(8, 3), 8, include_self=True, levels=(2, 2, 2)).shape == (8, 8)
