"""Scores of post-trained decoders on the same held-out samples, by which objective=auto and sigma=auto choose.

Which objective and which sigma help depends on tokenizer and generator; a sigma that is too low makes the decoder worse
than no post-training. So a few are tried with short trainings, and every decoder is compared with the one before
post-training, and with the control: as many steps on clean latents.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from rich.table import Table

from robustok.commands.post_train_settings import Candidate
from robustok.console import console, note
from robustok.evaluation.held_out import HeldOutScore, ReconstructionScore
from robustok.files import append_line, json_lines, regular_file
from robustok.metrics.frechet import Estimate, mean_and_standard_error
from robustok.metrics.latent_gap import Figure
from robustok.model_card import price_fields
from robustok.tokenizers import load_tokenizer
from robustok.types import Measurement

METRIC = "held_out"  # in metrics.jsonl: a validation score, not a result to report
RECONSTRUCTIONS = {"rfd": "rFD", "psnr": "PSNR", "lpips_alex": "LPIPS"}


@dataclass(frozen=True)
class ScoredDecoder:
    """A decoder with its scores.

    Attributes:
        stage: "untouched", "candidate" (a short training), "continued" (the best candidate, trained on) or "unseen"
            (one of these on samples that chose nothing).
        candidate: how it was trained; None for the untouched decoder.
        steps: of its training.
        path: its snapshot.
        values: distance on each held-out set.
        reconstructions: of real images: ``rfd``, ``psnr`` and perhaps ``lpips_alex``; of some stages.
    """

    stage: str
    candidate: Candidate | None
    steps: int
    path: Path
    values: list[float]
    reconstructions: Mapping[str, float]

    @property
    def distance(self) -> float:
        """Mean over the sets."""
        return statistics.fmean(self.values)

    @property
    def name(self) -> str:
        """For tables, for example "paired 0.9"."""
        if self.candidate is None:
            return "untouched"
        sigma = "" if self.candidate.sigma is None else f" {self.candidate.sigma:g}"
        return f"{self.candidate.objectives}{sigma}{' (control)' * self.is_control}"

    @property
    def is_control(self) -> bool:
        """Whether it learned from clean latents alone."""
        return self.candidate is not None and (self.candidate.objectives == "clean" or self.candidate.name == "1")

    def change(self, other: "ScoredDecoder") -> Estimate:
        """Its distance minus that of another on the same sets, with the standard error over the sets."""
        return mean_and_standard_error([a - b for a, b in zip(self.values, other.values, strict=True)])

    def key(self) -> tuple[str, str | None, float | None, int]:
        """What distinguishes it from others of the run."""
        candidate = self.candidate
        return self.stage, candidate and candidate.objectives, candidate and candidate.sigma, self.steps


class Search:
    """The decoders of a run with their scores. A score in the run's metrics.jsonl is not computed again.

    Args:
        folder: run folder.
        make_score: makes the score; called when the first decoder needs it.
        make_reconstructions: makes that of real images, or None.
        accelerator: all processes compute, the main one writes.
        seed: of the run.
        reference: description of the real images.
        limit: PSNR in dB that reconstructions may lose; None: no limit.

    Attributes:
        found: decoders in the order in which they were added, the untouched one first.
    """

    def __init__(
        self,
        folder: Path,
        make_score: Callable[[], HeldOutScore],
        make_reconstructions: Callable[[], ReconstructionScore | None],
        accelerator: Accelerator,
        seed: int,
        reference: str,
        limit: float | None = None,
    ) -> None:
        self.file, self.accelerator = folder / "metrics.jsonl", accelerator
        self._make, self._seed, self._reference = (make_score, make_reconstructions), seed, reference
        self._limit = limit
        self._scores: tuple[HeldOutScore, ReconstructionScore | None] | None = None
        self.found: list[ScoredDecoder] = []

    @property
    def untouched(self) -> ScoredDecoder:
        """The decoder before post-training."""
        return self.found[0]

    @property
    def control(self) -> ScoredDecoder | None:
        """The short training on clean latents, if there was one."""
        return next((scored for scored in self.found if scored.is_control), None)

    def add(self, stage: str, candidate: Candidate | None, steps: int, path: Path) -> None:
        """Score a decoder and append a line to metrics.jsonl; the untouched decoder has to be the first."""
        scored = ScoredDecoder(stage, candidate, steps, path, [], {})
        if scored.key() in (other.key() for other in self.found):
            return
        if self._known(scored) is None:  # in all processes alike: the line is written once all have computed
            self._scores = self._scores or tuple(make() for make in self._make)
            distances, reconstructions = self._scores
            decode = distances.decoder(load_tokenizer(path))
            measured = {} if reconstructions is None else reconstructions(decode)
            new = ScoredDecoder(stage, candidate, steps, path, distances(decode), measured)
            if self.accelerator.is_main_process:
                append_line(self.file, self._line(new))
        self.accelerator.wait_for_everyone()
        line = self._known(scored)
        measured = {name: line[name] for name in RECONSTRUCTIONS if name in line}
        self.found.append(ScoredDecoder(stage, candidate, steps, path, line["values"], measured))

    def like(self, other: ScoredDecoder) -> ScoredDecoder:
        """The same decoder as that of another search."""
        return next(scored for scored in self.found if scored.key()[1:] == other.key()[1:])

    @property
    def allowed(self) -> list[ScoredDecoder]:
        """Those whose reconstructions lose no more than the limit, the untouched decoder first."""
        return [scored for scored in self.found if not self.refused(scored)]

    def refused(self, scored: ScoredDecoder) -> bool:
        """Whether reconstructions lose more than the limit."""
        before = (self.found[0] if self.found else scored).reconstructions
        return self._limit is not None and scored.reconstructions["psnr"] < before["psnr"] - self._limit

    def best(self) -> ScoredDecoder:
        """The lowest mean distance that is allowed; of equals the first, so that a tie keeps the untouched decoder."""
        return min(self.allowed, key=lambda scored: scored.distance)

    def price(self) -> dict[str, dict[str, float]]:
        """``price`` for the header of the best decoder; nothing where reconstructions were not measured."""
        return price_fields(self.best().reconstructions, self.untouched.reconstructions)

    def stalled(self, patience: int) -> bool:
        """Whether so many snapshots of the continued training gained no more than a standard error."""
        snapshots = sorted((s for s in self.found if s.stage == "continued"), key=lambda scored: scored.steps)
        best, since = snapshots[0], 0
        for scored in snapshots[1:]:
            change = scored.change(best)
            gained = change.value < -(change.standard_error or 0)
            best, since = (scored, 0) if gained else (best, since + 1)
        return since >= patience

    def conclude(self, words: str) -> None:
        """Append the verdict to metrics.jsonl, on the line of the best decoder, and print it."""
        line = self._known(self.best()) | {"stage": "verdict", "words": words}
        if self.accelerator.is_main_process and line not in self._lines():
            append_line(self.file, line)
        note(words, "bold")

    def show(self) -> None:
        """Print the table."""
        control, measured = self.control, [name for name in RECONSTRUCTIONS if name in self.untouched.reconstructions]
        table = Table("trained on", "steps", "held-out distance", "change", "against the control", box=None)
        for name in measured:
            table.add_column(RECONSTRUCTIONS[name])
        best = self.best()
        for scored in self.found:
            changes = ["" if b in (None, scored) else plus_minus(scored.change(b)) for b in (self.untouched, control)]
            numbers = [f"{scored.reconstructions[name]:.4g}" if scored.reconstructions else "" for name in measured]
            name = scored.name + " (refused: its price)" * self.refused(scored)
            row = [name, str(scored.steps), f"{scored.distance:.4g}", *changes, *numbers]
            table.add_row(*row, style="bold" if scored is best else None)
        console.print(table)

    def rows(self) -> list[dict[str, object]]:
        """For the model card: all that were tried."""
        found = []
        for scored in self.found:
            change, candidate = scored.change(self.untouched), scored.candidate
            row = {"objective": candidate and candidate.objectives, "sigma": candidate and candidate.sigma}
            row |= {"steps": scored.steps, "distance": round(scored.distance, 6), "change": round(change.value, 6)}
            row |= {"standard_error": round(change.standard_error or 0, 6)}
            names = self.untouched.reconstructions
            found.append(row | {name: round(scored.reconstructions.get(name, 0.0), 6) for name in names})
        return found

    def _known(self, scored: ScoredDecoder) -> dict | None:
        """The line of metrics.jsonl, if it is there."""
        for line in self._lines():
            key = tuple(line.get(name) for name in ("stage", "objective", "sigma", "steps"))
            if line.get("metric") == METRIC and key == scored.key():
                return line
        return None

    def _lines(self) -> list[dict]:
        return json_lines(regular_file(self.file).read_text())[0] if self.file.exists() else []

    def _line(self, scored: ScoredDecoder) -> dict:
        """The line of metrics.jsonl."""
        value, change = mean_and_standard_error(scored.values), scored.change(self.found[0] if self.found else scored)
        stage, objective, sigma, steps = scored.key()
        distances = self._scores[0]
        return Measurement(
            metric=METRIC,
            value=value.value,
            standard_error=value.standard_error,
            samples=distances.samples * len(scored.values),
            seed=self._seed,
            extractor=distances.extractor,
            reference=self._reference,
            details={
                "stage": stage,
                "objective": objective,
                "sigma": sigma,
                "steps": steps,
                "sets": len(scored.values),
                "values": scored.values,
                "change": change.value,
                "change_error": change.standard_error,
                **scored.reconstructions,
                **({"refused": True} if self.refused(scored) else {}),
            },
        ).line()


def plus_minus(estimate: Estimate) -> str:
    """For example "-0.41 ± 0.03"."""
    error = "" if estimate.standard_error is None else f" ± {estimate.standard_error:.2g}"
    return f"{estimate.value:+.3g}{error}"


def verdict(before: ScoredDecoder, best: ScoredDecoder, short: ScoredDecoder, control: ScoredDecoder | None) -> str:
    """Whether post-training pays, in words: by at least two standard errors, and more than the control.

    Args:
        before: the untouched decoder.
        best: the best one of all.
        short: the candidate that it was, after as many steps as the control.
        control: the short training on clean latents; None if there was none.
    """
    change = best.change(before)
    gain = f"{plus_minus(change)} from {before.distance:.4g} with {best.name} after {best.steps} steps"
    if not _lower(change):
        return f"post-training does not pay: {gain}"
    if control is None:
        return f"post-training pays: {gain}; the control, clean latents, was not among the candidates"
    if short.is_control:
        return f"post-training pays, and needs no generator: {gain}"
    beyond = short.change(control)
    against = f"{plus_minus(beyond)} against the control after {short.steps} steps each"
    if _lower(beyond):
        return f"post-training pays, beyond the control: {gain}; {against}"
    return f"post-training pays, but clean latents may do as much: {gain}; {against}"


def _lower(change: Estimate) -> bool:
    return change.value < -2 * (change.standard_error or 0)


def gap_in_words(figures: Mapping[str, Figure]) -> str:
    """What predicts whether post-training pays: where generated latents are like real ones there is nothing to mend."""
    found = ", ".join(f"{name} {figure.value:.3g} ({figure.baseline:.3g})" for name, figure in figures.items())
    return f"the gap of the generated latents (of real ones, where there is nothing to mend): {found}"
