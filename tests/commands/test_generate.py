import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from robustok.commands.encode import chosen_shard_size
from robustok.commands.generate import GenerateRun, SampleCacheSettings, generate, samples_at_once
from robustok.commands.make_pairs import MakePairsRun, make_pairs, reencode
from robustok.data.latent_cache import LatentCache
from robustok.data.pixels import from_pixels, to_pixels
from robustok.errors import UserError
from robustok.generators import load_generator
from robustok.generators.sampling import Sampling
from robustok.tokenizers import load_tokenizer
from robustok.training.tokenizer import train_tokenizer
from tiny_models import tiny_generator
from tiny_tokens import build


def records(path):
    return LatentCache(path).read(slice(None))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, generator, latents):
    """Function of sigma and further words to the records of pairs."""
    folder = tmp_path_factory.mktemp("mixed")

    def make(sigma, name, *words):
        return records(make_pairs(tiny.pairs_run(folder / name, generator, latents, f"sigma={sigma}", *words)))

    return make


# Free samples


def test_samples_are_class_balanced_and_their_own(samples):
    first, second = map(records, samples)
    assert first.labels.tolist() == [i % 10 for i in range(40)]
    assert (first.indices == -1).all()
    assert first.seeds.tolist() == list(range(40))
    assert 0.1 < (first.latents != second.latents).float().mean() <= 1
    assert len(first.latents.unique(dim=0)) > 20
    assert LatentCache(samples[0]).manifest.source["seed"] == 1


def test_a_sample_depends_on_its_number_alone(tmp_path, generator, samples):
    words = ("seed=1", "cache.batch_size=7", "cache.shard_size=9", "count=23")
    fewer = records(generate(tiny.samples_run(tmp_path / "a", generator, *words)))
    assert torch.equal(fewer.latents, records(samples[0]).latents[:23])


@pytest.mark.parametrize(("count", "most"), [(50_000, 1.07), (200_000, 1.01), (1_281_167, 1.07)])
def test_shards_leave_none_of_eight_processes_idle(count, most):
    size = chosen_shard_size(SampleCacheSettings(), count)
    records = [0] * 8
    for k, start in enumerate(range(0, count, size)):
        records[k % 8] += min(size, count - start)
    assert max(records) <= most * count / 8
    assert 512 <= size <= 10_000


def test_an_unfinished_cache_keeps_its_shards(tmp_path, generator, samples):
    """As one of an earlier version, whose default was 10,000."""
    run = tiny.samples_run(tmp_path / "a", generator, "seed=1", "cache.shard_size=23")
    generate(run)
    first = (tmp_path / "a" / "shard-00000.safetensors").read_bytes()
    (tmp_path / "a" / "shard-00001.safetensors").unlink()
    found = records(generate(tiny.samples_run(tmp_path / "a", generator, "seed=1")))
    assert (tmp_path / "a" / "shard-00000.safetensors").read_bytes() == first
    assert torch.equal(found.latents, records(samples[0]).latents)
    with pytest.raises(UserError, match="shard_size"):
        generate(tiny.samples_run(tmp_path / "a", generator, "seed=1", "cache.shard_size=10"))


def test_as_many_tokens_are_sampled_at_once_as_the_memory_of_a_gpu_holds(monkeypatch):
    model, sampling = build("rar"), Sampling(guidance_scale=4)
    one = 2 * 2 * 2 * 4 * 8 * 10 * 4  # keys and values, rows, blocks, heads, head width, positions, float32
    assert model.cache_bytes(sampling) == one == 2 * model.cache_bytes(Sampling())
    with torch.autocast("cpu", torch.bfloat16):
        assert 2 * model.cache_bytes(sampling) == one
    settings = SampleCacheSettings()
    assert samples_at_once(model, settings, sampling) == 64  # on a CPU
    for free, size in ((3 * 512, 512), (3 * 511, 256), (3 * 128, 128), (3, 64)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free * one, 0))
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            assert samples_at_once(model, settings, sampling) == size
            assert samples_at_once(tiny_generator("sit"), settings, sampling) == 64
            assert samples_at_once(model, SampleCacheSettings(batch_size=7), sampling) == 7


def test_chosen_classes_and_settings(tmp_path, generator):
    words = ("classes=[3,7]", "count=6", "sampling.top_k=1")
    found = LatentCache(generate(tiny.samples_run(tmp_path / "a", generator, *words)))
    assert found.labels.tolist() == [3, 7, 3, 7, 3, 7]
    assert found.manifest.source["sampling"]["top_k"] == 1
    tokens = found.read(slice(None)).latents
    assert torch.equal(tokens[0], tokens[2])  # the most likely token each time
    for wrong in ("[10]", "[-1]"):
        with pytest.raises(UserError, match=r"class -?\d+ is not among the generator's classes 0 to 9"):
            generate(tiny.samples_run(tmp_path / "b", generator, f"classes={wrong}"))


@torch.no_grad()
def test_images_are_the_decoded_samples(tmp_path, generator, tokenizer, samples):
    words = ("seed=1", f"tokenizer={tokenizer}")
    npz = generate(tiny.samples_run(tmp_path / "npz", generator, *words, "images=npz"))
    png = generate(tiny.samples_run(tmp_path / "png", generator, *words, "images=png"))
    expected = to_pixels(load_tokenizer(tokenizer).decode(records(samples[0]).latents)).permute(0, 2, 3, 1).numpy()
    stored = np.load(npz / "samples.npz")["arr_0"]
    assert (stored.shape, stored.dtype) == ((40, 16, 16, 3), np.uint8)
    assert np.array_equal(stored, expected)
    files = sorted((png / "png").iterdir())
    assert [file.name for file in files[:2]] == ["000000_class0000.png", "000001_class0001.png"]
    assert np.array_equal(np.stack([np.array(Image.open(file)) for file in files]), expected)


def test_images_and_tokenizer_go_together(tmp_path, generator, tokenizer):
    for words in ((f"tokenizer={tokenizer}",), ("images=npz",)):
        with pytest.raises(UserError, match="images and tokenizer go together"):
            tiny.samples_run(tmp_path / "a", generator, *words)
    other = train_tokenizer(tiny.main_run(tmp_path / "other", "steps=1", "seed=5"))
    with pytest.raises(UserError, match="is not the tokenizer whose latents"):
        generate(tiny.samples_run(tmp_path / "a", generator, f"tokenizer={other}", "images=npz"))


def test_an_interrupted_cache_is_completed(tmp_path, generator, monkeypatch):
    run = tiny.samples_run(tmp_path / "a", generator, "cache.shard_size=10")
    whole = records(generate(tiny.samples_run(tmp_path / "whole", generator, "cache.shard_size=10")))
    sample, calls = type(load_generator(generator)).generate, []

    def stop(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(type(load_generator(generator)), "generate", stop)
        with pytest.raises(KeyboardInterrupt):
            generate(run)
    assert len(list((tmp_path / "a").glob("shard*"))) == 2
    assert torch.equal(records(generate(run)).latents, whole.latents)
    assert len(list((tmp_path / "a").glob("shard*"))) == 4
    with pytest.raises(UserError, match=r"holds other latents .*seed"):
        generate(tiny.samples_run(tmp_path / "a", generator, "cache.shard_size=10", "seed=9"))


# Pairs


def test_sigma_one_is_the_encoded_tokens(mixed, latents):
    real, pairs = records(latents), mixed(1.0, "one")
    order = {int(index): row for row, index in enumerate(real.indices)}
    rows = [order[int(index)] for index in pairs.indices]
    assert sorted(rows) == list(range(128))  # every image once
    assert torch.equal(pairs.latents, real.latents[rows])
    assert torch.equal(pairs.labels, real.labels[rows])


def test_sigma_zero_ignores_them_and_the_kept_share_is_sigma(mixed):
    real = mixed(1.0, "one-again").latents
    free = mixed(0.0, "zero").latents
    chance = (free == real).float().mean().item()
    assert chance < 0.85
    for sigma in (0.3, 0.8):
        pairs = mixed(sigma, str(sigma)).latents
        # A position that is not kept agrees with the real token now and then.
        expected = sigma + (1 - sigma) * chance
        assert abs((pairs == real).float().mean().item() - expected) < 0.05


def test_a_subset_is_chosen_by_the_seed(mixed):
    chosen = [mixed(1.0, name, "count=20", f"seed={seed}").indices for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])
    assert len(chosen[0].unique()) == 20
    assert len(mixed(1.0, "many", "count=100000").indices) == 128


@torch.no_grad()
def test_reencoded_pairs_went_through_pixels(mixed, tokenizer):
    direct = mixed(0.5, "direct")
    again = mixed(0.5, "again", "mode=reencoded", f"tokenizer={tokenizer}", "cache.batch_size=128")
    model = load_tokenizer(tokenizer)
    pixels = to_pixels(model.decode(direct.latents))
    assert pixels.dtype == torch.uint8
    assert torch.equal(again.latents, model.encode(from_pixels(pixels)))
    assert torch.equal(again.latents, reencode(model, direct.latents))
    assert torch.equal(again.indices, direct.indices)
    assert not torch.equal(again.latents, direct.latents)


def test_pairs_name_their_making(pairs, latents):
    manifest, real = LatentCache(pairs).manifest, LatentCache(latents).manifest
    assert (manifest.data, manifest.tokenizer, manifest.latent_shape) == (real.data, real.tokenizer, real.latent_shape)
    assert (manifest.source["sigma"], manifest.source["mode"]) == (0.5, "direct")


def test_what_cannot_be_mixed(tmp_path, generator, latents, tokenizer):
    with pytest.raises(UserError, match="sigma"):
        tiny.pairs_run(tmp_path / "a", generator, latents, "sigma=1.2")
    with pytest.raises(UserError, match="reencoded needs the tokenizer"):
        tiny.pairs_run(tmp_path / "a", generator, latents, "mode=reencoded")
    other = train_tokenizer(tiny.main_run(tmp_path / "other", "steps=1", "seed=5"))
    foreign = tiny.encode(tiny.tokens_run(tmp_path / "foreign", other))
    with pytest.raises(UserError, match="was made by another tokenizer"):
        make_pairs(tiny.pairs_run(tmp_path / "a", generator, foreign))
    assert {"sampling", "seed"} <= GenerateRun.model_fields.keys() & MakePairsRun.model_fields.keys()
