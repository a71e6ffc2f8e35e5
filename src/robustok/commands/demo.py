"""The `demo` command: the whole method from real images to a report, by default on handwritten digits and a CPU.

For a tokenizer without and one with latent perturbation:

    tokenizer -> tokens -> generator -> decoders post-trained on clean latents, pairs and free samples -> metrics

The decoder post-trained on clean latents is the control. All decoders are evaluated on the same samples, which chose
nothing. Every stage calls the function of a command, with a recipe of configs/, in a run folder of its own, so the same
command again resumes. The tokenizers have a process each: models this small gain nothing from more threads.
"""

import json
import os
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator
from rich.table import Table

from robustok.commands.encode import EncodeRun, encode
from robustok.commands.evaluate import evaluate
from robustok.commands.generate import GenerateRun, generate
from robustok.commands.parallel import few_threads, run_parallel
from robustok.commands.pictures import draw_reconstructions, draw_samples
from robustok.commands.post_train import post_train
from robustok.commands.post_train_settings import PostTrainRun
from robustok.commands.train_classifier import TrainClassifierRun, train_classifier
from robustok.config import C, Config, read_yaml, recipe, validate
from robustok.console import console, note, stage
from robustok.data.sources import Data, Digits
from robustok.errors import UserError
from robustok.evaluation.settings import EvaluateRun, MetricNames
from robustok.files import inside, write_file
from robustok.metrics.features import ExtractorConfig
from robustok.metrics.pfid import PerturbedGrid, RelativeGrid
from robustok.report.changes import changes, first_column
from robustok.report.collect import collect
from robustok.report.names import decimal, label, plus_minus
from robustok.report.page import write_report
from robustok.report.results import Estimate, arrange
from robustok.report.sweeps import HELD_OUT
from robustok.training.generator import GeneratorTrainingRun, train_generator
from robustok.training.tokenizer import TokenizerTrainingRun, train_tokenizer

TOKENIZERS = {"plain": {"perturbation": {"proportion": 0}}, "perturbed": {}}  # they differ in nothing else
OBJECTIVES = ("clean", "paired", "free")  # of post-training: the control, the paper's, and one without pairs
RECIPES: dict[type[Config], str] = {
    TrainClassifierRun: "classifier.yaml",
    TokenizerTrainingRun: "tokenizer.yaml",
    GeneratorTrainingRun: "generator.yaml",
    PostTrainRun: "post.yaml",
}
TIMES = ("steps", "warmup_steps", "start", "anneal_start", "anneal_end")  # settings in steps
SHORT = {"out": "runs/demo", "recipes": "demo", "metrics": ["rfid", "psnr", "pfid", "gfid"]}  # where null
FULL = {
    "out": "runs/demo-full",
    "recipes": "digits",
    "metrics": ["rfid", "psnr", "codebook", "pfid", "gfid", "kid", "gap"],
}
CACHE = {"batch_size": 256, "precision": "float32"}  # of latents: bf16 would depend on the processor


class DemoRun(Config):
    """All stages of the method. The defaults take three minutes on two cores, ``full`` takes five."""

    full: bool = Field(
        False,
        description="the longer run of docs/results/digits.md: recipes=digits, all metrics, out=runs/demo-full; "
        "robustok demo --full",
    )
    out: Path | None = Field(None, description="run folder; null: runs/demo, full: runs/demo-full")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [0], min_length=1, description="seeds; all stages run once for each"
    )
    recipes: Path | None = Field(
        None,
        description="folder with classifier.yaml, tokenizer.yaml, generator.yaml, post.yaml; null: demo, full: digits",
    )
    data: Data = Field(Digits(), description="labelled images")
    sigma: float = Field(0.7, ge=0, lt=1, description="sigma of the pairs; 1 is the control")
    sets: int = Field(4, ge=2, description="independent sets of samples behind each gFID, for its standard error")
    samples: int = Field(1348, ge=20, description="samples in a set; the default is the number of training digits")
    grid: PerturbedGrid = Field(RelativeGrid(), description="cells of pFID")
    perturbation_seeds: int = Field(2, ge=1, le=1000, description="repetitions of pFID, for its standard error")
    metrics: MetricNames | None = Field(
        None, description="what is measured; null: rfid, psnr, pfid and gfid, full: codebook, kid and gap too"
    )
    scale: float = Field(
        1.0,
        gt=0,
        description="multiplies the numbers of training steps; 2 is a longer demo, 0.1 a quick trial of all stages",
    )

    @model_validator(mode="before")
    @classmethod
    def _full(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        full = str(settings.get("full")).lower() in ("true", "yes", "on", "1")  # words are not typed yet
        chosen = FULL if full else SHORT
        return settings | {key: value for key, value in chosen.items() if settings.get(key) is None}

    @model_validator(mode="after")
    def _seeds_differ(self) -> "DemoRun":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} hold the same seed twice; keep one")
        return self


def demo(run: DemoRun) -> Path:
    """Run all stages for every seed; write metrics.jsonl, pictures and report.html, and print a table.

    Returns:
        The page.

    Raises:
        UserError: as the stages raise it; or a launcher has started several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("demo starts its own processes; run it without torchrun or accelerate launch")
    inside(run.out)
    for seed in run.seeds:
        stages = Stages(run, seed)
        stages.train_classifiers()
        run_parallel({name: (partial(_stages_of_a_tokenizer, seed=seed, name=name), run) for name in TOKENIZERS})
        with stages.timed("pictures"):
            stages.draw()
    lines = "".join(
        (run.out / f"seed-{seed}" / f"measure-{name}" / "all.jsonl").read_text()
        for seed in run.seeds
        for name in TOKENIZERS
    )
    write_file(run.out / "metrics.jsonl", lines)
    _print_tables(run.out)
    return write_report(run.out, title=f"robustok on {run.data.name}")


def _stages_of_a_tokenizer(run: DemoRun, seed: int, name: str) -> None:
    """All stages for one tokenizer, in a process of its own."""
    stages = Stages(run, seed)
    stages.train(name)
    stages.post_train(name)
    stages.evaluate(name)


class Stages:
    """The stages for one seed, in the folder OUT/seed-N.

    Args:
        run: the demo.
        seed: which seed.
    """

    def __init__(self, run: DemoRun, seed: int) -> None:
        self.run, self.seed, self.folder = run, seed, run.out / f"seed-{seed}"
        # Two classifiers with different seeds: the one of the perceptual loss must not be the one that evaluates.
        self.extractor = ExtractorConfig(path=self.folder / "classifier-metric")
        self.losses = {
            "data": run.data,
            "reconstruction": {"perceptual_weights": str(self.folder / "classifier-guide")},
            "seed": seed,
        }

    def configure(self, model: type[C], out: str, **settings: Any) -> C:
        """The configuration of a stage: its scaled recipe, if it has one, with these settings over it."""
        merged = self.recipe(model)
        for key, value in settings.items():
            merged[key] = (merged.get(key) or {}) | value if isinstance(value, dict) else value
        return validate(model, merged | {"out": self.folder / out}, f"the settings of {out}")

    def recipe(self, model: type[Config]) -> dict[str, Any]:
        """The scaled recipe of a stage, if it has one."""
        name = RECIPES.get(model)
        return _scaled(read_yaml(recipe(self.run.recipes / name)), self.run.scale) if name else {}

    def timed(self, name: str) -> AbstractContextManager[None]:
        """A line with the time of a stage."""
        return stage(f"seed {self.seed}, {name}")

    def train_classifiers(self) -> None:
        """Train the feature space of the distances and that of the perceptual loss."""
        with self.timed("two classifiers"), few_threads(len(TOKENIZERS)):
            # One after the other: a process of its own would take as long to start as to train one.
            for i, name in enumerate(("classifier-metric", "classifier-guide")):
                seed = 2 * self.seed + i
                train_classifier(self.configure(TrainClassifierRun, name, data=self.run.data, seed=seed))

    def train(self, name: str) -> None:
        """Train a tokenizer and a generator of its tokens."""
        with self.timed("tokenizer"):
            settings = self.losses | TOKENIZERS[name]
            train_tokenizer(self.configure(TokenizerTrainingRun, f"tokenizer-{name}", **settings))
        with self.timed("tokens"):
            tokenizer = self.folder / f"tokenizer-{name}"
            latents = encode(
                self.configure(EncodeRun, f"latents-{name}", data=self.run.data, tokenizer=tokenizer, cache=CACHE)
            )
        with self.timed("generator"):
            train_generator(self.configure(GeneratorTrainingRun, f"generator-{name}", latents=latents, seed=self.seed))

    def post_train(self, name: str) -> None:
        """Post-train the decoder with each objective, for as many steps; the best is chosen on samples of its own."""
        with self.timed("post-training"):
            post_train(
                self.configure(
                    PostTrainRun,
                    f"post-{name}",
                    **self.losses,
                    tokenizer=self.folder / f"tokenizer-{name}",
                    generator=self.folder / f"generator-{name}",
                    latents=self.folder / f"latents-{name}",
                    objective="auto",
                    mixture={"count": 3 * self.run.samples},
                    sweep={
                        "objectives": OBJECTIVES,
                        "sigmas": [self.run.sigma],
                        "steps": self.recipe(PostTrainRun)["steps"],  # all of them: what follows would have no control
                        "sets": self.run.sets,
                        "samples": self.run.samples // 2,
                    },
                    held_out={"extractor": self.extractor},
                    cache=CACHE,
                )
            )

    def decoders(self, name: str) -> dict[str, Path]:
        """The decoders that are evaluated, by their names in the results."""
        post = self.folder / f"post-{name}"
        candidates = {"clean": "clean", "paired": f"{self.run.sigma:g}", "free": "free"}
        paths = {name: post / f"candidate-{candidate}" for name, candidate in candidates.items()}
        return {"original": self.folder / f"tokenizer-{name}"} | paths

    def evaluate(self, name: str) -> None:
        """Measure a tokenizer and all its decoders anew, on samples that chose nothing."""
        with self.timed("samples"):
            samples = [self._sample(name, number) for number in range(self.run.sets)]
        with self.timed("metrics"):
            config = self.configure(
                EvaluateRun,
                f"measure-{name}",
                tokenizer=self.folder / f"tokenizer-{name}",
                tags={"tokenizer": name},
                extractor=self.extractor,
                data=self.run.data,
                samples={"decoders": self.decoders(name), "latents": samples},
                metrics=self.run.metrics,
                pfid={"grid": self.run.grid, "seeds": self.run.perturbation_seeds},
                seed=self.seed,
                batch_size=256,
            )
            (config.out / "metrics.jsonl").unlink(missing_ok=True)
            lines = [measurement.line() for measurement in evaluate(config)]
        # How the decoder was chosen is part of the report too.
        lines += [
            json.loads(line) | {"tokenizer": name}
            for line in (self.folder / f"post-{name}" / "metrics.jsonl").read_text().splitlines()
        ]
        write_file(config.out / "all.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def _sample(self, name: str, number: int) -> Path:
        """Free samples of the generator of the tokenizer ``name``."""
        generator, seed = self.folder / f"generator-{name}", 1000 * self.seed + number
        run = {"generator": generator, "count": self.run.samples, "seed": seed, "cache": CACHE}
        return generate(self.configure(GenerateRun, f"samples/{name}-{number}", **run))

    def draw(self) -> None:
        """Write the pictures of the report; after post-training is the decoder that the held-out samples chose."""
        start = self.run.out / "pictures" / f"seed-{self.seed}"
        tokenizers = {name: self.folder / f"tokenizer-{name}" for name in TOKENIZERS}
        draw_reconstructions(Path(f"{start}-reconstructions.npz"), tokenizers, self.run.data)
        decoders = self.decoders("perturbed")
        shown = {"before": decoders["original"], "after": self.folder / "post-perturbed", "clean": decoders["clean"]}
        samples = self.folder / "samples" / "perturbed-0"
        draw_samples(Path(f"{start}-samples.npz"), shown, samples, self.run.data, self.extractor)


def _print_tables(folder: Path) -> None:
    """Print what was measured, as the report does: means over the seeds where there are several."""
    results = arrange([result for result in collect(folder).results if result.metric != HELD_OUT])
    found = {(one.row, one.versus.decoder): one for one in changes(results) if one.column.metric == "gfid"}
    tokenizers, decoders = Table(box=None), Table(box=None)
    rows = [row for row in results.rows if row.decoder == "original"]
    columns = [c for metric in ("rfid", "pfid", "psnr") if (c := first_column(results, metric, *rows))]
    for head in ("tokenizer", *map(label, columns)):
        tokenizers.add_column(head)
    for row in rows:
        tokenizers.add_row(row.tokenizer, *(_number(results.mean(row, column)) for column in columns))
    column = first_column(results, "gfid", *results.rows)
    if column is not None:
        for head in ("tokenizer", "decoder", label(column), "minus original", "minus clean"):
            decoders.add_column(head)
        for row in results.rows:
            against = (found.get((row, versus)) for versus in ("original", "clean"))
            shown = [_number(results.mean(row, column)), *(one.amount if one else "" for one in against)]
            decoders.add_row(row.tokenizer, row.decoder, *shown)
    for table in (tokenizers, decoders):
        if table.columns:
            console.print(table)
            console.print()
    note("lower is better, but for PSNR; ±: standard error; clean: the control")


def _number(estimate: Estimate) -> str:
    return decimal(estimate.value) + plus_minus(estimate)


def _scaled(settings: dict[str, Any], scale: float) -> dict[str, Any]:
    """A recipe whose numbers of steps are multiplied; at least 1, except where 0 means never."""
    if scale == 1:
        return settings
    found = dict(settings)
    for key, value in settings.items():
        if isinstance(value, dict):
            found[key] = _scaled(value, scale)
        elif isinstance(value, int) and (key in TIMES or key.endswith("_every")):
            found[key] = max(1, round(value * scale)) if value else 0
    return found
