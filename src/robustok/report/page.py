"""A :class:`Report` to one HTML page that needs no network, no other files, and no script for its content."""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from robustok.files import write_file
from robustok.report import changes, figures, names, sweeps
from robustok.report.collect import Report, Result, collect, natural
from robustok.report.names import joined
from robustok.report.results import LATENTS, Column, Table, arrange, mean_over_seeds

PIXELS = 2_000_000  # of all images together: keeps the page at a few MB
LISTED = 2000  # lines of metrics.jsonl that are shown as they are


def write_report(folder: str | Path, out: str | Path | None = None, title: str | None = None, refresh: int = 0) -> Path:
    """Collect the runs under ``folder`` and write the page, by default to ``folder/report.html``.

    Args:
        folder: a run folder, or a folder of run folders.
        out: the page.
        title: of the page; None is the folder's name.
        refresh: seconds after which the open page loads itself again; 0 is never.

    Raises:
        UserError: the folder is missing or holds no run; the page cannot be written.
    """
    page = render(collect(folder, title), refresh)
    out = Path(folder) / "report.html" if out is None else Path(out)
    write_file(out, page, shared=True)
    return out


def render(report: Report, refresh: int = 0) -> str:
    """The page as text; ``refresh`` as for :func:`write_report`. Jinja2 escapes all that comes from files."""
    templates = Environment(
        loader=PackageLoader("robustok.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions = (names.capital, names.counts, names.decimal, names.decoder_name, names.describe, names.joined)
    functions += (names.label, names.plus_minus, names.settings, mean_over_seeds, raw)
    templates.filters |= {function.__name__: function for function in functions}
    style = templates.get_template("style.css").render(colours=figures.COLOURS)
    script = templates.get_template("script.js").render()
    table = arrange([result for result in report.results if result.metric != sweeps.HELD_OUT])
    found = changes.changes(table)
    sentence, cards = changes.headline(table, found)
    sheets = len(report.rows) + 4 * len(report.pairs) + sum(min(len(run.progress), 4) for run in report.runs)
    budget = PIXELS // max(sheets, 1)
    listed = report.results[:LISTED]
    return templates.get_template("page.html").render(
        report=report,
        refresh=refresh,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'",
        sentence=sentence,
        cards=cards,
        features={c.extractor or "an unnamed extractor": None for c in table.columns if names.other_features(c)},
        sliders=[figures.slider(pair, budget) for pair in report.pairs],
        strips=[figures.strips(rows, budget) for rows in report.rows],
        table=table,
        image_columns=_heads([c for c in table.columns if c.metric not in LATENTS]),
        latent_columns=_heads([c for c in table.columns if c.metric in LATENTS]),
        changes=found,
        heat_maps=_heat_maps(table),
        sweeps=sweeps.choices(report.results) + sweeps.sweeps(report.results),
        curves=figures.curves(report.runs),
        protocols=_protocols(report.results),
        listed=listed,
        keys=[key for key in dict.fromkeys(key for r in listed for key in r.record) if key != "versions"],
        progress=[(run, figures.progress(run, budget)) for run in report.runs],
    )


def raw(value: Any) -> str:
    """A value of metrics.jsonl as it was written."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _hash(text: str) -> str:
    """The source expression by which the Content-Security-Policy allows this text and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _heads(columns: Sequence[Column]) -> dict[Column, tuple[str, str]]:
    """The head of each column, and how it was measured where a reader could compare what cannot be compared."""
    metrics = [column.metric for column in columns]
    several = len({(c.extractor, c.reference) for c in columns if c.metric in names.DISTANCES}) > 1
    heads = {}
    for column in columns:
        how = [column.extractor, column.reference] if metrics.count(column.metric) > 1 else []
        if not how and several and column.metric in names.DISTANCES:
            how = [column.extractor, column.reference.split(",")[0]]
        heads[column] = names.label(column) + names.arrow(column), joined(how, " · ")
    return heads


def _heat_maps(table: Table) -> list[tuple]:
    """(row, column, grid, lowest and highest mean): the colours of all grids of one column share their range."""
    values: dict[Column, list[float]] = {}
    for (_, column), grid in table.grids.items():
        means = [mean_over_seeds(cell).value for cell in grid.values()]
        values.setdefault(column, []).extend(mean for mean in means if math.isfinite(mean))
    keys = [(row, column) for row in table.rows for column in table.columns if (row, column) in table.grids]
    return [(row, c, table.grids[row, c], min(values[c]), max(values[c])) for row, c in keys if values[c]]


def _protocols(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """For each extractor and reference: metrics, extractor, reference, samples, seeds and versions."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result.extractor, result.reference), []).append(result.record | {"metric": result.metric})

    def every(lines: list[dict[str, Any]], key: str) -> str:
        return joined(sorted({str(line[key]) for line in lines if line.get(key) is not None}, key=natural))

    def versions(lines: list[dict[str, Any]]) -> str:
        found = [line["versions"] for line in lines if isinstance(line.get("versions"), dict)]
        return joined(dict.fromkeys(f"{name} {version}" for each in found for name, version in each.items()))

    return [
        (every(lines, "metric"), *how, every(lines, "samples"), every(lines, "seed"), versions(lines))
        for how, lines in groups.items()
    ]
