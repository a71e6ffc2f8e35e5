"""How objective and sigma were chosen, and gFID and KID as curves over sigma and the strength of a delta."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from robustok.report.collect import Result, number
from robustok.report.figures import Gallery, Picture, plot
from robustok.report.names import decimal, joined, label
from robustok.report.results import Estimate, Seeds, column_of, mean_over_seeds

HELD_OUT = "held_out"  # metric of the lines that chose a decoder on validation samples; never a result
PRICES = {"rfd": "rFD", "psnr": "PSNR (dB)", "lpips_alex": "LPIPS (AlexNet)"}  # of reconstructions of real images
STAGES = {"candidate": "short training", "continued": "continued"}
Curves = dict[str, dict[float, Seeds]]  # name, x, seed


def choices(results: Sequence[Result]) -> list[Gallery]:
    """The candidates of every run that chose objective or sigma, against the decoder before post-training."""
    found = []
    for (group, tokenizer, seed), lines in _grouped(
        results, lambda r: (r.group, r.tokenizer, r.seed), HELD_OUT
    ).items():
        before = [line for line in lines if line.record.get("stage") == "untouched"][:1]
        tried = [line for line in lines if str(line.record.get("stage")) in STAGES and _trained_on(line)]
        if not before or not tried:
            continue
        curves: Curves = {}
        for line in (line for line in tried if math.isfinite(_number(line, "sigma"))):
            points = curves.setdefault(STAGES[line.record["stage"]], {})
            points[_number(line, "sigma")] = {seed: Estimate(line.value, _number(line, "change_error"))}
        if all(len(points) == 1 for points in curves.values()):  # one sigma is no curve
            curves = {}
        prices = [name for name in PRICES if any(math.isfinite(_number(line, name)) for line in tried)]
        rows = tuple(_row(line, prices) for line in before + tried)
        allowed = lambda line: math.isfinite(line.value) and not line.record.get("refused")  # noqa: E731
        values = [line.value if allowed(line) else math.inf for line in before + tried]
        best = values.index(min(values))
        chosen = rows[best][0] if best else "the decoder before post-training"
        within = " within the limit of the price" if any(line.record.get("refused") for line in tried) else ""
        note = "Distances on validation samples, the same latents for every decoder. "
        note += f"The lowest{within} is that of {chosen}."
        words = [str(line.record.get("words")) for line in lines if line.record.get("stage") == "verdict"][-1:]
        of = f"{tokenizer} tokenizer" if tokenizer else ""
        title = joined(
            ["Choice of σ" if curves else "Choice of objective", group, of, "" if seed is None else f"seed {seed}"]
        )
        gallery = (
            _gallery(title, "validation distance against σ", curves, before[0].value) if curves else Gallery(title, ())
        )
        heads = ("Trained on", "Steps", "Distance", "Change", *map(PRICES.get, prices), "Sets")
        found.append(replace(gallery, note=joined([note, *words], " "), heads=heads, rows=rows, best=best))
    return found


def sweeps(results: Sequence[Result]) -> list[Gallery]:
    """Draw gFID and KID over sigma and over the strength of a delta, where three values of it or more were measured."""
    found = []
    groups = _grouped(results, lambda r: (r.group, r.tokenizer, column_of(r)), "gfid", "kid")
    for key, name in (("sigma", "σ"), ("delta_scale", "scale of the delta")):
        for (group, tokenizer, column), same in groups.items():
            curves: Curves = {}
            for result in same:
                if math.isfinite(x := _number(result, key)) and (key != "sigma" or _post_trained(result)):
                    points = curves.setdefault("" if key == "sigma" else _delta(result), {})
                    points.setdefault(x, {})[result.seed] = Estimate(result.value, result.standard_error)
            curves = {curve: points for curve, points in curves.items() if len(points) >= 3}
            if curves:
                of = joined([label(column), f"{tokenizer} tokenizer" if tokenizer else "", group])
                before = mean_over_seeds({r.seed: Estimate(r.value) for r in same if r.decoder == "original"}).value
                found.append(_gallery(f"{of} against {name}", f"{of} against {name}", curves, before))
    return found


def _trained_on(line: Result) -> str:
    """Objective and sigma; "" for a line that has neither. Lines of earlier versions have sigma alone."""
    sigma, objective = _number(line, "sigma"), line.record.get("objective", "paired")
    if not isinstance(objective, str) or (objective == "paired" and not math.isfinite(sigma)):
        return ""
    control = " (control)" * (objective == "clean" or sigma == 1)
    return joined([objective, f"σ = {sigma:g}" if math.isfinite(sigma) else ""]) + control


def _row(line: Result, prices: Sequence[str]) -> tuple[str, ...]:
    error = _number(line, "change_error")
    change = decimal(_number(line, "change"), 3, "+") + (f" ± {decimal(error, 2)}" if math.isfinite(error) else "")
    steps, sets = (str(line.record.get(key, "")) for key in ("steps", "sets"))
    name = _trained_on(line)
    if line.record.get("stage") == "untouched":
        name, change = "before post-training", ""
    return name, steps, decimal(line.value), change, *(decimal(_number(line, price)) for price in prices), sets


def _delta(result: Result) -> str:
    """What distinguishes the decoders of one curve over strengths from those of another."""
    sigma = _number(result, "sigma")
    return joined([f"σ = {sigma:g}" if math.isfinite(sigma) else "", str(result.record.get("delta") or "")])


def _post_trained(result: Result) -> bool:
    """Whether this decoder was post-trained and is no mixture with the original."""
    scale = _number(result, "delta_scale")
    return result.decoder != "original" and (not math.isfinite(scale) or scale == 1)


def _gallery(title: str, alt: str, curves: Curves, before: float) -> Gallery:
    """A plot of means over seeds and, dashed, the decoder before post-training; its text lists the points."""
    lines, texts = [], []
    for name, points in curves.items():
        means = {x: mean_over_seeds(points[x]) for x in sorted(points)}
        means = {x: mean for x, mean in means.items() if math.isfinite(mean.value)}
        lines.append(np.array([(x, mean.value, mean.standard_error) for x, mean in means.items()]).reshape(-1, 3))
        of = f"{name}: " if len(curves) > 1 and name else ""
        texts.append(of + joined(f"{decimal(mean.value)} at {x:g}" for x, mean in means.items()))
    texts += [f"before post-training {decimal(before)}"] if math.isfinite(before) else []
    picture = Picture(plot(lines, before), f"{alt}: {'; '.join(texts)}")
    return Gallery(title, (picture,), legend=tuple(curves) if len(curves) > 1 else ())


def _number(result: Result, key: str) -> float:
    return number(result.record.get(key))


def _grouped(results: Sequence[Result], key: Callable[[Result], Any], *metrics: str) -> dict[Any, list[Result]]:
    """Results of these metrics by key, in the order in which the keys first appear."""
    groups: dict[Any, list[Result]] = {}
    for result in results:
        if result.metric in metrics:
            groups.setdefault(key(result), []).append(result)
    return groups
