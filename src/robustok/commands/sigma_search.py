"""Choosing sigma: decoders judged on the same held-out samples, the untouched one first, and the best of them.

A sigma that is too low makes a decoder worse than none; how low depends on the tokenizer. So a few are tried for a
short while, and all that post-training makes is held against the decoder it started from.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from rich.table import Table

from robustok.console import console
from robustok.evaluation.held_out import HeldOutScore
from robustok.files import append_line
from robustok.metrics.frechet import Estimate, mean_and_standard_error
from robustok.tokenizers import load_tokenizer
from robustok.types import Measurement

METRIC = "held_out"  # of the lines in metrics.jsonl; never a result to report


def default_sigmas(family: str | None) -> list[float]:
    """What to try: less of the real latents for a tokenizer that was trained on perturbed ones; 1 is the control."""
    return [0.7, 0.8, 0.9, 1.0] if family == "robustok" else [0.8, 0.9, 0.95, 1.0]


@dataclass(frozen=True)
class ScoredDecoder:
    """A decoder with its distances.

    Attributes:
        stage: "untouched", "candidate" (a short training) or "continued" (the best of these, to the end).
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
        """Its distance minus that of another on the same sets, with the standard error over these."""
        return mean_and_standard_error([a - b for a, b in zip(self.values, other.values, strict=True)])


class SigmaSearch:
    """The decoders of a run, judged once each: what is in its metrics.jsonl is not judged again.

    Args:
        folder: run folder.
        make_judge: makes the judge, once the first decoder needs it.
        accelerator: one process judges; all of them read.
        seed: of the run.
        reference: what the samples are compared with.
    """

    def __init__(
        self, folder: Path, make_judge: Callable[[], HeldOutScore], accelerator: Accelerator, seed: int, reference: str
    ) -> None:
        self.folder, self._make, self._accelerator = folder, make_judge, accelerator
        self._seed, self._reference, self._judge = seed, reference, None
        self.found: list[ScoredDecoder] = []

    @property
    def untouched(self) -> ScoredDecoder:
        """The decoder that post-training started from."""
        return self.found[0]

    def add(self, stage: str, sigma: float | None, steps: int, path: Path) -> ScoredDecoder:
        """Evaluator a decoder, and write a line about it; the first one has to be the untouched one."""
        if self._accelerator.is_main_process and self._known(stage, sigma, steps) is None:
            self._write(stage, sigma, steps, path)
        self._accelerator.wait_for_everyone()
        scored = ScoredDecoder(stage, sigma, steps, path, self._known(stage, sigma, steps))
        self.found.append(scored)
        return scored

    def best(self) -> ScoredDecoder:
        """The lowest mean; the earlier one of equals, so that nothing replaces the untouched decoder for nothing."""
        return min(self.found, key=lambda scored: scored.distance)

    def show(self) -> None:
        """Print the table."""
        table = Table("sigma", "steps", "held-out distance", "change", "standard error", box=None)
        best = self.best()
        for scored in self.found:
            change = scored.change(self.untouched)
            error = "" if change.standard_error is None else f"{change.standard_error:.3g}"
            table.add_row(
                "untouched" if scored.sigma is None else f"{scored.sigma:g}{' (control)' * (scored.sigma == 1)}",
                str(scored.steps),
                f"{scored.distance:.4g}",
                "" if scored is self.untouched else f"{change.value:+.3g}",
                "" if scored is self.untouched else error,
                style="bold" if scored is best else None,
            )
        console.print(table)

    def _known(self, stage: str, sigma: float | None, steps: int) -> list[float] | None:
        """The distances in metrics.jsonl, if they are there."""
        file = self.folder / "metrics.jsonl"
        for line in map(json.loads, file.read_text().splitlines()) if file.exists() else ():
            if line["metric"] == METRIC and (line["stage"], line["sigma"], line["steps"]) == (stage, sigma, steps):
                return line["values"]
        return None

    def _write(self, stage: str, sigma: float | None, steps: int, path: Path) -> None:
        """Evaluator, and append the line."""
        self._judge = self._judge or self._make()
        scored = ScoredDecoder(stage, sigma, steps, path, self._judge(self._judge.decoder(load_tokenizer(path))))
        value = mean_and_standard_error(scored.values)
        change = scored.change(self.found[0] if self.found else scored)
        details = {"stage": stage, "sigma": sigma, "steps": steps, "sets": len(scored.values), "values": scored.values}
        details |= {"change": change.value, "change_error": change.standard_error}
        line = Measurement(
            METRIC,
            value.value,
            value.standard_error,
            self._judge.samples * len(scored.values),
            self._seed,
            self._judge.extractor,
            self._reference,
            details,
        )
        append_line(self.folder / "metrics.jsonl", line.line())
