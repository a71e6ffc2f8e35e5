"""Run robustok commands that need one another, several at a time. The same call again continues.

A job is one command, with the run folder ``OUT/NAME``. ``OUT/jobs.jsonl`` has a line for every job that ended: name,
words, exit code, seconds. A job whose last line says 0 with the same words is not run again. What it printed is in
``OUT/logs``.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        name: unique, also its folder.
        needs: names of the jobs that come first.
        words: command, recipes and settings, without ``out``.
    """

    name: str
    needs: tuple[str, ...]
    words: tuple[str, ...]


def run(jobs: Sequence[Job], out: Path, workers: int) -> None:
    """Run all jobs, in order where nothing else decides. A job whose needs failed is left out."""
    (out / "logs").mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")  # a process that has imported everything once
    context.set_forkserver_preload(["robustok.cli", "robustok.commands.evaluate", "robustok.training.decoder"])
    running: dict[str, tuple[BaseProcess, float, Job]] = {}
    done = {job.name for job in jobs if finished(out).get(job.name) == list(job.words)}
    failed: set[str] = set()
    while True:
        for name, (process, started, job) in list(running.items()):
            if process.exitcode is not None:
                del running[name]
                (failed if process.exitcode else done).add(name)
                _record(out, job, process.exitcode, time.monotonic() - started)
        ready = [j for j in jobs if j.name not in done | failed | running.keys() and done.issuperset(j.needs)]
        if not running and not ready:
            break
        for job in ready[: workers - len(running)]:
            process = context.Process(target=_work, args=(job, out), name=job.name)
            process.start()
            running[job.name] = process, time.monotonic(), job
        time.sleep(0.2)
    if left := [job.name for job in jobs if job.name not in done]:
        print(f"not done: {', '.join(left)}; see {out / 'logs'}", flush=True)


def finished(out: Path) -> dict[str, list[str]]:
    """Words of the jobs that have succeeded, by name."""
    file = out / "jobs.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {line["name"]: line["words"] for line in lines if line["code"] == 0}


def _record(out: Path, job: Job, code: int, seconds: float) -> None:
    line = {"name": job.name, "words": job.words, "code": code, "seconds": round(seconds, 1)}
    with (out / "jobs.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{time.strftime('%H:%M:%S')} {job.name}: exit code {code}, {seconds:.0f} s", flush=True)


def _work(job: Job, out: Path) -> None:
    """In its own process: run the command with its output in a file."""
    from robustok.cli import main

    log = os.open(out / "logs" / f"{job.name.replace('/', '_')}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    raise SystemExit(main([*job.words, f"out={out / job.name}"]))
