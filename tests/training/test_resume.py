"""Interrupted and uninterrupted runs end in the same bits: float32, one process, CPU."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import tiny
from robustok.training import decoder as post_training
from robustok.training import generator as generator_training
from robustok.training import tokenizer as main_training

MAIN = (
    *tiny.ADVERSARY,
    "adversarial.start=1",
    "tokenizer.quantizer.revive_every=3",
    "tokenizer.encoder.drop_path=0.2",
    "tokenizer.encoder.depth=2",
    "perturbation.anneal_end=7",
    "steps=7",
    "log_every=3",
    "state_every=2",
    "snapshot_every=3",
)


def distance_to_the_original(run, tokenizer, *_):
    """A score by which the original decoder stays the best snapshot, also after an interruption."""
    tokens = torch.arange(32).view(2, 16)
    original = tokenizer.decode(tokens).detach()
    return lambda decode: (decode(tokens) - original).square().mean().item()


@pytest.fixture
def trainings(monkeypatch, tokenizer, latents, pairs, samples, classifier):
    """Name to (module, function, configuration of a folder)."""
    monkeypatch.setattr(post_training, "_held_out_score", distance_to_the_original)
    held_out = (f"held_out.latents={samples[0]}", f"held_out.extractor.path={classifier}")
    post = (
        "steps=7",
        "log_every=3",
        "state_every=2",
        "snapshot_every=3",
        *tiny.ADVERSARY[:2],
        "adversarial.start=1",
        *held_out,
    )
    ar = ("steps=7", "log_every=3", "state_every=2", "snapshot_every=3", "generator.dropout=0.2", "ema_decay=0.5")
    teacher = ("teacher.name=classifier", f"teacher.path={classifier}")
    return {
        "main": (main_training, "train_tokenizer", lambda out: tiny.main_run(out, *MAIN, *teacher)),
        "generator": (generator_training, "train_generator", lambda out: tiny.generator_run(out, latents, *ar)),
        "post": (post_training, "train_decoder", lambda out: tiny.post_run(out, tokenizer, pairs, *post)),
    }


def assert_same_run(folder, other):
    found, expected = dict(tiny.saved(folder)), dict(tiny.saved(other))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name
    best = [run / "snapshot" / "best" / "config.yaml" for run in (folder, other)]
    assert len({file.read_text() if file.exists() else None for file in best}) == 1
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    assert names == sorted(str(p.relative_to(other)) for p in other.rglob("*"))  # nothing half-written is left
    steps = [line["step"] for line in tiny.log(folder) if "total" in line]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("name", ["main", "generator", "post"])
@pytest.mark.parametrize("stops", [[0], [1], [4], [2, 3, 5, 6]], ids=str)
def test_interruptions_in_this_process(tmp_path, trainings, name, stops):
    """A run stops in the middle of these steps, before and after states and snapshots, and is started again."""
    module, function, run = trainings[name]
    train = getattr(module, function)
    train(run(tmp_path / "whole"))

    for stop in stops:
        torch.manual_seed(stop)  # what happened in between must not matter
        with tiny.interrupted(stop):
            train(run(tmp_path / "stopped"))
    train(run(tmp_path / "stopped"))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "stopped").rglob("*")}
    train(run(tmp_path / "stopped"))  # a finished run is left as it is
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "stopped").rglob("*") if "log" not in p.name} == {
        p: when for p, when in before.items() if "log" not in p.name
    }
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def start(run, file):
    command = [sys.executable, tiny.__file__, *tiny.command("main-train", run, file)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_a_new_state(folder, process, old=None):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        states = sorted(p.name for p in (folder / "state").glob("[0-9]*"))
        if states and states[-1] != old:
            return states[-1]
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    raise AssertionError("no state was written")


def test_sigkill_and_sigterm(tmp_path):
    run, out = tiny.main_run, tmp_path / "killed"
    words = (*MAIN, "steps=150", "log_every=20", "state_every=5", "snapshot_every=0")
    process = start(run(out, *words), tmp_path / "run.yaml")
    killed_after = wait_for_a_new_state(out, process)
    process.kill()
    process.wait()
    process.stderr.close()
    assert process.returncode == -signal.SIGKILL

    process = start(run(out, *words), tmp_path / "run.yaml")
    wait_for_a_new_state(out, process, killed_after)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "stopped by SIGTERM after step" in " ".join(error.split())
    stopped_at = max((out / "state").iterdir()).name
    assert killed_after < stopped_at < "00000150"
    assert f"after step {int(stopped_at)};" in " ".join(error.split())  # the state is that of the step it stopped at

    main_training.train_tokenizer(run(out, *words))
    main_training.train_tokenizer(run(tmp_path / "whole", *words))
    assert_same_run(out, tmp_path / "whole")
    assert os.path.exists(out / "snapshot" / "00000150" / "model.safetensors")
