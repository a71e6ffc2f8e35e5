"""The numbers arranged: rows and columns of the tables, means over seeds, differences and their standard errors."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from robustok.report.collect import SETTINGS, Result, natural, number

# Tokenizers, decoders and metrics in the order of the story.
STORY = (
    *("plain", "perturbed", "original", "post_trained", "control"),
    *("rfid", "pfid", "pfid_geometric_mean", "noise_fd", "gfid", "gfid_infinity", "kid", "sfid", "inception_score"),
    *("precision", "recall", "psnr", "ssim", "lpips_alex", "lpips_vgg"),
    *("codebook_usage", "codebook_perplexity", "generated_usage", "token_divergence", "latent_distance"),
    *("latent_position_distance", "latent_kernel_distance", "token_agreement", "reencoded_displacement"),
    *("reencoded_distance", "generator_accuracy", "generator_top_k", "generator_cross_entropy"),
)


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error (NaN where unknown): over seeds where there are several, else as measured.

    ``sets`` is how many independent sets of samples that error was measured over, 0 where it was not. ``baseline`` is
    what the number would be for real images in the place of generated ones, or by chance; NaN where that is not known.
    """

    value: float
    standard_error: float
    samples: tuple[int, ...] = ()
    seeds: int = 1
    sets: int = 0
    baseline: float = math.nan

    @property
    def errors(self) -> float:
        """How many standard errors the number is away from zero; NaN where that is unknown."""
        return abs(self.value) / self.standard_error if self.standard_error > 0 else math.nan


@dataclass(frozen=True)
class Row:
    """What was measured: ``settings`` holds what tells rows of one tokenizer and decoder apart."""

    group: str
    tokenizer: str
    decoder: str
    settings: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Column:
    """How it was measured. Digests are left out: seeds that train their own extractor share a column.

    ``fewer`` says "@2000" where fewer images were judged than published values stand on.
    """

    metric: str
    extractor: str
    reference: str
    fewer: str = ""


@dataclass(frozen=True)
class Pair:
    """Two decoders on the same latents: that of ``row``, minus the decoder ``versus`` of the same tokenizer."""

    row: Row
    versus: str
    column: Column


Seeds = dict[Any, Estimate]


@dataclass(frozen=True)
class Table:
    """The results arranged.

    Attributes:
        cells: ``cells[row][column]`` maps each seed to its estimate.
        grids: ``grids[row, column]`` maps (rate, strength) to the same, for what was measured on a grid.
        differences: ``differences[pair]`` maps each seed to what was measured on the same latents.
        hidden: results that share row, column and seed with a later one, which is shown instead.
    """

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    cells: dict[Row, dict[Column, Seeds]]
    grids: dict[tuple[Row, Column], dict[tuple[float, float], Seeds]]
    differences: dict[Pair, Seeds]
    hidden: int


def headline(results: Sequence[Result]) -> Table:
    """Arrange results by tokenizer and decoder against metric; a grid over rate and strength enters as its mean."""
    cells: dict[Row, dict[Column, Seeds]] = {}
    grids: dict[tuple[Row, Column], dict[tuple[float, float], Seeds]] = {}
    differences: dict[Pair, Seeds] = {}
    hidden = 0
    values = _values(results)
    for result in results:
        if result.metric == "noise_fd_cell":  # its mean stands in the table; the page lists every line below
            continue
        who = (result.group, result.tokenizer, result.decoder)
        row = Row(*who, _settings(result, values[who]))
        column = Column(result.metric, without_digest(result.extractor), without_digest(result.reference), result.fewer)
        versus = result.record.get("versus")
        if result.is_cell:
            seeds = grids.setdefault((row, column), {}).setdefault((result.rate, result.strength), {})
        elif result.metric.endswith("_difference") and isinstance(versus, str):
            column = replace(column, metric=result.metric.removesuffix("_difference"))
            seeds = differences.setdefault(Pair(row, versus, column), {})
        else:
            seeds = cells.setdefault(row, {}).setdefault(column, {})
        hidden += result.seed in seeds
        samples, sets = (result.samples,) if result.samples else (), number(result.record.get("sets"))
        sets = int(sets) if math.isfinite(sets) else 0
        baseline = number(result.record.get("baseline"))
        seeds[result.seed] = Estimate(result.value, result.standard_error, samples, sets=sets, baseline=baseline)
    for (row, column), grid in grids.items():
        for seed in {seed for seeds in grid.values() for seed in seeds}:
            mean = _mean([cell[seed] for cell in grid.values() if seed in cell])
            cells.setdefault(row, {}).setdefault(column, {}).setdefault(seed, mean)  # unless it was written
    rows = sorted(cells, key=_place)
    columns = sorted(
        {c for row in cells.values() for c in row}, key=lambda c: (_rank(c.metric), c.extractor, c.reference, c.fewer)
    )
    pairs = sorted(differences, key=lambda pair: (*_place(pair.row), _rank(pair.versus)))
    return Table(tuple(rows), tuple(columns), cells, grids, {pair: differences[pair] for pair in pairs}, hidden)


def over_seeds(seeds: Seeds) -> Estimate:
    """Mean over seeds with its standard error s / sqrt(n), seeds without a number left out; one seed stays as it is."""
    finite = [estimate for estimate in seeds.values() if math.isfinite(estimate.value)]
    if len(finite) < 2:
        return finite[0] if finite else Estimate(math.nan, math.nan)
    values = np.array([estimate.value for estimate in finite])
    error = values.std(ddof=1) / math.sqrt(len(values))
    samples = tuple(sorted({n for estimate in finite for n in estimate.samples}))
    baseline = number(float(np.mean([estimate.baseline for estimate in finite])))
    return Estimate(float(values.mean()), float(error), samples, len(finite), baseline=baseline)


def difference(before: Seeds, after: Seeds, paired: Seeds | None = None) -> Estimate:
    """``before`` - ``after``: seed by seed, its error over seeds; for one seed the error of that seed.

    Args:
        before: the first number.
        after: the second number.
        paired: ``before`` - ``after`` on the same latents. A seed without takes both errors as if independent, which
            is too large an error for decoders that were given the same latents.
    """
    each = {seed: _minus(before[seed], after[seed]) for seed in before.keys() & after.keys()} | (paired or {})
    return over_seeds(each) if each else _minus(over_seeds(before), over_seeds(after))


def measured_difference(table: Table, before: Row, after: Row, column: Column) -> Seeds:
    """``before`` - ``after`` on the same latents, for the seeds for which that has a standard error of its own.

    A line of the file names one of the two decoders only, and either may be the first: it must be clear which row the
    other one is.
    """
    for row, other, sign in ((after, before, -1), (before, after, 1)):
        found = table.differences.get(Pair(row, other.decoder, column), {})
        known = {seed: one for seed, one in found.items() if math.isfinite(one.errors)}
        if known and partners(table, row, other.decoder, column) == [other]:
            return {seed: replace(one, value=sign * one.value) for seed, one in known.items()}
    return {}


def partners(table: Table, row: Row, decoder: str, column: Column) -> list[Row]:
    """Rows of the same tokenizer with another decoder whose settings are most alike; that of sigma decides last."""

    def alike(other: Row) -> tuple[int, int]:
        shared = set(row.settings) & set(other.settings)
        return sum(key != "sigma" for key, _ in shared), len(shared)

    who = (row.group, row.tokenizer, decoder)
    found = [o for o in table.rows if (o.group, o.tokenizer, o.decoder) == who and column in table.cells[o]]
    best = max(map(alike, found), default=None)
    return [other for other in found if alike(other) == best]


def without_digest(name: str) -> str:
    """A name without the digests in it: ``classifier-64-3f9a12bc`` becomes ``classifier-64``."""
    return re.sub(r"[-@:, ]*\b(?=[0-9a-f]*[0-9])(?=[0-9a-f]*[a-f]|[0-9]{8})[0-9a-f]{8,64}\b", "", name)


def _minus(a: Estimate, b: Estimate) -> Estimate:
    return Estimate(a.value - b.value, math.hypot(a.standard_error, b.standard_error))


def _mean(cells: list[Estimate]) -> Estimate:
    """The mean of one seed's grid. Its cells share images, so that no standard error follows from theirs."""
    samples = tuple(sorted({count for cell in cells for count in cell.samples}))
    return Estimate(sum(cell.value for cell in cells) / len(cells), math.nan, samples)


def _values(results: Sequence[Result]) -> dict[tuple[str, str, str], dict[str, list[str]]]:
    """The values of every setting among the results of one tokenizer and decoder."""
    seen: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for result in results:
        values = seen.setdefault((result.group, result.tokenizer, result.decoder), {})
        for key in SETTINGS:
            value = result.record.get(key)
            if value is not None and str(value) not in values.setdefault(key, []):
                values[key].append(str(value))
    return seen


def _settings(result: Result, values: dict[str, list[str]]) -> tuple[tuple[str, str], ...]:
    """The settings that vary; and the one sigma of a trained decoder, which its other results need not repeat."""
    varying = [key for key in SETTINGS if len(values.get(key, ())) > 1 and result.record.get(key) is not None]
    settings = [(key, str(result.record[key])) for key in varying]
    if result.decoder != "original" and len(values.get("sigma", ())) == 1:
        settings.append(("sigma", values["sigma"][0]))
    return tuple(settings)


def _place(row: Row) -> tuple:
    return natural(row.group), _rank(row.tokenizer), _rank(row.decoder), row.settings


def _rank(word: str) -> tuple[int, str]:
    """Known words in the order of the story, the others after them by name."""
    return (STORY.index(word), "") if word in STORY else (len(STORY), word)
