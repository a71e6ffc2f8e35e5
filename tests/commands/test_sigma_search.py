"""Pairs made on the way, sigma chosen on held-out samples, and no decoder worse than the one it started from."""

import json
import statistics

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
from robustok.commands.dry_run import estimate
from robustok.commands.make_pairs import make_pairs
from robustok.commands.post_train import PostTrainRun, post_train
from robustok.commands.sigma_search import default_sigmas
from robustok.config import load
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache
from robustok.data.sources import Digits
from robustok.errors import UserError
from robustok.evaluation.held_out import HeldOut, HeldOutScore
from robustok.snapshots import read_snapshot
from robustok.tokenizers import load_tokenizer
from robustok.training.decoder import train_decoder

SWEEP = ("sweep.sigmas=[0.5,0.9,1]", "sweep.steps=2", "sweep.sets=2", "sweep.samples=40", "snapshot_every=3")


@pytest.fixture
def run_of(tokenizer, generator, latents, classifier):
    """Makes a configuration: sigma=auto over three sigmas, six steps after two."""

    def make(out, *words):
        terms = ("reconstruction.perceptual=none", "adversarial.weight=0", "learning_rate=3e-3")
        given = (f"out={out}", f"tokenizer={tokenizer}", f"generator={generator}", f"latents={latents}", "sigma=auto")
        judge = (f"held_out.extractor.path={classifier}",)
        return load(PostTrainRun, None, (*given, *tiny.DATA, *tiny.TRAINING, *terms, *SWEEP, *judge, *words))

    return make


@pytest.fixture
def module(monkeypatch):
    """Replaces what the verb uses."""
    import sys

    return lambda name, value: monkeypatch.setattr(sys.modules["robustok.commands.post_train"], name, value)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(path):
    return load_file(path / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class ScriptedJudge:
    """Judges as it was told; two sets."""

    samples, extractor = 40, "script"

    def __init__(self, values):
        self.values = iter(values)

    def decoder(self, tokenizer):
        return tokenizer.decode

    def __call__(self, decode):
        value = next(self.values)
        return [value, value + 1]


def test_the_best_decoder_of_the_sweep_is_published(tmp_path, run_of, tokenizer, classifier):
    out = tmp_path / "run"
    path = post_train(run_of(out))
    assert path == out / "snapshot" / "best"
    found = lines(out)
    stages = [(line["stage"], line["sigma"], line["steps"]) for line in found]
    assert stages[:4] == [("untouched", None, 0), *(("candidate", sigma, 2) for sigma in (0.5, 0.9, 1.0))]
    short = min(found[:4], key=lambda line: line["value"])
    continued = [("continued", short["sigma"], steps) for steps in (3, 6)]
    assert stages[4:] == (continued if short["stage"] == "candidate" else [])

    untouched, best = found[0]["values"], min(found, key=lambda line: line["value"])
    for line in found:
        assert line["value"] == pytest.approx(statistics.fmean(line["values"]))
        changes = [a - b for a, b in zip(line["values"], untouched, strict=True)]
        assert line["change"] == pytest.approx(statistics.fmean(changes))
        assert line["change_error"] == pytest.approx(statistics.stdev(changes) / 2**0.5)
        assert (line["metric"], line["samples"], line["sets"]) == ("held_out", 80, 2)

    # The published decoder is as good as its line says, and no worse than the untouched one.
    held_out = HeldOut(latents=out / "held-out", extractor={"path": classifier})
    data = open_images(Digits(limit=128), 16)
    judge = HeldOutScore(held_out, load_tokenizer(tokenizer), data, torch.device("cpu"), sets=2)
    assert judge(load_tokenizer(out).decode) == pytest.approx(best["values"])
    assert judge(load_tokenizer(tokenizer).decode) == pytest.approx(untouched)
    assert best["value"] <= found[0]["value"]

    header = yaml.safe_load((path / "config.yaml").read_text())
    assert [row["sigma"] for row in header["sweep"]] == [line["sigma"] for line in found]
    assert header["held_out"]["at_the_start"] == pytest.approx(found[0]["value"])
    assert LatentCache(out / "held-out").manifest.source["seed"] > 10**6  # not one that a user would think of


def test_candidates_see_the_same_images_and_random_numbers(tmp_path, run_of, module):
    module("HeldOutScore", lambda *_: ScriptedJudge([5, 6, 7, 8]))
    post_train(run_of(tmp_path, "mixture.count=20"))
    caches = [LatentCache(tmp_path / "pairs" / f"sigma-{sigma}-20").read(slice(None)) for sigma in ("0.5", "0.9", "1")]
    a, b, real = caches
    for other in (b, real):
        assert torch.equal(a.indices, other.indices)
        assert torch.equal(a.seeds, other.seeds)
    kept_a, kept_b = (cache.latents == real.latents for cache in (a, b))
    assert 0.3 < kept_a.float().mean() < kept_b.float().mean() < 1
    logs = [tiny.log(tmp_path / f"candidate-{sigma}") for sigma in ("0.5", "0.9")]
    assert [[line["step"] for line in log] for log in logs] == [[1, 2], [1, 2]]


def test_where_nothing_helps_the_decoder_stays_as_it_was(tmp_path, run_of, module, tokenizer, capsys):
    module("HeldOutScore", lambda *_: ScriptedJudge([5, 6, 5, 7]))
    path = post_train(run_of(tmp_path))
    assert same(weights(path), read_snapshot(tokenizer, "tokenizer").weights)
    card = (path / "README.md").read_text()
    assert "| 0.5 | 2 | 6.5 | 1.0 |" in card
    assert "5.5, before post-training 5.5" in card
    assert not list(tmp_path.glob("post-*"))
    assert "stays as it was" in " ".join(capsys.readouterr().err.split())


def test_a_long_training_that_ends_worse_leaves_the_candidate(tmp_path, run_of, module):
    module("HeldOutScore", lambda *_: ScriptedJudge([5, 6, 3, 7, 9, 4]))
    path = post_train(run_of(tmp_path))
    assert same(weights(path), weights(tmp_path / "candidate-0.9" / "snapshot" / "00000002"))
    assert not same(weights(path), weights(tmp_path / "post-0.9" / "snapshot" / "00000006"))
    assert [row["change"] for row in yaml.safe_load((path / "config.yaml").read_text())["sweep"]] == [
        0,
        1,
        -2,
        2,
        4,
        -1,
    ]


def test_the_best_candidate_is_continued(tmp_path, run_of, module):
    module("HeldOutScore", lambda *_: ScriptedJudge([5, 6, 3, 7, 2, 1]))
    path = post_train(run_of(tmp_path))
    assert same(weights(path), weights(tmp_path / "post-0.9" / "snapshot" / "00000006"))
    assert [line["step"] for line in tiny.log(tmp_path / "post-0.9")] == [3, 4, 5, 6]
    start = weights(tmp_path / "post-0.9" / "snapshot" / "00000002")
    assert same(start, weights(tmp_path / "candidate-0.9" / "snapshot" / "00000002"))
    assert not list(tmp_path.glob("candidate-*/state"))  # only resuming would need them


def test_no_continuing_where_candidates_have_all_the_steps(tmp_path, run_of, module):
    module("HeldOutScore", lambda *_: ScriptedJudge([5, 6, 3, 7]))
    path = post_train(run_of(tmp_path, "sweep.steps=9"))
    assert same(weights(path), weights(tmp_path / "candidate-0.9" / "snapshot" / "00000006"))


def test_an_interrupted_sweep_goes_on(tmp_path, run_of, module):
    whole, out, trained = tmp_path / "whole", tmp_path / "stopped", []
    post_train(run_of(whole))

    def train(run, stop_at=None):
        if run.out.name == stop_at:
            raise KeyboardInterrupt
        trained.append(run.out.name)
        return train_decoder(run)

    module("train_decoder", lambda run: train(run, "candidate-0.9"))
    with pytest.raises(KeyboardInterrupt):
        post_train(run_of(out))
    assert trained == ["candidate-0.5"]
    module("train_decoder", train)
    module("HeldOutScore", counting := CountingJudge())
    post_train(run_of(out))
    assert trained[:3] == ["candidate-0.5", "candidate-0.9", "candidate-1"]
    assert counting.calls == len(lines(whole)) - 2  # the untouched one and the first candidate are known
    assert lines(out) == lines(whole)
    assert same(weights(out / "snapshot" / "best"), weights(whole / "snapshot" / "best"))
    post_train(run_of(out))
    assert trained[3:].count("candidate-0.5") == trained[3:].count("candidate-1") == 0


class CountingJudge:
    """Makes judges that are counted."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *arguments):
        outer, judge = self, HeldOutScore(*arguments)

        class Counted:
            samples, extractor, decoder = judge.samples, judge.extractor, staticmethod(judge.decoder)

            def __call__(self, decode):
                outer.calls += 1
                return judge(decode)

        return Counted()


def test_one_sigma_is_pairs_and_a_training(tmp_path, run_of, tokenizer, generator, latents):
    words = ("sigma=0.8", "held_out=null")
    path = post_train(run_of(tmp_path / "run", *words))
    pairs = make_pairs(tiny.pairs_run(tmp_path / "pairs", generator, latents, "sigma=0.8", "count=96"))
    terms = ("learning_rate=3e-3", "snapshot_every=3")
    by_hand = train_decoder(tiny.post_run(tmp_path / "hand", tokenizer, pairs, *terms))
    assert same(weights(path), weights(by_hand))
    assert load_tokenizer(tmp_path / "run").kind == "discrete"


def test_defaults_know_perturbed_tokenizers():
    assert default_sigmas("robustok") == [0.7, 0.8, 0.9, 1.0]
    assert default_sigmas("llamagen") == [0.8, 0.9, 0.95, 1.0]


def test_what_does_not_fit_is_said(tmp_path, run_of, tokenizer):
    for words, said in (
        (("pairs=somewhere",), "pairs are given, and so is generator"),
        (("generator=null",), r"no pairs: give pairs=PATH, or generator and sigma \(generator missing\)"),
        (("sigma=1.2",), "sigma 1.2 is to be a share from 0 to 1, or auto"),
        (("held_out=null",), r"sigma=auto judges on held-out samples; set held_out\.extractor\.path"),
        (("sweep.sigmas=[0.5,2]",), r"sweep\.sigmas .* shares from 0 to 1"),
    ):
        with pytest.raises(UserError, match=said):
            run_of(tmp_path / "run", *words)
    for word, said in (
        (f"generator={tokenizer}", "expected a generator"),
        (f"latents={tokenizer}", "no latents cache"),
    ):
        with pytest.raises(UserError, match=said):
            post_train(run_of(tmp_path / "run", word, "sigma=0.8", "held_out=null"))
    assert not (tmp_path / "run").exists()
    assert estimate(run_of(tmp_path / "run"))["pairs"] == 6 * 16


def test_held_out_sets_need_samples(samples, tokenizer, classifier):
    data, given = open_images(Digits(limit=128), 16), HeldOut(latents=samples[0], extractor={"path": classifier})
    with pytest.raises(UserError, match="holds 40 samples, 21 sets need at least 42"):
        HeldOutScore(given, load_tokenizer(tokenizer), data, torch.device("cpu"), sets=21)
    missing = given.model_copy(update={"latents": None})
    with pytest.raises(UserError, match=r"held_out\.latents is missing"):
        HeldOutScore(missing, load_tokenizer(tokenizer), data, torch.device("cpu"))
