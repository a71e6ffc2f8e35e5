"""Run several commands at the same time, each in a process with its share of the cores, and show their progress."""

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread, current_thread, main_thread
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from robustok.config import Config
from robustok.console import console, note
from robustok.errors import UserError
from robustok.training.common import TrainingConfig

PATIENCE = 60  # seconds in which a job must have saved its state


def run_parallel(jobs: Mapping[str, tuple[Callable[[Any], Any], Config]]) -> None:
    """Run each function on its configuration, all at the same time; wait for all.

    However this ends, no job goes on: they get SIGTERM, at which a training saves its state.

    Args:
        jobs: name to (function of a command, its configuration). The progress of a training is read from its log.

    Raises:
        UserError: a job raised it, or was killed.
        RuntimeError: a job failed otherwise; its trace is on stderr.
        SystemExit: this process or a job was stopped by SIGTERM, or this one by SIGHUP.
    """
    context = multiprocessing.get_context("spawn")  # forked torch threads hang
    threads = max(1, torch.get_num_threads() // len(jobs))
    running: dict[str, tuple[BaseProcess, Connection]] = {}
    with _signals() as listen:
        try:
            for name, (function, config) in jobs.items():
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_run, args=(function, config, threads, sender), name=name)
                process.start()
                sender.close()
                running[name] = (process, receiver)
            listen()
            _watch({name: config for name, (_, config) in jobs.items()}, running)
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.join(PATIENCE)
                process.kill()
                process.join()


@contextmanager
def _signals() -> Iterator[Callable[[], None]]:
    """Context in which signals do not kill this process before it has ended its jobs.

    It yields a function to call once the jobs have started. Until then SIGINT and SIGHUP are ignored, and the jobs
    inherit this, for a terminal sends them to all processes: the jobs end when this process tells them to.
    """
    if current_thread() is not main_thread():  # as in some notebooks: it cannot handle signals
        yield lambda: None
        return

    def stop(number: int, _: Any) -> None:
        raise SystemExit(_stopped(signal.Signals(number).name))

    handlers = {signal.SIGTERM: stop, signal.SIGINT: signal.getsignal(signal.SIGINT)}
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        handlers[signal.SIGHUP] = stop
    before = {number: signal.getsignal(number) for number in handlers}
    for number in handlers:
        signal.signal(number, stop if number == signal.SIGTERM else signal.SIG_IGN)
    try:
        yield lambda: [signal.signal(number, handler) for number, handler in handlers.items()]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopped(by: str) -> int:
    """Say that a signal has stopped the jobs; returns the exit code."""
    note(f"stopped by {by}; what is done is saved, run the same command to resume")
    return 0


def _end_with_parent() -> None:
    """End this job as SIGTERM does when its parent was killed."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def _run(function: Callable[[Any], Any], config: Config, threads: int, sender: Connection) -> None:
    """Run one job in a child process, without a progress bar of its own."""
    Thread(target=_end_with_parent, daemon=True).start()
    os.environ["ROBUSTOK_PROGRESS"] = "0"
    torch.set_num_threads(threads)
    try:
        function(config)
        sender.send("done")
    except UserError as error:
        sender.send(str(error))
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _watch(configs: Mapping[str, Config], running: Mapping[str, tuple[BaseProcess, Connection]]) -> None:
    """Show progress until all have ended; raise what the first failure raised."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=os.environ.get("ROBUSTOK_PROGRESS") == "0") as progress:
        steps = {name: c.steps if isinstance(c, TrainingConfig) else None for name, c in configs.items()}
        bars = {name: progress.add_task(f"{name:<24}", total=total) for name, total in steps.items()}
        alive = dict(running)
        while alive:
            time.sleep(0.25)
            for name, (process, receiver) in list(alive.items()):
                if steps[name] is not None:
                    progress.update(bars[name], completed=_steps_done(configs[name].out / "log.jsonl"))
                if process.exitcode is None:
                    continue
                del alive[name]
                total = steps[name] or 1
                progress.update(bars[name], total=total, completed=total)
                message = _received(receiver)
                if process.exitcode == 2 and message:
                    raise UserError(message)
                if process.exitcode < 0:
                    why = " (perhaps memory is short)" if process.exitcode == -signal.SIGKILL else ""
                    raise UserError(
                        f"{name} was killed by signal {-process.exitcode}{why}; run the same command to resume"
                    )
                if process.exitcode:
                    raise RuntimeError(f"{name} failed with exit code {process.exitcode}; its messages are above")
                if message != "done":
                    raise SystemExit(_stopped("SIGTERM"))


def _received(receiver: Connection) -> str | None:
    """What a job that has ended has sent; None if it sent nothing."""
    try:
        return receiver.recv()
    except EOFError:
        return None


def _steps_done(log: Path) -> int:
    """The last step in the log of a training; 0 if there is none yet."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().splitlines()[1:]  # the first may be cut
        return max((json.loads(line).get("step", 0) for line in lines if line.endswith(b"}")), default=0)
    except (OSError, ValueError):
        return 0
