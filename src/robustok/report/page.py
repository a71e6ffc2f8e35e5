"""A :class:`Report` to one HTML page that needs nothing else: no network, no other files, no script for its content."""

import contextlib
import html
import json
import math
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from robustok.errors import UserError
from robustok.report import plot
from robustok.report.collect import Report, Run, collect, natural
from robustok.report.style import SCRIPT, STYLE
from robustok.report.sweeps import HELD_OUT, sweep_section
from robustok.report.table import Column, Estimate, Row, Seeds, Table, headline, over_seeds
from robustok.report.words import DISTANCES, LATENTS, capital, decoder_name, label, settings, summary, tokenizer_name

PIXELS = 2_000_000  # of all pictures together: keeps the page at a few MB
HIGHER = {"psnr", "ssim", "inception_score", "precision", "recall", "codebook_usage", "codebook_perplexity", "accuracy"}
LOWER = {*DISTANCES, "lpips_alex", "lpips_vgg", "token_divergence", "latent_distance"}
NOTHING = Estimate(math.nan, math.nan)

e = html.escape


def write_report(folder: Path, out: Path | None = None, title: str | None = None) -> Path:
    """Collect the runs under ``folder`` and write the page, by default to ``folder/report.html``.

    Raises:
        UserError: the folder is missing or holds no run; the page cannot be written.
    """
    out = Path(folder) / "report.html" if out is None else Path(out)
    page = render(collect(Path(folder), title))
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8", errors="replace")
        os.replace(partial, out)  # a reader sees the old page or the new one, never half of one
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(
            f"cannot write the report {out}: {error.strerror}; choose another place with out=PATH"
        ) from None
    return out


def render(report: Report) -> str:
    """The page as text. Everything that comes from files is escaped."""
    table = headline([result for result in report.results if result.metric != HELD_OUT])
    sheets = len(report.grids) + 4 * len(report.comparisons) + sum(min(len(run.progress), 4) for run in report.runs)
    budget = PIXELS // max(sheets, 1)
    sections = [
        ("Results", _results(table)),
        ("Perturbed reconstructions, by rate and strength", _heat_maps(table)),
        ("Sigma and strength", sweep_section(report.results)),
        ("Training", plot.curve_section(report.runs)),
        ("Reconstructions, clean and perturbed", "".join(plot.grid_section(grid, budget) for grid in report.grids)),
        (
            "Before and after post-training",
            "".join(plot.comparison_section(c, i, budget) for i, c in enumerate(report.comparisons)),
        ),
        ("Protocol", _protocol(report)),
        ("Runs", _runs(report.runs, budget)),
    ]
    notes = "".join(f"<li>{e(note)}</li>" for note in report.notes)
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{e(report.title)} · robustok</title><style>{STYLE}</style></head><body><main>"
        f'<header><p class="kicker">robustok report</p><h1>{e(report.title)}</h1>{summary(table)}</header>'
        f"{body}"
        + (f'<section><h2>Notes</h2><ul class="notes">{notes}</ul></section>' if notes else "")
        + f"</main><script>{SCRIPT}</script></body></html>\n"
    )


# --- Tables ----------------------------------------------------------------------------------------------------------


def _results(table: Table) -> str:
    """Three tables: what decoders make of latents, two decoders on the same latents, and the latents themselves."""
    images = [column for column in table.columns if column.metric not in LATENTS]
    latents = [column for column in table.columns if column.metric in LATENTS]
    caption = "Value ± standard error; n is the number of images. A mean over seeds has its standard error over seeds."
    if table.hidden:
        caption += f" {table.hidden} further results under other settings are listed with the protocol."
    titled = {
        "": _by_decoder(table, images, caption),
        "Two decoders on the same latents": _differences(table),
        "Codebook and latents": _by_decoder(
            table, latents, "Before any decoder. Codes used are shares of the codebook, which grow with n."
        ),
    }
    return "".join(f"<h3>{title}</h3>" * bool(title) + content for title, content in titled.items() if content)


def _by_decoder(table: Table, columns: Sequence[Column], caption: str) -> str:
    metrics = [column.metric for column in columns]
    several = len({(column.extractor, column.reference) for column in columns if column.metric in DISTANCES}) > 1
    entries = []
    for row in table.rows:
        seeds = [table.cells[row].get(column, {}) for column in columns]
        if any(seeds):
            entries.append((row, f"{decoder_name(row.decoder)}{_small(settings(row))}", seeds))
    heads = []
    for column in columns:
        # How it was measured, where a reader may otherwise compare numbers that cannot be compared.
        how = [column.extractor, column.reference]
        if metrics.count(column.metric) == 1:
            how = [column.extractor, column.reference.split(",")[0]] if several and column.metric in DISTANCES else []
        arrow = " ↓" if column.metric in LOWER else " ↑" if column.metric in HIGHER else ""
        heads.append(_head(column, arrow, how))
    return _table(entries, heads, "Decoder", caption)


def _differences(table: Table) -> str:
    """What was measured as a difference: the noise of the latents, which both decoders share, is not in its error."""
    columns = list(dict.fromkeys(pair.column for pair in table.differences))
    entries: dict[tuple[Row, str], list[Seeds]] = {}
    for pair, seeds in table.differences.items():
        cells = entries.setdefault((pair.row, pair.versus), [{} for _ in columns])
        cells[columns.index(pair.column)] = seeds
    lines = [
        (row, f"{decoder_name(row.decoder)} &minus; {decoder_name(versus)}{_small(settings(row))}", cells)
        for (row, versus), cells in entries.items()
    ]
    caption = (
        "The distance with the first decoder minus that with the second, given the same generated latents: below zero "
        "the first is better. The standard error is that of the difference, over independent sets of latents."
    )
    heads = [_head(c, "", [c.extractor, c.reference] if len(columns) > 1 else []) for c in columns]
    return _table(lines, heads, "Decoders", caption, signed=True)


def _table(
    entries: Sequence[tuple[Row, str, list[Seeds]]],
    heads: Sequence[str],
    what: str,
    caption: str,
    signed: bool = False,
) -> str:
    """A block for each tokenizer with a line for each entry, and beneath that its seeds where there are several."""
    if not entries:
        return ""
    many = len({row.group for row, _, _ in entries}) > 1
    body = ""
    for (group, _), block in groupby(entries, key=lambda entry: (entry[0].group, entry[0].tokenizer)):
        same, lines = list(block), []
        for _, name, cells in same:
            means = "".join(_cell(over_seeds(seeds), signed) for seeds in cells)
            lines.append(f'<th scope="row">{name}</th>{means}')
            each = sorted({seed for seeds in cells for seed in seeds}, key=lambda seed: natural(str(seed)))
            for seed in each if len(each) > 1 else ():
                numbers = "".join(_cell(seeds.get(seed, NOTHING), signed, counted=False) for seeds in cells)
                lines.append(f'<th scope="row" class="seed">seed {e(str(seed))}</th>{numbers}')
        name = f"<small>{e(group)}</small> " * many + capital(e(same[0][0].tokenizer) or "tokenizer")
        lines[0] = f'<th scope="rowgroup" rowspan="{len(lines)}">{name}</th>{lines[0]}'
        body += f"<tbody>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody>"
    columns = "".join(f'<th scope="col">{head}</th>' for head in ("Tokenizer", what, *heads))
    return (
        f'<div class="scroll"><table class="results"><caption>{caption}</caption>'
        f"<thead><tr>{columns}</tr></thead>{body}</table></div>"
    )


def _head(column: Column, arrow: str, how: Sequence[str]) -> str:
    words = " · ".join(filter(None, how))
    return f"{label(column)}{arrow}{_small(e(words))}"


def _small(text: str) -> str:
    return f"<small>{text}</small>" if text else ""


def _cell(estimate: Estimate, signed: bool = False, counted: bool = True) -> str:
    """A number with its standard error; beneath it what it was counted over, and how clear a difference is."""
    if not math.isfinite(estimate.value):
        return "<td>&ndash;</td>"
    error = f' <span class="error">± {_error(estimate)}</span>' if math.isfinite(estimate.standard_error) else ""
    counts = "&ndash;".join(f"{n:,}" for n in sorted({*estimate.samples[:1], *estimate.samples[-1:]}))
    facts = (
        f"{estimate.errors:.1f} standard errors" if signed and math.isfinite(estimate.errors) else "",
        f"{estimate.seeds} seeds" if estimate.seeds > 1 else "",
        f"n = {counts}{f' in {estimate.sets} sets' if estimate.sets > 1 else ''}" if counts else "",
    )
    value = f'<data value="{estimate.value!r}">{plot.decimal(estimate.value, sign="+" if signed else "-")}</data>'
    return f"<td>{value}{error}{_small(', '.join(filter(None, facts)) if counted else '')}</td>"


def _error(estimate: Estimate) -> str:
    """The standard error with as many decimals as its value, or two digits of its own."""
    text = plot.decimal(estimate.value)
    decimals = len(text.partition(".")[2]) if "e" not in text else 0
    rounded = f"{estimate.standard_error:.{decimals}f}"
    return rounded if float(rounded) else f"{estimate.standard_error:.2g}".replace("-", "&minus;")


def _heat_maps(table: Table) -> str:
    """Rate down, strength across, one table for each tokenizer, all of a metric in one scale of colour."""
    maps = ""
    for column in dict.fromkeys(column for _, column in table.grids):
        grids = {row: table.grids[row, column] for row in table.rows if (row, column) in table.grids}
        values = [over_seeds(cell).value for grid in grids.values() for cell in grid.values()]
        values = [value for value in values if math.isfinite(value)] or [0.0]
        for row, grid in grids.items():
            strengths = sorted({strength for _, strength in grid})
            heads = "".join(f'<th scope="col">{strength:g}</th>' for strength in strengths)
            body = ""
            for rate in sorted({rate for rate, _ in grid}):
                cells = (over_seeds(grid.get((rate, strength), {})) for strength in strengths)
                colours = "".join(_coloured(cell, min(values), max(values)) for cell in cells)
                body += f'<tr><th scope="row">{rate:g}</th>{colours}</tr>'
            group = f"{e(row.group)}: " if row.group else ""
            decoder = "" if row.decoder == "original" else f", {decoder_name(row.decoder)} decoder"
            name = f"{capital(tokenizer_name(row))}{decoder}{_small(settings(row))}"
            mean = plot.decimal(over_seeds(table.cells[row][column]).value)
            maps += (
                f'<table class="heat"><caption>{group}{name}'
                f"<small>{label(column)}, mean {mean}</small></caption><thead>"
                f'<tr><td></td><th scope="colgroup" colspan="{len(strengths)}">strength (neighbours)</th></tr>'
                f'<tr><th scope="col">rate</th>{heads}</tr></thead><tbody>{body}</tbody></table>'
            )
    return f'<div class="row">{maps}</div>' if maps else ""


def _coloured(cell: Estimate, low: float, high: float) -> str:
    if not math.isfinite(cell.value):
        return "<td>&ndash;</td>"
    share = (cell.value - low) / (high - low) if high > low else 0.0
    ends = np.array([[246, 243, 236], [178, 72, 53]])  # paper to brick
    colour = ",".join(str(round(c)) for c in ends[0] + share * (ends[1] - ends[0]))
    ink = "#fff" if share > 0.6 else "#1f2430"
    error = f" ± {_error(cell)}" if math.isfinite(cell.standard_error) else ""
    return (
        f'<td style="background:rgb({colour});color:{ink}" title="{plot.decimal(cell.value)}{error}">'
        f'<data value="{cell.value!r}">{plot.decimal(cell.value)}</data></td>'
    )


# --- Protocol and configurations -------------------------------------------------------------------------------------


def _protocol(report: Report) -> str:
    protocols: dict[tuple[str, str], list] = {}
    versions: dict[str, None] = {}
    for result in report.results:
        protocols.setdefault((result.extractor, result.reference), []).append(result)
        found = result.record.get("versions")
        for name, version in found.items() if isinstance(found, dict) else ():
            versions[f"{name} {version}"] = None
    if not protocols:
        return ""
    body = ""
    for (extractor, reference), same in protocols.items():
        metrics = ", ".join(sorted({result.metric for result in same}))
        seeds = ", ".join(sorted({str(result.seed) for result in same if result.seed is not None}))
        samples = ", ".join(f"{n:,}" for n in sorted({result.samples for result in same if result.samples}))
        cells = "".join(f"<td>{e(text) or '&ndash;'}</td>" for text in (extractor, reference, samples, seeds))
        body += f'<tr><th scope="row">{e(metrics)}</th>{cells}</tr>'
    heads = "".join(
        f'<th scope="col">{head}</th>' for head in ("Metrics", "Extractor", "Reference", "Samples", "Seeds")
    )
    made = f'<p class="small">Made with {e(", ".join(versions))}.</p>' if versions else ""
    return (
        f'<div class="scroll"><table class="plain"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{made}{_measurements(report)}"
    )


def _measurements(report: Report, limit: int = 2000) -> str:
    """Every line of metrics.jsonl, as it was written."""
    records = [result.record for result in report.results[:limit]]
    keys = [key for key in dict.fromkeys(key for record in records for key in record) if key != "versions"]
    heads = "".join(f'<th scope="col">{e(str(key))}</th>' for key in keys)
    body = "".join(
        "<tr>" + "".join(f"<td>{_raw(record.get(key))}</td>" for key in keys) + "</tr>" for record in records
    )
    more = f" (the first {limit} of {len(report.results)})" if len(report.results) > limit else ""
    return (
        f"<details><summary>All {len(records)} measurements{more}</summary>"
        f'<div class="scroll"><table class="plain">'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _raw(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "&ndash;"
    return e(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _runs(runs: Sequence[Run], budget: int) -> str:
    """Progress pictures and configuration of each run, folded."""
    blocks = ""
    for run in runs:
        pictures = "".join(plot.progress_pictures(run.progress, budget))
        config = f"<pre>{e(run.config)}</pre>" if run.config else ""
        if pictures or config:
            blocks += (
                f'<details><summary>{e(run.name) or "run"}</summary><div class="row">{pictures}</div>{config}</details>'
            )
    return blocks
