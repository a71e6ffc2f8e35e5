"""Pairs made by the command, sigma chosen on held-out samples, and no decoder worse than before post-training."""

import json
import re
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
from robustok.commands.candidates import ScoredDecoder, verdict
from robustok.commands.dry_run import estimate
from robustok.commands.make_pairs import make_pairs
from robustok.commands.post_train import PostTrainRun, post_train
from robustok.commands.post_train_settings import Candidate
from robustok.config import load
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache
from robustok.data.pixels import to_pixels
from robustok.data.sources import Digits
from robustok.errors import UserError
from robustok.evaluation.held_out import HeldOut, HeldOutScore, ReconstructionScore, batch_of, reconstruction_score
from robustok.metrics.features import ExtractorConfig
from robustok.metrics.frechet import GaussianStatistics, frechet_distance
from robustok.metrics.pixels import psnr
from robustok.metrics.processes import ALONE, Processes
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
        held_out = (f"held_out.extractor.path={classifier}",)
        return load(PostTrainRun, None, (*given, *tiny.DATA, *tiny.TRAINING, *terms, *SWEEP, *held_out, *words))

    return make


@pytest.fixture
def module(monkeypatch):
    """Replaces a name in the module of the command."""
    import sys

    return lambda name, value: monkeypatch.setattr(sys.modules["robustok.commands.post_train"], name, value)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(path):
    return load_file(path / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class ScriptedScore:
    """Returns given values; two sets."""

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
    score = HeldOutScore(held_out, load_tokenizer(tokenizer), [data], torch.device("cpu"), sets=2)
    assert score(load_tokenizer(out).decode) == pytest.approx(best["values"])
    assert score(load_tokenizer(tokenizer).decode) == pytest.approx(untouched)
    assert best["value"] <= found[0]["value"]

    header = yaml.safe_load((path / "config.yaml").read_text())
    assert [row["sigma"] for row in header["sweep"]] == [line["sigma"] for line in found]
    assert header["held_out"]["at_the_start"] == pytest.approx(found[0]["value"])
    assert LatentCache(out / "held-out").manifest.source["seed"] > 10**6  # not one that a user would think of


def test_candidates_have_the_same_images_and_random_numbers(tmp_path, run_of, module):
    module("HeldOutScore", lambda *_: ScriptedScore([5, 6, 7, 8]))
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
    module("HeldOutScore", lambda *_: ScriptedScore([5, 6, 5, 7]))
    path = post_train(run_of(tmp_path))
    assert same(weights(path), read_snapshot(tokenizer, "tokenizer").weights)
    card = (path / "README.md").read_text()
    assert "| 0.5 | 2 | 6.5 | 1.0 |" in card
    assert "5.5, before post-training 5.5" in card
    assert not list(tmp_path.glob("post-*"))
    assert "stays as it was" in " ".join(capsys.readouterr().err.split())


def test_a_long_training_that_ends_worse_leaves_the_candidate(tmp_path, run_of, module):
    module("HeldOutScore", lambda *_: ScriptedScore([5, 6, 3, 7, 9, 4]))
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
    module("HeldOutScore", lambda *_: ScriptedScore([5, 6, 3, 7, 2, 1]))
    path = post_train(run_of(tmp_path))
    assert same(weights(path), weights(tmp_path / "post-0.9" / "snapshot" / "00000006"))
    assert [line["step"] for line in tiny.log(tmp_path / "post-0.9")] == [3, 4, 5, 6]
    start = weights(tmp_path / "post-0.9" / "snapshot" / "00000002")
    assert same(start, weights(tmp_path / "candidate-0.9" / "snapshot" / "00000002"))
    assert not list(tmp_path.glob("candidate-*/state"))  # only resuming would need them


def test_no_continuing_where_candidates_have_all_the_steps(tmp_path, run_of, module):
    module("HeldOutScore", lambda *_: ScriptedScore([5, 6, 3, 7]))
    path = post_train(run_of(tmp_path, "sweep.steps=9"))
    assert same(weights(path), weights(tmp_path / "candidate-0.9" / "snapshot" / "00000006"))


def test_an_interrupted_sweep_goes_on(tmp_path, run_of, module):
    whole, out, trained = tmp_path / "whole", tmp_path / "stopped", []
    post_train(run_of(whole))

    def train(run, enough=None, stop_at=None):
        if run.out.name == stop_at:
            raise KeyboardInterrupt
        trained.append(run.out.name)
        return train_decoder(run, enough)

    module("train_decoder", lambda run, enough=None: train(run, enough, "candidate-0.9"))
    with pytest.raises(KeyboardInterrupt):
        post_train(run_of(out))
    assert trained == ["candidate-0.5"]
    module("train_decoder", train)
    module("HeldOutScore", counting := CountingScore())
    post_train(run_of(out))
    assert trained[:3] == ["candidate-0.5", "candidate-0.9", "candidate-1"]
    assert counting.calls == len(lines(whole)) - 2  # the untouched one and the first candidate are known
    assert lines(out) == lines(whole)
    assert same(weights(out / "snapshot" / "best"), weights(whole / "snapshot" / "best"))
    post_train(run_of(out))
    assert trained[3:].count("candidate-0.5") == trained[3:].count("candidate-1") == 0


class CountingScore:
    """Makes scores whose calls are counted."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *arguments):
        outer, score = self, HeldOutScore(*arguments)

        class Counted:
            samples, extractor, decoder = score.samples, score.extractor, staticmethod(score.decoder)

            def __call__(self, decode):
                outer.calls += 1
                return score(decode)

        return Counted()


AUTO = (
    *("objective=auto", "sigma=null", "sweep.images=20", "snapshot_every=0", "adversary=fresh"),
    *(*tiny.ADVERSARY, "adversarial.adaptive=false"),
)


def test_auto_tries_objectives_and_sigmas_and_says_whether_it_pays(tmp_path, run_of, tokenizer, capsys):
    out = tmp_path / "run"
    path = post_train(run_of(out, *AUTO))
    found = lines(out)
    tried = [(line["objective"], line["sigma"]) for line in found if line["stage"] == "candidate"]
    assert tried == [
        ("clean", None),
        ("noise", None),
        ("paired", 0.5),
        ("paired", 0.9),
        ("free", None),
        ("free+clean", None),
    ]
    assert [line["steps"] for line in found if line["stage"] == "candidate"] == [2] * 6
    chosen = [line for line in found if line["stage"] in ("untouched", "candidate", "continued")]
    best = min(chosen, key=lambda line: line["value"])
    assert all(line["rfd"] > 0 and 5 < line["psnr"] < 40 for line in chosen)
    assert "lpips_alex" not in best  # images of 16 pixels a side
    assert best["value"] < found[0]["value"]

    # Snapshots of the continued training: a tenth of the steps, at least one, apart.
    name = {"paired": f"{best['sigma']}"}.get(best["objective"], best["objective"])
    steps = [line["steps"] for line in found if line["stage"] == "continued"]
    assert steps == list(range(3, 3 + len(steps)))
    assert len(steps) in (3, 4)
    snapshot = out / f"candidate-{name}" if best["stage"] == "candidate" else out / f"post-{name}"
    assert same(weights(path), weights(snapshot / "snapshot" / f"{best['steps']:08d}"))

    # The verdict is from samples that chose nothing.
    seeds = {name: LatentCache(out / name).manifest.source["seed"] for name in ("held-out", "unseen", "samples")}
    assert len(set(seeds.values())) == 3
    unseen = {(line["objective"], line["steps"]): line for line in found if line["stage"] == "unseen"}
    assert {(None, 0), ("clean", 2), (best["objective"], 2), (best["objective"], best["steps"])} == unseen.keys()
    words = found[-1]["words"]
    assert (found[-1]["stage"], found[-1]["value"]) == ("verdict", best["value"])
    assert f"{unseen[best['objective'], best['steps']]['change']:+.3g}" in words
    assert words.startswith("on samples that chose nothing: post-training")
    assert words in (path / "README.md").read_text()
    assert words in " ".join(capsys.readouterr().err.split())

    # Again: everything is known.
    post_train(run_of(out, *AUTO))
    assert lines(out) == found


def test_auto_stops_where_snapshots_no_longer_gain(tmp_path, run_of, module):
    # Untouched, five candidates, then: better, worse, no better than by the noise.
    values = [[5, 5], [6, 6], [6, 6], [6, 6], [4, 4], [3.0, 3.2], [3.1, 3.3], [2.8, 3.5]]
    module("HeldOutScore", lambda *_: PairedScore(values))
    words = (*AUTO, "sweep.objectives=[clean,noise,{paired: 1},{free: 1, clean: 3}]", "sweep.sigmas=[0.9]")
    run = run_of(tmp_path, *words, "steps=10", "sweep.patience=2", "held_out.latents=null")
    module("_verdict", lambda *_: "words")
    path = post_train(run)
    found = lines(tmp_path)
    assert [(line["objective"], line["steps"]) for line in found if line["stage"] == "continued"] == [
        ("1free+3clean", 3),
        ("1free+3clean", 4),
        ("1free+3clean", 5),
    ]
    assert same(weights(path), weights(tmp_path / "post-1free+3clean" / "snapshot" / "00000003"))
    assert not (tmp_path / "post-1free+3clean" / "snapshot" / "00000006").exists()
    assert found[-1]["words"] == "words"
    module("HeldOutScore", None)  # needed by nothing
    assert post_train(run) == path
    assert not (tmp_path / "post-1free+3clean" / "snapshot" / "00000006").exists()


class PairedScore(ScriptedScore):
    """Returns given values of two sets."""

    def __call__(self, decode):
        return next(self.values)


def scored(*values, objective=None, sigma=None, steps=0, stage="candidate"):
    candidate = None if objective is None else Candidate({objective: 1.0}, sigma)
    return ScoredDecoder(stage, candidate, steps, None, list(values), {})


def test_the_verdict_in_words():
    before, control = scored(5.0, 5.2), scored(4.5, 4.7, objective="clean", steps=2)
    short, long = scored(4.0, 4.3, objective="paired", sigma=0.9, steps=2), scored(3.0, 3.3, objective="free", steps=9)
    pays = "post-training pays, beyond the control: -1.95 ± 0.05 from 5.1 with free after 9 steps; "
    assert verdict(before, long, short, control) == f"{pays}-0.45 ± 0.05 against the control after 2 steps each"
    same = scored(4.4, 4.9, objective="free", steps=2)
    assert verdict(before, long, same, control).startswith(
        "post-training pays, but clean latents may do as much: -1.95"
    )
    assert verdict(before, long, same, control).endswith("+0.05 ± 0.15 against the control after 2 steps each")
    assert verdict(before, control, control, control).startswith("post-training pays, and needs no generator: -0.5 ± 0")
    assert verdict(before, long, short, None).endswith("clean latents, was not among the candidates")
    noisy = scored(4.9, 5.2, objective="noise", steps=2)  # -0.05 +- 0.05
    assert verdict(before, noisy, noisy, control) == (
        "post-training does not pay: -0.05 ± 0.05 from 5.1 with noise after 2 steps"
    )
    assert scored(1, objective="paired", sigma=1.0).is_control


def test_where_auto_finds_nothing_it_names_the_gap(tmp_path, run_of, module, tokenizer):
    module("HeldOutScore", lambda *_: ScriptedScore([5, 6, 7]))
    path = post_train(run_of(tmp_path, *AUTO, "sweep.objectives=[clean,noise]"))
    assert same(weights(path), read_snapshot(tokenizer, "tokenizer").weights)
    words = lines(tmp_path)[-1]["words"]
    assert "on the samples that chose the decoder: post-training does not pay: +1 ± 0 from 5.5 with clean" in words
    assert re.search(r"the gap of the generated latents .*: generated_usage [\d.]+ \([\d.]+\), token_divergence", words)
    assert not (tmp_path / "unseen").exists()


def test_processes_share_the_scores_and_keep_the_statistics(tmp_path, classifier, tokenizer, samples, monkeypatch):
    """Three processes, of which the last has no image of some sets, get the numbers of one, and read images once."""
    model, decoder = load_tokenizer(tokenizer), load_tokenizer(tokenizer)
    data, test = open_images(Digits(limit=70), 16), open_images(Digits(limit=90), 16, split="test")
    given, settings = HeldOut(latents=samples[0], extractor={"path": classifier}), ExtractorConfig(path=classifier)

    def scores(processes, cache):
        score = HeldOutScore(given, model, [data], torch.device("cpu"), 8, 0, processes, cache)
        others = ReconstructionScore(settings, model, [test], 65, 0, processes)
        return score(decoder.decode), others(decoder.decode)

    alone = scores(ALONE, None)
    shared = in_threads(3, lambda processes: scores(processes, tmp_path / "statistics"))
    assert shared[0] == shared[1] == shared[2]
    assert shared[0][0] == pytest.approx(alone[0], rel=1e-6)
    assert shared[0][1] == pytest.approx(alone[1], rel=1e-6)
    assert len(list((tmp_path / "statistics").iterdir())) == 1
    monkeypatch.setattr("robustok.evaluation.held_out.real_statistics", None)
    assert scores(ALONE, tmp_path / "statistics")[0] == pytest.approx(alone[0], rel=1e-6)


def in_threads(world, function):
    """``function`` of each of several processes, as threads that add up and gather."""
    barrier, given = threading.Barrier(world), [None] * world

    def exchange(rank, value):
        given[rank] = value
        barrier.wait(60)
        found = list(given)
        barrier.wait(60)
        return found

    def run(rank):
        add = lambda tensor: sum(exchange(rank, tensor))  # noqa: E731
        try:
            return function(Processes(rank, world, add, lambda parts: list(chain(*exchange(rank, parts)))))
        except Exception:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        waiting = [pool.submit(run, rank) for rank in range(world)]
    failed = [one.exception() for one in waiting if one.exception() is not None]
    if failed:
        raise min(failed, key=lambda error: isinstance(error, threading.BrokenBarrierError))
    return [one.result() for one in waiting]


def test_reconstructions_are_scored_on_real_images(classifier, tokenizer, capsys):
    inside, data = load_tokenizer(tokenizer), open_images(Digits(limit=90), 16, split="test")
    score = ReconstructionScore(ExtractorConfig(path=classifier), inside, [data], count=70)
    images = data.read(range(70)).images
    perfect = iter(images.split([64, 6]))
    assert score(lambda latents: next(perfect)) == pytest.approx({"rfd": 0, "psnr": 100}, abs=1e-6)
    shifted = iter((images * 0.9).split([64, 6]))
    found = score(lambda latents: next(shifted))
    assert found["psnr"] == pytest.approx(psnr(to_pixels(images * 0.9), to_pixels(images)).mean().item())
    own = score(inside.decode)
    statistics = [
        GaussianStatistics.of(score._extract(to_pixels(x))) for x in (inside.decode(inside.encode(images)), images)
    ]
    assert own["rfd"] == pytest.approx(frechet_distance(*statistics), rel=1e-6)
    assert "LPIPS is left out: it needs images of 31 pixels" in " ".join(capsys.readouterr().err.split())
    alone = ReconstructionScore(None, inside, [data], count=70)
    assert alone(inside.decode) == {"psnr": own["psnr"]}
    assert [batch_of((side, side)) for side in (16, 256, 512, 1024, 4096)] == [64, 64, 16, 4, 1]


def test_a_candidate_that_costs_too_much_is_refused(tmp_path, run_of, module, capsys):
    prices = iter([20.0, 19.8, 18.0, 20.0, 19.4, 19.6])
    module("HeldOutScore", lambda *_: ScriptedScore([5, 4, 2, 6, 1, 3]))
    module("reconstruction_score", lambda *_: lambda decode: {"psnr": next(prices)})
    path = post_train(run_of(tmp_path, "max_reconstruction_loss=0.5"))
    found = lines(tmp_path)
    assert [line["sigma"] for line in found if line.get("refused")] == [0.9, 0.5]
    assert [(line["stage"], line["value"]) for line in found][-2:] == [("continued", 1.5), ("continued", 3.5)]
    assert same(weights(path), weights(tmp_path / "post-0.5" / "snapshot" / "00000006"))
    header = yaml.safe_load((path / "config.yaml").read_text())
    assert header["price"] == {"psnr": {"before": 20.0, "after": 19.6}}
    assert "(refused:" in capsys.readouterr().err


def test_a_limit_without_held_out_images_is_refused(tokenizer, capsys):
    inside = load_tokenizer(tokenizer)
    with pytest.raises(UserError, match=r"digits test.* is too few images .*raise data\.holdout, or drop"):
        reconstruction_score(Digits(limit=1), inside, None, limited=True)
    assert reconstruction_score(Digits(limit=1), inside, None, limited=False) is None
    assert "rFD and PSNR are left out" in " ".join(capsys.readouterr().err.split())


def test_one_sigma_is_pairs_and_a_training(tmp_path, run_of, tokenizer, generator, latents):
    words = ("sigma=0.8", "held_out=null")
    path = post_train(run_of(tmp_path / "run", *words))
    pairs = make_pairs(tiny.pairs_run(tmp_path / "pairs", generator, latents, "sigma=0.8", "count=96"))
    terms = ("learning_rate=3e-3", "snapshot_every=3")
    by_hand = train_decoder(tiny.post_run(tmp_path / "hand", tokenizer, pairs, *terms))
    assert same(weights(path), weights(by_hand))
    assert load_tokenizer(tmp_path / "run").kind == "discrete"


def test_candidates_depend_on_the_family_of_the_tokenizer(tmp_path, run_of):
    run = run_of(tmp_path, "sweep.sigmas=null")
    assert run.sigmas("robustok") == [0.7, 0.8, 0.9, 1.0]
    assert run.sigmas("llamagen") == [0.8, 0.9, 0.95, 1.0]


def test_what_does_not_fit_is_refused(tmp_path, run_of, tokenizer):
    for words, said in (
        (("pairs=somewhere",), "pairs are given, and so is generator"),
        (("generator=null",), r"no pairs: give pairs=PATH, or generator and sigma \(generator missing\)"),
        (("sigma=1.2",), "sigma 1.2 is to be a share from 0 to 1, or auto"),
        (("held_out=null",), r"sigma=auto compares decoders on held-out samples; set held_out\.extractor\.path"),
        (("sweep.sigmas=[0.5,2]",), r"sweep\.sigmas\.1 = 2: .*less than or equal to 1"),
        (("sweep.sigmas=[]",), r"sweep\.sigmas = \[\]: .*at least 1 item"),
        ((*AUTO, "pairs=p"), "objective=auto makes the pairs of each sigma itself; drop pairs"),
        ((*AUTO, "generator=null"), "objective=auto compares decoders on samples of a generator; give generator"),
        ((*AUTO, "held_out=null"), r"objective=auto compares decoders on held-out samples; set held_out\.extractor"),
        ((*AUTO, "sweep.objectives=[free]", "adversarial.adaptive=true"), r"set adversarial\.adaptive=false"),
        ((*AUTO, "sweep.objectives=[clean]", "sigma=0.5"), "objective clean does not use sigma"),
        (
            (*AUTO, "sweep.objectives=[clean]", "frechet.weight=1", "frechet.extractors=[{path: x}]"),
            "needs free samples",
        ),
        (
            (*AUTO, "sweep.objectives=[cleen]"),
            r"sweep\.objectives.*Input should be 'paired', 'free', 'noise' or 'clean'",
        ),
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


def test_auto_does_not_judge_in_a_space_that_it_trains_in(tmp_path, run_of, classifier):
    words = (*AUTO, "frechet.weight=1", f"frechet.extractors=[{{path: {classifier}}}]")
    with pytest.raises(UserError, match=r"frechet\.extractors and held_out\.extractor are the same feature space"):
        post_train(run_of(tmp_path / "run", *words))
    assert not (tmp_path / "run" / "samples").exists()


def test_auto_leaves_out_what_the_adversary_does_not_allow(tmp_path, run_of, capsys):
    run = run_of(tmp_path, *AUTO, "adversarial.adaptive=true")
    assert [candidate.name for candidate in run.candidates(None)] == ["clean", "noise", "0.5", "0.9", "free+clean"]
    assert run.used == {"clean": 1.0, "noise": 1.0, "paired": 1.0, "free": 1.0}
    facts = estimate(run)
    assert facts["pairs_bytes"] == (2 * 32 + 96) * 53


def test_held_out_sets_need_samples(samples, tokenizer, classifier):
    data, given = open_images(Digits(limit=128), 16), HeldOut(latents=samples[0], extractor={"path": classifier})
    with pytest.raises(UserError, match="holds 40 samples, 21 sets need at least 42"):
        HeldOutScore(given, load_tokenizer(tokenizer), [data], torch.device("cpu"), sets=21)
    missing = given.model_copy(update={"latents": None})
    with pytest.raises(UserError, match=r"held_out\.latents is missing"):
        HeldOutScore(missing, load_tokenizer(tokenizer), [data], torch.device("cpu"))
