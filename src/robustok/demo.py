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

from robustok.config import Config, load, read_yaml, recipe
from robustok.encode import EncodeRun, encode
from robustok.evaluate import EvaluateRun, evaluate
from robustok.generate import GenerateRun, MakePairsRun, generate, make_pairs
from robustok.images import Data
from robustok.pictures import PicturesRun, draw_pictures
from robustok.report import ReportRun, report
from robustok.side_by_side import side_by_side
from robustok.sources import Digits
from robustok.train_classifier import TrainClassifierRun, train
from robustok.training.generator_training import GeneratorTrainingRun, train_generator
from robustok.training.loop import console
from robustok.training.main_training import MainTrainingRun, main_train
from robustok.training.post_training import PostTrainingRun, post_train
from robustok.types import Measurement

TOKENIZERS = {"plain": ["perturbation.proportion=0"], "perturbed": []}  # they differ in this and in nothing else


class DemoRun(Config):
    """The whole story. The defaults take a few minutes on two cores."""

    out: Path = Field(Path("runs/demo"), description="run folder")
    seeds: list[int] = Field([0], min_length=1, description="seeds; the whole story is told once for each")
    recipes: Path = Field(
        Path("digits"), description="folder with classifier.yaml, tokenizer.yaml, generator.yaml and post.yaml"
    )
    data: Data = Field(Digits(), description="labelled images")
    preservation: float = Field(0.7, ge=0, le=1, description="sigma of the pairs")
    sets: int = Field(6, ge=2, description="independent sets of samples behind each gFID, for its standard error")
    samples: int = Field(1348, ge=20, description="samples in a set; the default is the number of training digits")
    perturbation_seeds: int = Field(2, ge=1, description="repetitions of pFID, for its standard error")
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
        tell(run, seed)
    files = [run.out / f"seed-{seed}" / "metrics.jsonl" for seed in run.seeds]
    lines = [line for file in files for line in file.read_text().splitlines()]
    (run.out / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    page = report(ReportRun(path=run.out, title=f"robustok on {run.data.name}"))
    console.print(f"report: {page}")
    return [Measurement.from_line(json.loads(line)) for line in lines]


def tell(run: DemoRun, seed: int) -> None:
    """The story for one seed, in run.out/seed-N."""
    here, images = run.out / f"seed-{seed}", _words("data", run.data.model_dump(mode="json", exclude_none=True))

    def job(model: type[Config], file: str | None, out: str, *words: str) -> Config:
        name = recipe(run.recipes / file) if file else None
        config = load(model, name, [*_scaled(name, run.scale), f"out={here / out}", *words])
        return config

    # Two classifiers that know nothing of each other: what guides the training must not be what judges it.
    side_by_side(
        {
            name: (train, job(TrainClassifierRun, "classifier.yaml", name, f"seed={2 * seed + i}", *images))
            for i, name in enumerate(("classifier-metric", "classifier-guide"))
        }
    )
    guide = f"reconstruction.perceptual_weights={here / 'classifier-guide'}"
    extractor = f"extractor.path={here / 'classifier-metric'}"
    side_by_side(
        {
            f"tokenizer-{name}": (
                main_train,
                job(MainTrainingRun, "tokenizer.yaml", f"tokenizer-{name}", f"seed={seed}", guide, *images, *change),
            )
            for name, change in TOKENIZERS.items()
        }
    )
    for name in TOKENIZERS:
        encode(
            job(
                EncodeRun, None, f"latents-{name}", f"tokenizer={here / f'tokenizer-{name}'}", "batch_size=256", *images
            )
        )
    side_by_side(
        {
            f"generator-{name}": (
                train_generator,
                job(
                    GeneratorTrainingRun,
                    "generator.yaml",
                    f"generator-{name}",
                    f"seed={seed}",
                    f"latents={here / f'latents-{name}'}",
                ),
            )
            for name in TOKENIZERS
        }
    )

    # Free samples: independent sets for the report, one more that chooses among snapshots and is never reported.
    for name in TOKENIZERS:
        for i in range(run.sets):
            generate(
                job(GenerateRun, None, f"samples/{name}-{i}", *_sampling(here, name, run.samples, 1000 * seed + i))
            )
    generate(
        job(GenerateRun, None, "samples/held-out", *_sampling(here, "perturbed", 2 * run.samples, 1000 * seed + 999))
    )

    # Post-training of the perturbed tokenizer's decoder, and its control: as many steps on clean latents.
    sigmas = {"post": run.preservation, "control": 1.0}
    for name, sigma in sigmas.items():
        make_pairs(
            job(
                MakePairsRun, None, f"pairs-{name}", f"generator={here / 'generator-perturbed'}",
                f"latents={here / 'latents-perturbed'}", f"preservation={sigma}", f"seed={seed}", "batch_size=256",
            )
        )  # fmt: skip
    held_out = [f"held_out.latents={here / 'samples' / 'held-out'}", f"held_out.{extractor}"]
    side_by_side(
        {
            name: (
                post_train,
                job(
                    PostTrainingRun, "post.yaml", name, f"seed={seed}", f"tokenizer={here / 'tokenizer-perturbed'}",
                    f"pairs={here / f'pairs-{name}'}", guide, *held_out, *images,
                ),
            )
            for name in sigmas
        }
    )  # fmt: skip
    _measure(run, seed, here, images, extractor)


def _measure(run: DemoRun, seed: int, here: Path, images: list[str], extractor: str) -> None:
    """All numbers and pictures of one seed, anew each time: they follow from what is in the run folder."""
    decoders = {"plain": {"original": "tokenizer-plain"}}
    decoders["perturbed"] = {"original": "tokenizer-perturbed", "control": "control", "post_trained": "post"}
    jobs = {}
    for name, paths in decoders.items():
        (here / f"measure-{name}" / "metrics.jsonl").unlink(missing_ok=True)
        words = [
            f"out={here / f'measure-{name}'}",
            f"tokenizer={here / f'tokenizer-{name}'}",
            f"tags.tokenizer={name}",
            extractor,
        ]
        words += [f"decoders.{decoder}={here / path}" for decoder, path in paths.items()]
        words += [f"latents={[str(here / 'samples' / f'{name}-{i}') for i in range(run.sets)]}", f"seed={seed}"]
        words += [
            f"perturbation_seeds={run.perturbation_seeds}",
            "metrics=[rfid,psnr,codebook,pfid,gfid,kid,gap]",
            "batch_size=256",
        ]
        jobs[f"evaluate {name}"] = (evaluate, load(EvaluateRun, None, [*words, *images]))
    side_by_side(jobs)
    lines = [(here / f"measure-{name}" / "metrics.jsonl").read_text() for name in decoders]
    (here / "metrics.jsonl").write_text("".join(lines))
    draw_pictures(
        load(
            PicturesRun, None,
            [f"out={run.out / 'pictures'}", f"prefix=seed-{seed}-", extractor, *images]
            + [f"samples={here / 'samples' / 'perturbed-0'}"]
            + [f"tokenizers.{name}={here / f'tokenizer-{name}'}" for name in TOKENIZERS]
            + [f"decoders.{decoder}={here / path}" for decoder, path in decoders["perturbed"].items()],
        )
    )  # fmt: skip


def _sampling(here: Path, name: str, count: int, seed: int) -> list[str]:
    return [f"generator={here / f'generator-{name}'}", f"count={count}", f"seed={seed}", "batch_size=256"]


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
