import math

import pytest
import torch

from robustok.errors import UserError
from robustok.generators.sampling import (
    Sampling,
    check_labels,
    check_mixture,
    draw_tokens,
    guidance_scales,
    guide,
    mixture_draws,
    sample_tokens,
    truncate,
)
from robustok.randomness import image_rngs, image_uniforms, per_image


@pytest.mark.parametrize(
    ("scale", "power", "expected"),
    [
        (6.0, 1.15, {0: 1.0, 32: 1.1026, 64: 1.4917, 128: 3.1138, 192: 5.0834, 255: 5.9998}),
        (6.75, 1.01, {0: 1.0, 32: 1.2100, 64: 1.8202, 128: 3.8438, 192: 5.8941, 255: 6.7498}),
    ],
)
def test_guidance_schedule_has_the_published_values(scale, power, expected):
    scales = guidance_scales(256, Sampling(guidance_scale=scale, guidance_power=power))
    assert scales.shape == (256,)
    for step, value in expected.items():
        assert scales[step].item() == pytest.approx(value, abs=5e-5)


def test_guidance_power_0_is_constant_and_scales_0_and_1_are_off():
    assert guidance_scales(16, Sampling(guidance_scale=3, guidance_power=0)).tolist() == [3.0] * 16
    for scale in (0, 1):
        assert not Sampling(guidance_scale=scale).guided
        assert guidance_scales(16, Sampling(guidance_scale=scale, guidance_power=2)).tolist() == [1.0] * 16


def test_the_guidance_window_has_the_published_schedules():
    constant = {"guidance_scale": 2.0, "guidance_power": 0}
    # LlamaGen's cfg_interval 20 of 64 tokens guides tokens 0 to 21.
    until = guidance_scales(64, Sampling(**constant, guidance_until=21 / 63))
    assert until.tolist() == [2.0] * 22 + [1.0] * 42
    # GigaTok's step schedule of 256 tokens: 1 to 45 are all but unguided, the first one is guided.
    step = guidance_scales(256, Sampling(**constant, guidance_from=0.18))
    assert step.tolist() == [2.0] + [1.0001] * 45 + [2.0] * 210
    assert guidance_scales(64, Sampling(guidance_from=0.18, guidance_until=0.5)).tolist() == [1.0] * 64  # off is off
    assert guidance_scales(1, Sampling(**constant, guidance_from=0.18)).tolist() == [2.0]


def test_settings_written_before_there_were_windows_mean_what_they_meant():
    before = {"guidance_scale": 6.0, "guidance_power": 1.15, "temperature": 1.02, "top_k": 0, "top_p": 1.0}
    sampling = Sampling(**before)
    assert (sampling.name, sampling.guidance_from, sampling.guidance_until) == ("tokens", 0.0, 1.0)
    rising = guidance_scales(64, sampling)
    assert (rising.diff() > 0).all()


def test_a_mixture_keeps_real_tokens_at_the_asked_rate_and_draws_the_others_alike():
    count, length, sigma, device = 300, 20, 0.7, torch.device("cpu")
    reference = torch.full((count, length), 3)
    found = {}
    for share in (None, sigma, 1.0):
        found[share] = mixture_draws(image_rngs(0, range(count)), length, reference, share, device)
    kept = found[sigma][1] == 3
    assert all(torch.equal(uniforms, found[None][0]) for uniforms, _ in found.values())
    assert (found[sigma][1][~kept] == -1).all()
    assert abs(kept.float().mean().item() - sigma) < 4 * math.sqrt(sigma * (1 - sigma) / kept.numel())
    assert (found[1.0][1] == 3).all()
    assert (found[None][1] == -1).all()


def test_guide_goes_from_unconditional_through_conditional():
    conditional, unconditional = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    assert guide(conditional, unconditional, 0).tolist() == [0.0, 4.0]
    assert guide(conditional, unconditional, 1).tolist() == [1.0, 2.0]
    assert guide(conditional, unconditional, 3).tolist() == [3.0, -2.0]


def kept_by_hand(logits, top_k, top_p):
    """Walk down from the best token until k tokens or the probability p are reached."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[: top_k or None]
    weights = [math.exp(logits[token]) for token in order]
    kept, mass = set(), 0.0
    for token, weight in zip(order, weights, strict=True):
        if mass >= top_p * sum(weights):
            break
        kept.add(token)
        mass += weight
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 99])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.93, 1.0])
def test_truncation_matches_a_walk_down_the_ranking(top_k, top_p):
    logits = torch.randn(30, 40, generator=torch.Generator().manual_seed(0)) * 2
    logits[:10] = logits[:10].round()  # ties: the lower token stays
    truncated = truncate(logits, top_k, top_p)
    for row, before in zip(truncated, logits, strict=True):
        kept = set(row.isfinite().nonzero()[:, 0].tolist())
        assert kept == kept_by_hand(before.tolist(), top_k, 1.0 if top_p == 1 else top_p - 1e-12)
        assert torch.equal(row[row.isfinite()], before[row.isfinite()])


def test_tokens_invert_the_cumulative_distribution():
    logits = torch.tensor([0.1, 0.2, 0.0, 0.7]).log().expand(8, 4)
    uniforms = torch.tensor([0.0, 0.05, 0.11, 0.29, 0.31, 0.5, 0.9, 1 - 2**-24])
    assert sample_tokens(logits, uniforms).tolist() == [0, 0, 1, 1, 3, 3, 3, 3]


def test_excluded_tokens_are_never_drawn_at_the_ends_of_the_interval():
    logits = torch.full((2, 5), -torch.inf)
    logits[:, 1:3] = 0
    assert sample_tokens(logits, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 2]


def test_evenly_spread_uniforms_give_the_softmax():
    logits = torch.randn(7, generator=torch.Generator().manual_seed(1))
    count = 70_000
    uniforms = (torch.arange(count) + 0.5) / count
    shares = sample_tokens(logits.expand(count, 7), uniforms).bincount(minlength=7) / count
    assert torch.allclose(shares, logits.softmax(0), atol=2 / count)


def test_temperature_sharpens_before_truncation():
    logits, uniforms = torch.tensor([[2.0, 1.0, 0.0]]).expand(100, 3), torch.linspace(0, 0.99, 100)
    assert draw_tokens(logits, uniforms, Sampling(temperature=0.01)).unique().tolist() == [0]
    # At temperature 1 the best token has 0.665; at 4 it has 0.42, so that 0.6 needs a second one.
    assert draw_tokens(logits, uniforms, Sampling(top_p=0.6)).unique().tolist() == [0]
    assert draw_tokens(logits, uniforms, Sampling(top_p=0.6, temperature=4)).unique().tolist() == [0, 1]


def test_an_image_has_its_own_numbers_whatever_stands_beside_it():
    together = image_uniforms(image_rngs(3, range(20)), 16)
    assert torch.equal(image_uniforms(image_rngs(3, [17]), 16)[0], together[17])
    others = image_uniforms(image_rngs(4, range(20)), 16)
    assert len({tuple(row) for row in torch.cat([together, others]).tolist()}) == 40  # seeds do not overlap
    assert 0 <= together.min() <= together.max() < 1


def test_a_single_generator_seeds_the_images_in_turn():
    def uniforms(count):
        return image_uniforms(per_image(torch.Generator().manual_seed(5), count), 8)

    assert torch.equal(uniforms(3), uniforms(6)[:3])
    rng = torch.Generator().manual_seed(5)
    split = torch.cat([image_uniforms(per_image(rng, 2), 8), image_uniforms(per_image(rng, 4), 8)])
    assert torch.equal(split, uniforms(6))
    with pytest.raises(UserError, match="2 random generators for 3 images"):
        per_image(image_rngs(0, range(2)), 3)


def test_bad_requests_are_refused_in_one_line():
    good = torch.zeros(2, 4, dtype=torch.int64)
    check_labels(torch.tensor([0, 9, 10]), classes=10)  # 10: no class
    check_mixture(0.5, good, (2, 4), 8)
    check_mixture(0, None, (2, 4), 8)
    for labels in (torch.tensor([11]), torch.tensor([-1]), torch.tensor([[1]]), torch.tensor([1.0])):
        with pytest.raises(UserError, match="labels"):
            check_labels(labels, classes=10)
    for sigma in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="sigma is"):
            check_mixture(sigma, good, (2, 4), 8)
    with pytest.raises(UserError, match="no reference is given"):
        check_mixture(0.5, None, (2, 4), 8)
    for reference in (good[:1], good[:, :3], good.float(), good - 1, good + 8):
        with pytest.raises(UserError, match="reference"):
            check_mixture(0.5, reference, (2, 4), 8)
