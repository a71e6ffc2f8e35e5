"""Scores of post-trained decoders on the same held-out samples, by which sigma=auto chooses.

A sigma that is too low makes the decoder worse than no post-training; how low depends on the tokenizer. So a few values
are tried with short trainings, and every decoder is compared with the one before post-training.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from rich.table import Table

from robustok.console import console
from robustok.evaluation.held_out import HeldOutScore
from robustok.files import append_line, json_lines, regular_file
from robustok.metrics.frechet import Estimate, mean_and_standard_error
from robustok.tokenizers import load_tokenizer
from robustok.types import Measurement

METRIC = "held_out"  # in metrics.jsonl: a validation score, not a result to report


@dataclass(frozen=True)
class ScoredDecoder:
    """A decoder with its scores.

    Attributes:
        stage: "untouched", "candidate" (a short training) or "continued" (the best candidate, trained to the end).
        sigma: of its pairs; None for the untouched decoder.
        steps: of its training.
        path: its snapshot.
        values: distance on each held-out set.
    """

    stage: str
    sigma: float | None
    steps: int
    path: Path
    values: list[float]

    @property
    def distance(self) -> float:
        """Mean over the sets."""
        return statistics.fmean(self.values)

    def change(self, other: "ScoredDecoder") -> Estimate:
        """Its distance minus that of another on the same sets, with the standard error over the sets."""
        return mean_and_standard_error([a - b for a, b in zip(self.values, other.values, strict=True)])


class SigmaSearch:
    """The decoders of a run with their scores. A score in the run's metrics.jsonl is not computed again.

    Args:
        folder: run folder.
        make_score: makes the score; called when the first decoder needs it.
        accelerator: its main process computes, all of them read.
        seed: of the run.
        reference: description of the real images.

    Attributes:
        found: decoders in the order in which they were added, the untouched one first.
    """

    def __init__(
        self, folder: Path, make_score: Callable[[], HeldOutScore], accelerator: Accelerator, seed: int, reference: str
    ) -> None:
        self.file, self._make_score, self._accelerator = folder / "metrics.jsonl", make_score, accelerator
        self._seed, self._reference = seed, reference
        self._score: HeldOutScore | None = None
        self.found: list[ScoredDecoder] = []

    @property
    def untouched(self) -> ScoredDecoder:
        """The decoder before post-training."""
        return self.found[0]

    def add(self, stage: str, sigma: float | None, steps: int, path: Path) -> None:
        """Score a decoder and append a line to metrics.jsonl; the untouched decoder has to be the first."""
        if self._accelerator.is_main_process and self._known(stage, sigma, steps) is None:
            self._score = self._score or self._make_score()
            values = self._score(self._score.decoder(load_tokenizer(path)))
            append_line(self.file, self._line(ScoredDecoder(stage, sigma, steps, path, values)).line())
        self._accelerator.wait_for_everyone()
        self.found.append(ScoredDecoder(stage, sigma, steps, path, self._known(stage, sigma, steps)))

    def best(self) -> ScoredDecoder:
        """The lowest mean distance; of equals the first, so that a tie keeps the untouched decoder."""
        return min(self.found, key=lambda scored: scored.distance)

    def show(self) -> None:
        """Print the table."""
        table = Table("sigma", "steps", "held-out distance", "change", "standard error", box=None)
        best = self.best()
        for scored in self.found:
            sigma = "untouched" if scored.sigma is None else f"{scored.sigma:g}{' (control)' * (scored.sigma == 1)}"
            change = scored.change(self.untouched)
            changes = [f"{change.value:+.3g}", "" if change.standard_error is None else f"{change.standard_error:.3g}"]
            if scored is self.untouched:
                changes = ["", ""]
            style = "bold" if scored is best else None
            table.add_row(sigma, str(scored.steps), f"{scored.distance:.4g}", *changes, style=style)
        console.print(table)

    def _known(self, stage: str, sigma: float | None, steps: int) -> list[float] | None:
        """The values in metrics.jsonl, if they are there."""
        wanted = (METRIC, stage, sigma, steps)
        for line in json_lines(regular_file(self.file).read_text())[0] if self.file.exists() else ():
            if tuple(map(line.get, ("metric", "stage", "sigma", "steps"))) == wanted:
                return line["values"]
        return None

    def _line(self, scored: ScoredDecoder) -> Measurement:
        """The line of metrics.jsonl."""
        value, change = mean_and_standard_error(scored.values), scored.change(self.found[0] if self.found else scored)
        return Measurement(
            metric=METRIC,
            value=value.value,
            standard_error=value.standard_error,
            samples=self._score.samples * len(scored.values),
            seed=self._seed,
            extractor=self._score.extractor,
            reference=self._reference,
            details={
                "stage": scored.stage,
                "sigma": scored.sigma,
                "steps": scored.steps,
                "sets": len(scored.values),
                "values": scored.values,
                "change": change.value,
                "change_error": change.standard_error,
            },
        )
