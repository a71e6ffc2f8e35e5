"""The `demo` verb: the paper's story from real images to a report, by default on handwritten digits and a CPU.

    plain and perturbed tokenizer -> tokens -> generator -> pairs -> post-trained decoder and its control -> numbers
    -> report

Every stage is the function that a verb calls, with a recipe of configs/, in a run folder of its own: the same command
again goes on where it was stopped. Two stages at a time run side by side, each in a process with half of the cores:
models this small do not gain from more threads.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from robustok.commands.encode import EncodeRun, encode
from robustok.commands.evaluate import evaluate
from robustok.commands.generate import GenerateRun, generate
from robustok.commands.make_pairs import MakePairsRun, make_pairs
from robustok.commands.parallel import side_by_side
from robustok.commands.pictures import PicturesRun, draw_pictures
from robustok.commands.report import ReportRun, report
from robustok.commands.train_classifier import TrainClassifierRun, train_classifier
from robustok.config import C, Config, load, read_yaml, recipe
from robustok.console import console
from robustok.data.sources import Data, Digits
from robustok.evaluation.settings import EvaluateRun, MetricNames
from robustok.metrics.pfid import PerturbedGrid, RelativeGrid
from robustok.training.decoder import DecoderTrainingRun, train_decoder
from robustok.training.generator import GeneratorTrainingRun, train_generator
from robustok.training.tokenizer import TokenizerTrainingRun, train_tokenizer
from robustok.types import Measurement

TOKENIZERS = {"plain": ["perturbation.proportion=0"], "perturbed": []}  # they differ in this and in nothing else
RECIPES: dict[type[Config], str] = {
    TrainClassifierRun: "classifier.yaml",
    TokenizerTrainingRun: "tokenizer.yaml",
    GeneratorTrainingRun: "generator.yaml",
    DecoderTrainingRun: "post.yaml",
}


class DemoRun(Config):
    """The whole stages. The defaults take a few minutes on two cores."""

    out: Path = Field(Path("runs/demo"), description="run folder")
    seeds: list[int] = Field([0], min_length=1, description="seeds; the whole story is told once for each")
    recipes: Path = Field(
        Path("digits"), description="folder with classifier.yaml, tokenizer.yaml, generator.yaml and post.yaml"
    )
    data: Data = Field(Digits(), description="labelled images")
    sigma: float = Field(0.7, ge=0, le=1, description="sigma of the pairs")
    sets: int = Field(6, ge=2, description="independent sets of samples behind each gFID, for its standard error")
    samples: int = Field(1348, ge=20, description="samples in a set; the default is the number of training digits")
    grid: PerturbedGrid = Field(RelativeGrid(), description="cells of pFID")
    perturbation_seeds: int = Field(2, ge=1, description="repetitions of pFID, for its standard error")
    metrics: MetricNames = Field(
        ["rfid", "psnr", "codebook", "pfid", "gfid", "kid", "gap"], description="what is measured"
    )
    scale: float = Field(
        1.0, gt=0, description="multiplies the numbers of training steps; small values try out the machinery"
    )


def demo(run: DemoRun) -> list[Measurement]:
    """Tell the story for every seed; write metrics.jsonl, pictures and report.html.

    Returns:
        All measurements, as in metrics.jsonl.

    Raises:
        UserError: as the verbs raise it.
    """
    for seed in run.seeds:
        run_seed(run, seed)
    files = [run.out / f"seed-{seed}" / "metrics.jsonl" for seed in run.seeds]
    lines = [line for file in files for line in file.read_text().splitlines()]
    (run.out / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    page = report(ReportRun(path=run.out, title=f"robustok on {run.data.name}"))
    console.print(f"report: {page}")
    return [Measurement.from_line(json.loads(line)) for line in lines]


def run_seed(run: DemoRun, seed: int) -> None:
    """The story for one seed, in run.out/seed-N."""
    stages = Stages(run, seed)
    # Two classifiers that know nothing of each other: what guides the training must not be what judges it.
    side_by_side(
        {
            name: (train_classifier, stages.job(TrainClassifierRun, name, *stages.images, f"seed={2 * seed + i}"))
            for i, name in enumerate(("classifier-metric", "classifier-guide"))
        }
    )
    side_by_side(
        {
            f"tokenizer-{name}": (
                train_tokenizer,
                stages.job(
                    TokenizerTrainingRun, f"tokenizer-{name}", *stages.images, stages.guide, f"seed={seed}", *change
                ),
            )
            for name, change in TOKENIZERS.items()
        }
    )
    for name in TOKENIZERS:
        tokenizer = f"tokenizer={stages.here / f'tokenizer-{name}'}"
        encode(stages.job(EncodeRun, f"latents-{name}", *stages.images, tokenizer, "cache.batch_size=256"))
    side_by_side(
        {
            f"generator-{name}": (
                train_generator,
                stages.job(GeneratorTrainingRun, f"generator-{name}", stages.latents(name), f"seed={seed}"),
            )
            for name in TOKENIZERS
        }
    )
    _post_train(stages)
    _measure(stages)


class Stages:
    """Paths and settings that the stages of one seed share.

    Args:
        run: the demo.
        seed: which seed.
    """

    def __init__(self, run: DemoRun, seed: int) -> None:
        self.run, self.seed, self.here = run, seed, run.out / f"seed-{seed}"
        self.images = _words("data", run.data.model_dump(mode="json", exclude_none=True))
        self.guide = f"reconstruction.perceptual_weights={self.here / 'classifier-guide'}"
        self.extractor = f"extractor.path={self.here / 'classifier-metric'}"

    def job(self, model: type[C], out: str, *words: str) -> C:
        """The configuration of a stage: its recipe, where there is one, scaled, and words."""
        file = recipe(self.run.recipes / RECIPES[model]) if model in RECIPES else None
        return load(model, file, [*_scaled(file, self.run.scale), f"out={self.here / out}", *words])

    def latents(self, name: str) -> str:
        """The word that names the latents of the real images."""
        return f"latents={self.here / f'latents-{name}'}"

    def sample(self, name: str, out: str, count: int, seed: int) -> Path:
        """Free samples of a generator."""
        generator = f"generator={self.here / f'generator-{name}'}"
        return generate(
            self.job(GenerateRun, f"samples/{out}", generator, f"count={count}", f"seed={seed}", "cache.batch_size=256")
        )


def _post_train(stages: Stages) -> None:
    """Post-train the perturbed tokenizer's decoder, and its control: as many steps on clean latents."""
    tokenizer, generator = stages.here / "tokenizer-perturbed", stages.here / "generator-perturbed"
    # These samples choose among the snapshots and are never reported.
    held_out = stages.sample("perturbed", "held-out", 2 * stages.run.samples, 1000 * stages.seed + 999)
    words = [
        f"seed={stages.seed}",
        f"tokenizer={tokenizer}",
        f"held_out.latents={held_out}",
        f"held_out.{stages.extractor}",
    ]
    jobs = {}
    for name, sigma in {"post": stages.run.sigma, "control": 1.0}.items():
        pairs = f"pairs={stages.here / f'pairs-{name}'}"
        post = stages.job(DecoderTrainingRun, name, *stages.images, stages.guide, *words, pairs)
        mixing = [f"generator={generator}", f"sigma={sigma}", f"count={post.steps * post.batch_size}"]
        mixing += ["cache.batch_size=256"]
        make_pairs(stages.job(MakePairsRun, f"pairs-{name}", stages.latents("perturbed"), *mixing))
        jobs[name] = train_decoder, post
    side_by_side(jobs)


def _measure(stages: Stages) -> None:
    """All numbers and pictures of one seed, anew each time: they follow from what is in the run folder."""
    run, here = stages.run, stages.here
    decoders = {"plain": {"original": "tokenizer-plain"}}
    decoders["perturbed"] = {"original": "tokenizer-perturbed", "control": "control", "post_trained": "post"}
    jobs = {}
    for name, paths in decoders.items():
        (here / f"measure-{name}" / "metrics.jsonl").unlink(missing_ok=True)
        sets = [stages.sample(name, f"{name}-{i}", run.samples, 1000 * stages.seed + i) for i in range(run.sets)]
        words = [f"tokenizer={here / f'tokenizer-{name}'}", f"tags.tokenizer={name}", stages.extractor, *stages.images]
        words += [f"samples.decoders.{decoder}={here / path}" for decoder, path in paths.items()]
        words += [f"samples.latents={json.dumps([str(path) for path in sets])}", f"metrics={json.dumps(run.metrics)}"]
        words += _words("pfid.grid", run.grid.model_dump(mode="json"))
        words += [f"seed={stages.seed}", f"pfid.seeds={run.perturbation_seeds}", "batch_size=256"]
        jobs[f"evaluate {name}"] = evaluate, stages.job(EvaluateRun, f"measure-{name}", *words)
    side_by_side(jobs)
    lines = [(here / f"measure-{name}" / "metrics.jsonl").read_text() for name in decoders]
    (here / "metrics.jsonl").write_text("".join(lines))
    words = [f"tokenizers.{name}={here / f'tokenizer-{name}'}" for name in TOKENIZERS]
    words += [f"decoders.{decoder}={here / path}" for decoder, path in decoders["perturbed"].items()]
    words += [
        f"prefix=seed-{stages.seed}-",
        f"samples={here / 'samples' / 'perturbed-0'}",
        stages.extractor,
        *stages.images,
    ]
    draw_pictures(load(PicturesRun, None, [f"out={run.out / 'pictures'}", *words]))


def _words(prefix: str, settings: dict[str, Any]) -> list[str]:
    """Settings as dotted words, the name of the variant first."""
    keys = sorted(settings, key=lambda key: key != "name")
    return [f"{prefix}.{key}={json.dumps(settings[key])}" for key in keys]


def _scaled(file: Path | None, scale: float) -> list[str]:
    """Words that scale the numbers of steps of a recipe."""
    if file is None or scale == 1:
        return []
    found = []

    def visit(prefix: str, tree: dict[str, Any]) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                visit(f"{prefix}{key}.", value)
            elif key in ("steps", "warmup_steps", "start", "anneal_start", "anneal_end") or key.endswith("_every"):
                found.append(f"{prefix}{key}={max(1, round(value * scale)) if value else 0}")

    visit("", read_yaml(file))
    return found
