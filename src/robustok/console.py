"""Notes and progress on stderr while a command runs."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from robustok.errors import printable

FIRST, RATIO, LAST = 15, 0.1, 600  # seconds between two lines of PlainProgress: RATIO of the time so far, in bounds

console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")  # only the first process prints


_listener: Callable[[tuple[Any, ...]], None] | None = None  # of a job of ``run_parallel``


def listen(listener: Callable[[tuple[Any, ...]], None]) -> None:
    """Print nothing more; another process shows it, which gets ("note", text, style), ("progress", what, done, all)."""
    global _listener
    _listener, console.quiet = listener, True


def note(text: str, style: str = "") -> None:
    """Print a line, in which names of files are text and never styles or commands of the terminal."""
    if _listener is not None:
        _listener(("note", text, style))
    console.print(Text(printable(text), style), soft_wrap=True)


def shows_bars() -> bool:
    """Whether stderr is a terminal, or a notebook, for bars that move."""
    return (console.is_terminal or console.is_jupyter) and shows_progress()


def shows_progress() -> bool:
    """Whether progress is shown: as bars that move, or else as lines."""
    return os.environ.get("ROBUSTOK_PROGRESS") != "0"


class PlainProgress:
    """Progress as lines, for a stderr that is no terminal: how much is done, and the time left.

    The first line comes after 15 seconds; the longer the work, the rarer they get.

    Args:
        what: the work.
        start: what was done before, in steps.
    """

    def __init__(self, what: str, start: int = 0) -> None:
        self.what, self.start = what, start
        self.done, self.total = start, 0  # 0: unknown
        self.began = self.shown = time.monotonic()

    def look(self) -> None:
        """Print a line if it is time for one."""
        now = time.monotonic()
        so_far = now - self.began
        if not shows_progress() or now - self.shown < min(max(FIRST, RATIO * so_far), LAST):
            return
        self.shown = now
        if not self.total or self.done <= self.start:
            note(f"{self.what}: {duration(so_far)} so far")
            return
        left = duration(so_far * (self.total - self.done) / (self.done - self.start))
        note(f"{self.what}: {self.done} of {self.total} ({self.done / self.total:.0%}), {left} left")


def duration(seconds: float) -> str:
    """For example "8 s", "3 min 20 s" or "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A part of a long command: when it is done, a line says how long it took."""
    started = time.monotonic()
    if _listener is not None:
        _listener(("progress", name, 0, None))
    yield
    note(f"{name:<30} {time.monotonic() - started:5.0f} s")


def track(steps: range, description: str, show: bool = True) -> Iterator[int]:
    """Iterate over the steps with progress and the remaining time on stderr: a bar, or lines where it cannot move."""
    if show and _listener is not None:
        for step in steps:
            yield step
            _listener(("progress", description, step + 1, steps.stop))
        return
    if not show or not shows_progress():
        yield from steps
        return
    if not shows_bars():
        lines = PlainProgress(description, steps.start)
        lines.total = steps.stop
        for step in steps:
            yield step
            lines.done = step + 1
            lines.look()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{printable(description):<28}", total=steps.stop, completed=steps.start)
        for step in steps:
            yield step
            progress.advance(task)
