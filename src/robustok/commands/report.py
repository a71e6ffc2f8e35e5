"""The `report` command: run folders to one self-contained HTML page."""

import os
import time
import webbrowser
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from robustok.config import Config
from robustok.console import note
from robustok.errors import UserError
from robustok.report import write_report

SHOWN = (".jsonl", ".npz", ".png", ".yaml")  # files whose change changes the page


class ReportRun(Config):
    """Which runs to report, and where."""

    path: Path = Field(Path("runs/demo"), description="a run folder, or a folder of run folders")
    out: Path | None = Field(None, description="the page to write; default: report.html in that folder")
    title: str | None = Field(None, description="title of the page; default: the folder's name")
    open: bool = Field(False, description="show the page in a browser; robustok report --open")
    watch: bool = Field(
        False, description="write it again whenever the runs have changed, until Ctrl-C; robustok report --watch"
    )
    every: int = Field(10, ge=1, description="seconds between two looks of watch")


def report(run: ReportRun) -> Path:
    """Write the page and return its path.

    Raises:
        UserError: the folder is missing or holds no run; the page cannot be written.
    """
    page = run.out or run.path / "report.html"
    if not run.watch:
        write_report(run.path, page, run.title)
        if run.open:
            _show(page)
        return page
    note(f"{page} follows the runs under {run.path}; Ctrl-C ends it")
    opened = not run.open
    try:
        for _ in _changes(run.path, run.every):
            try:
                write_report(run.path, page, run.title, refresh=run.every)
            except UserError as error:
                if not run.path.is_dir():
                    raise
                note(f"{error}; waiting", "yellow")  # such as for the first line of a log
                continue
            if not opened:
                _show(page)
            opened = True
    except KeyboardInterrupt:
        pass
    return write_report(run.path, page, run.title)  # one that stays as it is


def _changes(folder: Path, every: int) -> Iterator[None]:
    """Yield at first, and then whenever a file under the folder that the page shows has changed."""
    before = None
    while True:
        now = _state(folder)
        if now != before:
            yield
        before = now
        time.sleep(every)


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of all files that the page shows."""
    found = {}
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("state", "snapshot") and name[0] != "."]
        for name in names:
            if name.endswith(SHOWN):
                try:
                    status = os.stat(os.path.join(path, name))
                except OSError:  # it was removed since
                    continue
                found[os.path.join(path, name)] = status.st_size, status.st_mtime_ns
    return found


def _show(page: Path) -> None:
    """Open the page in the user's browser, or say where it is."""
    if not webbrowser.open(page.resolve().as_uri()):
        note(f"found no browser to open; the page is {page.resolve()}", "yellow")
