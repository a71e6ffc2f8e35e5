"""The `demo` command: the whole method from real images to a report, by default on handwritten digits and a CPU.

    plain and perturbed tokenizer -> tokens -> generator -> pairs -> post-trained decoder and its control -> metrics
    -> report

Every stage calls the function of a command, with a recipe of configs/, in a run folder of its own, so the same command
again resumes. Stages that do not depend on each other run at the same time, each with a share of the cores: models
this small gain nothing from more threads.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from robustok.commands.encode import EncodeRun, encode
from robustok.commands.evaluate import evaluate
from robustok.commands.generate import GenerateRun, generate
from robustok.commands.make_pairs import MakePairsRun, make_pairs
from robustok.commands.parallel import run_parallel
from robustok.commands.pictures import draw_reconstructions, draw_samples
from robustok.commands.report import ReportRun, report
from robustok.commands.train_classifier import TrainClassifierRun, train_classifier
from robustok.config import C, Config, read_yaml, recipe, validate
from robustok.console import note
from robustok.data.sources import Data, Digits
from robustok.errors import UserError
from robustok.evaluation.settings import EvaluateRun, MetricNames
from robustok.files import inside, write_file
from robustok.metrics.features import ExtractorConfig
from robustok.metrics.pfid import PerturbedGrid, RelativeGrid
from robustok.training.decoder import DecoderTrainingRun, train_decoder
from robustok.training.generator import GeneratorTrainingRun, train_generator
from robustok.training.tokenizer import TokenizerTrainingRun, train_tokenizer
from robustok.types import Measurement

TOKENIZERS = {"plain": {"perturbation": {"proportion": 0}}, "perturbed": {}}  # they differ in nothing else
DECODERS = {  # of each tokenizer: the snapshots that decode the same samples
    "plain": {"original": "tokenizer-plain"},
    "perturbed": {"original": "tokenizer-perturbed", "control": "control", "post_trained": "post"},
}
RECIPES: dict[type[Config], str] = {
    TrainClassifierRun: "classifier.yaml",
    TokenizerTrainingRun: "tokenizer.yaml",
    GeneratorTrainingRun: "generator.yaml",
    DecoderTrainingRun: "post.yaml",
}


TIMES = ("steps", "warmup_steps", "start", "anneal_start", "anneal_end")  # settings in steps


class DemoRun(Config):
    """All stages of the method. The defaults take a few minutes on two cores."""

    out: Path = Field(Path("runs/demo"), description="run folder")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [0], min_length=1, description="seeds; all stages run once for each"
    )
    recipes: Path = Field(
        Path("digits"), description="folder with classifier.yaml, tokenizer.yaml, generator.yaml and post.yaml"
    )
    data: Data = Field(Digits(), description="labelled images")
    sigma: float = Field(0.7, ge=0, le=1, description="sigma of the pairs")
    sets: int = Field(6, ge=2, description="independent sets of samples behind each gFID, for its standard error")
    samples: int = Field(1348, ge=20, description="samples in a set; the default is the number of training digits")
    grid: PerturbedGrid = Field(RelativeGrid(), description="cells of pFID")
    perturbation_seeds: int = Field(2, ge=1, le=1000, description="repetitions of pFID, for its standard error")
    metrics: MetricNames = Field(
        ["rfid", "psnr", "codebook", "pfid", "gfid", "kid", "gap"], description="what is measured"
    )
    scale: float = Field(
        1.0, gt=0, description="multiplies the numbers of training steps; 0.1 is a quick trial of all stages"
    )

    @model_validator(mode="after")
    def _seeds_differ(self) -> "DemoRun":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} hold the same seed twice; keep one")
        return self


def demo(run: DemoRun) -> list[Measurement]:
    """Run all stages for every seed; write metrics.jsonl, pictures and report.html.

    Returns:
        All measurements, as in metrics.jsonl.

    Raises:
        UserError: as the stages raise it; or a launcher has started several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("demo starts its own processes; run it without torchrun or accelerate launch")
    inside(run.out)
    for seed in run.seeds:
        stages = Stages(run, seed)
        stages.train()
        stages.post_train()
        stages.evaluate()
        stages.draw()
    lines = "".join((run.out / f"seed-{seed}" / "metrics.jsonl").read_text() for seed in run.seeds)
    write_file(run.out / "metrics.jsonl", lines)
    page = report(ReportRun(path=run.out, title=f"robustok on {run.data.name}"))
    note(f"report: {page}")
    return [Measurement.from_line(json.loads(line)) for line in lines.splitlines()]


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
        name = RECIPES.get(model)
        merged = _scaled(read_yaml(recipe(self.run.recipes / name)), self.run.scale) if name else {}
        for key, value in settings.items():
            merged[key] = (merged.get(key) or {}) | value if isinstance(value, dict) else value
        return validate(model, merged | {"out": self.folder / out}, f"the settings of {out}")

    def train(self) -> None:
        """Train the classifiers, the tokenizers and a generator for each tokenizer."""
        classifiers = {}
        for i, name in enumerate(("classifier-metric", "classifier-guide")):
            config = self.configure(TrainClassifierRun, name, data=self.run.data, seed=2 * self.seed + i)
            classifiers[name] = train_classifier, config
        run_parallel(classifiers)
        tokenizers, generators = {}, {}
        for name, perturbation in TOKENIZERS.items():
            tokenizers[f"tokenizer-{name}"] = (
                train_tokenizer,
                self.configure(TokenizerTrainingRun, f"tokenizer-{name}", **self.losses, **perturbation),
            )
            latents = self.folder / f"latents-{name}"
            generators[f"generator-{name}"] = (
                train_generator,
                self.configure(GeneratorTrainingRun, f"generator-{name}", latents=latents, seed=self.seed),
            )
        run_parallel(tokenizers)
        for name in TOKENIZERS:
            tokenizer = self.folder / f"tokenizer-{name}"
            out = f"latents-{name}"
            encode(self.configure(EncodeRun, out, data=self.run.data, tokenizer=tokenizer, cache={"batch_size": 256}))
        run_parallel(generators)

    def sample(self, name: str, out: str, count: int, seed: int) -> Path:
        """Free samples of the generator of the tokenizer ``name``."""
        generator = self.folder / f"generator-{name}"
        return generate(
            self.configure(
                GenerateRun, f"samples/{out}", generator=generator, count=count, seed=seed, cache={"batch_size": 256}
            )
        )

    def post_train(self) -> None:
        """Post-train the perturbed tokenizer's decoder, and its control: as many steps on clean latents."""
        # These samples choose among the snapshots and are never reported.
        held_out = self.sample("perturbed", "held-out", 2 * self.run.samples, 1000 * self.seed + 999)
        jobs = {}
        for name, sigma in {"post": self.run.sigma, "control": 1.0}.items():
            post = self.configure(
                DecoderTrainingRun,
                name,
                **self.losses,
                tokenizer=self.folder / "tokenizer-perturbed",
                pairs=self.folder / f"pairs-{name}",
                held_out={"latents": held_out, "extractor": self.extractor},
            )
            mixtures = self.configure(
                MakePairsRun,
                f"pairs-{name}",
                latents=self.folder / "latents-perturbed",
                generator=self.folder / "generator-perturbed",
                sigma=sigma,
                count=post.steps * post.batch_size,
                cache={"batch_size": 256},
            )
            make_pairs(mixtures)
            jobs[name] = train_decoder, post
        run_parallel(jobs)

    def evaluate(self) -> None:
        """Measure everything anew, from what is in the run folder, into metrics.jsonl."""
        jobs, files = {}, []
        for name, decoders in DECODERS.items():
            config = self.configure(
                EvaluateRun,
                f"measure-{name}",
                tokenizer=self.folder / f"tokenizer-{name}",
                tags={"tokenizer": name},
                extractor=self.extractor,
                data=self.run.data,
                samples={
                    "decoders": {decoder: self.folder / path for decoder, path in decoders.items()},
                    "latents": [
                        self.sample(name, f"{name}-{i}", self.run.samples, 1000 * self.seed + i)
                        for i in range(self.run.sets)
                    ],
                },
                metrics=self.run.metrics,
                pfid={"grid": self.run.grid, "seeds": self.run.perturbation_seeds},
                seed=self.seed,
                batch_size=256,
            )
            files.append(config.out / "metrics.jsonl")
            files[-1].unlink(missing_ok=True)
            jobs[f"evaluate {name}"] = evaluate, config
        run_parallel(jobs)
        write_file(self.folder / "metrics.jsonl", "".join(file.read_text() for file in files))

    def draw(self) -> None:
        """Write the pictures of the report."""
        start = self.run.out / "pictures" / f"seed-{self.seed}"
        tokenizers = {name: self.folder / f"tokenizer-{name}" for name in TOKENIZERS}
        draw_reconstructions(Path(f"{start}-reconstructions.npz"), tokenizers, self.run.data)
        decoders = {decoder: self.folder / path for decoder, path in DECODERS["perturbed"].items()}
        samples = self.folder / "samples" / "perturbed-0"
        draw_samples(Path(f"{start}-samples.npz"), decoders, samples, self.run.data, self.extractor)


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
