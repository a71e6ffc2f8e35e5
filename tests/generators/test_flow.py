"""Samplers, paths and sigma against closed forms: data that are Gaussian have a known velocity."""

import math
from itertools import pairwise

import pytest
import torch

from robustok.config import validate
from robustok.errors import UserError
from robustok.generators.diffusion_sampling import guided_model, image_normals, sample_mixture
from robustok.generators.flow import (
    DiffusionSampling,
    FlowProcess,
    draw_noise_levels,
    interpolate,
    noise_level,
    path_point,
    sampling_times,
    score_of,
    shift_times,
    target_velocity,
)
from robustok.generators.sampling import check_mixture
from robustok.randomness import image_rngs

CONVENTIONS = [0.0, 1.0]  # noise_time
PATHS = ["linear", "cosine"]
STRATEGIES = ["sdedit", "sdedit_snr", "linear_mix", "noise_only", "token_mix"]
SPREAD = 0.5  # standard deviation of the Gaussian data


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_velocity(noise_time, path="linear", spread=SPREAD):
    """The true velocity for data from a normal distribution of mean 0."""

    def velocity(x, time):
        level = noise_level(torch.tensor(time, dtype=torch.float64), noise_time)
        p = path_point(level, path)
        variance = (p.signal * spread) ** 2 + p.noise**2
        rate = p.signal * p.signal_rate * spread**2 + p.noise * p.noise_rate  # half the variance's derivative
        return (1 if noise_time == 1 else -1) * rate / variance * x

    return velocity


# Time


def test_each_family_has_its_convention_of_time():
    times = torch.tensor([0.0, 0.25, 1.0])
    assert noise_level(times, 1.0).tolist() == [0, 0.25, 1]
    assert noise_level(times, 0.0).tolist() == [1, 0.75, 0]
    for convention in CONVENTIONS:
        assert torch.equal(noise_level(noise_level(times, convention), convention), times)


@pytest.mark.parametrize("noise_time", CONVENTIONS)
@pytest.mark.parametrize("sampler", ["euler", "heun", "euler_maruyama"])
@pytest.mark.parametrize("shift", [1.0, 0.3, 3.0])
def test_times_go_from_noise_to_data(noise_time, sampler, shift):
    sampling = DiffusionSampling(sampler=sampler, steps=9, timestep_shift=shift)
    times = sampling_times(sampling, noise_time)
    levels = noise_level(times, noise_time)
    assert (times.shape, times.dtype) == ((10,), torch.float64)
    assert (levels[0], levels[-1]) == (1, 0)
    assert (levels.diff() < 0).all()
    # The same shift pulls families in opposite directions of noise: it is defined in their own time.
    other = noise_level(
        sampling_times(sampling.model_copy(update={"timestep_shift": 1 / shift}), 1 - noise_time), 1 - noise_time
    )
    torch.testing.assert_close(levels, other)


def test_published_times():
    sde = sampling_times(DiffusionSampling(sampler="euler_maruyama", steps=5), 1.0)
    torch.testing.assert_close(sde, torch.tensor([1, 0.76, 0.52, 0.28, 0.04, 0], dtype=torch.float64))
    shifted = sampling_times(DiffusionSampling(steps=6, timestep_shift=0.3), 0.0)
    by_hand = torch.tensor([0.3 * i / 6 / (1 - 0.7 * i / 6) for i in range(7)], dtype=torch.float64)
    torch.testing.assert_close(shifted, by_hand)
    assert shift_times(torch.tensor(0.5), 0.3).item() == pytest.approx(3 / 13)


def test_noise_levels_of_training():
    rng = torch.Generator().manual_seed(0)
    uniform = draw_noise_levels(20_000, "uniform", rng)
    normal = draw_noise_levels(20_000, "logit_normal", rng)
    for levels in (uniform, normal):
        assert 0 <= levels.min() <= levels.max() <= 1
        assert levels.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.var().item() == pytest.approx(1 / 12, abs=0.002)
    below = (normal < 1 / (1 + math.exp(-1))).float().mean().item()  # one standard deviation above the median
    assert below == pytest.approx(0.8413, abs=0.01)


# Paths


@pytest.mark.parametrize("path", PATHS)
def test_paths_lead_from_latents_to_noise(path):
    latents, noise = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    for level, end in ((0.0, latents), (1.0, noise)):
        torch.testing.assert_close(interpolate(latents, noise, torch.tensor(level, dtype=torch.float64), path), end)
    levels = torch.linspace(0, 1, 7, dtype=torch.float64)
    p = path_point(levels, path)
    if path == "cosine":
        torch.testing.assert_close(p.signal**2 + p.noise**2, torch.ones(7, dtype=torch.float64))
    else:
        torch.testing.assert_close(p.signal + p.noise, torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("noise_time", CONVENTIONS)
def test_the_target_is_the_derivative_by_the_familys_time(path, noise_time):
    latents, noise = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    time, step = torch.tensor(0.3, dtype=torch.float64), 1e-6
    at = lambda t: interpolate(latents, noise, noise_level(t, noise_time), path)  # noqa: E731
    numeric = (at(time + step) - at(time - step)) / (2 * step)
    exact = target_velocity(latents, noise, noise_level(time, noise_time), path, noise_time)
    torch.testing.assert_close(exact, numeric, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("path", PATHS)
def test_score_of_a_gaussian(path):
    x = randn(2, 3, 4)
    for level in (0.05, 0.5, 1.0):
        u = torch.tensor(level, dtype=torch.float64)
        p = path_point(u, path)
        variance = (p.signal * SPREAD) ** 2 + p.noise**2
        score = score_of(x, gaussian_velocity(1.0, path)(x, level), u, path)
        torch.testing.assert_close(score, -x / variance)


# Samplers


def final(velocity, start, sampling, noise_time, path="linear", draw=None):
    times = sampling_times(sampling, noise_time)
    states = list(FlowProcess(sampling, noise_time, path).solve(velocity, start, times, draw))
    assert len(states) == sampling.steps
    return states[-1]


@pytest.mark.parametrize("noise_time", CONVENTIONS)
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_ode_samplers_converge_at_their_order(noise_time, sampler, order):
    """Gaussian data: the flow scales noise to the data's standard deviation."""
    start = randn(4, 2, 3)
    errors = []
    for steps in (16, 32, 64):
        found = final(gaussian_velocity(noise_time), start, DiffusionSampling(sampler=sampler, steps=steps), noise_time)
        errors.append((found - SPREAD * start).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("noise_time", CONVENTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_the_sde_samples_the_distribution(noise_time, path):
    sampling = DiffusionSampling(sampler="euler_maruyama", steps=100)
    rng = torch.Generator().manual_seed(0)
    drawn = []

    def draw():
        drawn.append(1)
        return torch.randn(1, 40_000, 1, generator=rng)

    start = torch.randn(1, 40_000, 1, generator=rng)
    found = final(gaussian_velocity(noise_time, path), start, sampling, noise_time, path, draw)
    assert found.std().item() == pytest.approx(SPREAD, rel=0.03)
    assert found.mean().abs() < 0.02
    assert len(drawn) == 99  # the last step takes the mean
    correlation = (found * start).mean() / found.std() / start.std()
    assert correlation < 0.8  # the ODE would have 1


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler_maruyama"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_in_the_other_convention_gives_the_same(sampler, strategy):
    """Time and velocity reversed: all samplers and strategies give the same."""
    latents, noise, steps = randn(2, 5, 3, seed=1), randn(2, 5, 3), randn(20, 2, 5, 3, seed=2)
    keep = torch.tensor([True, False, True, True, False])[None, :, None]
    sampling = DiffusionSampling(sampler=sampler, steps=8, strategy=strategy)
    one = lambda x, t: torch.tanh(x + t) + t  # noqa: E731
    found = [
        sample_mixture(v, FlowProcess(sampling, noise_time), noise, latents, 0.4, keep, iter(steps).__next__)
        for v, noise_time in ((one, 1.0), (lambda x, t: -one(x, 1 - t), 0.0))
    ]
    torch.testing.assert_close(*found)


# Guidance


def test_guidance_keeps_to_its_interval_and_channels():
    calls = []

    def model(x, times, labels):
        calls.append((len(x), times.tolist()))
        return x + labels[:, None, None]

    sampling = DiffusionSampling(guidance_scale=3.0, guidance_interval=(0.25, 0.75), guided_channels=1)
    labels, x = torch.tensor([1, 2]), torch.zeros(2, 1, 3, dtype=torch.float64)
    velocity = guided_model(model, labels, 10, sampling)
    for time, guided in ((0.24, False), (0.25, True), (0.5, True), (0.75, True), (0.76, False)):
        calls.clear()
        found = velocity(x, time)
        expected = [-17.0, 1.0, 1.0] if guided else [1.0, 1.0, 1.0]  # 10 + 3 * (1 - 10)
        assert found[0, 0].tolist() == expected
        assert calls == [(4 if guided else 2, [time] * (4 if guided else 2))]
    whole = guided_model(model, labels, 10, DiffusionSampling(guidance_scale=3.0))(x, 1.0)
    assert whole[1, 0].tolist() == [-14.0] * 3
    assert not DiffusionSampling(guidance_scale=1.0).guides(0.5)


# Mixtures of samples with real latents


@pytest.mark.parametrize("noise_time", CONVENTIONS)
def test_sigma_is_the_share_of_steps_or_of_signal(noise_time):
    plan = lambda sigma, path="linear", **s: FlowProcess(  # noqa: E731
        DiffusionSampling(steps=10, **s), noise_time, path
    ).plan(sigma)
    for sigma in (0.0, 0.3, 0.9):
        start = 1 - sigma if noise_time == 1 else sigma
        assert plan(sigma).times[0].item() == pytest.approx(start)
        assert plan(sigma).noise_level == pytest.approx(1 - sigma)
        assert len(plan(sigma).times) == round(10 * (1 - sigma)) + 1
        shifted = plan(sigma, timestep_shift=0.3)
        assert len(shifted.times) == len(plan(sigma).times)
        assert sigma == 0 or shifted.noise_level != pytest.approx(1 - sigma, abs=0.01)
        by_signal = plan(sigma, timestep_shift=0.3, strategy="sdedit_snr")
        assert by_signal.noise_level == pytest.approx(1 - sigma)
        assert (noise_level(by_signal.times, noise_time).diff() < 0).all()
        cosine = plan(sigma, "cosine", strategy="sdedit_snr")
        signal = path_point(torch.tensor(cosine.noise_level, dtype=torch.float64), "cosine").signal
        assert signal.item() ** 2 == pytest.approx(sigma, abs=1e-12)
    for strategy in STRATEGIES:
        one = plan(1.0, strategy=strategy)
        assert (len(one.times), one.noise_level, one.guided_share) == (1, 0.0, 0.0)
    assert plan(0.5, strategy="token_mix").noise_level == plan(0.5, strategy="linear_mix").noise_level == 1
    assert plan(0.5, strategy="noise_only").details() == {"noise_level": 0.5, "sampler_steps": 0, "guided_share": 0.0}


def test_the_guided_share_of_published_settings():
    sit = DiffusionSampling(sampler="euler_maruyama", steps=250, guidance_scale=1.9, guidance_interval=(0, 0.75))
    lightning = DiffusionSampling(
        steps=249, guidance_scale=6.7, guidance_interval=(0.125, 1.0), guided_channels=3, timestep_shift=0.3
    )
    for sampling, noise_time in ((sit, 1.0), (lightning, 0.0)):
        assert FlowProcess(sampling, noise_time).plan(0.9).guided_share == 1  # the noisy part is left out
        share = FlowProcess(sampling, noise_time).plan(0.0).guided_share
        visited = sampling_times(sampling, noise_time)[:-1].tolist()
        low, high = sampling.guidance_interval
        assert share == sum(low <= t <= high for t in visited) / len(visited)
        assert 0.5 < share < 0.8


@pytest.mark.parametrize("noise_time", CONVENTIONS)
@pytest.mark.parametrize("sampler", ["euler", "euler_maruyama"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_higher_sigma_is_nearer_to_the_reference(noise_time, sampler, strategy):
    latents, noise = SPREAD * randn(8, 16, 4, seed=1), randn(8, 16, 4)
    uniforms = torch.rand(8, 16, 1, generator=torch.Generator().manual_seed(3))
    process = FlowProcess(DiffusionSampling(sampler=sampler, steps=20, strategy=strategy), noise_time)
    arguments = (gaussian_velocity(noise_time), process, noise)

    def mixed(sigma):
        draw = iter(randn(20, 8, 16, 4, seed=2)).__next__
        return sample_mixture(*arguments, latents, sigma, uniforms < sigma, draw)

    sigmas = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)[strategy == "noise_only" :]  # at 0 that one turns into a free sample
    distances = [(mixed(sigma) - latents).square().mean().item() for sigma in sigmas]
    assert all(a > b for a, b in pairwise(distances)), distances
    assert distances[-1] == 0
    assert torch.equal(mixed(0.0), sample_mixture(*arguments, draw=iter(randn(20, 8, 16, 4, seed=2)).__next__))


@pytest.mark.parametrize("noise_time", CONVENTIONS)
def test_token_mix_gives_kept_latents_the_noise_level_of_the_others(noise_time):
    latents, noise = randn(1, 4, 2, seed=1), randn(1, 4, 2)
    keep = torch.tensor([True, False, False, True])[None, :, None]
    sampling, seen = DiffusionSampling(steps=4, strategy="token_mix"), []

    def velocity(x, time):
        seen.append((time, x))
        return torch.zeros_like(x)

    found = sample_mixture(velocity, FlowProcess(sampling, noise_time), noise, latents, 0.5, keep)
    for time, x in seen:
        level = noise_level(torch.tensor(time, dtype=torch.float64), noise_time)
        torch.testing.assert_close(x, torch.where(keep, (1 - level) * latents + level * noise, noise))
    assert len(seen) == 4
    assert torch.equal(found, torch.where(keep, latents, noise))


def test_noise_only_and_linear_mix_by_hand():
    latents, noise = randn(2, 4, 2, seed=1), randn(2, 4, 2)
    mix = lambda strategy: sample_mixture(  # noqa: E731
        lambda x, t: -x, FlowProcess(DiffusionSampling(steps=1, strategy=strategy), 0.0), noise, latents, 0.75
    )
    torch.testing.assert_close(mix("noise_only"), latents + 0.25 * noise)
    torch.testing.assert_close(mix("linear_mix"), 0.75 * latents)  # one step of -x ends at 0


def test_noise_belongs_to_the_image():
    whole = image_normals(image_rngs(0, range(5)), (3, 2))
    assert whole.shape == (5, 3, 2)
    assert torch.equal(image_normals(image_rngs(0, [3, 1]), (3, 2)), whole[[3, 1]])
    assert image_normals([], (3, 2)).shape == (0, 3, 2)


# Errors


def test_references_that_do_not_fit():
    shape, good = (2, 4, 3), torch.zeros(2, 4, 3)
    check_mixture(None, None, shape, None)
    check_mixture(0.5, good, shape, None)
    with pytest.raises(UserError, match=r"sigma is 1\.5"):
        check_mixture(1.5, good, shape, None)
    with pytest.raises(UserError, match="no reference is given"):
        check_mixture(0.5, None, shape, None)
    for wrong in (torch.zeros(2, 3, 4), torch.zeros(2, 4), torch.zeros(2, 4, 3, dtype=torch.int64)):
        with pytest.raises(UserError, match="the reference has shape"):
            check_mixture(0.5, wrong, shape, None)


def test_intervals_that_are_none():
    for wrong in ([0.5, 0.2], [-0.1, 1], [0, 1.5]):
        with pytest.raises(UserError, match="guidance_interval"):
            validate(DiffusionSampling, {"guidance_interval": wrong})
