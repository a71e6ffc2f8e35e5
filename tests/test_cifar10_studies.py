"""The studies on CIFAR-10: every command has settings that exist, and needs what comes before it; figures are read."""

import json
import re
import sys
from pathlib import Path

import pytest

from robustok.cli import COMMANDS
from robustok.config import load, recipe

FOLDER = Path(__file__).parents[1] / "benchmarks" / "cifar10"


@pytest.fixture(scope="module")
def study():
    """The modules of the studies, by name."""
    names = ("jobs", "setting", "main_training", "post_training", "pipelines", "figures")
    sys.path.insert(0, str(FOLDER))
    try:
        yield type("Study", (), {name: __import__(name) for name in names})
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture
def every_job(study, tmp_path):
    """The jobs of both studies, in order."""
    setting = study.setting.Setting(("data.name=parquet", "data.path=images"), Path("classifiers"), tmp_path)
    best = {pair.name: pair.sigmas[0] for pair in study.post_training.PAIRS}
    post = [*study.post_training.jobs(setting), *study.post_training.last_jobs(setting, best)]
    pipelines = study.pipelines.jobs(setting, str(tmp_path / "given"))
    return [*dict.fromkeys([*study.main_training.jobs(setting), *post, *pipelines])]


def test_every_command_is_valid_and_comes_after_what_it_needs(every_job, tmp_path):
    known = set()
    for job in every_job:
        assert job.name not in known, "a name stands for two commands"
        assert known.issuperset(job.needs)
        known.add(job.name)
        command, words = job.words[0], job.words[1:]
        files = [recipe(word) for word in words if word.endswith(".yaml")]
        _, config = COMMANDS[command].load()
        load(config, files, [*words[len(files) :], f"out={tmp_path / job.name}"], command=command)


def test_what_a_command_reads_was_made_by_a_job_it_needs(every_job, tmp_path):
    """Every path inside of the folder that a command names belongs to a job which is needed, directly or not."""
    needs, read = {job.name: set(job.needs) for job in every_job}, 0
    for job in every_job:
        after = "]".join([*job.words, ""]).split(f"{tmp_path}/")[1:]  # each begins with the path of a job, or of a file
        paths = {rest[: end.start()] for rest in after for end in re.finditer(r"[,\]}/]", rest)}
        others = paths & needs.keys() - {job.name}
        assert others <= _all_needs(needs, job.name), job.name
        read += len(others)
    assert read > len(every_job)


def _all_needs(needs, name):
    found, new = set(), set(needs[name])
    while new:
        found |= new
        new = set().union(*(needs[n] for n in new)) - found
    return found


def test_jobs_that_failed_take_along_what_needs_them(study, tmp_path, monkeypatch, capsys):
    job, started = study.jobs.Job, []
    jobs = [job("a", (), ("x",)), job("b", ("a",), ("fail",)), job("c", ("b",), ("x",)), job("d", ("a",), ("x",))]

    class Process:
        def __init__(self, target, args, name):
            self.exitcode = 2 if args[0].words == ("fail",) else 0

        def start(self):
            pass

    class Context:
        def set_forkserver_preload(self, modules):
            pass

        def Process(self, target, args, name):  # noqa: N802
            started.append(name)
            return Process(target, args, name)

    monkeypatch.setattr(study.jobs.multiprocessing, "get_context", lambda name: Context())
    study.jobs.run(jobs, tmp_path, workers=2)
    assert started == ["a", "b", "d"]
    assert "not done: b, c" in capsys.readouterr().out
    started.clear()
    study.jobs.run(jobs, tmp_path, workers=2)  # again: only what has not succeeded
    assert started == ["b"]


def line(metric, value, decoder=None, versus=None, extractor="cifar-resnet56-0", error=None):
    """A line of metrics.jsonl."""
    fields = {"metric": metric, "value": value, "standard_error": error, "extractor": extractor}
    return json.dumps(fields | {"decoder": decoder, "versus": versus}) + "\n"


def test_sigma_is_chosen_by_the_lowest_distance_in_the_evaluating_space(study, tmp_path):
    for pair in study.post_training.PAIRS:
        folder = tmp_path / pair.name / "sigma"
        folder.mkdir(parents=True)
        last, others = pair.sigmas[-1], pair.sigmas[:-1]
        text = line("gfid", 1.0, f"paired-{last:g}") + "".join(line("gfid", 2.0, f"paired-{s:g}") for s in others)
        text += "".join(line("gfid", 0.5, f"paired-{s:g}", extractor="cifar-resnet44-0") for s in others)
        (folder / "metrics.jsonl").write_text(text)
    assert study.figures.best_sigmas(tmp_path) == {p.name: p.sigmas[-1] for p in study.post_training.PAIRS}


def test_a_pair_has_changes_with_errors_beside_the_price(study, tmp_path):
    pair = study.post_training.PAIRS[0]
    for name, text in {
        "gfid": line("gfid", 7.0, "before", error=0.1) + line("gfid_difference", -1.234, "free", "before", error=0.05)
        + line("gfid", 5.766, "free"),
        "reconstructions-free": line("rfid", 0.5) + line("psnr", 22.5, extractor=None),
    }.items():  # fmt: skip
        (tmp_path / pair.name / name).mkdir(parents=True)
        (tmp_path / pair.name / name / "metrics.jsonl").write_text(text)
    rows = study.figures.pair_table(tmp_path, pair).splitlines()
    assert rows[2].startswith("| before | 7.00 ± 0.10 |")
    assert rows[3].startswith("| free | -1.23 ± 0.05 |")
    assert "| 0.50 |" in rows[3]
    assert "| 22.50 |" in rows[3]


def test_spearman_has_an_interval_over_tokenizers(study):
    import numpy as np

    x = np.arange(8.0)
    assert study.figures.interval(np.stack([x, x**3], 1)) == "+1.00 (+1.00 to +1.00)"
    assert study.figures.interval(np.stack([x, -x], 1)).startswith("-1.00")


def test_what_perturbation_changes_is_paired_by_seed(study):
    last = f"gfid {study.main_training.GENERATOR_STEPS} 1"
    found = {"vq256-b0": {last: 10.0}, "vq256-b0.3": {last: 9.0}, "vq256-b0-seed1": {last: 20.0}}
    found |= {"vq256-b0.3-seed1": {last: 17.0}, "vq256-b0-seed2": {last: 99.0}}  # has no partner
    rows = {
        row.split(" | ")[1]: row for row in study.figures.seeds_table(found).splitlines() if row.startswith("| 256")
    }
    assert "| 2 |" in rows["without"]
    assert "| 15.00 ± 5.00 |" in rows["without"]
    assert "| -2.00 ± 1.00 |" in rows["difference"]


def test_post_training_has_a_mean_and_an_error_over_seeds(study, tmp_path):
    for name, end, clean, free in (("gfid", "", -1.0, -2.0), ("gfid-seed1", "-seed1", -2.0, -4.0)):
        folder = tmp_path / study.post_training.PAIRS[0].name / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(
            line("gfid_difference", value, f"{objective}{end}", "before", extractor=space)
            for objective, value in (("clean", clean), ("free", free)) for space in study.figures.SPACES
        ))  # fmt: skip
    rows = study.figures.post_seeds_table(tmp_path).splitlines()[2:]
    assert [row.split(" | ")[1:4] for row in rows] == [
        ["2", "clean", "-1.50 ± 0.50"],
        ["2", "free", "-3.00 ± 1.00"],
        ["2", "free minus clean", "-1.50 ± 0.50"],
    ]
