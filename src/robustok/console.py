"""Notes and progress on stderr while a command runs."""

import os
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")  # only the first process prints


def track(steps: range, description: str, show: bool = True) -> Iterator[int]:
    """Iterate over the steps with a progress bar and the remaining time on stderr."""
    if not show or not (console.is_terminal or console.is_jupyter) or os.environ.get("ROBUSTOK_PROGRESS") == "0":
        yield from steps
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"{description:<28}", total=steps.stop, completed=steps.start)
        for step in steps:
            yield step
            progress.advance(task)
