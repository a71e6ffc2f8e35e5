import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import tiny
from robustok import files
from robustok.data.pixels import save_picture
from robustok.devices import start_accelerator
from robustok.errors import UserError
from robustok.randomness import seed_step, step_rng
from robustok.runs import RunFolder, termination
from robustok.training.common import Meter, average_copy, learning_rate, update_average
from robustok.training.finite import FiniteCheck, step_optimizer


@pytest.fixture
def run(tmp_path):
    return tiny.main_run(tmp_path / "run")


@pytest.fixture
def folder(run):
    folder = RunFolder(run)
    folder.start()
    return folder


# Schedules and randomness


def test_learning_rate_warms_up_and_falls_in_a_cosine(tmp_path):
    run = tiny.main_run(tmp_path, "steps=110", "warmup_steps=10", "learning_rate=1.0", "min_learning_rate=0.2")
    rates = [learning_rate(run, step) for step in range(111)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert (rates[10], rates[60], rates[110]) == pytest.approx((1.0, 0.6, 0.2))
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(run, 110, peak=0.1) == pytest.approx(0.1)  # a minimum above the peak does not raise it
    with pytest.raises(UserError, match="warmup_steps 110 does not leave any of the 110 steps"):
        tiny.main_run(tmp_path, "steps=110", "warmup_steps=110")


def test_random_numbers_are_a_function_of_seed_step_and_purpose():
    keys = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (1, 1, "a")]
    draws = {torch.rand(3, generator=step_rng(*key)).sum().item() for key in keys}
    assert len(draws) == len(keys)
    assert torch.equal(torch.rand(3, generator=step_rng(0, 0, "a")), torch.rand(3, generator=step_rng(0, 0, "a")))
    seed_step(0, 1, rank=0)
    first = torch.rand(3)
    seed_step(0, 1, rank=1)
    assert not torch.equal(first, torch.rand(3))


def test_average_of_the_weights():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    average = average_copy(model)
    assert not any(p.requires_grad for p in average.parameters())
    start, expected = model[0].weight.detach().clone(), model[0].weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            model[0].weight += 1
            model[1].running_mean += 1
        update_average(average, model, decay=0.9)
        expected = 0.9 * expected + 0.1 * model[0].weight.detach()
    torch.testing.assert_close(average[0].weight, expected)
    assert torch.equal(average[0].bias, model[0].bias)
    assert torch.equal(average[1].running_mean, model[1].running_mean)
    update_average(average, model, decay=0.0)
    assert torch.equal(average[0].weight, model[0].weight)
    torch.testing.assert_close(model[0].weight, start + 3)


def test_meter_means_over_steps_and_resumes():
    meter, again, accelerator = Meter(), Meter(), start_accelerator()
    meter.add({"a": torch.tensor(1.0), "b": 2.0})
    again.load_state(json.loads(json.dumps(meter.state())))
    for m in (meter, again):
        m.add({"a": 3.0})
        assert m.means(accelerator) == {"a": 2.0, "b": 2.0}
        assert m.means(accelerator) == {}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite(tmp_path, value):
    """It is an error one step later, or before anything is written; the weights stay as they are."""
    accelerator, good = start_accelerator(), {"pixel": torch.tensor(1.0), "semantic": torch.tensor(2.0)}
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = accelerator.prepare(torch.optim.AdamW([weight], lr=0.1, fused=True))
    check, kept = FiniteCheck(tmp_path, accelerator), []
    for step, loss in ((6, 1.0), (7, value)):
        weight.grad = torch.full((3,), loss)
        step_optimizer(optimizer, check.add(good | {"semantic": torch.tensor(loss)}, step))
        kept.append([weight.detach().clone(), *(x.clone() for x in optimizer.state[weight].values())])
    assert not torch.equal(kept[0][0], torch.ones(3))
    assert all(map(torch.equal, *kept))  # weights, moments and number of steps
    for look in (partial(copy.copy(check).add, good, 8), check.settle):
        with pytest.raises(UserError, match=rf"not finite at step 7 \(semantic = {value}\); no state was saved"):
            look()


def test_a_loss_that_is_not_finite_in_another_process(tmp_path):
    two = SimpleNamespace(num_processes=2, reduce=lambda flag, _: flag + 1)
    check = FiniteCheck(tmp_path, two)
    assert check.add({"pixel": torch.tensor(0.5)}, 3) == 1
    with pytest.raises(UserError, match=r"not finite at step 3 \(in another process\)"):
        check.settle()
    check.settle()  # said once


# The run folder


def test_another_configuration_is_refused(run, folder):
    RunFolder(run)
    with pytest.raises(
        UserError,
        match=r"another configuration: learning_rate: 0\.01 -> 0\.1; seed: 0 -> 3; set the old values to resume",
    ):
        RunFolder(tiny.main_run(folder.path, "seed=3", "learning_rate=0.1"))
    moved = folder.path.rename(folder.path.with_name("moved"))
    RunFolder(tiny.main_run(moved))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        RunFolder(tiny.main_run(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*run/config\.yaml: Not a directory"):
        RunFolder(tiny.main_run(tmp_path / "file" / "run")).start()


class Anything:
    """Takes every state."""

    def load(self, state):
        pass


def test_what_a_kill_left_is_no_content_and_is_removed(run):
    run.out.mkdir()
    (run.out / ".config.yaml.tmp").write_text("hal")  # killed before the first file had its name
    folder = RunFolder(run)
    folder.start()
    assert [path.name for path in run.out.iterdir() if path.name != ".lock"] == ["config.yaml"]
    folder.save_state(1, state(1))
    (run.out / "snapshot" / ".best.old").mkdir(parents=True)  # killed while it was replaced
    (run.out / "state" / ".00000002.tmp").mkdir()
    RunFolder(run)
    assert [path.name for path in (run.out / "snapshot").iterdir()] == ["best"]
    assert [path.name for path in (run.out / "state").iterdir()] == ["00000001"]


def test_one_process_runs_in_a_folder(run):
    RunFolder(run).start()
    code = "import sys, time, tiny; from robustok.runs import RunFolder; from pathlib import Path"
    code += "\nfolder = RunFolder(tiny.main_run(Path(sys.argv[1]))); print(flush=True); time.sleep(60)"
    late = RunFolder(tiny.main_run(run.out.with_name("late")))
    command = [sys.executable, "-c", code, str(run.out)]
    paths = os.pathsep.join([str(Path(tiny.__file__).parent), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths}) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=r"another process is writing to .*run; wait until it ends, or choose"):
            RunFolder(run)
        other.kill()
    assert RunFolder(run).load_state() is None
    # Two that began at the same time: the other one was faster.
    RunFolder(late.run).start()
    with pytest.raises(UserError, match=r"another process has begun this run in .*late just now; run the same command"):
        late.start()


def test_the_lock_is_released_at_the_end_of_the_steps(run, folder):
    assert (run.out / ".lock").exists()
    for _ in folder.steps(range(1), SimpleNamespace(save=lambda keep: state(1)), 5, SimpleNamespace(num_processes=1)):
        pass
    assert sorted(path.name for path in run.out.iterdir()) == ["config.yaml", "state"]


@pytest.mark.parametrize("name", ["log.jsonl", "config.yaml", "state", "state/00000001", "state/00000001/state.json"])
def test_links_of_a_foreign_run_folder_are_not_followed(run, folder, name, tmp_path):
    folder.log(1, {"pixel": 0.1})
    folder.save_state(1, state(1))
    (run.out / name).rename(tmp_path / "elsewhere")
    (run.out / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name} is a link to a place outside of .*run, where nothing is read or"):
        RunFolder(run)
    (run.out / name).unlink()
    (tmp_path / "elsewhere").rename(run.out / name)
    run.out.rename(tmp_path / "moved")
    run.out.symlink_to(tmp_path / "moved")  # the folder itself may be a link
    assert RunFolder(run).load_state()[0] == 1


@pytest.mark.parametrize("name", ["log.jsonl", "config.yaml", "state/00000001/state.json"])
def test_a_fifo_in_a_run_folder_is_not_waited_for(run, folder, name):
    folder.log(1, {"pixel": 0.1})
    folder.save_state(1, state(1))
    (run.out / name).unlink()
    os.mkfifo(run.out / name)
    said = "none of its 1 states can be read" if "state" in name else f"cannot read .*{name}: it is a FIFO"
    with pytest.raises(UserError, match=said):
        RunFolder(run).restore(Anything(), {})


def state(value):
    nested = {
        "optimizer": {"state": {0: {"step": torch.tensor(2.0)}, 10: {}}, "groups": [{"betas": (0.9, 0.95), "lr": 0.1}]}
    }
    shared = torch.arange(6.0)
    return nested | {
        "weights": {"a/b.c": shared[:3], "tied": shared[:3]},
        "best": {"value": float("inf")},
        "none": None,
        "v": value,
    }


def test_a_state_reads_back_as_it_was(folder):
    folder.save_state(5, state(1))
    step, found, inputs = folder.load_state()
    assert inputs == {}
    assert step == 5
    assert found["optimizer"]["state"][0]["step"].item() == 2
    assert found["optimizer"]["state"][10] == {}
    assert found["optimizer"]["groups"] == [{"betas": [0.9, 0.95], "lr": 0.1}]
    assert torch.equal(found["weights"]["a/b.c"], torch.tensor([0.0, 1.0, 2.0]))
    assert torch.equal(found["weights"]["tied"], torch.tensor([0.0, 1.0, 2.0]))
    assert (found["best"], found["none"], found["v"]) == ({"value": float("inf")}, None, 1)


def test_the_two_newest_states_are_kept_and_a_broken_one_is_skipped(folder):
    assert folder.load_state() is None
    for step in (1, 2, 10):
        folder.save_state(step, state(step))
    assert sorted(p.name for p in (folder.path / "state").iterdir()) == ["00000002", "00000010"]
    file = folder.path / "state" / "00000010" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert folder.load_state()[0] == 2
    (folder.path / "state" / "00000002" / "state.json").write_text('{"step": 2, "sta')
    with pytest.raises(UserError, match=r"none of its 2 states can be read; .* start again from step 0"):
        folder.load_state()


def test_a_full_disk_keeps_the_last_good_state(folder, monkeypatch):
    folder.save_state(1, state(1))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "replace_folder", full)
        with pytest.raises(UserError, match=r"No space left on device; free some space .*the last good state is kept"):
            folder.save_state(2, state(2))
    assert folder.load_state()[0] == 1
    folder.save_state(2, state(2))
    assert folder.load_state()[0] == 2


def test_the_log_goes_back_to_the_state(folder):
    for step in (0, 1, 2, 3):
        folder.log(step, {"pixel": 0.1 * step})
    with (folder.path / "log.jsonl").open("a") as handle:
        handle.write('{"step": 4, "pix')  # killed while writing
    folder.save_state(2, state(2))
    with pytest.warns(UserWarning, match="log.jsonl: 1 lines were cut off, as by a killed process; removed"):
        folder.restore(Anything(), {})
    assert [line["step"] for line in tiny.log(folder.path)] == [0, 1, 2]
    shutil.rmtree(folder.path / "state")
    folder.restore(Anything(), {})
    assert tiny.log(folder.path) == []  # the run starts again, so does the log


def test_only_the_main_process_writes(run):
    folder = RunFolder(run, main=False)
    folder.start()
    folder.log(1, {"pixel": 1.0})
    folder.save_state(1, state(1))
    assert not folder.path.exists()


def test_weights_that_are_not_finite_do_not_replace_a_good_state(folder):
    for step in (1, 2):
        folder.save_state(step, state(step))
    for value in (torch.nan, torch.inf):
        with pytest.raises(UserError, match="weights/a is not finite after step 3; the state before is kept"):
            folder.save_state(3, {"weights": {"a": torch.tensor([1.0, value])}})
    assert folder.load_state()[0] == 2


# Devices, signals and pictures


def test_sigterm_is_noted():
    before = signal.getsignal(signal.SIGTERM)
    with termination() as received:
        assert not received
        os.kill(os.getpid(), signal.SIGTERM)
        assert received
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_picture_shows_every_pixel(tmp_path):
    images = torch.rand(2, 3, 3, 4, 5) * 2 - 1
    save_picture(tmp_path / "samples" / "a.png", images)
    picture = torch.tensor(list(Image.open(tmp_path / "samples" / "a.png").tobytes())).view(8, 15, 3)
    for row in range(2):
        for column in range(3):
            tile = picture[4 * row : 4 * row + 4, 5 * column : 5 * column + 5].permute(2, 0, 1) / 127.5 - 1
            torch.testing.assert_close(tile, images[row, column], atol=1 / 127, rtol=0)
