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
    return (console.is_terminal or console.is_jupyter) and os.environ.get("ROBUSTOK_PROGRESS") != "0"


@contextmanager
def stage(name: str) -> Iterator[None]:
    """A part of a long command: when it is done, a line says how long it took."""
    started = time.monotonic()
    if _listener is not None:
        _listener(("progress", name, 0, None))
    yield
    note(f"{name:<30} {time.monotonic() - started:5.0f} s")


def track(steps: range, description: str, show: bool = True) -> Iterator[int]:
    """Iterate over the steps with a progress bar and the remaining time on stderr."""
    if show and _listener is not None:
        for step in steps:
            yield step
            _listener(("progress", description, step + 1, steps.stop))
        return
    if not show or not shows_bars():
        yield from steps
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
