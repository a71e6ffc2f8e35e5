"""Between two lines of the log no step of any training waits for its device.

The trainings run on PyTorch's meta device, whose tensors have shapes and no content. Whatever would make a host wait
for a GPU is an error there, because there is nothing to read: ``item``, ``tolist``, ``bool``, ``nonzero``, boolean
indices, ``bincount``, copies to the CPU. Copies to the device wait if their memory is not pinned: they are counted.

Allowed are numbers that are drawn on the CPU, which are no tensors of the device, and the copy of the losses to the
host, which :class:`robustok.devices.Reading` starts in one step and looks at in the next.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import tiny
from robustok.config import load
from robustok.data.dataset import open_images
from robustok.data.latent_cache import Manifest, create_cache, write_shard
from robustok.data.sources import Digits
from robustok.metrics.features.classifier import ClassifierConfig, SmallClassifier, save_classifier
from robustok.runs import RunFolder
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.training import decoder, finite
from robustok.training.decoder import train_decoder
from robustok.training.generator import GeneratorTrainingRun, train_generator
from robustok.training.tokenizer import TokenizerTrainingRun, train_tokenizer
from waiting_copies import Copies

META, STEPS = torch.device("meta"), 3


class FinishedError(Exception):
    """The steps are done; the last one's line of the log is not written."""


class Reading:
    """In place of the real one: nothing can be read from the meta device. Records when it is looked at."""

    log: ClassVar[list[str]] = []

    def __init__(self, values):
        assert values.is_meta
        self.count = len(values)
        self.log.append("copied")

    def numbers(self):
        self.log.append("read")
        return [0.0] * self.count


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained classifier, a tokenizer, a cache of pairs and one of continuous latents."""
    home, rng, zeros = tmp_path_factory.mktemp("home"), np.random.default_rng(0), np.zeros(128, dtype=np.int64)
    save_classifier(SmallClassifier(ClassifierConfig(width=8, features=16), classes=10), home / "classifier")
    train_tokenizer(tiny.main_run(home / "tokenizer", "steps=1", *tiny.ADVERSARY))
    space = encoder_digest(load_tokenizer(home / "tokenizer"))
    data, numbers = open_images(Digits(limit=128), 16, "train").fingerprint, np.arange(128)
    source = {"sigma": 0.5, "mode": "direct"}
    create_cache(home / "pairs", Manifest("discrete", (16, 8), 32, 10, 128, 128, space, data, source))
    create_cache(home / "continuous", Manifest("continuous", (4, 3), None, 10, 128, 128, "t", "d"))
    for name, latents in (
        ("pairs", rng.integers(0, 32, (128, 16))),
        ("continuous", rng.standard_normal((128, 4, 3)).astype(np.float32)),
    ):
        records = {"latents": latents, "labels": numbers % 10, "indices": numbers, "seeds": zeros}
        write_shard(home / name, 0, records)
    return home


SIDES = {"width": 8, "multipliers": [1, 2], "blocks": 1, "groups": 4}
KL = {"name": "kl", "image_size": 16, "encoder": SIDES, "decoder": SIDES, "z_channels": 8, "dim": 4}
QUIET = ("steps=100", "log_every=100", "state_every=100")


def trainings(home, out):
    """Name to (training, settings), each with every term that there is, and clipping."""
    classifier = home / "classifier"
    teacher = ("teacher.name=classifier", f"teacher.path={classifier}")
    perceptual = ("reconstruction.perceptual=classifier", f"reconstruction.perceptual_weights={classifier}")
    terms, adversary = tiny.every_term(classifier), ("adversarial.weight=0.1", "clip_norm=1.0", *perceptual)
    kl = (*tiny.DATA, *tiny.TRAINING, f"tokenizer={json.dumps(KL)}", *tiny.ADVERSARY, *perceptual, "latent_noise=0.5")
    main = lambda *words: tiny.main_run(out, *terms, *QUIET, *words)  # noqa: E731
    generator = lambda cache, name: tiny.generator_run(out, home / cache, *QUIET, f"generator.name={name}")  # noqa: E731
    blocks = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 1}
    dit = (f"latents={home / 'continuous'}", f"generator={json.dumps({'name': 'dit', 'settings': blocks})}")
    post = lambda *words: tiny.post_run(out, home / "tokenizer", home / "pairs", *adversary, *QUIET, *words)  # noqa: E731
    return {
        "tokenizer": (train_tokenizer, main("tracker=tensorboard")),
        "tokenizer, neighbours of features": (train_tokenizer, main("perturbation.neighbour_of=feature")),
        "tokenizer, in parts": (train_tokenizer, main("gradient_accumulation=2", "gradient_checkpointing=true")),
        "tokenizer, codes on a grid": (
            train_tokenizer,
            main("tokenizer.quantizer={name: fsq, levels: [8, 4]}", "perturbation.strength=5"),
        ),
        "tokenizer, continuous": (train_tokenizer, load(TokenizerTrainingRun, None, (f"out={out}", *kl, *QUIET))),
        "rar": (train_generator, generator("pairs", "rar")),
        "gpt": (train_generator, generator("pairs", "gpt")),
        "sit": (train_generator, generator("continuous", "sit")),
        "lightningdit": (train_generator, generator("continuous", "lightningdit")),
        "dit": (train_generator, load(GeneratorTrainingRun, None, (*dit, *tiny.TRAINING, *QUIET, f"out={out}"))),
        "post-training": (train_decoder, post()),
        "post-training as in the authors' code": (train_decoder, post("trainable=authors", *teacher)),
    }


@pytest.fixture
def on_meta(monkeypatch, folder):
    """Trainings run on the meta device and end after a few steps."""
    space = encoder_digest(load_tokenizer(folder / "tokenizer"))
    copies, steps = Copies(), []

    def some_steps(self, *_):
        with copies:
            for step in range(STEPS):
                steps.append(step)
                yield step
        raise FinishedError

    Reading.log = []
    monkeypatch.setattr(Accelerator, "device", META)
    monkeypatch.setattr(import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *_, **__: None)
    monkeypatch.setattr(RunFolder, "steps", some_steps)
    monkeypatch.setattr(finite, "Reading", Reading)
    monkeypatch.setattr(decoder, "encoder_digest", lambda _: space)
    monkeypatch.setattr(decoder, "_digest", lambda *_: "")
    monkeypatch.setattr(decoder.Snapshots, "write", lambda *_: None)
    return copies, steps


@pytest.mark.parametrize("name", trainings(Path(), Path()))
def test_no_step_waits(tmp_path, folder, on_meta, name):
    (train, run), (copies, steps) = trainings(folder, tmp_path / "run")[name], on_meta
    with pytest.raises(FinishedError):
        train(run)
    assert steps == list(range(STEPS))
    assert not copies.waiting
    adversary = bool(getattr(run, "adversarial", None))
    assert Reading.log.count("copied") == STEPS * (1 + adversary)
    assert Reading.log.count("read") == (STEPS - 1) * (1 + adversary)  # those of the last step are not looked at yet
