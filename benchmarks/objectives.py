"""Post-training objectives and losses on CIFAR-10, compared in feature spaces that guided nothing. Made for one GPU.

    python benchmarks/objectives.py --data cifar10-jpeg --classifiers cifar10-classifiers --out results --limit 390
    python benchmarks/objectives.py ... --tiny --device cpu --limit 170      # the same at toy sizes, to test the script

Two pairs are trained from scratch with the recipes of ``configs/cifar10``, wider and longer: VQGAN + GPT (tokens), and
a KL autoencoder + LightningDiT (continuous). Then decoders are post-trained, in two parts:

1. losses: the control (clean latents) of the first pair with about 15 combinations of losses;
2. objectives: with the adversarial loss that was best for the control, and with no adversary, on both pairs.

ResNet-20 guides (perceptual term, discriminator's backbone). ResNet-56, ResNet-44 and a small classifier that is
trained here evaluate; the ResNets are of one trainer, and only the small one shares neither architecture nor
trainer with the guide. Losses are chosen on two sets of samples and reported on four others.

Written as it arrives: ``OUT/objectives.jsonl``, a line for each decoder, and ``OUT/log.txt``; at the end
``OUT/pictures-PAIR.jpg``. After ``--limit`` seconds everything ends. Images are decoded once.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "ROBUSTOK_PROGRESS": "0"}  # a core for each process

import argparse
import copy
import json
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robustok.commands import encode as encoding
from robustok.commands import train_classifier as classifying
from robustok.commands.encode import EncodeRun
from robustok.commands.generate import GenerateRun, generate
from robustok.commands.make_pairs import MakePairsRun, make_pairs
from robustok.config import read_yaml, recipe, validate
from robustok.data.dataset import Augmentation, ImageDataset, open_images
from robustok.data.latent_cache import LatentCache
from robustok.data.pixels import to_pixels
from robustok.data.sources import Parquet
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.metrics.frechet import GaussianStatistics, covariance_factor, frechet_distance, mean_and_standard_error
from robustok.metrics.pixels import psnr
from robustok.tokenizers import load_tokenizer
from robustok.training import decoder as decoding
from robustok.training import generator as generating
from robustok.training import tokenizer as tokenizing
from robustok.training.decoder import DecoderTrainingRun
from robustok.training.generator import GeneratorTrainingRun
from robustok.training.tokenizer import TokenizerTrainingRun

SPACES = ("resnet56", "resnet44", "small", "resnet20")
INDEPENDENT = SPACES[:3]  # guided nothing
GUIDE = 0.1  # weight of the perceptual term in main training; 1 gave the same perceptual and 1.6 times the pixel loss
SETS, CHOOSING = (1, 2, 3, 4), (11, 12)  # seeds of the samples that are reported, and of those that choose losses


# What is trained


@dataclass(frozen=True)
class Sizes:
    """Sizes of everything; ``tiny`` has its own."""

    workers: int = 8
    width: int = 32  # of the tokenizers' first level
    model: int = 256  # width of the generators
    depth: int = 6
    batch: int = 256
    post_steps: int = 400
    post_batch: int = 128
    warmup: int = 200  # of the discriminator
    samples: int = 2_500  # in a set
    mixtures: int = 25_600  # pairs of each sigma, and free samples
    decoded: int = 500  # images at once
    limit: int | None = None  # of the images
    most: int = 20_000  # steps of a main training, which its seconds decide
    classifier_steps: int = 900
    searched: int | None = None  # of the losses


TINY = Sizes(2, 8, 32, 1, 16, 3, 8, 2, 20, 64, 64, limit=60, most=6, classifier_steps=5, searched=3)


@dataclass(frozen=True)
class Pair:
    """A tokenizer and its generator."""

    name: str
    tokenizer: str  # recipe
    generator: str
    sampling: dict[str, Any]
    sigmas: tuple[float, ...]  # the most promising first


PAIRS = (
    Pair(
        "vq", "vq.yaml", "gpt.yaml", {"name": "tokens", "guidance_scale": 1.75, "guidance_power": 0.0}, (0.8, 0.9, 0.7)
    ),
    Pair(
        "kl",
        "kl.yaml",
        "lightningdit.yaml",
        {"name": "diffusion", "sampler": "euler", "steps": 20, "guidance_scale": 2.0},
        (0.5, 0.7, 0.9),
    ),
)


@dataclass(frozen=True)
class Losses:
    """Losses of a post-training."""

    adversary: str = "none"  # patch, resnet: warmed up first; carried: that of main training
    weight: float = 0.0
    rate: float = 1e-4  # learning rate of the decoder
    guide: float = GUIDE  # weight of the perceptual term
    longer: int = 1  # warm-up of the discriminator, in those of the others

    @property
    def name(self) -> str:
        """Such as ``patch-0.1-lr1e-04-guide0.1``."""
        warm = f"-warm{self.longer}" * (self.longer > 1)
        return f"{self.adversary}-{self.weight:g}-lr{self.rate:.0e}-guide{self.guide:g}{warm}"


PLAIN = Losses()
SEARCH = (
    PLAIN,
    Losses("resnet", 0.1),
    Losses("patch", 0.1),
    Losses("resnet", 0.03),
    Losses("patch", 0.03),
    Losses("resnet", 0.3),
    Losses("patch", 0.3),
    Losses("resnet", 0.1, rate=2e-5),
    Losses("resnet", 0.1, guide=1.0),
    Losses("resnet", 0.1, longer=4),
    Losses("patch", 0.1, longer=4),
    Losses("carried", 0.1),
    Losses(rate=2e-5),
    Losses(guide=1.0),
    Losses(guide=0.0),
    Losses("patch", 0.1, rate=2e-5),
)


@dataclass(frozen=True)
class Post:
    """A post-training."""

    pair: str
    objective: tuple[str, ...]
    losses: Losses
    sigma: float | None = None
    seed: int = 0
    consistency: float = 1.0
    longer: int = 1

    @property
    def name(self) -> str:
        """Unique."""
        sigma = "" if self.sigma is None else f"-{self.sigma:g}"
        extra = f"-seed{self.seed}" * bool(self.seed) + f"-consistency{self.consistency:g}" * (self.consistency != 1)
        return f"{self.pair}/{'+'.join(self.objective)}{sigma}/{self.losses.name}{extra}" + "-long" * (self.longer > 1)


def objectives(chosen: Losses) -> Iterator[Post]:
    """Everything to compare, the most telling first, until time is up."""
    for pair in PAIRS:
        yield Post(pair.name, ("free",), chosen)
        yield Post(pair.name, ("free", "clean"), chosen)
        yield Post(pair.name, ("paired",), chosen, pair.sigmas[0])
        yield Post(pair.name, ("clean",), chosen)
        yield Post(pair.name, ("noise",), chosen)
    for pair in PAIRS:
        yield Post(pair.name, ("paired",), chosen, pair.sigmas[1])
        yield Post(pair.name, ("clean",), PLAIN)
        yield Post(pair.name, ("noise",), PLAIN)
        yield Post(pair.name, ("paired",), PLAIN, pair.sigmas[0])
        yield Post(pair.name, ("paired",), PLAIN, pair.sigmas[1])
    for seed in (1, 2):
        for pair in PAIRS:
            for names, sigma in (
                (("free",), None),
                (("clean",), None),
                (("paired",), pair.sigmas[0]),
                (("noise",), None),
            ):
                yield Post(pair.name, names, chosen, sigma, seed)
            yield Post(pair.name, ("free", "clean"), chosen, None, seed)
    for pair in PAIRS:
        yield Post(pair.name, ("free",), chosen, consistency=0.3)
        yield Post(pair.name, ("free",), chosen, consistency=3.0)
        yield Post(pair.name, ("paired",), chosen, pair.sigmas[2])
        yield Post(pair.name, ("free",), replace(chosen, weight=3 * chosen.weight))
        yield Post(pair.name, ("free",), chosen, longer=3)
        yield Post(pair.name, ("clean",), chosen, longer=3)


# Tasks, which run in other processes. Each returns what later tasks need.


class Study:
    """Settings and folders of the study, the same in all processes. The first one made decodes the images."""

    def __init__(self, data: Path, classifiers: Path, tiny: bool, device: str, limit: float, home: Path) -> None:
        self.classifiers, self.device, self.limit, self.home = classifiers, device, limit, home
        self.sizes = TINY if tiny else Sizes()
        self.data = Parquet(path=data, limit=self.sizes.limit)
        file = home / "images.pickle"
        if not file.exists():
            images = {split: open_images(self.data, 32, split) for split in ("train", "test")}
            file.write_bytes(pickle.dumps(images))
        self.images = pickle.loads(file.read_bytes())
        for module in (encoding, classifying, tokenizing, decoding):
            module.open_images = self.opened  # decoded once for all

    def opened(self, _data: Any, _size: int, split: str = "train", augment: Augmentation | None = None) -> ImageDataset:
        """In place of ``open_images``."""
        found = copy.copy(self.images[split])
        found.augment = augment or Augmentation()
        return found

    def weights(self, depth: int) -> Path:
        """The file of a public classifier."""
        return self.classifiers / f"resnet{depth}.safetensors"

    def guide(self, weight: float) -> dict[str, Any]:
        """Settings of the perceptual term."""
        if not weight:
            return {"perceptual": "none"}
        return {
            "perceptual": "cifar-resnet",
            "perceptual_weights": str(self.weights(20)),
            "perceptual_weight": weight,
        }

    def folder(self, *parts: str) -> Path:
        """A folder of the study."""
        return self.home.joinpath(*parts)

    # The pairs

    def classifier(self) -> float:
        """Train the small classifier that evaluates; returns its accuracy."""
        settings = read_yaml(recipe("cifar10/classifier.yaml"))
        settings["classifier"] |= {"steps": self.sizes.classifier_steps}
        run = validate(classifying.TrainClassifierRun, settings | {"out": self.folder("small"), "data": self.data})
        return classifying.train_classifier(run).accuracy

    def tokenizer(self, pair: Pair, seconds: float) -> dict[str, Any]:
        """Main training, as many steps as fit into the seconds; then the latents of all images."""
        settings = read_yaml(recipe(f"cifar10/{pair.tokenizer}"))
        for side in ("encoder", "decoder"):
            settings["tokenizer"][side] |= {"width": self.sizes.width}
        settings |= {"data": self.data, "reconstruction": self.guide(GUIDE), "learning_rate": 1e-3}
        settings |= {"batch_size": self.sizes.batch, "ema_decay": 0.995, "warmup_steps": 100, "precision": "auto"}
        found = self.fitted(
            tokenizing.train_tokenizer, TokenizerTrainingRun, settings, self.folder(pair.name, "tokenizer"), seconds
        )
        for split in ("train", "test"):
            common = {"tokenizer": self.folder(pair.name, "tokenizer"), "data": self.data, "split": split}
            large = {"cache": {"batch_size": self.sizes.decoded}}
            encoding.encode(validate(EncodeRun, common | large | {"out": self.folder(pair.name, f"latents-{split}")}))
        return found

    def generator(self, pair: Pair, seconds: float) -> dict[str, Any]:
        """Train the generator, as many steps as fit into the seconds."""
        settings = read_yaml(recipe(f"cifar10/{pair.generator}"))
        settings["generator"] |= {"width": self.sizes.model, "depth": self.sizes.depth}
        settings |= {"latents": self.folder(pair.name, "latents-train"), "sampling": pair.sampling, "ema_decay": 0.999}
        settings |= {"batch_size": self.sizes.batch, "learning_rate": 1e-3, "warmup_steps": 100, "precision": "auto"}
        return self.fitted(
            generating.train_generator, GeneratorTrainingRun, settings, self.folder(pair.name, "generator"), seconds
        )

    def fitted(
        self, train: Callable, model: type, settings: dict[str, Any], out: Path, seconds: float
    ) -> dict[str, Any]:
        """Train for so many seconds: a short run measures the steps a second."""
        rare = {"state_every": 10**6, "warmup_steps": 0, "log_every": 10, "steps": min(60, self.sizes.most)}
        probe = settings | rare | {"out": out.with_name(f"{out.name}-probe")}
        if "adversarial" in settings:
            probe["adversarial"] = settings["adversarial"] | {"start": 0}
        started = time.monotonic()
        train(validate(model, probe))
        lines = log_of(probe["out"])
        first, last = lines[len(lines) // 2 - 1], lines[-1]
        each = (last["seconds"] - first["seconds"]) / max(1, last["step"] - first["step"]) if len(lines) > 1 else 1.0
        left = seconds - (time.monotonic() - started)
        steps = max(2, min(self.sizes.most, int(left / max(each, 1e-4))))
        final = settings | {"out": out, "steps": steps, "state_every": 10**6, "log_every": max(1, steps // 40)}
        final["warmup_steps"] = min(settings["warmup_steps"], steps // 10)
        if "adversarial" in settings:
            final["adversarial"] = settings["adversarial"] | {"start": steps // 2}
        train(validate(model, final))
        numbers = {key: value for key, value in log_of(out)[-1].items() if key != "step"}
        return {"steps": steps, "ms": round(1000 * each, 2), "last": numbers}

    def sample(self, pair: Pair, seed: int, count: int, out: str) -> None:
        """Free samples."""
        common = {"generator": self.folder(pair.name, "generator"), "count": count, "seed": seed}
        generate(
            validate(
                GenerateRun,
                common | {"out": self.folder(pair.name, out), "cache": {"batch_size": 2 * self.sizes.decoded}},
            )
        )

    def mix(self, pair: Pair, sigma: float) -> None:
        """Pairs."""
        common = {"generator": self.folder(pair.name, "generator"), "latents": self.folder(pair.name, "latents-train")}
        sizes = {"count": self.sizes.mixtures, "cache": {"batch_size": 2 * self.sizes.decoded}}
        make_pairs(
            validate(MakePairsRun, common | sizes | {"sigma": sigma, "out": self.folder(pair.name, f"pairs-{sigma:g}")})
        )

    # Post-training

    def post(self, job: Post) -> dict[str, Any]:
        """Post-train a decoder; returns the last line of its log."""
        losses, sizes, steps = job.losses, self.sizes, self.sizes.post_steps * job.longer
        caches = {"paired": ("pairs", f"pairs-{job.sigma}"), "free": ("samples", "free")}
        used = dict(caches.get(name, ("latents", "latents-train")) for name in job.objective)
        settings = {
            "out": self.folder("post", job.name.replace("/", "_")),
            "tokenizer": self.folder(job.pair, "tokenizer"),
            "data": self.data,
            "objective": dict.fromkeys(job.objective, 1.0),
            "consistency": job.consistency,
            "seed": job.seed,
            "steps": steps,
            "batch_size": sizes.post_batch,
            "learning_rate": losses.rate,
            "min_learning_rate": losses.rate / 5,
            "warmup_steps": min(20, steps - 1),
            "betas": (0.5, 0.95),
            "ema_decay": 0.99,
            "log_every": max(1, steps // 8),
            "state_every": 10**6,
            "reconstruction": self.guide(losses.guide),
            "adversarial": {"weight": losses.weight, "adaptive": False, "learning_rate": 5e-4},
            "adversary": "carried" if losses.adversary == "carried" else "reinit_warmup",
            "adversary_warmup": sizes.warmup * losses.longer,
            **{setting: self.folder(job.pair, name) for setting, name in used.items()},
        }
        if losses.adversary == "patch":
            settings["discriminator"] = {"name": "patch", "width": 64, "depth": 2}
        if losses.adversary == "resnet":
            settings["discriminator"] = {"name": "cifar-resnet", "weights": str(self.weights(20))}
        decoding.train_decoder(validate(DecoderTrainingRun, settings))
        return {key: round(value, 5) for key, value in log_of(settings["out"])[-1].items()}

    # Evaluation

    @cache  # noqa: B019
    def extractor(self, space: str) -> Callable[[Tensor], Tensor]:
        """Pixels to features."""
        if space == "small":
            return load_extractor(ExtractorConfig(path=self.folder("small")), self.device)
        return load_extractor(ExtractorConfig(name="cifar-resnet", path=self.weights(int(space[6:]))), self.device)

    def statistics(self, batches: Iterator[Tensor]) -> dict[str, GaussianStatistics]:
        """Statistics of uint8 pixels in all spaces."""
        found = {space: GaussianStatistics(self.extractor(space).dim) for space in SPACES}
        for pixels in batches:
            for space, statistics in found.items():
                statistics.update(self.extractor(space)(pixels).cpu())
        return found

    def references(self) -> dict[str, dict[str, GaussianStatistics]]:
        """Statistics of all real images, by split and space."""
        return {split: self.statistics(self.real(split)) for split in ("train", "test")}

    def real(self, split: str) -> Iterator[Tensor]:
        """Pixels of real images."""
        data = self.images[split]
        for start in range(0, len(data), self.sizes.decoded):
            indices = np.arange(start, min(start + self.sizes.decoded, len(data)))
            yield to_pixels(data.read(indices).images).to(self.device)

    def decoded(self, tokenizer: Any, cache: LatentCache) -> Iterator[Tensor]:
        """Pixels of latents."""
        for start in range(0, len(cache), self.sizes.decoded):
            yield to_pixels(
                tokenizer.decode(cache.read(slice(start, start + self.sizes.decoded)).latents.to(self.device))
            )

    @torch.no_grad()
    def evaluate(
        self, pair: str, decoder: Path, references: dict[str, dict[str, GaussianStatistics]]
    ) -> dict[str, Any]:
        """All figures of a decoder: gFD of each set in each space, rFD, PSNR."""
        tokenizer = load_tokenizer(decoder).to(self.device).eval()
        factors = {key: {s: covariance_factor(r) for s, r in by.items()} for key, by in references.items()}
        distance = lambda found, key: {  # noqa: E731
            s: frechet_distance(found[s], references[key][s], factors[key][s]) for s in SPACES
        }
        sets = {}
        for seed in SETS + CHOOSING:
            found = self.statistics(self.decoded(tokenizer, LatentCache(self.folder(pair, f"samples-{seed}"))))
            sets[seed] = {"train": distance(found, "train"), "test": distance(found, "test")}
        quality = []

        def reconstructions() -> Iterator[Tensor]:
            made = self.decoded(tokenizer, LatentCache(self.folder(pair, "latents-test")))
            for pixels, original in zip(made, self.real("test"), strict=True):
                quality.append(psnr(pixels, original).cpu())
                yield pixels

        rfd = distance(self.statistics(reconstructions()), "test")
        return {"sets": sets, "rfd": rfd, "psnr": torch.cat(quality).mean().item()}

    @torch.no_grad()
    def draw(self, pair: str, decoders: dict[str, Path], out: Path) -> list[str]:
        """A picture: samples, a row for each decoder; test images; their reconstructions. Returns the decoders."""
        latents = [
            LatentCache(self.folder(pair, name)).read(slice(0, 20)).latents for name in ("samples-1", "latents-test")
        ]
        rows = []
        for path in decoders.values():
            tokenizer = load_tokenizer(path).to(self.device).eval()
            rows.append([to_pixels(tokenizer.decode(part.to(self.device))).cpu() for part in latents])
        real = to_pixels(self.images["test"].read(range(20)).images)
        sheet = torch.stack([*(row[0] for row in rows), real, *(row[1] for row in rows)])  # (rows, 20, 3, 32, 32)
        sheet = sheet.permute(0, 3, 1, 4, 2).reshape(len(sheet) * 32, -1, 3).numpy()
        picture = Image.fromarray(sheet)
        picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(out, quality=92)
        return list(decoders)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Lines of a training's log that have losses."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "total" in line or "cross_entropy" in line or "flow_matching" in line]


@cache
def study_of(*arguments: Any) -> Study:
    """The study of this process."""
    torch.set_num_threads(1)
    return Study(*arguments)


def work(connection: Connection, settings: tuple) -> None:
    """A worker: runs methods of the study until it is killed; sends each result, or the error, and its seconds."""
    while True:
        method, arguments = connection.recv()
        started = time.monotonic()
        torch.backends.cudnn.allow_tf32 = False
        try:
            result = getattr(study_of(*settings), method)(*arguments)
        except Exception:
            result = RuntimeError(traceback.format_exc())
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        connection.send((result, time.monotonic() - started))


# The order of tasks


class Schedule:
    """Starts tasks once what they need is done, evaluations first and else in order, until time is up.

    Args:
        settings: of :class:`Study`.
        workers: number of processes.
        out: folder of the log.
        deadline: by ``time.monotonic``.
    """

    def __init__(self, settings: tuple, workers: int, out: Path, started: float, deadline: float) -> None:
        self.out, self.started, self.deadline = out, started, deadline
        self.done: dict[str, Any] = {}
        self.waiting: dict[str, tuple[str, tuple, tuple[str, ...]]] = {}
        self.running: dict[str, int] = {}  # number of the worker
        self.settings = settings
        self.workers = [self._worker() for _ in range(workers)]

    def add(self, name: str, method: str, *arguments: Any, needs: tuple[str, ...] = ()) -> None:
        """Add a task; an argument that is a function of the results so far is called when it starts."""
        if name not in self.done | self.waiting | self.running:
            self.waiting[name] = method, arguments, needs

    def run(self, finished: Callable[[str, Any], None]) -> None:
        """Run all tasks, and those that ``finished`` adds."""
        while (self.waiting or self.running) and time.monotonic() < self.deadline:
            self._start()
            for name in [name for name, i in self.running.items() if self.workers[i][1].poll()]:
                result, seconds = self._received(name)
                self.done[name] = result
                figures = isinstance(result, dict) and ("sets" in result or "train" in result)
                self.say(f"{name}: {seconds:.1f} s {'' if figures else str(result)[-2000:]}")
                if not isinstance(result, Exception):
                    finished(name, result)
            time.sleep(0.02)
        self.say(f"left out: {', '.join([*self.running, *self.waiting]) or 'nothing'}")
        for process, _ in self.workers:
            process.kill()

    def _worker(self) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context("spawn")
        own, other = context.Pipe()
        process = context.Process(target=work, args=(other, self.settings), daemon=True)
        process.start()
        other.close()
        return process, own

    def _received(self, name: str) -> tuple[Any, float]:
        """The result of a task; a worker that died or lost its device is replaced."""
        number = self.running.pop(name)
        process, connection = self.workers[number]
        try:
            result, seconds = connection.recv()
        except EOFError:
            result, seconds = RuntimeError("CUDA error, perhaps: the worker died"), 0.0
        if isinstance(result, Exception) and "CUDA error" in str(result):
            process.kill()
            self.workers[number] = self._worker()
        return result, seconds

    def _start(self) -> None:
        for name in sorted(self.waiting, key=lambda name: not name.startswith("evaluate/")):
            method, arguments, needs = self.waiting[name]
            if failed := [n for n in needs if isinstance(self.done.get(n), Exception)]:
                self.done[name] = RuntimeError(f"needs {failed[0]}")
                del self.waiting[name]
                continue
            idle = {*range(len(self.workers))} - {*self.running.values()}
            if idle and all(n in self.done for n in needs):
                self.running[name] = min(idle)
                self.workers[min(idle)][1].send((method, tuple(a(self.done) if callable(a) else a for a in arguments)))
                del self.waiting[name]

    def say(self, text: str) -> None:
        """To the log and the terminal."""
        line = f"{time.monotonic() - self.started:6.1f} {text}"
        print(line[:300], flush=True)
        with (self.out / "log.txt").open("a") as file:
            file.write(line + "\n")


# The figures


def change(
    before: dict[str, Any], after: dict[str, Any], space: str, key: str, seeds: tuple[int, ...]
) -> dict[str, float]:
    """Change of gFD, after minus before, on the same latents: mean and standard error over the sets."""
    found = mean_and_standard_error([after["sets"][s][key][space] - before["sets"][s][key][space] for s in seeds])
    return {"mean": round(found.value, 4), "error": round(found.standard_error, 4)}


def line_of(name: str, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The line of a decoder."""
    mean = lambda key: {s: round(np.mean([after["sets"][i][key][s] for i in SETS]).item(), 4) for s in SPACES}  # noqa: E731
    return {
        "decoder": name,
        "gfd_change_train": {s: change(before, after, s, "train", SETS) for s in SPACES},
        "gfd_change_test": {s: change(before, after, s, "test", SETS) for s in SPACES},
        "gfd_train": mean("train"),
        "gfd_test": mean("test"),
        "rfd": {s: round(value, 4) for s, value in after["rfd"].items()},
        "rfd_change": {s: round(value - before["rfd"][s], 4) for s, value in after["rfd"].items()},
        "psnr": round(after["psnr"], 3),
    }


def score(before: dict[str, Any], after: dict[str, Any]) -> float:
    """What chooses losses: relative change of gFD on sets that are not reported, mean over the independent spaces."""
    old, new = ([np.mean([f["sets"][i]["train"][s] for i in CHOOSING]) for s in INDEPENDENT] for f in (before, after))
    return float(np.mean([b / a - 1 for a, b in zip(old, new, strict=True)]))


def report(lines: list[dict[str, Any]]) -> str:
    """A table: changes of gFD in the independent spaces, rFD, PSNR."""
    rows = [f"{'decoder':<62}" + "".join(f"{s:>19}" for s in SPACES) + f"{'rFD56':>9}{'PSNR':>8}"]
    for line in lines:
        cells = "".join(f"{c['mean']:>+11.3f} ±{c['error']:.3f}" for c in line["gfd_change_train"].values())
        rows.append(f"{line['decoder']:<62}{cells}{line['rfd_change']['resnet56']:>+9.3f}{line['psnr']:>8.2f}")
    return "\n".join(rows)


class Plan:
    """The tasks of the study: adds them, writes the figures, chooses the losses."""

    def __init__(self, schedule: Schedule, study: Study, out: Path) -> None:
        self.schedule, self.study, self.out = schedule, study, out
        self.lines: list[dict[str, Any]] = []
        self.evaluated: dict[str, dict[str, Any]] = {}  # by decoder
        self.chosen: Losses | None = None
        self.search = [Post("vq", ("clean",), losses) for losses in SEARCH[: study.sizes.searched]]
        for pair in PAIRS:
            schedule.add(f"{pair.name}/tokenizer", "tokenizer", pair, 0.22 * study.limit)
        schedule.add("small", "classifier")
        schedule.add("references", "references", needs=("small",))
        for pair in PAIRS:
            needs = (f"{pair.name}/tokenizer",)
            schedule.add(f"{pair.name}/generator", "generator", pair, 0.1 * study.limit, needs=needs)
        for pair in PAIRS:
            self.add_samples(pair)
            self.add_evaluation(pair.name, f"{pair.name}/before", study.folder(pair.name, "tokenizer"))
        for i, job in enumerate(self.search):  # most of them later: the generators would wait for the GPU
            self.add_post(job, *(("vq/generator", "kl/generator") if i > 2 else ()))

    def add_samples(self, pair: Pair) -> None:
        """Free samples and pairs."""
        sizes, name, needs = self.study.sizes, pair.name, (f"{pair.name}/generator",)
        for seed in SETS + CHOOSING:
            out = f"samples-{seed}"
            self.schedule.add(f"{name}/{out}", "sample", pair, seed, sizes.samples, out, needs=needs)
        self.schedule.add(f"{name}/free", "sample", pair, 987654321, sizes.mixtures, "free", needs=needs)
        for sigma in pair.sigmas:
            self.schedule.add(f"{name}/pairs-{sigma}", "mix", pair, sigma, needs=needs)

    def add_post(self, job: Post, *needs: str) -> None:
        """A post-training and its figures."""
        caches = {"paired": f"{job.pair}/pairs-{job.sigma}", "free": f"{job.pair}/free"}
        needs = (f"{job.pair}/tokenizer", *(caches[name] for name in job.objective if name in caches), *needs)
        self.schedule.add(f"post/{job.name}", "post", job, needs=needs)
        self.add_evaluation(job.pair, job.name, self.folder(job.name), f"post/{job.name}")

    def add_evaluation(self, pair: str, decoder: str, path: Path, *needs: str) -> None:
        """The figures of a decoder."""
        needs = ("references", *(f"{pair}/samples-{seed}" for seed in SETS + CHOOSING), *needs)
        self.schedule.add(f"evaluate/{decoder}", "evaluate", pair, path, lambda done: done["references"], needs=needs)

    def folder(self, decoder: str) -> Path:
        """Of a decoder."""
        pair, _, rest = decoder.partition("/")
        return (
            self.study.folder(pair, "tokenizer")
            if rest == "before"
            else self.study.folder("post", decoder.replace("/", "_"))
        )

    def finished(self, name: str, result: Any) -> None:
        """Write the lines of decoders that are evaluated."""
        kind, _, decoder = name.partition("/")
        if kind != "evaluate":
            return
        self.evaluated[decoder] = result
        before = self.evaluated.get(f"{decoder.partition('/')[0]}/before")
        written = {line["decoder"] for line in self.lines}
        for other in [
            d for d in self.evaluated if d.partition("/")[0] == decoder.partition("/")[0] and d not in written
        ]:
            if before is not None:
                log = {"log": self.schedule.done.get(f"post/{other}")}
                self.lines.append(line_of(other, before, self.evaluated[other]) | log)
                with (self.out / "objectives.jsonl").open("a") as file:
                    file.write(json.dumps(self.lines[-1]) + "\n")
        self.choose()

    def choose(self) -> None:
        """Once the losses are evaluated, or most of the time is over: the best adversary and the objectives with it."""
        found = {job.losses: self.evaluated[job.name] for job in self.search if job.name in self.evaluated}
        late = time.monotonic() - self.schedule.started > 0.65 * self.study.limit
        adversaries = [losses for losses in found if losses.adversary in ("patch", "resnet")]
        if (
            self.chosen
            or "vq/before" not in self.evaluated
            or not adversaries
            or (len(found) < len(self.search) and not late)
        ):
            return
        scores = {losses: score(self.evaluated["vq/before"], result) for losses, result in found.items()}
        self.chosen = min(adversaries, key=scores.get)
        self.schedule.say("scores: " + ", ".join(f"{losses.name} {value:+.4f}" for losses, value in scores.items()))
        self.schedule.say(f"chosen: {self.chosen.name}")
        last = {
            name: self.schedule.waiting.pop(name) for name in list(self.schedule.waiting) if name.startswith("post/")
        }
        for job in objectives(self.chosen):
            self.add_post(job)
        self.schedule.waiting |= last

    def draw(self) -> None:
        """Pictures of the chosen losses' objectives."""
        for pair in PAIRS:
            names = [line["decoder"] for line in self.lines if line["decoder"].startswith(f"{pair.name}/")]
            names = [n for n in names if n.endswith("/before") or (self.chosen and n.endswith(self.chosen.name))][:8]
            if names:
                out = self.out / f"pictures-{pair.name}.jpg"
                rows = self.study.draw(pair.name, {n: self.folder(n) for n in names}, out)
                self.schedule.say(
                    f"rows of {out.name}, samples, then test images, then reconstructions: {', '.join(rows)}"
                )


def main() -> None:
    """Read the arguments, run the study, print the table."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10 as parquet")
    parser.add_argument("--classifiers", type=Path, required=True, help="folder with resnet20, 44 and 56.safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--limit", type=float, default=390, help="seconds after which everything ends")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        a, workers = arguments, (TINY if arguments.tiny else Sizes()).workers
        settings = (a.data.resolve(), a.classifiers.resolve(), a.tiny, a.device, a.limit, Path(home))
        schedule = Schedule(settings, workers, arguments.out, started, started + arguments.limit - 15)
        study = Study(*settings)
        schedule.say("images decoded")
        plan = Plan(schedule, study, arguments.out)
        schedule.run(plan.finished)
        schedule.say("table\n" + report(plan.lines))
        print(report(plan.lines), flush=True)
        plan.draw()


if __name__ == "__main__":
    main()
