"""The `report` command: run folders to one self-contained HTML page."""

from pathlib import Path

from pydantic import Field

from robustok.config import Config
from robustok.report import write_report


class ReportRun(Config):
    """Which runs to report, and where."""

    path: Path = Field(Path("runs/demo"), description="a run folder, or a folder of run folders")
    out: Path | None = Field(None, description="the page to write; default: report.html in that folder")
    title: str | None = Field(None, description="title of the page; default: the folder's name")


def report(run: ReportRun) -> Path:
    """Write the page and return its path.

    Raises:
        UserError: the folder is missing or holds no run; the page cannot be written.
    """
    return write_report(run.path, run.out, run.title)
