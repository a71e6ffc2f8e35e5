"""Configurations of tiny runs on the digits, which train in seconds.

``python tests/tiny.py COMMAND CONFIG.yaml [COMMAND CONFIG.yaml ...]`` runs commands in a new process, or in several
under ``python -m torch.distributed.run``, for tests of interruption and of several processes.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from safetensors.torch import load_file

from robustok.commands.encode import EncodeRun, encode
from robustok.commands.evaluate import evaluate
from robustok.commands.generate import GenerateRun, generate
from robustok.commands.make_pairs import MakePairsRun, make_pairs
from robustok.config import Config, load, save
from robustok.devices import leave_processes
from robustok.evaluation.settings import EvaluateRun
from robustok.training.decoder import DecoderTrainingRun, train_decoder
from robustok.training.finite import FiniteCheck
from robustok.training.generator import GeneratorTrainingRun, train_generator
from robustok.training.tokenizer import TokenizerTrainingRun, train_tokenizer

COMMANDS = {
    "main-train": (train_tokenizer, TokenizerTrainingRun),
    "encode": (encode, EncodeRun),
    "train-generator": (train_generator, GeneratorTrainingRun),
    "generate": (generate, GenerateRun),
    "make-pairs": (make_pairs, MakePairsRun),
    "post-train": (train_decoder, DecoderTrainingRun),
    "evaluate": (evaluate, EvaluateRun),
}
DATA = ("data.name=digits", "data.limit=128")
TRAINING = ("batch_size=16", "steps=6", "precision=float32", "ema_decay=0.9", "log_every=1", "state_every=2")
VIT = tuple(
    f"tokenizer.{side}.{word}" for side in ("encoder", "decoder") for word in ("width=16", "depth=1", "heads=2")
)
TOKENIZER = (
    *VIT,
    "tokenizer.image_size=16",
    "tokenizer.patch_size=4",
    "tokenizer.quantizer.size=32",
    "tokenizer.quantizer.dim=8",
)
ADVERSARY = (
    "adversarial.weight=0.1",
    "adversarial.learning_rate=1e-3",
    "discriminator.width=8",
    "discriminator.depth=1",
)


def every_term(classifier: Path) -> tuple[str, ...]:
    """Settings that switch on every term of main training, annealed perturbation, revival and clipping."""
    return (
        *ADVERSARY,
        "reconstruction.perceptual=classifier",
        f"reconstruction.perceptual_weights={classifier}",
        "teacher.name=classifier",
        f"teacher.path={classifier}",
        "tokenizer.quantizer.revive_every=2",
        "clip_norm=1.0",
        "perturbation.anneal_end=6",
    )


def main_run(out: Path, *words: str) -> TokenizerTrainingRun:
    """Main training of a tokenizer with 16 tokens from 32 codes, with perturbation, without adversary."""
    perturbation = ("perturbation.proportion=0.5", "perturbation.strength=4")
    terms = ("reconstruction.perceptual=none", "adversarial.weight=0", "learning_rate=1e-2", "min_learning_rate=1e-4")
    return load(TokenizerTrainingRun, None, (f"out={out}", *DATA, *TRAINING, *TOKENIZER, *perturbation, *terms, *words))


def generator_run(out: Path, latents: Path, *words: str) -> GeneratorTrainingRun:
    """Training of a RAR generator with one block."""
    size = ("generator.width=16", "generator.depth=1", "generator.heads=2", "learning_rate=1e-2")
    return load(GeneratorTrainingRun, None, (f"out={out}", f"latents={latents}", *TRAINING, *size, *words))


def post_run(out: Path, tokenizer: Path, pairs: Path, *words: str) -> DecoderTrainingRun:
    """Post-training without adversary."""
    terms = ("reconstruction.perceptual=none", "adversarial.weight=0", "learning_rate=1e-3")
    return load(
        DecoderTrainingRun,
        None,
        (f"out={out}", f"tokenizer={tokenizer}", f"pairs={pairs}", *DATA, *TRAINING, *terms, *words),
    )


def tokens_run(out: Path, tokenizer: Path, *words: str) -> EncodeRun:
    """Encode the training images."""
    return load(EncodeRun, None, (f"out={out}", f"tokenizer={tokenizer}", *DATA, *words))


def samples_run(out: Path, generator: Path, *words: str) -> GenerateRun:
    """Sample 40 images."""
    return load(GenerateRun, None, (f"out={out}", f"generator={generator}", "count=40", *words))


def pairs_run(out: Path, generator: Path, latents: Path, *words: str) -> MakePairsRun:
    """Mix all latents with samples."""
    return load(
        MakePairsRun, None, (f"out={out}", f"generator={generator}", f"latents={latents}", "count=null", *words)
    )


def command(name: str, run: Config, file: Path) -> list[str]:
    """Arguments for this script; writes the configuration to ``file``."""
    save(run, file)
    return [name, str(file)]


@contextmanager
def in_each_step(call: Callable[[int], None]) -> Iterator[None]:
    """Context: trainings call this with the step, after its gradients and before it changes a weight."""
    add = FiniteCheck.add

    def called(check: FiniteCheck, terms: Any, step: int) -> Any:
        if "d_hinge" not in terms:  # not again for the discriminator
            call(step)
        return add(check, terms, step)

    with mock.patch.object(FiniteCheck, "add", called):
        yield


@contextmanager
def interrupted(at: int) -> Iterator[None]:
    """Context: a training is interrupted in the middle of this step, counted from 0."""

    def interrupt(step: int) -> None:
        if step == at:
            raise KeyboardInterrupt

    with in_each_step(interrupt):
        try:
            yield
        except KeyboardInterrupt:
            return
        raise AssertionError("the training did not come so far")


def log(folder: Path) -> list[dict[str, Any]]:
    """Lines of a run's log without the times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def saved(folder: Path) -> Iterator[tuple[str, Any]]:
    """What a run saved and interruptions must not change: weights, newest state, log."""
    for file in sorted(folder.glob("snapshot/*/*.safetensors")):
        yield from ((f"{file.parent.name}/{file.stem}/{name}", value) for name, value in load_file(file).items())
    newest = max((folder / "state").iterdir())
    yield from ((f"state/{name}", value) for name, value in load_file(newest / "state.safetensors").items())
    yield "state.json", (newest / "state.json").read_text()
    yield "log", log(folder)


if __name__ == "__main__":
    for name, file in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        function, model = COMMANDS[name]
        function(load(model, file))
    leave_processes()
