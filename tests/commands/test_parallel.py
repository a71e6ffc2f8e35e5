"""Jobs of ``run_parallel`` end with it, however it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pydantic import Field

from robustok.commands.parallel import few_threads, run_parallel
from robustok.config import Config
from robustok.console import note, stage, track
from robustok.errors import UserError


class Job(Config):
    out: Path = Field(description="the file for the number of the process")


def sleep(job: Job) -> None:
    job.out.write_text(str(os.getpid()))
    time.sleep(120)


def die(job: Job) -> None:
    wait_for(job.out)
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(job: Job) -> None:
    raise UserError("not like this")


def work(job: Job) -> None:
    with stage("part one"):
        for _ in track(range(3), "folder/steps"):
            note("a word")


def wait_for(file: Path) -> int:
    """The number in a file that is still to be written."""
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(file.read_text())


def has_ended(process: int) -> bool:
    """Whether a process ends within seconds."""
    for _ in range(200):
        try:
            os.kill(process, 0)
            if Path(f"/proc/{process}/stat").read_text().split()[2] == "Z":  # ended, but its parent did not look
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def slow_part(job: Job) -> None:
    for _ in track(range(4), "folder/steps"):
        time.sleep(0.3)


def test_jobs_show_lines_of_progress_where_no_bar_can_move(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ROBUSTOK_PROGRESS", "1")
    monkeypatch.setattr("robustok.console.FIRST", 0.1)
    run_parallel({name: (slow_part, Job(out=tmp_path)) for name in ("a", "second")})
    shown = capsys.readouterr().err.splitlines()
    assert all(
        re.fullmatch(r"(a|second): steps(: [1-4] of 4 \(\d+%\), \d+ s left|: \d+ s so far)", line) for line in shown
    )
    assert {line.split(":")[0] for line in shown} == {"a", "second"}


def test_few_threads_are_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with few_threads(2):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 4
        with few_threads(9):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_what_jobs_say_is_shown_with_their_names(tmp_path, capsys):
    run_parallel({name: (work, Job(out=tmp_path)) for name in ("a", "second")})
    shown = capsys.readouterr().err.splitlines()
    assert sorted(line[:12] for line in shown) == ["a:      a wo"] * 3 + ["a:      part"] + ["second: a wo"] * 3 + [
        "second: part"
    ]
    assert all(line.endswith(" s") for line in shown if "part one" in line)


@pytest.mark.parametrize(("function", "said"), [(die, "second was killed by signal 9 .*resume"), (refuse, "not like")])
def test_a_job_that_ends_badly_ends_the_others(tmp_path, function, said):
    job, handler = Job(out=tmp_path / "process"), signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError, match=said):
        run_parallel({"first": (sleep, job), "second": (function, job)})
    assert not job.out.exists() or has_ended(int(job.out.read_text()))
    assert signal.getsignal(signal.SIGINT) == handler


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as on Linux")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGKILL"])
def test_a_signal_ends_the_jobs_too(tmp_path, name):
    code = (
        "import signal, sys; from commands.test_parallel import Job, run_parallel, sleep\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler); signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "try: run_parallel({'a': (sleep, Job(out=sys.argv[1]))})\n"
        "except KeyboardInterrupt: print('interrupted'); sys.exit(130)"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    command = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "process")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )
    job = wait_for(tmp_path / "process")
    number = getattr(signal, name)
    if name in ("SIGHUP", "SIGINT"):
        os.killpg(command.pid, number)  # as a terminal does
    else:
        command.send_signal(number)
    said, _ = command.communicate(timeout=60)
    assert has_ended(job)
    assert "Traceback" not in said
    assert (command.returncode, said) == {
        "SIGINT": (130, "interrupted\n"),
        "SIGKILL": (-9, ""),
    }.get(name, (0, f"stopped by {name}; what is done is saved, run the same command to resume\n"))
