"""Run several jobs at the same time, each in a process with its share of the cores, and show their progress."""

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
from threading import Thread, current_thread, main_thread
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from robustok.config import Config
from robustok.console import PlainProgress, console, listen, note, shows_bars
from robustok.errors import UserError, printable

PATIENCE = 60  # seconds in which a job must have saved its state
SECONDS = 0.25  # between looks at the jobs


def run_parallel(jobs: Mapping[str, tuple[Callable[[Any], Any], Config]]) -> None:
    """Run each function on its configuration, all at the same time; wait for all.

    However this ends, no job goes on: they get SIGTERM, at which a training saves its state.

    Args:
        jobs: name to (function of a module, its configuration). Their notes and progress are shown here.

    Raises:
        UserError: a job raised it, or was killed.
        RuntimeError: a job failed otherwise; its trace is on stderr.
        SystemExit: this process or a job was stopped by SIGTERM, or this one by SIGHUP.
    """
    context = multiprocessing.get_context("spawn")  # forked torch threads hang
    threads = share_of_threads(len(jobs))
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
            _watch(running)
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.join(PATIENCE)
                process.kill()
                process.join()


def share_of_threads(jobs: int) -> int:
    """The threads of torch that each of so many jobs at the same time may have."""
    return max(1, torch.get_num_threads() // jobs)


@contextmanager
def few_threads(jobs: int) -> Iterator[None]:
    """Context: as many threads as one of so many jobs would have; small models mostly wait with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(share_of_threads(jobs))
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    """Run one job in a child process, which sends what it would print."""
    Thread(target=_end_with_parent, daemon=True).start()
    latest = 0.0  # when progress was sent

    def send(message: tuple[Any, ...]) -> None:
        nonlocal latest
        if message[0] != "progress" or message[2] in (0, message[3]) or time.monotonic() > latest + SECONDS:
            latest = time.monotonic()
            sender.send(message)

    listen(send)
    torch.set_num_threads(threads)
    try:
        function(config)
        sender.send(("done",))
    except UserError as error:
        sender.send(("refused", str(error)))
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _watch(running: Mapping[str, tuple[BaseProcess, Connection]]) -> None:
    """Show progress and notes until all have ended; raise what the first failure raised."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(20),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not shows_bars()) as progress:
        bars = {name: progress.add_task(name, total=None) for name in running}
        shown, results = {}, {}  # what each bar is of; the last word of each job
        lines: dict[str, PlainProgress] = {}  # where there are no bars
        width = max(map(len, running)) + 2
        while bars:
            time.sleep(SECONDS)
            for name in list(bars):
                process, receiver = running[name]
                code = process.exitcode  # before its messages are read, so that none is missed
                for kind, *said in _received(receiver):
                    if kind == "note":
                        note(f"{name + ':':<{width}}{said[0]}", said[1])
                    elif kind == "progress":
                        what, done, total = said
                        if shown.get(name) != what:
                            text = f"{name}: {printable(what.rpartition('/')[2])}"
                            progress.reset(bars[name], total=total, description=f"{text:<32}")
                            lines[name] = PlainProgress(text, done)
                        shown[name] = what
                        progress.update(bars[name], completed=done, total=total)
                        lines[name].done, lines[name].total = done, total or 0
                    else:
                        results[name] = kind, *said
                if name in lines and not shows_bars():
                    lines[name].look()
                if code is not None:
                    _check(name, code, results.get(name, ("",)))
                    progress.update(bars.pop(name), visible=False)


def _check(name: str, code: int, result: tuple[str, ...]) -> None:
    """Raise what a job that has ended raised."""
    if result[0] == "refused":
        raise UserError(result[1])
    if code < 0:
        why = " (perhaps memory is short)" if code == -signal.SIGKILL else ""
        raise UserError(f"{name} was killed by signal {-code}{why}; run the same command to resume")
    if code:
        raise RuntimeError(f"{name} failed with exit code {code}; its messages are above")
    if result[0] != "done":
        raise SystemExit(_stopped("SIGTERM"))


def _received(receiver: Connection) -> Iterator[tuple[Any, ...]]:
    """What a job has sent since the last call."""
    try:
        while receiver.poll():
            yield receiver.recv()
    except (EOFError, OSError):  # it has ended, perhaps amid a message
        return
