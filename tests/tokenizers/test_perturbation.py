import math
from itertools import pairwise

import pytest
import torch

from robustok.config import validate
from robustok.errors import UserError
from robustok.tokenizers.perturbation import (
    PerturbationConfig,
    PerturbationDraw,
    annealing_ratio,
    apply_draw,
    draw_perturbation,
    nearest_codes,
    nearest_to,
    perturb,
    perturb_latents,
    straight_through,
)

CODES, WIDTH = 40, 5


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def codebook():
    return torch.nn.functional.normalize(torch.randn(CODES, WIDTH, generator=rng(1)), dim=-1)


def some_tokens(count, length, seed=2):
    return torch.randint(CODES, (count, length), generator=rng(seed))


def by_hand(query, codebook, strength, own=None):
    """Nearest codes one by one, in float64."""
    distances = [(float((query.double() - code.double()).square().sum()), k) for k, code in enumerate(codebook)]
    return [k for _, k in sorted(distances) if k != own][:strength]


# Neighbours


def test_nearest_codes_against_brute_force(codebook):
    found = nearest_codes(codebook, 7)
    assert found.tolist() == [by_hand(code, codebook, 7, own=k) for k, code in enumerate(codebook)]


def test_with_self_the_own_code_comes_first(codebook):
    found = nearest_codes(codebook, 8, include_self=True)
    assert found[:, 0].tolist() == list(range(CODES))
    assert torch.equal(found[:, 1:], nearest_codes(codebook, 7))


def test_a_smaller_strength_is_a_prefix(codebook):
    most = nearest_codes(codebook, CODES - 1)
    for strength in (0, 1, 5, 20):
        assert torch.equal(nearest_codes(codebook, strength), most[:, :strength])
    assert all(sorted([k, *row]) == list(range(CODES)) for k, row in enumerate(most.tolist()))


def test_duplicates_in_the_codebook(codebook):
    doubled = torch.cat([codebook, codebook[:10]])  # codes 40 to 49 equal codes 0 to 9
    found = nearest_codes(doubled, 6)
    assert not (found == torch.arange(50)[:, None]).any()  # a duplicate must not push the own code into its neighbours
    assert found[:10, 0].tolist() == list(range(40, 50))  # the twin is the nearest neighbour
    assert found[40:, 0].tolist() == list(range(10))
    assert nearest_codes(doubled, 3, include_self=True)[:, 0].tolist() == list(range(50))


def test_unordered_neighbours_are_the_same_set(codebook):
    queries, own = torch.randn(30, WIDTH, generator=rng(3)), torch.arange(30)
    ordered = nearest_to(queries, codebook, 9, own)
    unordered = nearest_to(queries, codebook, 9, own, ordered=False)
    assert torch.equal(ordered.sort().values, unordered.sort().values)


@pytest.mark.parametrize(("strength", "include_self"), [(CODES, False), (CODES + 1, True), (-1, False)])
def test_more_neighbours_than_codes(codebook, strength, include_self):
    with pytest.raises(UserError, match=f"strength is {strength}, but a codebook of {CODES} codes"):
        nearest_codes(codebook, strength, include_self)
    assert nearest_codes(codebook, CODES, include_self=True).shape == (CODES, CODES)


# What is drawn


@pytest.mark.parametrize(("rate", "proportion", "strength"), [(0.0, 1.0, 5), (1.0, 0.0, 5), (1.0, 1.0, 0)])
@pytest.mark.parametrize("selection", ["exact", "bernoulli"])
def test_identities(codebook, rate, proportion, strength, selection):
    tokens = some_tokens(6, 16)
    assert torch.equal(perturb(tokens, nearest_codes(codebook, strength), rate, proportion, rng(), selection), tokens)


@pytest.mark.parametrize(("length", "rate"), [(16, 0.3), (16, 1.0), (7, 0.5), (64, 0.01), (100, 0.29)])
def test_exact_selection_replaces_exactly_its_count(codebook, length, rate):
    tokens = some_tokens(9, length)
    changed = perturb(tokens, nearest_codes(codebook, 5), rate, 1.0, rng()) != tokens  # the codes are all distinct
    assert changed.sum(1).tolist() == [round(rate * length)] * 9


def test_replacements_are_neighbours_of_the_token(codebook):
    tokens, neighbours = some_tokens(50, 16), nearest_codes(codebook, 5)
    result = perturb(tokens, neighbours, 0.6, 0.5, rng())
    for old, new in zip(tokens.flatten().tolist(), result.flatten().tolist(), strict=True):
        assert old == new or new in by_hand(codebook[old], codebook, 5, own=old)


def test_neighbours_and_positions_are_uniform(codebook):
    tokens, neighbours = torch.full((4000, 8), 3), nearest_codes(codebook, 5)
    result = perturb(tokens, neighbours, 0.25, 1.0, rng())  # two of eight tokens in each image
    places = (result != tokens).sum(0).double()
    assert (places - 1000).abs().max() < 5 * math.sqrt(4000 * 0.25 * 0.75)
    ranks = (result[result != tokens][:, None] == neighbours[3]).sum(0).double()  # (5,)
    assert ranks.sum() == 8000
    assert (ranks - 1600).abs().max() < 5 * math.sqrt(8000 * 0.2 * 0.8)


@pytest.mark.parametrize(("count", "proportion"), [(4, 0.1), (2, 0.1), (3, 0.5), (7, 0.33), (1, 0.02)])
def test_stochastic_rounding_has_the_right_mean(count, proportion):
    draws, source, wanted = 3000, rng(), count * proportion
    chosen = torch.tensor(
        [int(draw_perturbation(count, 4, 1.0, proportion, source).images.sum()) for _ in range(draws)]
    )
    fraction = wanted - math.floor(wanted)
    assert set(chosen.tolist()) == {
        math.floor(wanted),
        math.floor(wanted) + 1,
    }  # a small batch is perturbed now and then
    assert abs(chosen.double().mean().item() - wanted) < 5 * math.sqrt(fraction * (1 - fraction) / draws)


def test_whole_products_are_not_rounded_up():
    source = rng()
    for count, proportion, images in ((10, 0.3, 3), (100, 0.29, 29), (8, 0.5, 4), (5, 1.0, 5)):
        found = {int(draw_perturbation(count, 4, 1.0, proportion, source).images.sum()) for _ in range(300)}
        assert found == {images}


def test_stochastic_images_are_uniform_and_floor_takes_the_first():
    source = rng()
    share = torch.stack([draw_perturbation(8, 4, 1.0, 0.25, source).images for _ in range(2000)]).double().mean(0)
    assert (share - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 2000)
    for count, proportion in ((10, 0.35), (100, 0.29), (9, 0.1)):  # the release: int(0.29 * 100) is 28
        images = draw_perturbation(count, 4, 1.0, proportion, source, image_selection="floor").images
        assert images.tolist() == [i < int(proportion * count) for i in range(count)]


@pytest.mark.parametrize(("rate", "strength"), [(0.7, 5), (1.0, 2), (0.3, 10)])
def test_bernoulli_with_self_has_the_rate_of_the_authors(codebook, rate, strength):
    tokens, neighbours = some_tokens(500, 64), nearest_codes(codebook, strength, include_self=True)
    changed = (perturb(tokens, neighbours, rate, 1.0, rng(), "bernoulli") != tokens).double().mean().item()
    expected = rate * (1 - 1 / strength)
    assert abs(changed - expected) < 5 * math.sqrt(expected * (1 - expected) / tokens.numel())


def test_rows_of_a_draw_equal_the_single_process(codebook):
    tokens, neighbours = some_tokens(12, 16), nearest_codes(codebook, 5)
    whole = apply_draw(tokens, neighbours, draw_perturbation(12, 16, 0.5, 0.4, rng()))
    parts = []
    for rank in range(3):  # every process draws for the global batch and takes its rows
        draw = draw_perturbation(12, 16, 0.5, 0.4, rng()).rows(4 * rank, 4 * rank + 4)
        parts.append(apply_draw(tokens[4 * rank : 4 * rank + 4], neighbours, draw))
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, tokens)


@pytest.mark.parametrize(
    ("name", "rate", "proportion"), [("rate", 1.1, 0.5), ("proportion", 0.5, -0.1), ("rate", math.nan, 0.5)]
)
def test_shares_outside_their_range(name, rate, proportion):
    with pytest.raises(UserError, match=f"perturbation {name} is .*expected a share"):
        draw_perturbation(4, 4, rate, proportion, rng())


# In training


def candidates(features, tokens, codebook, draw, strength, config):
    """Token by token, the codes of which one must replace it."""
    for i, j in draw.mask.nonzero().tolist():
        own = int(tokens[i, j])
        query = features[i, j] if config.neighbour_of == "feature" else codebook[own]
        near = by_hand(query, codebook, len(codebook), own=own)
        yield i, j, ([own, *near] if config.include_self else near)[:strength]


@pytest.mark.parametrize("neighbour_of", ["code", "feature"])
@pytest.mark.parametrize("include_self", [False, True])
def test_perturbed_latents_against_a_plain_reading(codebook, neighbour_of, include_self):
    features = torch.nn.functional.normalize(torch.randn(6, 16, WIDTH, generator=rng(4)), dim=-1)
    tokens = torch.cdist(features, codebook).argmin(-1)
    config = PerturbationConfig(neighbour_of=neighbour_of, include_self=include_self)
    draw = draw_perturbation(6, 16, 0.5, 0.5, rng(5))
    vectors, replaced = perturb_latents(features, tokens, codebook, draw, 4, config)
    assert torch.equal(replaced[~draw.mask], tokens[~draw.mask])
    for i, j, near in candidates(features, tokens, codebook, draw, 4, config):
        assert int(replaced[i, j]) in near
    torch.testing.assert_close(vectors, codebook[replaced])


def test_gradients_pass_straight_through(codebook):
    features = torch.randn(4, 8, WIDTH, generator=rng(6), requires_grad=True)
    book = codebook.clone().requires_grad_()
    tokens = torch.cdist(features, codebook).argmin(-1)
    draw = PerturbationDraw(
        torch.tensor([True, False, True, False]), torch.ones(4, 8, dtype=torch.bool), torch.rand(4, 8, generator=rng())
    )
    weight = torch.randn(4, 8, WIDTH, generator=rng(7))
    vectors, replaced = perturb_latents(features, tokens, book, draw, 5, PerturbationConfig())
    (vectors * weight).sum().backward()
    assert torch.equal(features.grad, weight)  # of perturbed and clean tokens alike
    assert book.grad is None
    assert (replaced != tokens).any(1).tolist() == [True, False, True, False]


def test_nothing_drawn_changes_nothing(codebook):
    features, tokens = torch.randn(2, 4, WIDTH, generator=rng()), some_tokens(2, 4)
    clean = straight_through(features, codebook[tokens])
    for draw, strength in (
        (draw_perturbation(2, 4, 1.0, 1.0, rng()), 0),
        (draw_perturbation(2, 4, 0.0, 1.0, rng()), 5),
    ):
        vectors, same = perturb_latents(features, tokens, codebook, draw, strength, PerturbationConfig())
        assert torch.equal(same, tokens)
        assert torch.equal(vectors, clean)


# Annealing


def test_the_paper_s_schedule():
    """Rate 1.0 to 0.5 and strength 100 to 50 over epochs 40 to 120, here steps."""
    config = PerturbationConfig(rate=1.0, strength=100, anneal_start=40, anneal_end=120, end_ratio=0.5)
    expected = {
        0: (1.0, 100),
        40: (1.0, 100),
        60: (0.875, 87),
        80: (0.75, 75),
        100: (0.625, 62),
        120: (0.5, 50),
        199: (0.5, 50),
    }
    assert {step: config.at(step) for step in expected} == expected


@pytest.mark.parametrize("end_ratio", [0.0, 0.25, 0.5, 1.0])
def test_annealing_is_continuous(end_ratio):
    ratios = [annealing_ratio(step, 10, 37, end_ratio) for step in range(60)]
    assert ratios[10] == 1
    assert ratios[37] == end_ratio
    falls = [a - b for a, b in pairwise(ratios)]
    assert falls[10:37] == pytest.approx(
        [(1 - end_ratio) / 27] * 27
    )  # the release jumps at its end unless end_ratio is 0.5
    assert falls[:10] + falls[37:] == [0] * 32


def test_annealing_without_length():
    assert annealing_ratio(1000, 0, 0, 0.5) == 1
    assert [annealing_ratio(step, 5, 5, 0.5) for step in (4, 5, 6)] == [1, 1, 0.5]  # the release divides by zero
    with pytest.raises(UserError, match="anneal_end 3 is before anneal_start 5"):
        validate(PerturbationConfig, {"anneal_start": 5, "anneal_end": 3})
