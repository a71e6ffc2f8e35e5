"""Trackers: what they get, resumed runs, and that nothing which fails in one fails a training."""

import json
import time
import warnings

import numpy as np
import pytest
from accelerate import tracking as accelerated

import tiny
from robustok.cli import main
from robustok.errors import UserError
from robustok.files import json_lines
from robustok.snapshots import read_weights, resolve
from robustok.training.decoder import train_decoder
from robustok.training.generator import train_generator
from robustok.training.tokenizer import train_tokenizer
from robustok.training.tracking import check_tracker

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def events(folder):
    """Step to value of each scalar, and steps of each picture, of all event files in a folder."""
    found = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    scalars = {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}
    return scalars, {tag: [e.step for e in found.Images(tag)] for tag in found.Tags()["images"]}


def logged(out):
    """Step to the values of each line of log.jsonl."""
    return {line.pop("step"): line for line in json_lines((out / "log.jsonl").read_text())[0]}


def weights(out):
    return read_weights(resolve(out) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


class Interrupted(Exception):  # noqa: N818
    pass


def fail_at(step):
    def call(now):
        if now == step:
            raise Interrupted

    return call


def test_an_interrupted_training_is_one_run_in_tensorboard(tmp_path, monkeypatch):
    """Same terms as log.jsonl and more, and the same weights as without a tracker."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_LOG_WITH", "wandb")
    out, words = tmp_path / "run", (*tiny.ADVERSARY, "snapshot_every=3")
    with pytest.raises(Interrupted), tiny.in_each_step(fail_at(5)), pytest.warns(UserWarning, match="ACCELERATE"):
        train_tokenizer(tiny.main_run(out, *words, "tracker=tensorboard"))
    assert set(events(out / "tensorboard")[0]["total"]) == {1, 2, 3, 4, 5}
    train_tokenizer(tiny.main_run(out, *words, "tracker=tensorboard"))  # from the state of step 4 on
    train_tokenizer(tiny.main_run(tmp_path / "plain", *words))
    assert same(weights(out), weights(tmp_path / "plain"))

    scalars, pictures = events(out / "tensorboard")
    log = logged(out)
    assert list(log) == [1, 2, 3, 4, 5, 6]
    for name in log[1].keys() - {"seconds"}:
        assert scalars[name] == {step: np.float32(line[name]) for step, line in log.items()}, name
    assert {"total", "lr", "adaptive_weight", "codebook_usage"} < scalars.keys()
    assert scalars["d_lr"][1] == np.float32(1e-3)
    assert min(scalars["images_per_second"].values()) > 0
    assert pictures == {"reconstructions": [3, 6]}
    settings = next((out / "tensorboard").glob("*/hparams.yml")).read_text()
    assert "tokenizer.quantizer.size: 32" in settings
    assert len(list((out / "tensorboard").glob("*/hparams.yml"))) == 1  # not once more on resume


def test_post_training_sends_scores_and_before_and_after(tmp_path, pipeline, classifier):
    free = f"held_out.latents={pipeline / 'samples'}"
    words = ("data.limit=48", "snapshot_every=3", free, f"held_out.extractor.path={classifier}")
    out = tmp_path / "run"
    run = tiny.post_run(out, pipeline / "tokenizer", pipeline / "pairs", *words, "tracker=tensorboard")
    train_decoder(run)
    scalars, pictures = events(out / "tensorboard")
    log = logged(out)
    assert scalars["held_out"] == {step: np.float32(log_of["held_out"]) for step, log_of in held_out(out)}
    assert pictures == {"before_after": [0, 3, 6]}
    assert len(log) >= 6


def held_out(out):
    lines = json_lines((out / "log.jsonl").read_text())[0]
    return [(line["step"], line) for line in lines if "held_out" in line]


def wandb_records(content):
    """The records in a .wandb file: blocks of 32 KiB, of parts with checksum (4 bytes), length (2) and kind (1)."""
    from wandb.proto.wandb_internal_pb2 import Record

    position, data = 7, b""  # after the file's own mark
    while position + 7 <= len(content):
        left = 2**15 - position % 2**15
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        data += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(data)
            data = b""


def written(out, seconds=20):
    """The records of both parts of a run, once a process of wandb's has written them."""
    for _ in range(10 * seconds):
        files = [[*wandb_records(file.read_bytes())] for file in out.glob("wandb/offline-run-*/*.wandb")]
        if [records[-1].WhichOneof("record_type") for records in files if records] == ["exit"] * 2:
            break
        time.sleep(0.1)
    return [record for records in files for record in records]


def test_wandb_offline_is_one_run_with_the_same_id(tmp_path, pipeline, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_PROJECT", "my-project")
    out = tmp_path / "run"
    with pytest.raises(Interrupted), tiny.in_each_step(fail_at(4)):
        train_generator(tiny.generator_run(out, pipeline / "latents", "tracker=wandb"))
    train_generator(tiny.generator_run(out, pipeline / "latents", "tracker=wandb"))

    runs, history, settings = set(), {}, set()
    for record in written(out):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            runs.add((record.run.project, record.run.run_id))
        if kind in ("run", "config"):
            config = record.run.config if kind == "run" else record.config
            settings |= {item.key or ".".join(item.nested_key) for item in config.update}
        if kind == "history":
            items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            history[items["_step"]] = items
    assert runs == {("my-project", json.loads((out / "tracker.json").read_text())["wandb"])}
    assert "generator.width" in settings
    for step, line in logged(out).items():
        assert history[step]["cross_entropy"] == pytest.approx(line["cross_entropy"])
        assert history[step]["images_per_second"] > 0


@pytest.mark.parametrize("when", ["start", "store_init_configuration", "log", "log_images", "finish"])
def test_a_tracker_that_dies_costs_one_warning(tmp_path, monkeypatch, when, capsys):
    def die(*_args, **_kwargs):
        print("a library that prints")
        raise ConnectionError("the network\nis gone")

    monkeypatch.setattr(accelerated.TensorBoardTracker, when, die)
    out = tmp_path / "run"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        train_tokenizer(tiny.main_run(out, "tracker=tensorboard", "snapshot_every=2"))
    said = [str(one.message) for one in found if "tracker" in str(one.message)]
    assert len(said) == 1
    assert "the training goes on, and log.jsonl has everything (ConnectionError: the network is gone)" in said[0]
    assert list(logged(out)) == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().out == ""
    assert (out / "tracker.json").exists() == (when != "start")  # where it never began, it is new next time


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("robustok.training.tracking.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(UserError, match=r"tracker=comet_ml needs the package comet-ml.*pip install comet-ml"):
        check_tracker(tiny.main_run(tmp_path / "run", "tracker=comet_ml"))
    assert main(["main-train", "digits/tokenizer.yaml", f"out={tmp_path / 'run'}", "tracker=trackio"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_another_tracker_may_be_chosen_on_resume(tmp_path):
    out = tmp_path / "run"
    train_tokenizer(tiny.main_run(out, "steps=2"))
    train_tokenizer(tiny.main_run(out, "steps=2", "tracker=tensorboard"))
    assert not (out / "tensorboard").exists()  # nothing was left to do
