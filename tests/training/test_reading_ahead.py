"""What the trainings read and draw is the same whoever reads it, and as it was before there were workers."""

import hashlib
import math

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache, create_cache, write_shard
from robustok.data.loader import ahead
from robustok.data.manifest import Manifest
from robustok.data.pixels import to_pixels
from robustok.data.sources import Folder
from robustok.training.generator import GeneratorTrainingRun, draw_step, step_inputs, train_generator
from robustok.training.objectives import LatentNoise, Material, Steps, mixture
from robustok.training.tokenizer import train_tokenizer
from tiny_images import save_tree

COUNT, SHARD, L, CODES = 60, 17, 16, 32
MIXTURE = {"paired": 1, "free": 1, "noise": 2}


def digest(*tensors):
    """Of the bytes of integers, which are the same on every machine."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return sha.hexdigest()[:16]


class Decoder(nn.Module):
    """Each token is a square of 2x2 pixels."""

    kind = "discrete"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.codebook = torch.arange(float(CODES))[:, None] ** 2

    def decode(self, tokens):
        squares = tokens.float().view(-1, 1, 4, 4).expand(-1, 3, 4, 4)
        return squares.repeat_interleave(2, 2).repeat_interleave(2, 3) / 16 - 1


def save_tokens(path, data, flips):
    rng = np.random.default_rng(len(path.name))
    manifest = Manifest("discrete", (L, 4), CODES, 2, COUNT, SHARD, "t", data)
    create_cache(path, manifest)
    tokens, labels = rng.integers(0, CODES, (COUNT, L)), rng.integers(0, 2, COUNT)
    indices, flips = rng.integers(0, 20, COUNT), rng.integers(0, 2, COUNT) * flips
    for k in range(manifest.shards):
        rows = slice(k * SHARD, min((k + 1) * SHARD, COUNT))
        fields = {"latents": tokens[rows], "labels": labels[rows], "indices": indices[rows], "flips": flips[rows]}
        write_shard(path, k, fields | {"seeds": indices[rows] * 0})
    return LatentCache(path)


@pytest.fixture(params=[10**9, 0], ids=["held", "decoded"])
def material(tmp_path, monkeypatch, request):
    monkeypatch.setattr("robustok.data.dataset.MEMORY_LIMIT", request.param)
    data = open_images(Folder(path=save_tree(tmp_path / "d"), holdout=0), 8)
    names = {"pairs": 1, "latents": 0, "samples": 0}
    caches = {name: save_tokens(tmp_path / name, data.fingerprint, flips) for name, flips in names.items()}
    return Material(Decoder(), data, caches, LatentNoise(rate=0.25, share=0.25), "float32")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_examples_of_post_training_are_those_of_before(material, workers):
    """Digests of commit 2cea2f7."""
    for world, expected in ((1, "1d9a29d085cb7e69"), (2, "446b044ec47fca5c")):
        ranks = [Steps(16, 3, 1, 4, rank, world) for rank in range(world)]
        examples = [e for steps in ranks for e in mixture([material], MIXTURE, 2.0, steps, workers=workers)]
        assert digest(*(x for e in examples for x in (e.latents, to_pixels(e.targets), to_pixels(e.real)))) == expected


def run_of(out, latents, **changes):
    rar = {"name": "rar", "width": 16, "depth": 1, "heads": 2, "label_dropout": 0.3}
    defaults = {"steps": 10, "batch_size": 12, "random_until": 0.2, "raster_from": 0.9, "generator": rar}
    return GeneratorTrainingRun(out=out, latents=latents, **(defaults | changes))


def test_draws_of_a_generator_are_those_of_before(tmp_path):
    run = run_of(tmp_path, tmp_path)
    whole = draw_step(run, (L, 4), 4)
    assert digest(whole.dropped, *whole.inputs) == "c2b149b8205e2799"  # of commit 2cea2f7
    parts = [draw_step(run, (L, 4), 4, rows) for rows in (slice(0, 4), slice(4, 12))]
    assert torch.equal(torch.cat([part.dropped for part in parts]), whole.dropped)
    assert torch.equal(torch.cat([part.inputs[0] for part in parts]), whole.inputs[0])


def test_a_tokenizer_learns_the_same_with_a_worker(tmp_path):
    losses = []
    for workers in (0, 1):
        words = ("steps=2", "log_every=1", "perturbation.proportion=0.5", "clip_norm=1", f"workers={workers}")
        train_tokenizer(run := tiny.main_run(tmp_path / str(workers), *words))
        losses.append([(line["total"], line["gradient_norm"]) for line in tiny.log(run.out)])
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]


def test_a_generator_learns_the_same_with_a_worker(tmp_path):
    save_tokens(tmp_path / "latents", "data", 0)
    losses = []
    for workers in (0, 1):
        run = run_of(tmp_path / str(workers), tmp_path / "latents", steps=3, log_every=1, workers=workers)
        train_generator(run)
        losses.append([(line["cross_entropy"], line["gradient_norm"]) for line in tiny.log(run.out)])
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


def test_labels_are_dropped_and_continuous_draws_are_rows_of_the_whole(tmp_path):
    cache = save_tokens(tmp_path / "latents", "data", 0)
    run = run_of(tmp_path, tmp_path)
    [((tokens, labels, orders), statistics)] = ahead(lambda step: step_inputs(run, cache, slice(3, 9), 2, step), [4])
    records, whole = cache.read(slice(None)), draw_step(run, (L, 4), 4)
    assert torch.equal(labels == 2, whole.dropped[3:9])
    assert torch.equal(orders, whole.inputs[0][3:9])
    assert all((records.latents == row).all(1).any() for row in tokens)
    assert math.isclose(statistics["random_order"], 5 / 7)
    flow = run.model_copy(update={"generator": run_of(tmp_path, tmp_path, generator={"name": "sit"}).generator})
    whole, part = draw_step(flow, (L, 4), 2), draw_step(flow, (L, 4), 2, slice(5, 8))
    assert all(torch.equal(a[5:8], b) for a, b in zip(whole.inputs, part.inputs, strict=True))
