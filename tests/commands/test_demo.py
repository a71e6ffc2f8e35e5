"""The demo with a few steps and images, of one tokenizer, without processes of its own."""

import json
from pathlib import Path

import pytest

from robustok.cli import main
from robustok.commands import demo as module
from robustok.commands.demo import DemoRun, Stages, demo
from robustok.config import load
from robustok.data.latent_cache import LatentCache
from robustok.snapshots import read_header

NAMES = ["original", "clean", "paired", "free"]
WORDS = (
    *("data.limit=64", "scale=0.02", "samples=40", "sets=2", "perturbation_seeds=1"),
    *("metrics=[rfid,psnr,pfid,gfid]", "grid={name: explicit, rates: [0.5], codes: [3]}"),
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of a demo that has ended."""
    out = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TOKENIZERS", {"perturbed": {}})
        patch.setattr(module, "run_parallel", lambda jobs: [function(config) for function, config in jobs.values()])
        assert demo(load(DemoRun, None, (f"out={out}", *WORDS))) == out / "report.html"
    return out


def lines(ran):
    return [json.loads(line) for line in (ran / "metrics.jsonl").read_text().splitlines()]


def test_all_decoders_are_evaluated_on_the_same_samples(ran):
    found = lines(ran)
    assert {line["tokenizer"] for line in found} == {"perturbed"}
    assert [line["decoder"] for line in found if line["metric"] == "gfid"] == NAMES
    differences = [(line["decoder"], line["versus"]) for line in found if line["metric"] == "gfid_difference"]
    assert differences == [(one, other) for i, one in enumerate(NAMES) for other in NAMES[:i]]
    assert {line["samples"] for line in found if line["metric"].startswith("gfid")} == {2 * 40}
    assert {"rfid", "pfid_mean", "psnr"} <= {line["metric"] for line in found}


def test_the_reported_samples_chose_nothing(ran):
    post = ran / "seed-0" / "post-perturbed"
    caches = [ran / "seed-0" / "samples" / f"perturbed-{i}" for i in range(2)] + [post / "samples", post / "held-out"]
    assert len({LatentCache(path).manifest.source["seed"] for path in caches}) == 4


def test_all_decoders_of_a_tokenizer_had_as_many_steps(ran):
    post = ran / "seed-0" / "post-perturbed"
    found = [read_header(post / f"candidate-{name}")["post_trained"] for name in ("clean", "0.7", "free")]
    assert [header["steps"] for header in found] == [2, 2, 2]
    assert [header.get("sigma") for header in found] == [None, 0.7, None]


def test_the_report_says_how_a_decoder_was_chosen(ran):
    page = (ran / "report.html").read_text()
    assert "Choice of objective, perturbed tokenizer, seed 0" in page
    assert "on samples that chose nothing" in page


def test_full_is_the_longer_run_of_the_same_stages():
    short, full = load(DemoRun, None, ()), load(DemoRun, None, ("full=true",))
    assert (short.out, full.out) == (Path("runs/demo"), Path("runs/demo-full"))
    assert set(short.metrics) < set(full.metrics)
    assert (full.sets, full.samples, full.sigma) == (short.sets, short.samples, short.sigma)
    for model in module.RECIPES:
        few, many = (Stages(run, 0).recipe(model) for run in (short, full))
        steps = [(recipe.get("classifier") or recipe)["steps"] for recipe in (few, many)]
        assert steps[0] < steps[1]
        assert few.keys() == many.keys()
    assert load(DemoRun, None, ("full=true", "out=here", "metrics=[rfid]")).metrics == ["rfid"]
    assert main(["demo", "--full", "--dry-run"]) == 0


def test_the_tables_fit_a_terminal(tmp_path, capsys):
    facts = {"samples": 5392, "seed": 0, "extractor": "classifier-64", "reference": "digits", "tokenizer": "perturbed"}
    found = [{"metric": "rfid", "value": 0.3316, "standard_error": None, **facts}]
    values = dict(zip(NAMES, (0.8059, 0.7359, 0.7209, 0.6859), strict=True))
    for i, one in enumerate(NAMES):
        shared = {"decoder": one, "sets": 4, **facts}
        found.append({"metric": "gfid", "value": values[one], "standard_error": 0.0145, **shared})
        for other in NAMES[:i]:
            change = {"value": values[one] - values[other], "standard_error": 0.0047, "versus": other}
            found.append({"metric": "gfid_difference", **change, **shared})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    module._print_tables(tmp_path)
    shown = capsys.readouterr().err.replace("−", "-").splitlines()
    assert max(map(len, shown)) <= 80
    rows = [line.split() for line in shown]
    assert ["perturbed", "0.3316"] in rows
    assert ["perturbed", "original", "0.8059", "±", "0.0145"] in rows
    assert ["perturbed", "clean", "0.7359", "±", "0.0145", "-0.07000", "±", "0.00470"] in rows
    free = ["perturbed", "free", "0.6859", "±", "0.0145", "-0.1200", "±", "0.0047", "-0.05000", "±", "0.00470"]
    assert free in rows
