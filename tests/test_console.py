"""Progress on stderr that is no terminal."""

import itertools

import pytest

from robustok import console
from robustok.console import PlainProgress, duration, track


@pytest.fixture(autouse=True)
def shown(monkeypatch):
    monkeypatch.setenv("ROBUSTOK_PROGRESS", "1")


def every(monkeypatch, seconds):
    """Let the clock show so many seconds more at each look."""
    clock = itertools.count(0, seconds)
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))


def test_lines_say_how_much_is_done_and_the_time_left(monkeypatch, capsys):
    every(monkeypatch, 10)
    assert list(track(range(20, 100), "train a")) == list(range(20, 100))
    lines = capsys.readouterr().err.splitlines()
    # A look after each step of 10 s, the first line not before 15 s; 80 steps in all, of which 20 were done before.
    assert lines[0] == "train a: 22 of 100 (22%), 13 min 0 s left"
    assert lines[1] == "train a: 24 of 100 (24%), 12 min 40 s left"
    assert len(lines) < 40  # rarer as time passes
    assert int(lines[-1].split()[2]) > 90


def test_short_work_is_silent_and_so_is_all_work_on_demand(monkeypatch, capsys):
    every(monkeypatch, 1)
    list(track(range(10), "short"))
    every(monkeypatch, 100)
    list(track(range(10), "hidden", show=False))
    monkeypatch.setenv("ROBUSTOK_PROGRESS", "0")
    list(track(range(10), "unwanted"))
    assert capsys.readouterr().err == ""


def test_work_of_unknown_length_says_how_long_it_has_taken(monkeypatch, capsys):
    every(monkeypatch, 40)
    PlainProgress("measure").look()
    assert capsys.readouterr().err == "measure: 40 s so far\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.6, "8 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
