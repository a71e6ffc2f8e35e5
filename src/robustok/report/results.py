"""Results arranged in rows and columns, averaged over seeds and compared with their standard errors."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from robustok.report.collect import Result, natural, number

SETTINGS = (
    *("sigma", "strategy", "mode", "steps", "guidance_scale", "guidance_power", "guidance_from", "guidance_until"),
    *("temperature", "top_k", "top_p", "sampler"),
)
LATENTS = (
    *("codebook_usage", "codebook_perplexity", "generated_usage", "token_divergence", "latent_distance"),
    *("latent_position_distance", "latent_kernel_distance", "token_agreement", "reencoded_displacement"),
    *("reencoded_distance", "generator_accuracy", "generator_top_k", "generator_cross_entropy"),
)
ORDER = (  # of tokenizers, decoders and metrics; others follow by name
    *("plain", "perturbed", "original", "clean", "paired", "free"),
    *("rfid", "pfid", "pfid_geometric_mean", "noise_fd", "ifid", "gfid", "gfid_validation", "fdr", "gfid_infinity"),
    *("kid", "sliced_wasserstein", "sfid", "inception_score"),
    *("precision", "recall", "psnr", "ssim", "lpips_alex", "lpips_vgg", *LATENTS),
)


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, over seeds where there are several; NaN where either is unknown.

    Attributes:
        samples: numbers of images behind the value.
        seeds: how many were averaged.
        sets: independent sets of samples behind the standard error; 0 where it has none.
        baseline: the same number for real images in place of generated ones, or by chance.
    """

    value: float = math.nan
    standard_error: float = math.nan
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
    """What was measured; ``settings`` holds what distinguishes rows of one tokenizer and decoder."""

    group: str
    tokenizer: str
    decoder: str
    settings: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Column:
    """How it was measured; names without digests, so that seeds with an extractor each share a column.

    ``fewer`` is "@2000" where fewer images were used than for published values.
    """

    metric: str
    extractor: str
    reference: str
    fewer: str = ""


Seeds = dict[Any, Estimate]


@dataclass
class Table:
    """The results arranged; rows and columns are sorted.

    Attributes:
        cells: ``cells[row][column]`` maps each seed to its estimate.
        grids: ``grids[row, column]`` maps (rate, strength) to the same, for pFID.
        paired: ``paired[row, decoder, column]`` maps each seed to the difference between the decoder of ``row`` and
            another one of the same tokenizer, measured on the same latents.
        hidden: number of results that share row, column and seed with a later one, which is shown instead.
    """

    rows: list[Row] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    cells: dict[Row, dict[Column, Seeds]] = field(default_factory=dict)
    grids: dict[tuple[Row, Column], dict[tuple[float, float], Seeds]] = field(default_factory=dict)
    paired: dict[tuple[Row, str, Column], Seeds] = field(default_factory=dict)
    hidden: int = 0

    def mean(self, row: Row, column: Column) -> Estimate:
        """The mean over seeds of one cell; NaN where nothing was measured."""
        return mean_over_seeds(self.cells[row].get(column, {}))

    def seeds(self, row: Row, columns: Sequence[Column]) -> list[Any]:
        """The seeds in these cells of a row, in order."""
        seeds = {seed for column in columns for seed in self.cells[row].get(column, ())}
        return sorted(seeds, key=lambda seed: natural(str(seed)))


def arrange(results: Sequence[Result]) -> Table:
    """Arrange results by tokenizer and decoder against metric; a pFID grid enters as its mean."""
    table, settings = Table(), _varying_settings(results)
    for result in results:
        if result.metric == "noise_fd_cell":  # only its mean is in the table; the page lists every line below
            continue
        row = Row(result.group, result.tokenizer, result.decoder, settings(result))
        column, versus = column_of(result), result.record.get("versus")
        rate, strength, samples, sets = (number(result.record.get(k)) for k in ("rate", "strength", "samples", "sets"))
        if result.metric == "pfid" and math.isfinite(rate + strength):
            seeds = table.grids.setdefault((row, column), {}).setdefault((rate, strength), {})
        elif result.metric.endswith("_difference") and isinstance(versus, str):
            column = replace(column, metric=result.metric.removesuffix("_difference"))
            seeds = table.paired.setdefault((row, versus, column), {})
        else:
            seeds = table.cells.setdefault(row, {}).setdefault(column, {})
        table.hidden += result.seed in seeds
        seeds[result.seed] = Estimate(
            result.value,
            result.standard_error,
            samples=(int(samples),) if samples > 0 else (),
            sets=int(sets) if sets > 0 else 0,
            baseline=number(result.record.get("baseline")),
        )
    for (row, column), grid in table.grids.items():
        for seed in {seed for seeds in grid.values() for seed in seeds}:
            cells = [cell[seed] for cell in grid.values() if seed in cell]
            # The cells share images, so no standard error of the mean follows from theirs.
            mean = Estimate(float(np.mean([cell.value for cell in cells])), samples=_samples(cells))
            table.cells.setdefault(row, {}).setdefault(column, {}).setdefault(seed, mean)  # unless it was measured
    table.rows = sorted(
        table.cells, key=lambda r: (natural(r.group), _order(r.tokenizer), _order(r.decoder), r.settings)
    )
    columns = {column for row in table.cells.values() for column in row}
    table.columns = sorted(columns, key=lambda c: (_order(c.metric), c.extractor, c.reference, c.fewer))
    return table


def mean_over_seeds(seeds: Seeds) -> Estimate:
    """Mean and standard error s / sqrt(n) over the seeds that have a number; a single seed stays as it is."""
    finite = [estimate for estimate in seeds.values() if math.isfinite(estimate.value)]
    if len(finite) < 2:
        return finite[0] if finite else Estimate()
    values = np.array([estimate.value for estimate in finite])
    error = values.std(ddof=1) / math.sqrt(len(values))
    baseline = float(np.mean([estimate.baseline for estimate in finite]))
    return Estimate(float(values.mean()), float(error), _samples(finite), len(finite), baseline=baseline)


def matching_rows(table: Table, row: Row, decoder: str, column: Column) -> list[Row]:
    """Rows of the same tokenizer with another decoder that share most settings; sigma only decides between equals."""

    def shared(other: Row) -> tuple[int, int]:
        same = set(row.settings) & set(other.settings)
        return sum(key != "sigma" for key, _ in same), len(same)

    who = (row.group, row.tokenizer, decoder)
    found = [o for o in table.rows if (o.group, o.tokenizer, o.decoder) == who and column in table.cells[o]]
    best = max(map(shared, found), default=None)
    return [other for other in found if shared(other) == best]


def column_of(result: Result) -> Column:
    """The column of a result."""
    return Column(result.metric, without_digest(result.extractor), without_digest(result.reference), result.fewer)


def without_digest(name: str) -> str:
    """A name without the digests in it: ``classifier-64-3f9a12bc`` becomes ``classifier-64``."""
    return re.sub(r"[-@:, ]*\b(?=[0-9a-f]*[0-9])(?=[0-9a-f]*[a-f]|[0-9]{8})[0-9a-f]{8,64}\b", "", name)


def _samples(estimates: Sequence[Estimate]) -> tuple[int, ...]:
    return tuple(sorted({count for estimate in estimates for count in estimate.samples}))


def _varying_settings(results: Sequence[Result]) -> Callable[[Result], tuple[tuple[str, str], ...]]:
    """A function from a result to the settings that vary among results of its tokenizer and decoder.

    The number of steps counts only where it varies within a seed, since each seed keeps the best of its snapshots. The
    sigma of a trained decoder counts also where there is only one, and for lines that do not repeat it.
    """
    values: dict[tuple[str, ...], dict[Any, set[str]]] = {}
    for result in results:
        for key in (key for key in SETTINGS if result.record.get(key) is not None):
            seeds = values.setdefault((result.group, result.tokenizer, result.decoder, key), {})
            seeds.setdefault(result.seed if key == "steps" else None, set()).add(str(result.record[key]))

    def settings(result: Result) -> tuple[tuple[str, str], ...]:
        found = []
        for key in SETTINGS:
            known = values.get((result.group, result.tokenizer, result.decoder, key), {})
            if any(len(several) > 1 for several in known.values()):
                found += [(key, str(result.record[key]))] if result.record.get(key) is not None else []
            elif key == "sigma" and known and result.decoder != "original":
                found += [(key, *known[None])]
        return tuple(found)

    return settings


def _order(word: str) -> tuple[int, str]:
    return (ORDER.index(word), "") if word in ORDER else (len(ORDER), word)
