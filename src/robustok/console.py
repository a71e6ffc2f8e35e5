"""Notes and progress on stderr while a command runs."""

import os
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from robustok.errors import printable

console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")  # only the first process prints


def note(text: str, style: str = "") -> None:
    """Print a line, in which names of files are text and never styles or commands of the terminal."""
    console.print(Text(printable(text), style), soft_wrap=True)


def track(steps: range, description: str, show: bool = True) -> Iterator[int]:
    """Iterate over the steps with a progress bar and the remaining time on stderr."""
    if not show or not (console.is_terminal or console.is_jupyter) or os.environ.get("ROBUSTOK_PROGRESS") == "0":
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
