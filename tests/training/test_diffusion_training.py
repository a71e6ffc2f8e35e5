"""Training of diffusion generators on continuous latents, and the commands that use them."""

import numpy as np
import pytest
import torch
import yaml

import tiny
from robustok.commands.dry_run import estimate
from robustok.commands.generate import generate
from robustok.commands.make_pairs import make_pairs
from robustok.data.latent_cache import LatentCache, Manifest, create_cache, write_shard
from robustok.errors import UserError
from robustok.generators import load_generator
from robustok.training.generator import draw_step, latent_statistics, train_generator

L, D, CLASSES, COUNT = 4, 3, 3, 90
MEAN, STD = np.array([5.0, -2.0, 0.1]), np.array([0.03, 1.0, 20.0])  # as different as the channels of VA-VAE may be
FAMILIES = ["sit", "lightningdit"]


def records(path):
    return LatentCache(path).read(slice(None))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Continuous latents in two shards: each class has a pattern of its own."""
    path = tmp_path_factory.mktemp("continuous") / "cache"
    random = np.random.default_rng(0)
    labels = np.arange(COUNT) % CLASSES
    pattern = random.standard_normal((CLASSES, L, D))
    latents = (MEAN + STD * (pattern[labels] + 0.3 * random.standard_normal((COUNT, L, D)))).astype(np.float32)
    create_cache(path, Manifest("continuous", (L, D), None, CLASSES, COUNT, 50, tokenizer="t", data="d"))
    for k, rows in enumerate((slice(0, 50), slice(50, COUNT))):
        fields = {"labels": labels[rows], "indices": np.arange(COUNT)[rows], "seeds": labels[rows] * 0}
        write_shard(path, k, {"latents": latents[rows], **fields})
    return path


def run_of(out, cache, name, *words):
    return tiny.generator_run(out, cache, f"generator.name={name}", *words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache):
    """Family to the run folder of a short training."""
    folder = tmp_path_factory.mktemp("trained")
    sampling = ("sampling.name=diffusion", "sampling.steps=5", "sampling.guidance_scale=1.5")
    words = ("steps=60", "batch_size=64", "log_every=10", "state_every=60", "generator.width=32", *sampling)
    for name in FAMILIES:
        train_generator(run_of(folder / name, cache, name, *words))
    return {name: folder / name for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_few_steps_lower_the_loss(trained, name):
    lines = tiny.log(trained[name])
    assert lines[-1]["flow_matching"] < 0.75 * lines[0]["flow_matching"]
    assert all(line["total"] == line["flow_matching"] for line in lines)
    assert "random_order" not in lines[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_snapshot_says_what_sampling_needs(trained, cache, name):
    header = yaml.safe_load((trained[name] / "snapshot" / "00000060" / "config.yaml").read_text())
    generator, real = load_generator(trained[name]), records(cache).latents
    assert (header["codebook_size"], header["latent_shape"], header["classes"]) == (None, [L, D], CLASSES)
    assert (generator.latent_shape, generator.latent_space, generator.classes) == ((L, D), "t", CLASSES)
    assert (generator.sampling.steps, generator.sampling.guidance_scale) == (5, 1.5)
    normalised = generator.normalise(real).flatten(0, 1)
    torch.testing.assert_close(normalised.mean(0), torch.zeros(D, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(normalised.std(0, correction=0), torch.ones(D, dtype=torch.float64))
    assert generator.check(real) == []


def test_statistics_of_a_cache(cache):
    """In chunks as at once, and exact where the mean is far larger than the standard deviation."""
    latents = records(cache).latents.double().flatten(0, 1)  # (N * L, D)
    for rows in (7, 4096):
        mean, std = latent_statistics(LatentCache(cache), rows)
        np.testing.assert_allclose(mean, latents.mean(0), rtol=1e-12)
        np.testing.assert_allclose(std, latents.std(0, correction=0), rtol=1e-9)


def test_statistics_that_are_given_stay(tmp_path, cache):
    words = ("steps=1", "generator.latent_mean=5.0", "generator.latent_std=[1.0,2.0,3.0]")
    train_generator(run_of(tmp_path / "run", cache, "sit", *words))
    config = load_generator(tmp_path / "run").config
    assert (config.latent_mean, config.latent_std) == (5.0, [1.0, 2.0, 3.0])


@pytest.mark.parametrize("name", FAMILIES)
def test_an_interrupted_training_ends_in_the_same_bits(tmp_path, cache, name):
    run = lambda out: run_of(out, cache, name, "steps=6", "state_every=2", "log_every=3")  # noqa: E731
    train_generator(run(tmp_path / "whole"))
    with tiny.interrupted(3):
        train_generator(run(tmp_path / "stopped"))
    torch.manual_seed(1)  # what happened in between must not matter
    train_generator(run(tmp_path / "stopped"))
    found, expected = dict(tiny.saved(tmp_path / "stopped")), dict(tiny.saved(tmp_path / "whole"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value, key


def test_draws_are_a_function_of_seed_and_step(tmp_path, cache):
    run = run_of(tmp_path / "run", cache, "lightningdit", "batch_size=512", "generator.label_dropout=0.3")
    first, again, later = (draw_step(run, (L, D), step) for step in (0, 0, 1))
    (levels, noise), (same_levels, same_noise) = first.inputs, again.inputs
    assert torch.equal(levels, same_levels)
    assert torch.equal(noise, same_noise)
    assert not torch.equal(noise, later.inputs[1])
    assert (levels.shape, noise.shape, first.dropped.shape) == ((512,), (512, L, D), (512,))
    assert abs(first.dropped.float().mean().item() - 0.3) < 0.1
    assert abs(noise.std().item() - 1) < 0.05


# Commands


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_are_continuous_latents_of_their_class(tmp_path, trained, cache, name):
    found = LatentCache(generate(tiny.samples_run(tmp_path / "a", trained[name], "sampling.name=diffusion")))
    manifest = found.manifest
    assert (manifest.kind, manifest.codebook_size, manifest.latent_shape) == ("continuous", None, (L, D))
    assert (manifest.source["sampling"]["name"], manifest.source["sampling"]["sampler"]) == ("diffusion", "euler")
    samples, real = found.read(slice(None)), records(cache)
    assert samples.labels.tolist() == [i % CLASSES for i in range(40)]
    means = torch.stack([real.latents[real.labels == c].mean(0) for c in range(CLASSES)])  # (C, L, D)
    distances = ((samples.latents[:, None] - means) / torch.tensor(STD)).square().mean((2, 3))  # (N, C)
    assert (distances.argmin(1) == samples.labels).float().mean() > 0.6  # by chance a third
    fewer = records(generate(tiny.samples_run(tmp_path / "b", trained[name], "sampling.name=diffusion", "count=7")))
    torch.testing.assert_close(fewer.latents, samples.latents[:7], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_pairs_come_nearer_with_sigma_and_say_how(tmp_path, trained, cache, name):
    real, distances = records(cache), []
    for sigma in (0.0, 0.4, 0.8, 1.0):
        words = (f"sigma={sigma}", "cache.shard_size=40")
        path = make_pairs(tiny.pairs_run(tmp_path / str(sigma), trained[name], cache, *words))
        pairs, source = records(path), LatentCache(path).manifest.source
        assert sorted(pairs.indices.tolist()) == list(range(COUNT))
        assert torch.equal(pairs.labels, real.labels[pairs.indices])
        targets = real.latents[pairs.indices]
        distances.append(((pairs.latents - targets) / torch.tensor(STD)).square().mean().item())
        assert (source["sigma"], source["strategy"]) == (sigma, "sdedit")
        assert source["sampler_steps"] == round(5 * (1 - sigma))
        assert source["noise_level"] == pytest.approx(1 - sigma)
        assert source["guided_share"] == (sigma < 1)
    assert distances[0] > distances[1] > distances[2] > distances[3] == 0


def test_what_does_not_fit(tmp_path, trained, cache, generator, latents):
    with pytest.raises(UserError, match="holds tokens, generator sit models continuous latents"):
        train_generator(run_of(tmp_path / "a", latents, "sit"))
    with pytest.raises(UserError, match=r"generator sit takes sampling\.name=diffusion, got tokens"):
        train_generator(run_of(tmp_path / "a", cache, "sit", "sampling.top_k=3"))
    with pytest.raises(UserError, match=r"generator rar takes sampling\.name=tokens, got diffusion"):
        generate(tiny.samples_run(tmp_path / "a", generator, "sampling.name=diffusion"))
    with pytest.raises(UserError, match="holds tokens, generator sit models continuous latents"):
        make_pairs(tiny.pairs_run(tmp_path / "a", trained["sit"], latents))
    with pytest.raises(UserError, match="holds continuous latents, generator rar models tokens"):
        make_pairs(tiny.pairs_run(tmp_path / "a", generator, cache))
    assert not (tmp_path / "a").exists()


def test_estimates(tmp_path, trained, cache):
    facts = estimate(run_of(tmp_path / "a", cache, "sit", "generator.width=32"))
    found = sum(p.numel() for p in load_generator(trained["sit"]).parameters())
    assert (facts["generator_parameters"], facts["latent_width"]) == (found, D)
    record = L * D * 4 + 21
    assert estimate(tiny.pairs_run(tmp_path / "a", trained["sit"], cache))["cache_bytes"] == COUNT * record
