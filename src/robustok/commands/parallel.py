"""Run several commands at the same time, each in a process with its share of the cores, and show their progress."""

import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from robustok.config import Config
from robustok.console import console
from robustok.errors import UserError
from robustok.training.common import TrainingConfig


def run_parallel(jobs: Mapping[str, tuple[Callable[[Any], Any], Config]]) -> None:
    """Run each function on its configuration, all at the same time; wait for all.

    Args:
        jobs: name to (function of a command, its configuration). The progress of a training is read from its log.

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
        _watch({name: config for name, (_, config) in jobs.items()}, running)
    except BaseException:  # also Ctrl-C: the other jobs save their state and end
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()
        raise


def _run(function: Callable[[Any], Any], config: Config, threads: int, sender: Connection) -> None:
    """Run one job in a child process, without a progress bar of its own."""
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
                message = receiver.recv() if receiver.poll() else None
                if process.exitcode == 2 and message:
                    raise UserError(message)
                if process.exitcode:
                    raise RuntimeError(f"{name} failed with exit code {process.exitcode}; its messages are above")
                if message != "done":
                    raise SystemExit(0)  # stopped by SIGTERM with its state saved


def _steps_done(log: Path) -> int:
    """The last step in the log of a training; 0 if there is none yet."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().splitlines()[1:]  # the first may be cut
        return max((json.loads(line).get("step", 0) for line in lines if line.endswith(b"}")), default=0)
    except (OSError, ValueError):
        return 0
