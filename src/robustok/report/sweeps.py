"""What depends on one number: how sigma was chosen, and generated images over sigma or the strength of a delta."""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustok.report.collect import Result, number
from robustok.report.plot import COLOURS, decimal, small_figure
from robustok.report.table import Column, Estimate, over_seeds, without_digest
from robustok.report.words import label

HELD_OUT = "held_out"  # metric of what chose sigma on held-out samples; no result
CURVES = ("gfid", "kid")
SEVERAL = 3  # values of sigma or strength that make a curve
STAGES = {"candidate": "short training", "continued": "continued"}

e = html.escape


@dataclass(frozen=True)
class Point:
    """A value at a place on the axis, with its standard error (NaN where unknown)."""

    x: float
    y: float
    error: float


def sweep_section(results: Sequence[Result]) -> str:
    """How sigma was chosen, for every run that did; then distances over sigma and strength, where there are several."""
    choices = "".join(_choice(*each) for each in _grouped(results, lambda r: (r.group, r.seed), HELD_OUT))
    curves = "".join(
        _curves(results, key, name)
        for key, name in (("sigma", "&sigma;"), ("delta_strength", "strength of the post-trained decoder"))
    )
    return choices + curves


def _choice(group: tuple, lines: list[Result]) -> str:
    """The candidates against the untouched decoder: a plot and a table."""
    untouched = next((line for line in lines if line.record.get("stage") == "untouched"), None)
    tried = [line for line in lines if line.record.get("stage") in STAGES and math.isfinite(_sigma(line))]
    if untouched is None or not tried:
        return ""
    best = min(lines, key=lambda line: line.value)
    curves = {
        name: [Point(_sigma(r), r.value, number(r.record.get("change_error"))) for r in tried if r.record["stage"] == s]
        for s, name in STAGES.items()
    }
    body = "".join(_row(line, line is best) for line in (untouched, *tried))
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("&sigma;", "Steps", "Distance", "Change", "Sets"))
    chosen = "the untouched decoder" if best is untouched else f"&sigma;&nbsp;=&nbsp;{_sigma(best):g}"
    name = " ".join(filter(None, (e(group[0]), f"seed {e(str(group[1]))}" if group[1] not in (None, 0) else "")))
    return (
        f"<h3>Choosing &sigma;{f': {name}' * bool(name)}</h3>"
        f'<p class="small">Distances on held-out samples, the same latents for all decoders. The best one is '
        f"{chosen}; held-out samples chose it, so its distance here is no result.</p>"
        f'<div class="row">{_figure("held-out distance against sigma", curves, untouched.value)}'
        f'<table class="plain"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _row(line: Result, best: bool) -> str:
    sigma, error = _sigma(line), number(line.record.get("change_error"))
    untouched = line.record.get("stage") == "untouched"
    name = "untouched" if untouched else f"{sigma:g}{' (control)' * (sigma == 1)}"
    change = "" if untouched else decimal(number(line.record.get("change")), 3, "+")
    change += f" ± {decimal(error, 2)}" if change and math.isfinite(error) else ""
    cells = (e(str(line.record.get("steps", ""))), decimal(line.value), change, e(str(line.record.get("sets", ""))))
    mark = (lambda text: f"<b>{text}</b>") if best else str
    return f'<tr><th scope="row">{mark(name)}</th>{"".join(f"<td>{mark(cell)}</td>" for cell in cells)}</tr>'


def _curves(results: Sequence[Result], key: str, name: str) -> str:
    """A figure for each distance that was measured at several values of this key; the original decoder's is a line."""
    figures = ""
    for (group, tokenizer, column), same in _grouped(results, lambda r: (r.group, r.tokenizer, _column(r)), *CURVES):
        original = {r.seed: r for r in same if r.decoder == "original"}
        points: dict[str, dict[float, dict[Any, Result]]] = {}
        for result in same:
            if math.isfinite(x := number(result.record.get(key))) and (key != "sigma" or _plain(result)):
                points.setdefault(_which(result, key), {}).setdefault(x, {})[result.seed] = result
        curves = {
            name: [_over_seeds(x, seeds) for x, seeds in places.items()]
            for name, places in points.items()
            if len(places) >= SEVERAL
        }
        if curves:
            whose = ", ".join(filter(None, (f"{e(tokenizer)} tokenizer" if tokenizer else "", e(group))))
            title = " · ".join(filter(None, (label(column), whose)))
            figures += _figure(f"{title} against {name}", curves, _over_seeds(0.0, original).y, title)
    return f'<h3>Over {name}</h3><div class="curves">{figures}</div>' if figures else ""


def _column(result: Result) -> Column:
    return Column(result.metric, without_digest(result.extractor), without_digest(result.reference), result.fewer)


def _which(result: Result, key: str) -> str:
    """What tells the decoders of one curve over ``key`` from those of another, in words."""
    if key == "sigma":
        return ""
    sigma, delta = _sigma(result), str(result.record.get("delta") or "")
    return ", ".join(filter(None, (f"sigma {sigma:g}" if math.isfinite(sigma) else "", delta)))


def _plain(result: Result) -> bool:
    """Whether this decoder was post-trained and is no mixture with the original."""
    strength = number(result.record.get("delta_strength"))
    return result.decoder != "original" and (not math.isfinite(strength) or strength == 1)


def _over_seeds(x: float, seeds: Mapping[Any, Result]) -> Point:
    """The mean over seeds at one place."""
    found = over_seeds({seed: Estimate(line.value, line.standard_error) for seed, line in seeds.items()})
    return Point(x, found.value, found.standard_error)


def _figure(alt: str, curves: dict[str, list[Point]], baseline: float, title: str = "") -> str:
    """Points with their errors, joined, and a dashed line for the decoder that was not post-trained."""
    told = []
    with small_figure() as (axes, uri):
        for index, (name, points) in enumerate(curves.items()):
            shown = sorted((p for p in points if math.isfinite(p.y)), key=lambda p: p.x)
            if not shown:
                continue
            errors = [p.error if math.isfinite(p.error) else 0.0 for p in shown]
            joined = "-" if len({p.x for p in shown}) == len(shown) else ""
            axes.errorbar(
                [p.x for p in shown],
                [p.y for p in shown],
                errors,
                color=COLOURS[index % len(COLOURS)],
                linestyle=joined,
                linewidth=1.1,
                marker="o",
                markersize=2.6,
                elinewidth=0.8,
            )
            of = f"{e(name)}: " if len(curves) > 1 and name else ""
            told.append(of + ", ".join(f"{decimal(p.y)} at {p.x:g}" for p in shown))
        if math.isfinite(baseline):
            axes.axhline(baseline, color="#5c6370", linewidth=0.8, linestyle=(0, (4, 3)))
            told.append(f"untouched {decimal(baseline)}")
    keys = " ".join(
        f'<i style="background:{COLOURS[i % 6]}"></i>{e(n)}' for i, n in enumerate(curves) if n and curves[n]
    )
    legend = f'<span class="legend">{keys}</span>' if len(curves) > 1 else ""
    return (
        f'<figure><figcaption>{title}{legend}</figcaption><img src="{uri()}" alt="{alt}: {"; ".join(told)}"></figure>'
    )


def _sigma(line: Result) -> float:
    return number(line.record.get("sigma"))


def _grouped(results: Sequence[Result], key: Callable[[Result], tuple], *metrics: str) -> list[tuple]:
    """Results of these metrics by key, in the order in which the keys first appear."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        if result.metric in metrics:
            groups.setdefault(key(result), []).append(result)
    return list(groups.items())
