"""Run several verbs at the same time, each in a process with its share of the cores, and show how far they are."""

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from robustok.config import Config
from robustok.console import console
from robustok.errors import UserError


def side_by_side(jobs: Mapping[str, tuple[Callable[[Config], Any], Config]]) -> None:
    """Run each function on its configuration, all at the same time; wait for all.

    Args:
        jobs: name to (verb, configuration). Where a configuration has ``steps``, its progress is read from its
            log.jsonl.

    Raises:
        UserError: a job raised it.
        RuntimeError: a job failed otherwise; its trace is on stderr.
        SystemExit: a job was stopped by SIGTERM and has saved its state.
    """
    context = multiprocessing.get_context("spawn")  # forked torch threads hang
    threads = max(1, torch.get_num_threads() // len(jobs))
    running = {}
    for name, (function, config) in jobs.items():
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(function, config, threads, sender), name=name)
        process.start()
        sender.close()
        running[name] = (process, receiver)
    try:
        _watch(jobs, running)
    except BaseException:  # the user's Ctrl-C above all: the others save their state and end too
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()
        raise


def _run(function: Callable[[Config], Any], config: Config, threads: int, sender: Any) -> None:
    """What a child process does: the verb, without a progress bar of its own."""
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


def _watch(jobs: Mapping[str, tuple[Callable[[Config], Any], Config]], running: Mapping[str, Any]) -> None:
    """Show progress until all have ended; raise what the first failure raised."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=os.environ.get("ROBUSTOK_PROGRESS") == "0") as progress:
        bars: dict[str, TaskID] = {
            name: progress.add_task(f"{name:<24}", total=getattr(config, "steps", None))
            for name, (_, config) in jobs.items()
        }
        alive = dict(running)
        while alive:
            time.sleep(0.25)
            for name, (process, receiver) in list(alive.items()):
                progress.update(bars[name], completed=_steps_done(jobs[name][1]))
                if process.exitcode is None:
                    continue
                del alive[name]
                total = getattr(jobs[name][1], "steps", None) or 1
                progress.update(bars[name], total=total, completed=total)
                message = receiver.recv() if receiver.poll() else None
                if process.exitcode == 2 and message:
                    raise UserError(message)
                if process.exitcode:
                    raise RuntimeError(f"{name} failed with exit code {process.exitcode}; its messages are above")
                if message != "done":
                    raise SystemExit(0)  # stopped by SIGTERM with its state saved


def _steps_done(config: Config) -> int:
    """The last step in the log of a run."""
    if getattr(config, "steps", None) is None:
        return 0
    try:
        with (Path(config.out) / "log.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            return max(
                (json.loads(line).get("step", 0) for line in file.read().splitlines()[1:] if line.endswith(b"}")),
                default=0,
            )
    except (OSError, ValueError):
        return 0
