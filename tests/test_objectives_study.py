"""The study of objectives: what it does with figures and tasks. ``--tiny --device cpu`` runs all of it."""

import importlib.util
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "objectives.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("objectives_study", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figures(script, reported, choosing):
    """Figures of a decoder whose gFD is the same in all spaces, by set."""
    values = dict(zip(script.SETS + script.CHOOSING, [*reported, *choosing], strict=True))
    sets = {seed: {key: dict.fromkeys(script.SPACES, v) for key in ("train", "test")} for seed, v in values.items()}
    return {"sets": sets, "rfd": dict.fromkeys(script.SPACES, reported[0]), "psnr": 20.0}


def test_a_line_has_paired_differences_over_the_reported_sets(script):
    before = figures(script, (4, 5, 6, 7), (4, 6))
    after = figures(script, (3, 4, 5.5, 6.5), (1, 1))
    line = script.line_of("vq/free", before, after)
    assert line["gfd_change_train"]["resnet56"] == {"mean": -0.75, "error": 0.1443}  # sd 0.2887 of -1, -1, -.5, -.5
    assert line["gfd_train"]["small"] == 4.75
    assert line["rfd_change"]["resnet44"] == -1
    assert "-0.750" in script.report([line])


def test_losses_are_chosen_on_other_sets(script):
    before = figures(script, (4, 4, 4, 4), (4, 6))
    assert script.score(before, figures(script, (0, 0, 0, 0), (5, 6))) == pytest.approx(0.1)
    assert script.score(before, figures(script, (9, 9, 9, 9), (4, 4))) == pytest.approx(-0.2)


def test_every_decoder_has_a_name_of_its_own(script):
    search = [script.Post("vq", ("clean",), losses) for losses in script.SEARCH]
    assert len({job.name for job in search}) == len(search)
    jobs = list(script.objectives(script.SEARCH[1]))
    assert len({job.name for job in jobs}) == len(jobs)
    first = {(job.pair, job.objective) for job in jobs[:10]}  # all objectives of both pairs come first
    assert len(first) == 10


def test_tasks_wait_for_what_they_need_and_evaluations_go_first(script, tmp_path):
    class Recorder(script.Schedule):
        def _worker(self):
            return None, self

        def poll(self):
            return True

        def send(self, task):
            started.append(task)

        def recv(self):
            return (RuntimeError("broken") if started[-1][0] == "broken" else len(started)), 0.0

    started, seen = [], []
    schedule = Recorder((), 1, tmp_path, time.monotonic(), time.monotonic() + 60)
    schedule.add("a", "first")
    schedule.add("b", "second", 7, needs=("a",))
    schedule.add("bad", "broken")
    schedule.add("never", "never", needs=("bad",))
    schedule.add("evaluate/a", "third", lambda done: done["a"], needs=("a",))
    schedule.workers = [(type("Process", (), {"kill": lambda self: None})(), schedule)]
    schedule.run(lambda name, result: seen.append(name))
    assert [method for method, _ in started] == ["first", "third", "second", "broken"]
    assert started[1][1] == (1,)
    assert seen == ["a", "evaluate/a", "b"]
    assert "needs bad" in str(schedule.done["never"])
