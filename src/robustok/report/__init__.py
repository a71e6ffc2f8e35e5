"""Run folders to one self-contained HTML page. Reads files only, and imports no torch."""

from robustok.report.collect import Report, collect
from robustok.report.page import render, write_report

__all__ = ["Report", "collect", "render", "write_report"]
