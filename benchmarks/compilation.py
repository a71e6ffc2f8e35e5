"""Graphs, breaks and recompilations of compiled trainings, for every model, counted without a compiler or a GPU.

    python benchmarks/compilation.py
    python benchmarks/compilation.py kl rar

The trainings are those of the recipes with ``compile=true``, at toy sizes on the digits: all modules, losses and
switches are there, and blocks as many as show whether they share a graph. A backend counts the graphs and returns them
as they are. ``later`` are the graphs of all steps after the first: each would stop a GPU for a minute.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
from torch import nn

from robustok.config import load, plain
from robustok.data.dataset import open_images
from robustok.data.latent_cache import create_cache, write_shard
from robustok.data.manifest import Manifest
from robustok.data.sources import Digits
from robustok.losses import semantic
from robustok.losses.discriminators import dino
from robustok.runs import RunFolder
from robustok.snapshots import write_snapshot
from robustok.tokenizers import TOKENIZERS, encoder_digest
from robustok.training import decoder, generator, tokenizer

STEPS = 3
LENGTH, WIDTH, CODES = 16, 8, 32
COMPILE = torch.compile

COMMON = ("batch_size=4", f"steps={STEPS}", "warmup_steps=0", "log_every=1", "state_every=100", "snapshot_every=0")
COMMON = (*COMMON, "compile=true", "workers=0")
IMAGES = ("data={name: digits, limit: 64}", "reconstruction.perceptual=none", "adversarial.start=0")
DINO = tuple(
    f"discriminator.{word}"
    for word in ("model=vit_tiny_patch16_224", "image_size=32", "width=192", "heads=3", "depth=1", "read_after=[0]")
)
VIT = {"width": 32, "depth": 3, "heads": 2}
CONV = {"width": 8, "multipliers": [1, 2], "blocks": 1, "groups": 4}


def _small(prefix: str, sizes: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}={json.dumps(value)}" for name, value in sizes.items())


def _halves(sizes: dict[str, Any]) -> tuple[str, ...]:
    return tuple(word for half in ("encoder", "decoder") for word in _small(f"tokenizer.{half}", sizes))


CODEBOOK = (f"tokenizer.quantizer.size={CODES}", f"tokenizer.quantizer.dim={WIDTH}", "perturbation.strength=4")
ROBUSTOK = (*_halves(VIT), "tokenizer.image_size=16", "tokenizer.patch_size=4", *CODEBOOK)
PAPER = (*ROBUSTOK, *DINO, "tokenizer.encoder.pretrained=null", "tokenizer.decoder.pretrained=null")
PAPER = (*PAPER, "teacher.model=vit_tiny_patch16_224", "augmentation={crop: center, flip: true}", "picture_every=0")
FRESH = ("teacher.name=none", "adversarial.learning_rate=1e-3", "discriminator={name: patch, width: 8, depth: 1}")
DISCRETE = ("tokenizer.image_size=16", *_halves(CONV), *CODEBOOK)
GIGATOK = ("tokenizer.name=gigatok", "tokenizer.z_channels=8", f"tokenizer.latents={LENGTH}")
GIGATOK = (*GIGATOK, *_small("tokenizer.grid_to_row", VIT), *_small("tokenizer.row_to_grid", VIT))
DIFFUSERS = {"block_out_channels": [8, 8], "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1}
DIFFUSERS |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
DIT = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16}


def main_training(folder: Path, recipe: str | None, *words: str) -> tuple[Callable[..., Any], Any]:
    """Main training of a tokenizer."""
    words = (f"out={folder / 'run'}", *COMMON, *IMAGES, *words)
    return tokenizer.train_tokenizer, load(tokenizer.TokenizerTrainingRun, recipe, words)


def generator_training(folder: Path, recipe: str | None, *words: str) -> tuple[Callable[..., Any], Any]:
    """Training of a generator on random latents."""
    run = load(generator.GeneratorTrainingRun, recipe, (f"out={folder / 'run'}", "latents=x", *COMMON, *words))
    cache = random_latents(folder / "latents", run.generator.name in ("rar", "gpt"), "random", None)
    return generator.train_generator, run.model_copy(update={"latents": cache})


def post_training(folder: Path, recipe: str | None, settings: dict[str, Any], *words: str) -> tuple[Any, Any]:
    """Post-training of a tokenizer with random weights on random pairs."""
    family, config = TOKENIZERS[settings["name"]]
    model = family(config.model_validate(settings))
    space = encoder_digest(model)
    header = {"kind": "tokenizer", "config": plain(model.config), "latent_space": space}
    write_snapshot(folder / "tokenizer", header, model.state_dict(), {})
    data = open_images(Digits(limit=64), model.image_size, "train").fingerprint
    source = {"mode": "direct", "sigma": 0.5}
    pairs = random_latents(folder / "pairs", model.kind == "discrete", space, data, model.latent_shape, **source)
    words = (f"out={folder / 'run'}", f"tokenizer={folder / 'tokenizer'}", f"pairs={pairs}", *COMMON, *IMAGES, *words)
    return decoder.train_decoder, load(decoder.DecoderTrainingRun, recipe, words)


def random_latents(
    folder: Path, discrete: bool, space: str, data: str | None, shape: tuple[int, int] = (LENGTH, WIDTH), **source: Any
) -> Path:
    """A cache of 32 random latents of the tokenizer with the digest ``space``."""
    rng, numbers = np.random.default_rng(0), np.arange(32)
    kind = "discrete" if discrete else "continuous"
    create_cache(folder, Manifest(kind, shape, CODES if discrete else None, 10, 32, 32, space, data, source))
    tokens = rng.integers(0, CODES, (32, shape[0]))
    latents = tokens if discrete else rng.standard_normal((32, *shape)).astype(np.float32)
    fields = {"latents": latents, "labels": numbers % 10, "indices": numbers, "seeds": np.zeros_like(numbers)}
    write_shard(folder, 0, fields)
    return folder


def _config(words: tuple[str, ...]) -> dict[str, Any]:
    """The settings ``tokenizer.*`` of these words."""
    return plain(load(tokenizer.TokenizerTrainingRun, None, (*IMAGES, "out=x", *words)).tokenizer)


Case = tuple[Callable[..., tuple[Any, Any]], tuple[Any, ...]]
GENERATOR = _small("generator", VIT)
CASES: dict[str, Case] = {
    "tokenizer, ViT with drop path": (main_training, ("imagenet256/tokenizer.yaml", *PAPER)),
    "tokenizer, ViT, in 2 parts, checkpointing": (
        main_training,
        ("imagenet256/tokenizer.yaml", *PAPER, "gradient_accumulation=2", "gradient_checkpointing=true"),
    ),
    "tokenizer, maetok": (
        main_training,
        (
            None,
            *FRESH,
            "tokenizer={name: maetok, image_size: 16, patch_size: 4}",
            f"tokenizer.latents={LENGTH}",
            *_halves(VIT),
        ),
    ),
    "tokenizer, vq": (main_training, ("cifar10/vq.yaml", *FRESH, *DISCRETE)),
    "tokenizer, vq, checkpointing": (
        main_training,
        ("cifar10/vq.yaml", *FRESH, *DISCRETE, "gradient_checkpointing=true"),
    ),
    "tokenizer, kl": (
        main_training,
        (
            "cifar10/kl.yaml",
            *FRESH,
            "tokenizer.image_size=16",
            *_halves(CONV),
            "tokenizer.z_channels=8",
            "tokenizer.dim=4",
        ),
    ),
    "tokenizer, maskgit": (main_training, (None, *FRESH, "tokenizer.name=maskgit", *DISCRETE)),
    "tokenizer, gigatok": (main_training, (None, *FRESH, *GIGATOK, *DISCRETE)),
    "RAR": (generator_training, ("imagenet256/generator-b.yaml", *GENERATOR)),
    "RAR, checkpointing": (generator_training, ("imagenet256/generator-xl.yaml", *GENERATOR)),
    "GPT": (generator_training, ("cifar10/gpt.yaml", *GENERATOR)),
    "GPT, adaptive norm": (
        generator_training,
        ("cifar10/gpt.yaml", *GENERATOR, "generator.adaptive_norm=true"),
    ),
    "SiT": (generator_training, ("cifar10/sit.yaml", *GENERATOR)),
    "LightningDiT": (generator_training, ("cifar10/lightningdit.yaml", *GENERATOR)),
    "DiT": (generator_training, (None, "generator.name=dit", f"generator.settings={json.dumps(DIT)}")),
    "post-training, ViT": (post_training, ("imagenet256/post.yaml", _config(ROBUSTOK), *DINO)),
    "post-training, vq": (
        post_training,
        (None, _config(("tokenizer.name=llamagen", "tokenizer.z_channels=8", *DISCRETE)), *FRESH, "adversary=fresh"),
    ),
    "post-training, AutoencoderKL of diffusers": (
        post_training,
        (None, {"name": "diffusers_kl", "image_size": 16, "settings": DIFFUSERS}, *FRESH, "adversary=fresh"),
    ),
}


class Counter:
    """A backend of torch.compile that counts graphs and returns them uncompiled."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: Any, _inputs: Any) -> Callable[..., Any]:
        """Count a graph and return it."""
        self.graphs += 1
        return module.forward


@contextmanager
def counting(counter: Counter, graphs: list[int]) -> Iterator[None]:
    """Context: trainings compile with this backend, have random backbones, save nothing, and note the graphs."""
    steps = RunFolder.steps

    def noted(folder: RunFolder, *words: Any) -> Iterator[int]:
        for step in steps(folder, *words):
            yield step
            graphs.append(counter.graphs)

    def backbone(name: str, *_: Any, role: str = "", setting: str = "", **sizes: int) -> nn.Module:
        return timm.create_model(name, pretrained=False, num_classes=0, **sizes)

    with ExitStack() as stack:
        patch = lambda *words: stack.enter_context(mock.patch.object(*words))  # noqa: E731
        patch(torch, "compile", partial(COMPILE, backend=counter))
        patch(RunFolder, "steps", noted)
        for user in (semantic, dino):
            patch(user, "pretrained_backbone", backbone)
        for trainer in (tokenizer, generator):
            patch(trainer, "_write_snapshot", lambda *_: None)
        patch(decoder.Snapshots, "write", lambda *_: None)
        patch(RunFolder, "save_state", lambda *_: None)
        yield


def count(name: str, folder: Path) -> dict[str, int]:
    """Train for a few steps; returns the graphs of the first step, breaks in all, and graphs of all later steps."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    make, words = CASES[name]
    train, run = make(folder, *words)
    counter, graphs = Counter(), []
    with counting(counter, graphs):
        train(run)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return {"graphs": graphs[0], "breaks": breaks, "later": graphs[STEPS - 1] - graphs[0]}


def main(names: list[str]) -> None:
    """Print a table."""
    print("| | graphs | breaks | later |\n|---|---|---|---|")
    for name in CASES:
        if names and not any(word in name for word in names):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = count(name, Path(folder))
        print(f"| {name} | {found['graphs']} | {found['breaks']} | {found['later']} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
