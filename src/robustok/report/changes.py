"""What post-training and latent perturbation changed, and the headline of the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from robustok.report.names import capital, decimal, decoder_name, describe, joined, label, plus_minus
from robustok.report.results import Column, Estimate, Row, Seeds, Table, matching_rows, mean_over_seeds

BASELINES = ("original", "clean")  # decoders: before post-training; the control, post-trained on clean latents
EFFECTS = {"lower": "lowered", "higher": "raised", "no clear change": "did not clearly change"}
AGAINST = {"lower": "below", "higher": "above", "no clear change": "not clearly different from"}


@dataclass(frozen=True)
class Change:
    """A distance with two decoders, or with two tokenizers: that of ``row`` minus that of ``versus``.

    ``seeds`` holds the difference of each seed. ``paired`` is whether both decoded the same latents, so that the noise
    which they share is not in the error.
    """

    row: Row
    versus: Row
    column: Column
    before: Estimate
    after: Estimate
    seeds: Seeds
    paired: bool

    @property
    def difference(self) -> Estimate:
        """The mean over seeds."""
        return mean_over_seeds(self.seeds)

    @property
    def name(self) -> str:
        """What was compared, for example "free − clean"."""
        if self.row.decoder == self.versus.decoder:
            return f"{self.row.tokenizer} − {self.versus.tokenizer} tokenizer"
        return f"{decoder_name(self.row.decoder)} − {decoder_name(self.versus.decoder)}"

    @property
    def verdict(self) -> str:
        """Lower or higher from two standard errors on, and where no standard error is known."""
        if not math.isfinite(self.difference.value):
            return "not comparable"
        if self.difference.value == 0 or self.difference.errors < 2:
            return "no clear change"
        return "lower" if self.difference.value < 0 else "higher"

    @property
    def percent(self) -> str:
        """The difference as a share of ``before``, for example "−20 %"; "" where that is zero or unknown."""
        share = 100 * self.difference.value / abs(self.before.value) if self.before.value else math.nan
        return f"{decimal(share, 2, '+')} %" if math.isfinite(share) else ""

    @property
    def amount(self) -> str:
        """The difference with its standard error."""
        return decimal(self.difference.value, sign="+") + plus_minus(self.difference)

    @property
    def certainty(self) -> str:
        """For example "5.3 standard errors, paired over 6 sets"."""
        one = self.difference
        if not math.isfinite(one.errors):
            return "standard error unknown, so this may be noise" if abs(one.value) > 0 else ""
        over = f"over {one.seeds} seeds" if one.seeds > 1 else f"paired over {one.sets} sets" if one.sets else "paired"
        return joined([f"{one.errors:.1f} standard errors", over if one.seeds > 1 or self.paired else ""])


@dataclass(frozen=True)
class Card:
    """One number of the headline: what it is, the number, and a line beneath it."""

    name: str
    number: str
    detail: str


def changes(table: Table) -> list[Change]:
    """Compare gFID of decoders with the baselines, and pFID with and without latent perturbation."""
    found = []
    for row in table.rows:
        for column in (c for c in table.columns if c.metric == "gfid" and c in table.cells[row]):
            known = BASELINES[: BASELINES.index(row.decoder)] if row.decoder in BASELINES else BASELINES
            others = [other for one in known for other in matching_rows(table, row, one, column)[:1]]
            if not others and row.decoder not in BASELINES:  # all names are a user's: what it was measured against
                measured = [versus for other, versus, c in table.paired if (other, c) == (row, column)]
                others = [other for one in measured for other in matching_rows(table, row, one, column)[:1]]
            found += [_change(table, row, other, column) for other in others]
    for plain in (row for row in table.rows if (row.tokenizer, row.decoder) == ("plain", "original")):
        for row in table.rows:
            same = (row.group, row.tokenizer, row.decoder) == (plain.group, "perturbed", "original")
            if same and (column := first_column(table, "pfid", plain, row)):
                found.append(_change(table, row, plain, column))
    return found


def headline(table: Table, found: Sequence[Change]) -> tuple[str, list[Card]]:
    """A sentence and three numbers: the largest reduction of gFID, its control and rFID, or else what there is."""
    trained = [c for c in found if c.column.metric == "gfid" and "clean" not in (c.row.decoder, c.versus.decoder)]
    if not trained:
        return _without_changes(table)
    comparable = [c for c in trained if c.column == trained[0].column]
    best = min(comparable, key=lambda c: c.difference.value if math.isfinite(c.difference.value) else math.inf)
    controls = [c for c in found if c.versus.decoder == "clean"]
    control = next((c for c in controls if (c.row, c.column) == (best.row, best.column)), None)
    name, what, post = label(best.column), decoder_name(best.row.decoder), best.versus.decoder == "original"
    title = f"{name}, {decoder_name(best.versus.decoder)} → {what}"
    number = f"{decimal(best.before.value)} → {decimal(best.after.value)}"
    cards = [Card(title, number, joined([best.amount, best.certainty]))]
    if control:
        detail = joined([f"{what} − clean: {control.amount}", control.certainty])
        cards.append(Card(f"{name} of the control (clean)", decimal(control.before.value), detail))
    elif post:
        cards.append(Card(f"{name} of the control", "–", "Not measured: longer training alone may explain the change."))
    if rfid := first_column(table, "rfid", best.versus):
        before, after = (table.mean(row, rfid) for row in (best.versus, best.row))
        number = decimal(before.value) + (f" → {decimal(after.value)}" if math.isfinite(after.value) else "")
        detail = f"on {rfid.reference}" if rfid.reference else ""
        if (rfid.extractor, rfid.reference) == (best.column.extractor, best.column.reference) and before.value > 0:
            detail = f"{name} before is {best.before.value / before.value:.1f} times as large"
        cards.append(Card(f"{label(rfid)} (reconstructions)", number, detail))
    subject = f"Post-training ({what})" if post else f"{capital(what)} instead of {decoder_name(best.versus.decoder)}"
    sentence = f"{subject} {EFFECTS.get(best.verdict, 'has no comparable')} {name}"
    sentence += f" by {best.percent[1:]}" if best.verdict in ("lower", "higher") and best.percent else ""
    sentence += " (one measurement, its error is unknown)" if not math.isfinite(best.difference.errors) else ""
    sentence += f"; it is {AGAINST.get(control.verdict, 'not comparable with')} the control" if control else ""
    many = f" Of {len(trained)} such comparisons, this one has the lowest difference." if len(trained) > 1 else ""
    return f"{sentence} ({describe(best.row)}).{many}", cards


def first_column(table: Table, metric: str, *rows: Row) -> Column | None:
    """The first column of a metric in which all these rows have a result."""
    return next((c for c in table.columns if c.metric == metric and all(c in table.cells[row] for row in rows)), None)


def _without_changes(table: Table) -> tuple[str, list[Card]]:
    row = next((row for row in table.rows if first_column(table, "gfid", row)), table.rows[0] if table.rows else None)
    if row is None:
        return "No measurements yet.", []
    found = [(column, table.mean(row, column)) for column in table.columns if column in table.cells[row]]
    detail = capital(joined([describe(row), f"{decoder_name(row.decoder)} decoder"]))
    cards = [Card(label(c), decimal(e.value) + plus_minus(e), detail) for c, e in found if math.isfinite(e.value)]
    return "No decoder was measured before and after post-training.", cards[:3]


def _change(table: Table, row: Row, versus: Row, column: Column) -> Change:
    """Seed by seed: as measured on the same latents, or both errors combined as if independent."""
    before, after = table.cells[versus][column], table.cells[row][column]
    paired = _paired(table, row, versus, column)
    seeds = {seed: _minus(after[seed], before[seed]) for seed in after if seed in before} | paired
    means = mean_over_seeds(before), mean_over_seeds(after)
    return Change(row, versus, column, *means, seeds or {None: _minus(*means[::-1])}, bool(paired))


def _paired(table: Table, after: Row, before: Row, column: Column) -> Seeds:
    """The difference on the same latents, for the seeds for which that has a standard error of its own.

    A line of metrics.jsonl gives the settings of one decoder only, and either may be the first. So the difference is
    used only where no second row fits the other decoder.
    """
    for row, other, sign in ((after, before, 1), (before, after, -1)):
        found = table.paired.get((row, other.decoder, column), {})
        known = {seed: replace(one, value=sign * one.value) for seed, one in found.items() if math.isfinite(one.errors)}
        if known and matching_rows(table, row, other.decoder, column) == [other]:
            return known
    return {}


def _minus(a: Estimate, b: Estimate) -> Estimate:
    return Estimate(a.value - b.value, math.hypot(a.standard_error, b.standard_error))
