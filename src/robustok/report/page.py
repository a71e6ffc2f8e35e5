"""A :class:`Report` to one HTML page that needs nothing else: no network, no other files, no script for its content."""

import contextlib
import html
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robustok.report import plot
from robustok.report.collect import (
    FRECHET,
    Column,
    Estimate,
    Report,
    Row,
    Run,
    Seeds,
    Table,
    collect,
    difference,
    headline,
    natural,
    over_seeds,
)
from robustok.types import UserError

PIXELS = 2_000_000  # of all pictures together: keeps the page at a few MB
NAMES = {"original": "original decoder", "post_trained": "post-trained decoder", "control": "control decoder"}
LABELS = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS", "kid": "KID", "inception_score": "IS"}
HIGHER = {"psnr", "ssim", "inception_score", "precision", "recall", "codebook_usage", "perplexity", "accuracy"}
LOWER = {*FRECHET, "lpips", "kid", "l1", "l2", "mse"}

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
    table = headline(report.results)
    sheets = len(report.grids) + 4 * len(report.comparisons) + sum(min(len(run.progress), 4) for run in report.runs)
    budget = PIXELS // max(sheets, 1)
    sections = [
        ("Results", _table(table)),
        ("Perturbed reconstructions, by rate and strength", _heat_maps(table)),
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
        f'<header><p class="kicker">robustok report</p><h1>{e(report.title)}</h1>{_summary(table)}</header>'
        f"{body}"
        + (f'<section><h2>Notes</h2><ul class="notes">{notes}</ul></section>' if notes else "")
        + f"</main><script>{SCRIPT}</script></body></html>\n"
    )


# --- Words -----------------------------------------------------------------------------------------------------------


def _summary(table: Table) -> str:
    """What the numbers say, in plain words, a paragraph for each experiment."""
    paragraphs = []
    for group in dict.fromkeys(row.group for row in table.rows):
        rows = [row for row in table.rows if row.group == group]
        told = [*_gaps(table, rows), *_perturbation(table, rows), *_post_training(table, rows)]
        if told:
            paragraphs.append(f"<p class='lede'>{f'<b>{e(group)}.</b> ' if group else ''}{' '.join(told)}</p>")
    if not paragraphs:
        return "<p class='lede'>No Fréchet distances were measured yet.</p>"
    rule = (
        "Lower is better. A difference counts when it is at least two standard errors: over seeds where there are "
        "several, else with the errors of the two numbers combined as if they were independent. "
        "Less is called no change."
    )
    return "".join(paragraphs) + f'<p class="small">{rule}{_naming(table)}</p>'


def _naming(table: Table) -> str:
    others = sorted({c.extractor for c in table.columns if c.metric in FRECHET and not _is_inception(c)})
    if not others:
        return ""
    spaces = ", ".join(f"<code>{e(name) or 'an unnamed extractor'}</code>" for name in others)
    return (
        f" rFD, pFD and gFD are rFID, pFID and gFID measured on the features of {spaces} instead of Inception; "
        "they cannot be compared with published FID."
    )


def _gaps(table: Table, rows: list[Row]) -> Iterable[str]:
    """The distances of real, perturbed and generated tokens, for each tokenizer with its original decoder."""
    kinds = {"rfid": "for reconstructions", "pfid": "from perturbed tokens", "gfid": "for generated images"}
    for row in (row for row in rows if row.decoder == "original"):
        parts, found = [], {}
        for metric, words in kinds.items():
            column = _column(table, [row], metric)
            if column and math.isfinite(value := over_seeds(table.cells[row][column]).value):
                parts.append(f"{plot.decimal(value)} {words} ({_label(column)})")
                found[metric] = (value, column.extractor, column.reference)
        if "gfid" not in found or len(parts) < 2:
            continue
        # A ratio means something only in one feature space and against one reference.
        comparable = found.get("rfid", (0,))[0] > 0 and found["rfid"][1:] == found["gfid"][1:]
        ratio = f", {found['gfid'][0] / found['rfid'][0]:.1f} times the first" if comparable else ""
        yield f"With the {_who(row)}, the distance to real images is {_and(parts)}{ratio}."


def _perturbation(table: Table, rows: list[Row]) -> Iterable[str]:
    original = [row for row in rows if row.decoder == "original"]
    plain = next((row for row in original if row.tokenizer == "plain"), None)
    perturbed = next((row for row in original if row.tokenizer == "perturbed"), None)
    if plain and perturbed and (column := _column(table, [plain, perturbed], "pfid")):
        effect, figures = _change(table.cells[plain][column], table.cells[perturbed][column])
        yield f"Training with latent perturbation {effect} {_label(column)} {figures}."


def _post_training(table: Table, rows: list[Row]) -> Iterable[str]:
    trained = [row for row in rows if row.decoder == "post_trained" and _column(table, [row], "gfid")]
    if not trained and any(_column(table, [row], "gfid") for row in rows):
        yield "No post-trained decoder was measured."
    against = {"lowered": "lower than", "raised": "higher than", "did not change": "not distinguishable from"}
    for row in trained:
        for column in [column for column in table.cells[row] if column.metric == "gfid"][:1]:
            before, control = (_partner(table, rows, row, decoder, column) for decoder in ("original", "control"))
            after = table.cells[row][column]
            if before:
                effect, figures = _change(table.cells[before][column], after)
                yield f"Post-training the decoder of the {_who(row)} {effect} {_label(column)} {figures}."
            if control:
                effect, figures = _change(table.cells[control][column], after)
                yield (
                    f"It is {against.get(effect, 'not comparable with')} that of the control decoder, trained "
                    f"for as many steps on clean latents {figures}."
                )
            else:
                yield "Without a control on clean latents (&sigma; = 1), longer training alone may explain this."


def _change(before: Seeds, after: Seeds) -> tuple[str, str]:
    """What happened to a distance, as a verb, and the figures that say so: two standard errors decide."""
    a, b, change = over_seeds(before), over_seeds(after), difference(before, after)
    numbers = f"{plot.decimal(a.value)} to {plot.decimal(b.value)}"
    if not math.isfinite(change.value):
        return "has no comparable", f"({numbers})"
    if change.value == 0:
        return "did not change", f"({numbers})"
    effect = "lowered" if change.value > 0 else "raised"
    percent = plot.decimal(-100 * change.value / abs(a.value), 2, "+") + "&nbsp;%" if a.value else "from nothing"
    if not change.standard_error > 0:
        return effect, f"({numbers}, {percent}; no standard error is known, so this may be noise)"
    errors = abs(change.value) / change.standard_error
    over = f" over {change.seeds} seeds" if change.seeds > 1 else ""
    figures = f"({numbers}, {percent}, {errors:.1f}&nbsp;standard errors{over})"
    return (effect, figures) if errors >= 2 else ("did not change", figures)


def _partner(table: Table, rows: list[Row], row: Row, decoder: str, column: Column) -> Row | None:
    """The row of the same tokenizer with another decoder, measured under the same settings where those vary."""
    found = [
        other
        for other in rows
        if (other.tokenizer, other.decoder) == (row.tokenizer, decoder) and column in table.cells[other]
    ]
    wanted = {item for item in row.settings if item[0] != "sigma"}
    return max(found, key=lambda other: len(wanted & set(other.settings)), default=None)


def _column(table: Table, rows: Sequence[Row], metric: str) -> Column | None:
    """The first column of a metric that all these rows have."""
    return next((c for c in table.columns if c.metric == metric and all(c in table.cells[row] for row in rows)), None)


def _label(column: Column) -> str:
    """The metric's name; a Fréchet distance on other features than Inception's is not called FID."""
    label = FRECHET.get(column.metric) or LABELS.get(column.metric) or column.metric.replace("_", " ")
    return e(label if column.metric not in FRECHET or _is_inception(column) else label.replace("FID", "FD"))


def _is_inception(column: Column) -> bool:
    return column.extractor.lower().startswith("inception")


def _tokenizer(row: Row) -> str:
    return f"{e(row.tokenizer)} tokenizer" if row.tokenizer else "tokenizer"


def _settings(row: Row) -> str:
    words = [f"{'&sigma;' if key == 'sigma' else key.replace('_', ' ')}&nbsp;=&nbsp;{e(v)}" for key, v in row.settings]
    return f" ({', '.join(words)})" if words else ""


def _who(row: Row) -> str:
    return _tokenizer(row) + _settings(row)


def _and(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1]


# --- Tables ----------------------------------------------------------------------------------------------------------


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    many = len({row.group for row in table.rows}) > 1
    several = len({(column.extractor, column.reference) for column in table.columns if column.metric in FRECHET}) > 1
    heads = "".join(f'<th scope="col">{_head(column, several)}</th>' for column in table.columns)
    body = ""
    for row in table.rows:
        cells = table.cells[row]
        seeds = sorted({seed for column in cells.values() for seed in column}, key=lambda seed: natural(str(seed)))
        name = f"<small>{e(row.group)}</small> " * many + f"{_tokenizer(row).capitalize()}<br>"
        name += f"<small>{e(NAMES.get(row.decoder, row.decoder))}{_settings(row)}</small>"
        means = "".join(_cell(over_seeds(cells.get(column, {}))) for column in table.columns)
        body += f'<tbody><tr class="mean"><th scope="rowgroup">{name}</th>{means}</tr>'
        for seed in seeds if len(seeds) > 1 else ():
            each = "".join(
                _cell(cells.get(c, {}).get(seed, Estimate(math.nan, math.nan)), False) for c in table.columns
            )
            body += f'<tr class="seed"><th scope="row">seed {e(str(seed))}</th>{each}</tr>'
        body += "</tbody>"
    caption = "Value ± standard error; n is the number of samples. A mean over seeds has its standard error over seeds."
    if table.hidden:
        caption += f" {table.hidden} further results under other settings are listed with the protocol."
    return (
        f'<div class="scroll"><table class="results"><caption>{caption}</caption>'
        f'<thead><tr><th scope="col">Tokenizer and decoder</th>{heads}</tr></thead>{body}</table></div>'
    )


def _head(column: Column, several: bool) -> str:
    arrow = " ↓" if column.metric in LOWER else " ↑" if column.metric in HIGHER else ""
    how = " · ".join(filter(None, (column.extractor, column.reference))) if several else ""
    return f"{_label(column)}{arrow}" + (f"<small>{e(how)}</small>" if how else "")


def _cell(estimate: Estimate, counted: bool = True) -> str:
    if not math.isfinite(estimate.value):
        return "<td>&ndash;</td>"
    error = f' <span class="error">± {_error(estimate)}</span>' if math.isfinite(estimate.standard_error) else ""
    counts = "&ndash;".join(f"{n:,}" for n in sorted({*estimate.samples[:1], *estimate.samples[-1:]}))
    over = f"{estimate.seeds} seeds" if estimate.seeds > 1 else ""
    beneath = ", ".join(filter(None, (over, f"n = {counts}" if counts else "")))
    value = f'<data value="{estimate.value!r}">{plot.decimal(estimate.value)}</data>'
    return f"<td>{value}{error}{f'<small>{beneath}</small>' if counted else ''}</td>"


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
            decoder = "" if row.decoder == "original" else f", {e(NAMES.get(row.decoder, row.decoder))}"
            mean = plot.decimal(over_seeds(table.cells[row][column]).value)
            maps += (
                f'<table class="heat"><caption>{group}{_tokenizer(row).capitalize()}{decoder}{_settings(row)}'
                f"<small>{_label(column)}, mean {mean}</small></caption><thead>"
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


STYLE = """
:root{color-scheme:light;--ink:#1f2430;--quiet:#5f6775;--line:#e2e4e9;--accent:#2f6690}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-print-color-adjust:exact;print-color-adjust:exact}
main{max-width:1080px;margin:0 auto;padding:48px 24px 96px}
h1{font-size:2.1rem;line-height:1.2;letter-spacing:-.02em;font-weight:650;margin:0 0 20px}
h2{font-size:1.3rem;letter-spacing:-.01em;font-weight:620;margin:64px 0 16px;padding-top:16px;
border-top:1px solid var(--line)}
h3{font-size:1rem;font-weight:620;margin:32px 0 10px}
h4{font-size:.85rem;font-weight:620;color:var(--quiet);margin:28px 0 8px}
p{margin:0 0 12px}.kicker{color:var(--accent);font-size:.85rem;margin-bottom:4px}
.lede{font-size:1.1rem;line-height:1.65;max-width:68ch}
.small,small{font-size:.8rem;color:var(--quiet);font-weight:400}.small{max-width:90ch}
code,pre{font:.8rem/1.5 ui-monospace,Menlo,Consolas,monospace}
pre{background:#f6f7f9;padding:16px;border-radius:6px;overflow-x:auto}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
caption{text-align:left;font-size:.8rem;color:var(--quiet);padding-bottom:10px}
th{text-align:left;font-weight:560}
.results{width:100%}.results th,.results td{padding:9px 12px;vertical-align:top;white-space:nowrap}
.results th:first-child{padding-left:0}.results thead th{border-bottom:1px solid var(--ink);vertical-align:bottom}
.results td,.results thead th:not(:first-child){text-align:right}
.results td small,.results thead small{display:block}.results tbody{border-bottom:1px solid var(--line)}
.results tbody th{line-height:1.35}.results data{font-weight:600}.error{color:var(--quiet)}
.results .seed th,.results .seed td{padding-top:2px;padding-bottom:4px;font-size:.85rem;
font-weight:400;color:var(--quiet)}
.results .seed th{padding-left:16px}.results .seed data{font-weight:400}
.plain{font-size:.82rem}
.plain th,.plain td{padding:5px 16px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
.row{display:flex;flex-wrap:wrap;gap:24px 48px;align-items:flex-start}
.heat caption{color:var(--ink);font-weight:560;font-size:.95rem}.heat caption small{display:block}
.heat th{font-size:.8rem;color:var(--quiet);padding:4px 8px;font-weight:400;text-align:center}
.heat td{min-width:76px;padding:10px 8px;text-align:center;border:2px solid #fff}
.heat thead td{min-width:0}
figure{margin:0}figcaption{font-size:.8rem;color:var(--quiet)}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(220px,1fr));gap:18px 20px}
.curves img{display:block;width:100%;height:auto}
.legend{font-size:.8rem;font-weight:400;color:var(--quiet);margin-left:16px}
.legend i{display:inline-block;width:14px;height:3px;border-radius:2px;vertical-align:middle;margin:0 5px 0 10px}
img.pixels,.tile{image-rendering:pixelated}.row img{max-width:100%;display:block}
.grid{display:flex;gap:16px}.grid img{display:block;max-width:none}.titles{flex:none;width:min(30%,180px)}
.titles span{display:flex;align-items:center;height:var(--h);font-size:.82rem;line-height:1.3;color:var(--quiet)}
.tile{position:relative;display:inline-block;width:var(--w);height:var(--h);vertical-align:top;
background-repeat:no-repeat;background-position:calc(var(--x)*-1*var(--w)) calc(var(--y)*-1*var(--h))}
.viewer{--after:100%}.viewer label{display:block;font-size:.85rem;margin-bottom:6px}
.viewer input{width:min(320px,50vw);vertical-align:middle;margin:0 8px;accent-color:var(--accent)}
.tiles{display:flex;flex-wrap:wrap;gap:4px;line-height:0}
.top{position:absolute;inset:0;clip-path:inset(0 calc(100% - var(--after)) 0 0)}
.tile:hover>.top{clip-path:inset(0 0 0 var(--after))}
.cards{display:flex;flex-wrap:wrap;gap:16px 24px}.card{width:max-content;max-width:100%;line-height:0}
.card .tile{margin:0 2px 2px 0}.card figcaption{line-height:1.6;font-variant-numeric:tabular-nums}
details{border-bottom:1px solid var(--line);padding:10px 0}summary{cursor:pointer}
details>*:not(summary){margin-top:12px}
.notes{font-size:.85rem;color:var(--quiet);padding-left:20px}
@media (max-width:600px){main{padding:28px 16px 64px}.lede{font-size:1rem}}
"""

SCRIPT = """
for (const viewer of document.querySelectorAll('.viewer')) {
  const label = viewer.querySelector('label');
  label.hidden = false;
  label.querySelector('input').addEventListener('input',
    event => viewer.style.setProperty('--after', event.target.value + '%'));
}
"""
