"""The samplers of DDPM against those of diffusers, and sigma against closed forms."""

import math
from itertools import pairwise

import pytest
import torch

from robustok.errors import UserError
from robustok.generators.ddpm import DDPMProcess, DDPMSampling, add_noise, alpha_bars
from robustok.generators.ddpm import visited_timesteps as visited
from robustok.generators.diffusion_sampling import sample_mixture

BARS = alpha_bars(1000, 1e-4, 0.02, "linear")
STRATEGIES = ["sdedit", "sdedit_snr", "linear_mix", "noise_only", "token_mix"]
SHAPE = (2, 16, 3)  # a grid of 4 x 4
SPREAD = 0.5  # standard deviation of the Gaussian data


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def predicted(x, time, variance=False):
    """No sensible model: a nonlinear function of state and timestep, with a variance in [-1, 1] if asked for."""
    noise = torch.tanh(x * (1 + time / 500)) + 0.3 * torch.sin(x + time)
    return torch.cat([noise, torch.cos(3 * x + time)], dim=-1) if variance else noise


def gaussian_noise(x, time):
    """The true prediction for data from a normal distribution of mean 0."""
    bar = BARS[int(time)]
    return (1 - bar).sqrt() / (bar * SPREAD**2 + 1 - bar) * x


def last(states):
    *_, state = states
    return state


# Against diffusers


def grid(x):
    return x.transpose(1, 2).unflatten(2, (4, 4))


def row(x):
    return x.flatten(2).transpose(1, 2)


def by_diffusers(scheduler, steps, start, variance=False, exact=True, **step):
    """The trajectory of one of its schedulers, whose constants are float32 unless they are made exact."""
    scheduler.set_timesteps(steps)
    if exact:
        scheduler.alphas_cumprod, scheduler.one = BARS[:-1], BARS[-1]
        if hasattr(scheduler, "final_alpha_cumprod"):
            scheduler.final_alpha_cumprod = BARS[-1]
    x, states, rng = grid(start), [], torch.Generator().manual_seed(5)
    for time in scheduler.timesteps:
        model = grid(predicted(row(x), time.item(), variance))
        x = scheduler.step(model, time, x, generator=rng, **step).prev_sample
        states.append(row(x))
    return scheduler.timesteps.tolist(), torch.stack(states)


def ours(sampling, start, variance=False, clip=None):
    rng = torch.Generator().manual_seed(5)
    draw = lambda: row(torch.randn(2, 3, 4, 4, generator=rng, dtype=torch.float64))  # noqa: E731
    times = visited(sampling.steps, 1000, sampling.spacing)
    model = lambda x, time: predicted(x, time, variance)  # noqa: E731
    return times.tolist()[:-1], torch.stack([*DDPMProcess(sampling, BARS, clip).solve(model, start, times, draw)])


@pytest.mark.parametrize(("exact", "tolerance"), [(True, 1e-12), (False, 1e-4)])
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 50), ("leading", 250), ("trailing", 20)])
def test_ddim_goes_the_way_of_diffusers(spacing, steps, eta, clip, exact, tolerance):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        timestep_spacing=spacing, clip_sample=clip is not None, clip_sample_range=clip or 1.0
    )
    found = ours(DDPMSampling(steps=steps, spacing=spacing, eta=eta), start := randn(*SHAPE), clip=clip)
    expected = by_diffusers(scheduler, steps, start, exact=exact, eta=eta)
    assert found[0] == expected[0]
    # It adds noise in the last step too, though next to none: there is no variance left.
    torch.testing.assert_close(found[1], expected[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("exact", "tolerance"), [(True, 1e-12), (False, 1e-4)])
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize(
    ("variance", "theirs"), [("small", "fixed_small"), ("large", "fixed_large"), ("learned", "learned_range")]
)
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 50), ("linspace", 250), ("leading", 1000)])
def test_ancestral_sampling_goes_the_way_of_diffusers(spacing, steps, variance, theirs, clip, exact, tolerance):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        variance_type=theirs, timestep_spacing=spacing, clip_sample=clip is not None, clip_sample_range=clip or 1.0
    )
    sampling = DDPMSampling(sampler="ancestral", steps=steps, spacing=spacing, variance=variance)
    found = ours(sampling, start := randn(*SHAPE), variance == "learned", clip)
    expected = by_diffusers(scheduler, steps, start, variance == "learned", exact)
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_latents_are_noised_as_in_diffusers(schedule):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_start=0.001, beta_end=0.01, beta_schedule=schedule)
    bars, latents, noise = alpha_bars(1000, 0.001, 0.01, schedule), randn(*SHAPE), randn(*SHAPE, seed=1)
    for time in (0, 500, 999):
        expected = scheduler.add_noise(latents, noise, torch.tensor([time] * 2))
        torch.testing.assert_close(add_noise(latents, noise, bars[time]), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(add_noise(latents, noise, bars[-1]), latents)


# Time


def test_timesteps_by_hand():
    assert visited(4, 10, "leading").tolist() == [6, 4, 2, 0, -1]
    assert visited(4, 10, "linspace").tolist() == [9, 6, 3, 0, -1]
    assert visited(4, 10, "trailing").tolist() == [9, 7, 4, 1, -1]
    for spacing in ("leading", "linspace", "trailing"):
        assert visited(10, 10, spacing).tolist() == [*range(9, -1, -1), -1]
        with pytest.raises(UserError, match=r"steps is 11, and the model has 10 timesteps"):
            visited(11, 10, spacing)
    assert visited(1, 10, "linspace").tolist() == [9, -1]


def test_alpha_bars_by_hand():
    found = alpha_bars(3, 0.1, 0.3, "linear")
    torch.testing.assert_close(found, torch.tensor([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7, 1.0]).double())


# Samplers against what is known


def test_ancestral_sampling_is_ddim_with_all_of_its_noise():
    """They are one formula where nothing is clipped and the variance is the posterior's (DDIM, section 4.1)."""
    start = randn(*SHAPE)
    ddim = ours(DDPMSampling(steps=30, eta=1.0), start)[1]
    torch.testing.assert_close(ours(DDPMSampling(steps=30, sampler="ancestral"), start)[1], ddim)


def test_a_perfect_model_makes_the_data():
    """Gaussian data from noise: DDIM scales the noise, ancestral draws anew; both have its standard deviation."""
    start = randn(4000, 1, 1)
    for sampler in ("ddim", "ancestral"):
        seeds = iter(range(1, 1000))
        sampling = DDPMSampling(steps=500, spacing="linspace", sampler=sampler)
        times = visited(500, 1000, "linspace")
        draw = lambda seeds=seeds: randn(4000, 1, 1, seed=next(seeds))  # noqa: E731
        samples = last(DDPMProcess(sampling, BARS).solve(gaussian_noise, start, times, draw))
        assert samples.std().item() == pytest.approx(SPREAD, rel=0.04)
        shared = torch.corrcoef(torch.stack([samples, start]).flatten(1))[0, 1].item()
        assert shared > 0.999 if sampler == "ddim" else abs(shared) < 0.1


def test_a_learned_variance_lies_between_the_fixed_ones():
    start, times = torch.zeros(1, 1, 1).double(), visited(2, 1000, "linspace")

    def spread(variance, learned):
        sampling = DDPMSampling(sampler="ancestral", steps=2, spacing="linspace", variance=variance)
        model = lambda x, time: torch.cat([0 * x, 0 * x + learned], dim=-1)  # noqa: E731
        return next(DDPMProcess(sampling, BARS).solve(model, start, times, lambda: torch.ones(1, 1, 1))).item()

    assert spread("learned", -1.0) == pytest.approx(spread("small", 0.0))
    assert spread("learned", 1.0) == pytest.approx(spread("large", 0.0))
    assert spread("learned", 0.0) == pytest.approx(math.sqrt(spread("small", 0.0) * spread("large", 0.0)))


# Mixtures of samples with real latents


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_higher_sigma_is_nearer_to_the_reference(sampler, strategy):
    latents, noise = SPREAD * randn(8, 16, 4, seed=1), randn(8, 16, 4)
    uniforms = torch.rand(8, 16, 1, generator=torch.Generator().manual_seed(3))
    process = DDPMProcess(DDPMSampling(sampler=sampler, steps=50, strategy=strategy), BARS)

    def mixed(sigma):
        draw = iter(randn(50, 8, 16, 4, seed=2)).__next__
        return sample_mixture(gaussian_noise, process, noise, latents, sigma, uniforms < sigma, draw)

    sigmas = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)[strategy == "noise_only" :]  # at 0 that one turns into a free sample
    distances = [(mixed(sigma) - latents).square().mean().item() for sigma in sigmas]
    assert all(a > b for a, b in pairwise(distances)), distances
    assert distances[-1] == 0
    free = sample_mixture(gaussian_noise, process, noise, draw=iter(randn(50, 8, 16, 4, seed=2)).__next__)
    assert torch.equal(mixed(0.0), free)


def test_where_sampling_starts():
    plan = lambda sigma, **settings: DDPMProcess(DDPMSampling(**settings), BARS).plan(sigma)  # noqa: E731
    found = plan(0.9, steps=50)
    assert found.times.tolist() == [80, 60, 40, 20, 0, -1]  # round(0.1 * 50) steps are left
    assert found.noise_level == pytest.approx((1 - BARS[80]).sqrt().item())
    assert BARS[100].sqrt() == pytest.approx(0.946, abs=1e-3)  # what sigma 0.9 leaves of 1000 steps
    assert found.details() == {"noise_level": found.noise_level, "sampler_steps": 5, "guided_share": 0.0}
    assert plan(0.9, steps=50, guidance_scale=2.0).guided_share == 1
    for strategy in STRATEGIES:
        nothing = plan(1.0, strategy=strategy, guidance_scale=2.0)
        assert (nothing.times.tolist(), nothing.noise_level, nothing.guided_share) == ([-1], 0, 0)
    assert plan(0.999, steps=50).times.tolist() == [-1]  # half a step is none
    assert plan(0.3, strategy="noise_only").noise_level == pytest.approx(0.7)
    for strategy in ("linear_mix", "token_mix"):
        assert len(plan(0.9, strategy=strategy).times) == 51


@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.9, 0.999])
def test_the_signal_decides_where_asked_to(sigma):
    found = DDPMProcess(DDPMSampling(strategy="sdedit_snr"), BARS).plan(sigma)
    start, *others = found.times.tolist()
    assert abs(BARS[start] - sigma) == (BARS - sigma).abs().min()
    assert others == [t for t in visited(50, 1000, "leading").tolist() if t < start]
    assert found.noise_level == pytest.approx(math.sqrt(1 - sigma), abs=0.01)


def test_sampling_starts_from_the_noised_reference():
    latents, noise, seen = randn(*SHAPE), randn(*SHAPE, seed=1), []

    def model(x, time):
        seen.append((time, x))
        return noise  # the truth

    found = sample_mixture(model, DDPMProcess(DDPMSampling(steps=10), BARS), noise, latents, 0.6)
    assert [time for time, _ in seen] == [300, 200, 100, 0]
    for time, x in seen:
        torch.testing.assert_close(x, add_noise(latents, noise, BARS[time]))
    torch.testing.assert_close(found, latents)


def test_token_mix_gives_kept_latents_the_noise_level_of_the_others():
    latents, noise, seen = randn(1, 4, 2, seed=1), randn(1, 4, 2), []
    keep = torch.tensor([True, False, False, True])[None, :, None]

    def model(x, time):
        seen.append((time, x))
        return noise

    process = DDPMProcess(DDPMSampling(steps=4, strategy="token_mix"), BARS)
    found = sample_mixture(model, process, noise, latents, 0.5, keep)
    for time, x in seen:
        torch.testing.assert_close(x[0, [0, 3]], add_noise(latents, noise, BARS[time])[0, [0, 3]])
    assert len(seen) == 4
    assert torch.equal(found[0, [0, 3]], latents[0, [0, 3]])
    assert not torch.isclose(found, latents)[0, 1:3].any()


def test_noise_only_and_linear_mix_by_hand():
    latents, noise = randn(2, 4, 2, seed=1), randn(2, 4, 2)
    mixed = lambda strategy: sample_mixture(  # noqa: E731
        lambda x, time: 0 * x, DDPMProcess(DDPMSampling(steps=1, strategy=strategy), BARS), noise, latents, 0.75
    )
    torch.testing.assert_close(mixed("noise_only"), latents + 0.25 * noise)
    torch.testing.assert_close(mixed("linear_mix"), 0.75 * latents + 0.25 * noise / BARS[0].sqrt())
