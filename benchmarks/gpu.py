"""One GPU: speed and memory of training, sampling, encoding, Inception, LPIPS, evaluation, loader; waits; tests; demo.

    python benchmarks/gpu.py --out gpu.json
    python benchmarks/gpu.py --only sampler,training/rar-b --limit 200

Weights are random, in the sizes of the recipes for ImageNet 256x256. Images are random unless ``--data`` gives some.
Nothing is downloaded, and only ``--out`` is written. If a case fails, its traceback is printed and the next one runs.
Cases that have not begun after ``--limit`` seconds are left out and listed. ``--tiny --device cpu`` runs the same code
at toy sizes on a CPU, to test the script; its figures mean nothing.
"""

import argparse
import copy
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchvision.models import inception_v3
from torchvision.models.vgg import cfgs, make_layers

import robustok
from robustok.config import load, plain
from robustok.data import dataset
from robustok.data.dataset import Augmentation, open_images
from robustok.data.latent_cache import Manifest, create_cache, write_shard
from robustok.data.loader import training_batches
from robustok.data.pixels import to_pixels
from robustok.data.sources import data_at
from robustok.devices import layout
from robustok.evaluation.collector import FeatureCollector
from robustok.generators.rar import RAR, RAR_SIZES
from robustok.generators.sampling import Sampling, draw_tokens
from robustok.losses import perceptual, semantic
from robustok.losses.discriminators import dino
from robustok.metrics import lpips as lpips_module
from robustok.metrics.features import inception
from robustok.metrics.frechet import GaussianStatistics, covariance_factor, frechet_distance
from robustok.metrics.kernel import kernel_distance
from robustok.metrics.manifold import precision_recall
from robustok.precision import Precision, at_precision, cast_weights
from robustok.randomness import image_rngs, image_uniforms
from robustok.runs import RunFolder
from robustok.snapshots import write_snapshot
from robustok.tokenizers import encoder_digest
from robustok.tokenizers import robustok as robustok_tokenizer
from robustok.tokenizers.diffusers import DiffusersConfig, DiffusersKL
from robustok.tokenizers.llamagen import LlamaGen, LlamaGenConfig
from robustok.tokenizers.robustok import RobusTok
from robustok.training import decoder, generator, tokenizer
from robustok.training.finite import FiniteCheck

SAMPLING = Sampling(guidance_scale=6.0, guidance_power=1.15, temperature=1.02)  # RAR-B's
POSITION_ROWS, TIMESTEP_ROWS = 1280, 356  # of the published checkpoints
CLASSES = 1000
STABLE_DIFFUSION = {  # its AutoencoderKL
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
TOKENIZER = "imagenet256/tokenizer.yaml"
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sizes:
    """Sizes of models, batches and data.

    Attributes:
        side: height and width of the images in pixels.
        codes: size of the codebook.
        tokens: number of tokens of an image.
        width: width of a code.
        tokenizer: settings of main training that replace those of the recipe.
        adversary: settings of the discriminator that replace those of the recipes.
        generator: settings of the training of a RAR that replace those of the recipe, by size.
        batches: images in a step of each training.
        fallbacks: batches to try if that one does not fit into memory.
        rar: the generators, by size.
        samples: batch sizes of the sampler.
        encoded: batch size of the tokenizer and of Inception.
        photographs: number of synthetic JPEG files.
        steps: training steps that are timed, and those before them that are not.
        repeats: how often everything else is timed.
        kl: settings of an AutoencoderKL, and the height and width of its images.
        matrix: height and width of the matrices whose product is timed.
        copied: bytes of the copy that is timed.
    """

    side: int = 256
    codes: int = 4096
    tokens: int = 256
    width: int = 64
    tokenizer: tuple[str, ...] = ()
    adversary: tuple[str, ...] = ()
    generator: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"b": (), "l": ()})
    batches: dict[str, int] = field(
        default_factory=lambda: {"tokenizer": 128, "rar-b": 256, "rar-l": 128, "post": 128, "authors": 128, "kl": 8}
    )
    fallbacks: tuple[int, ...] = (128, 96, 64, 48, 32, 4, 2, 1)
    rar: dict[str, Any] = field(default_factory=lambda: dict(RAR_SIZES))
    samples: tuple[int, ...] = (64, 256, 512)
    encoded: int = 256
    photographs: int = 512
    steps: tuple[int, int] = (8, 3)
    repeats: int = 5
    matrix: int = 8192
    copied: int = 4 * 10**9
    kl: tuple[dict[str, Any], int] = (STABLE_DIFFUSION, 512)


def tiny_sizes() -> Sizes:
    sides = ("encoder", "decoder")
    small = {"width": 32, "depth": 1, "heads": 2}
    generator = tuple(f"generator.{name}={value}" for name, value in small.items())
    dino_words = ("model=vit_tiny_patch16_224", "image_size=32", "width=192", "heads=3", "depth=1", "read_after=[0]")
    return Sizes(
        side=32,
        codes=64,
        tokens=16,
        width=8,
        tokenizer=(
            "tokenizer.image_size=32",
            "tokenizer.patch_size=8",
            "tokenizer.quantizer.size=64",
            "tokenizer.quantizer.dim=8",
            *(f"tokenizer.{side}.{name}={value}" for side in sides for name, value in small.items()),
            "tokenizer.teacher_width=192",
            "perturbation.strength=4",
            "teacher.model=vit_tiny_patch16_224",
        ),
        adversary=tuple(f"discriminator.{word}" for word in dino_words),
        generator={"b": generator, "l": generator},
        batches=dict.fromkeys(("tokenizer", "rar-b", "rar-l", "post", "authors", "kl"), 4),
        fallbacks=(2,),
        rar={size: RAR_SIZES["b"].model_copy(update=small) for size in ("b", "l")},
        samples=(2, 3),
        encoded=2,
        photographs=8,
        steps=(1, 1),
        repeats=1,
        matrix=64,
        copied=10**6,
        kl=(STABLE_DIFFUSION | {"block_out_channels": [32] * 4}, 32),
    )


class Bench:
    """What all parts use: sizes, device, a temporary folder, and results of earlier cases."""

    def __init__(self, device: torch.device, tiny: bool, folder: Path, data: Path | None) -> None:
        self.device, self.tiny, self.folder, self.data = device, tiny, folder, data
        self.sizes = tiny_sizes() if tiny else Sizes()
        self.cuda = device.type == "cuda"
        self.ceiling: float | None = None  # FLOP/s of a bf16 matrix product
        self.flops: dict[str, float] = {}  # of a training step for each image
        self.made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result of the first call of ``make`` for this key."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def wait(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], Any], repeats: int | None = None, warm: int = 1) -> float:
        """Median duration of a call in seconds, including the work of the device."""
        for _ in range(0 if self.tiny else warm):
            function()
        found = []
        for _ in range(repeats or self.sizes.repeats):
            self.wait()
            start = time.perf_counter()
            function()
            self.wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    def free(self) -> None:
        """Free memory that is no longer used."""
        torch._dynamo.reset()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float | None:
        """Peak memory of tensors since the last reset, in GB."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.cuda else None

    def pixels(self, count: int) -> Tensor:
        """Photographs (count, 3, H, W) uint8 on the device, repeated if there are fewer."""

        def read() -> Tensor:
            images = open_images(data_at(self.photographs()).model_copy(update={"holdout": 0}), self.sizes.side)
            return to_pixels(images.read(range(min(len(images), self.sizes.encoded))).images)

        found = self.once("pixels", read)
        return found[torch.arange(count) % len(found)].to(self.device)

    def photographs(self) -> Path:
        """The images of ``--data``, or synthetic JPEG files of 500 x 375 pixels."""
        if self.data is not None:
            return self.data

        def make() -> Path:
            rng, folder = np.random.default_rng(0), self.folder / "photographs" / "train" / "a"
            folder.mkdir(parents=True)
            for i in range(self.sizes.photographs):
                coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
                smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
                noisy = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(folder / f"{i:04d}.jpg", quality=90)
            return folder.parent.parent

        return self.once("photographs", make)

    def vgg(self) -> Path:
        """Random weights of VGG-16 in torchvision's layout."""

        def make() -> Path:
            torch.manual_seed(0)
            state = make_layers(cfgs["D"]).state_dict()
            torch.save({f"features.{name}": value for name, value in state.items()}, self.folder / "vgg16.pth")
            return self.folder / "vgg16.pth"

        return self.once("vgg", make)


Cases = Iterator[tuple[str, Callable[[], dict[str, Any] | list[dict[str, Any]]]]]


# Ceilings


def ceilings(bench: Bench) -> Cases:
    """Limits of the GPU: bytes read and written by a copy, and FLOP/s of the product of two large matrices."""

    def copy() -> dict[str, Any]:
        source = torch.empty(bench.sizes.copied // 4, device=bench.device).normal_()
        target = torch.empty_like(source)
        return {"GB/s": 2 * source.nbytes / bench.seconds(lambda: target.copy_(source), 10, 3) / 1e9}

    def product() -> dict[str, Any]:
        n = bench.sizes.matrix
        a, b = (torch.randn(n, n, device=bench.device).bfloat16() for _ in range(2))
        out = torch.empty_like(a)

        def several() -> None:
            for _ in range(10):
                torch.mm(a, b, out=out)

        bench.ceiling = 20 * n**3 / bench.seconds(several, 5, 2)
        return {"TFLOP/s": bench.ceiling / 1e12}

    yield "copy", copy
    yield "bf16-product", product


# Training


class Flops(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        count = flop_registry.get(getattr(function, "_overloadpacket", None))
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


class Clock:
    """Times the steps of a training. Called once a step, after the check that the loss is finite.

    After the timed steps, one further step each counts FLOP and profiles the kernels.

    Args:
        bench: the device.
        warm: first steps, which are not timed.
        steps: number of timed steps.
        eager: whether the model is not compiled, so that FLOP can be counted.
    """

    def __init__(self, bench: Bench, warm: int, steps: int, eager: bool) -> None:
        self.bench, self.warm, self.steps = bench, warm, steps
        self.moments: list[float] = []
        self.flops, self.busy, self.calls = 0, None, 0
        self.extra: list[Callable[[], Any]] = [self._count] if eager else []
        self.extra += [self._profile] if bench.cuda else []
        self.open: Any = None

    @property
    def needed(self) -> int:
        """Number of steps that the training needs."""
        return self.warm + self.steps + 1 + 2 * len(self.extra)

    def __call__(self) -> None:
        """Note that a step's loss was checked."""
        call, timed = self.calls, self.warm + self.steps
        self.calls += 1
        if call == self.warm and self.bench.cuda:
            torch.cuda.reset_peak_memory_stats()
        if self.warm <= call <= timed:
            self.bench.wait()
            self.moments.append(time.perf_counter())
        if call == timed:
            self.peak = self.bench.peak_gb()
        if call >= timed:
            if self.open is not None:
                self.open()
                self.open = None
            elif (number := (call - timed) // 2) < len(self.extra):
                self.open = self.extra[number]()

    def _count(self) -> Callable[[], None]:
        mode = Flops()
        mode.__enter__()

        def close() -> None:
            mode.__exit__(None, None, None)
            self.flops = mode.total

        return close

    def _profile(self) -> Callable[[], None]:
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        profiler.__enter__()

        def close() -> None:
            self.bench.wait()
            profiler.__exit__(None, None, None)
            kernels = [event for event in profiler.key_averages() if not getattr(event, "is_user_annotation", False)]
            self.busy = sum(event.self_device_time_total for event in kernels) / 1e6

        return close

    @property
    def seconds(self) -> float:
        """Median duration of the timed steps."""
        return statistics.median(b - a for a, b in zip(self.moments, self.moments[1:], strict=False))


def random_backbone(name: str, weights: object, role: str, setting: str, **sizes: int) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=0, **sizes)


@contextmanager
def short_training(bench: Bench, call: Callable[[], Any]) -> Iterator[None]:
    """Context: trainings have random backbones, write neither states nor snapshots, and ``call`` once a step."""
    add, load_lpips = FiniteCheck.add, perceptual.load_lpips

    def noted(check: FiniteCheck, terms: dict[str, Any], step: int) -> Any:
        if "d_hinge" not in terms:  # not again for the discriminator
            call()
        return add(check, terms, step)

    with ExitStack() as stack:
        patch = lambda *words: stack.enter_context(mock.patch.object(*words))  # noqa: E731
        for user in (robustok_tokenizer, semantic, dino):
            patch(user, "pretrained_backbone", random_backbone)
        patch(perceptual, "load_lpips", lambda *a, **k: bench.once("lpips", lambda: load_lpips(*a, **k)))
        patch(FiniteCheck, "add", noted)
        patch(tokenizer, "_write_snapshot", lambda *_: None)
        patch(generator, "_write_snapshot", lambda *_: None)
        patch(decoder.Snapshots, "write", lambda *_: None)
        patch(RunFolder, "save_state", lambda *_: None)
        if not bench.cuda:
            patch(torch.accelerator, "is_available", lambda: False)
        if bench.tiny:
            patch(torch, "compile", partial(COMPILE, backend="eager"))
        yield


COMPILE = torch.compile


def random_latents(
    folder: Path, shape: tuple[int, int], codes: int | None, count: int, space: str, data: str | None, **source: Any
) -> Path:
    """A cache of random tokens, or vectors where ``codes`` is None; ``space`` is the digest of their tokenizer."""
    kind = "continuous" if codes is None else "discrete"
    create_cache(folder, Manifest(kind, shape, codes, CLASSES, count, count, space, data, source))
    rng, numbers = np.random.default_rng(0), np.arange(count)
    latents = rng.standard_normal((count, *shape)) if codes is None else rng.integers(0, codes, (count, shape[0]))
    arrays = {"latents": latents, "labels": numbers % CLASSES, "indices": numbers, "seeds": np.zeros_like(numbers)}
    write_shard(folder, 0, arrays)
    return folder


def training_run(bench: Bench, name: str, folder: Path, words: tuple[str, ...], count: int) -> tuple[Any, Any]:
    """Function and settings of a training by the recipes, on ``count`` images or sequences."""
    common = (f"out={folder / 'run'}", "log_every=100000", "snapshot_every=0", "learning_rate=1e-6", "warmup_steps=0")
    common = (*common, "min_learning_rate=0", "workers=0")
    if name.startswith(("rar", "gpt")):
        shape = (bench.sizes.tokens, bench.sizes.width)
        cache = random_latents(folder / "latents", shape, bench.sizes.codes, count, "random", None)
        recipe = f"imagenet256/generator-{name[-1]}.yaml" if name.startswith("rar") else None
        rest = bench.sizes.generator[name[-1]] if recipe else ("generator={name: gpt, width: 32, depth: 1, heads: 2}",)
        run = load(generator.GeneratorTrainingRun, recipe, (*common, f"latents={cache}", "steps=100", *rest, *words))
        return generator.train_generator, run

    kl = name.startswith("kl")
    side = bench.sizes.side if not kl else bench.sizes.kl[1] * (2 if name == "kl-large" else 1)
    adversary = ("adversarial.start=0", "adversarial.warmup_steps=null", "adversarial.learning_rate=1e-6")
    adversary = (*adversary, f"reconstruction.perceptual_weights={bench.vgg()}", *bench.sizes.adversary)
    if name == "post-jpeg":
        images = (f"data={json.dumps(plain(data_at(bench.photographs())))}", "data.holdout=0")
    else:  # in memory, so that no image is decoded in a step
        file = folder / "images.npy"
        np.save(file, np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))
        images = ("data.name=npz", f"data.path={file}", "data.holdout=0")
    common = (*common, *images, *adversary)
    if name == "tokenizer":
        ours = ("picture_every=0", "augmentation.crop=center", *bench.sizes.tokenizer)
        ours = (*ours, "tokenizer.encoder.pretrained=null", "tokenizer.decoder.pretrained=null")
        run = load(tokenizer.TokenizerTrainingRun, TOKENIZER, (*common, "steps=100", *ours, *words))
        return tokenizer.train_tokenizer, run

    path = folder / "tokenizer"
    pretrain = load(tokenizer.TokenizerTrainingRun, TOKENIZER, (*images, *bench.sizes.tokenizer))
    model = bench.once(("tokenizer", kl, side), lambda: build_kl(bench, side) if kl else RobusTok(pretrain.tokenizer))
    space = bench.once(("its latent space", kl, side), lambda: encoder_digest(model))
    header = {"kind": "tokenizer", "config": plain(model.config), "latent_space": space}
    write_snapshot(path, header, model.state_dict(), {})
    data = open_images(pretrain.data, side)
    count, codes = min(count, len(data)), None if kl else bench.sizes.codes
    source = {"mode": "direct", "sigma": 0.7}
    pairs = random_latents(folder / "pairs", model.latent_shape, codes, count, space, data.fingerprint, **source)
    ours = (f"tokenizer={path}", f"pairs={pairs}", "steps=100")
    if name == "authors":
        teacher = [word for word in bench.sizes.tokenizer if word.startswith("teacher")]
        ours = (*ours, "trainable=authors", "teacher.name=timm", *teacher)
    run = load(decoder.DecoderTrainingRun, "imagenet256/post.yaml", (*common, *ours, *words))
    return decoder.train_decoder, run


def build_kl(bench: Bench, side: int) -> DiffusersKL:
    """An AutoencoderKL with random weights, for images of so many pixels a side."""
    torch.manual_seed(0)
    return DiffusersKL(DiffusersConfig(name="diffusers_kl", image_size=side, settings=bench.sizes.kl[0]))


def timed_training(bench: Bench, name: str, batch: int, words: tuple[str, ...], compiling: bool) -> dict[str, Any]:
    """Train for a few steps."""
    bench.free()
    steps, warm = bench.sizes.steps
    clock = Clock(bench, warm, steps, eager=not compiling)
    words = (f"batch_size={batch}", f"compile={str(compiling).lower()}", *words)
    torch._dynamo.utils.counters.clear()
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        train, run = training_run(bench, name, Path(folder), words, max(2 * batch, 16))
        run = run.model_copy(update={"steps": clock.needed})
        with short_training(bench, clock):
            start = time.perf_counter()
            train(run)
    kind = name.removesuffix("-jpeg")
    if clock.flops and "gradient_accumulation=2" not in words:  # which makes a second forward pass
        bench.flops[kind] = clock.flops / batch
    found: dict[str, Any] = {"batch": batch, "ms/step": 1e3 * clock.seconds, "images/s": batch / clock.seconds}
    if clock.busy is not None:
        found["busy ms"] = 1e3 * clock.busy
    if kind in bench.flops:
        found["TFLOP/step"] = bench.flops[kind] * batch / 1e12
        if bench.ceiling:
            found["MFU"] = bench.flops[kind] * batch / clock.seconds / bench.ceiling
    found |= {"peak GB": clock.peak} if bench.cuda else {}
    if compiling:
        counters = torch._dynamo.utils.counters
        found |= {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
        found["start s"] = clock.moments[0] - start
    return found


def largest_that_fits(bench: Bench, name: str, words: tuple[str, ...], compiling: bool) -> dict[str, Any]:
    wanted = bench.sizes.batches[name.removesuffix("-jpeg").removesuffix("-large")]
    for batch in (wanted, *(b for b in bench.sizes.fallbacks if b < wanted)):
        try:
            return timed_training(bench, name, batch, words, compiling)
        except torch.OutOfMemoryError as error:
            print(f"  {name}: {batch} images do not fit: {str(error).splitlines()[0]}", flush=True)
        bench.free()
    raise RuntimeError("no batch fits")


def training(bench: Bench) -> Cases:
    """Steps of the training loops, from one check of the loss to the next; images and tokens are in memory.

    ``busy ms`` is the time of all kernels in one profiled step. MFU is the FLOP/s of a step, frozen networks included,
    divided by the measured FLOP/s of a bf16 matrix product.
    """
    bf16 = ("precision=bf16",)
    case = lambda name, words=bf16, compiling=False: partial(  # noqa: E731
        largest_that_fits, bench, name, words, compiling
    )
    for name in ("tokenizer", "rar-b", "post", "rar-l", "authors"):
        yield f"{name}/eager", case(name)
    for name in ("tokenizer", "rar-b", "rar-l", "post"):
        yield f"{name}/compiled", case(name, compiling=True)

    for name in ("tokenizer", "rar-b"):
        yield f"{name}/in-2-parts", case(name, (*bf16, "gradient_accumulation=2"))

    def decoding() -> dict[str, Any]:
        with mock.patch.object(dataset, "MEMORY_LIMIT", 0):
            return case("post-jpeg")()

    yield "post/jpeg", decoding

    for name in ("float32", "tf32"):
        yield f"tokenizer/{name}", case("tokenizer", (f"precision={name}",))

    crop = f"crop={{size: {bench.sizes.kl[1] * 3 // 4}, margin: {bench.sizes.kl[1] // 4}}}"  # half of it on each side
    yield "kl/eager", case("kl")
    yield "kl/compiled", case("kl", compiling=True)
    yield "kl/checkpointing", case("kl", (*bf16, "gradient_checkpointing=true"))
    if bench.cuda:  # bitsandbytes has kernels for GPUs
        yield "kl/adamw8bit", case("kl", (*bf16, "optimizer=adamw8bit"))
    yield "kl-large/eager", case("kl-large")
    yield "kl-large/crop", case("kl-large", (*bf16, crop))


# Convolutional autoencoders


def convolutions(bench: Bench) -> Cases:
    """Convolutional tokenizers with channels first (NCHW) and last (NHWC): VQ-16 and Stable Diffusion's autoencoder.

    ``ms`` is a forward and backward pass of the decoder; ``difference`` that of its images to NCHW's in float32.
    """

    def measure(name: str, order: str, precision: Precision) -> dict[str, Any]:
        bench.free()
        torch.manual_seed(0)
        if name == "kl":
            model = build_kl(bench, bench.sizes.kl[1])
        else:
            small = {"width": 32} if bench.tiny else {}
            model = LlamaGen(LlamaGenConfig(encoder=small, decoder=small, image_size=bench.sizes.side))
        count = max(2, bench.sizes.encoded // (32 if name == "kl" else 8))
        memory = torch.channels_last if order == "NHWC" else torch.contiguous_format
        model = model.eval().requires_grad_(False).to(bench.device, memory_format=memory)
        rng = torch.Generator().manual_seed(0)
        images = (torch.rand(count, 3, model.image_size, model.image_size, generator=rng) * 2 - 1).to(bench.device)
        found = {}

        def passes() -> None:
            found["images"] = model.decode(latents)
            found["images"].float().square().mean().backward()

        with at_precision(bench.device, precision):
            encode = lambda: model.encode(images)  # noqa: E731
            with torch.no_grad():
                latents = bench.made.setdefault(("latents", name), encode())
                row = {"batch": count, "encoded/s": count / bench.seconds(encode)}
            for module in model.decoder_modules():
                module.requires_grad_()
            row["ms"] = 1e3 * bench.seconds(passes)
        exact = bench.made.setdefault(("decoded", name), found["images"].detach().float())
        row["difference"] = ((found["images"] - exact).abs().mean() / exact.abs().mean()).item()
        return row | ({"peak GB": bench.peak_gb()} if bench.cuda else {})

    for name in ("vq", "kl"):
        for precision in ("float32", "tf32", "bf16"):
            for order in ("NCHW", "NHWC"):
                yield f"{name}/{precision}-{order}", partial(measure, name, order, precision)


# Sampling


def build_rar(bench: Bench, size: str) -> RAR:
    """A RAR on the CPU. Its modulation is random too: with the zeros of a new model, every block is the identity."""
    torch.manual_seed(0)
    tables = {"position_rows": POSITION_ROWS, "timestep_rows": TIMESTEP_ROWS}
    model = RAR(bench.sizes.rar[size].model_copy(update=tables), bench.sizes.codes, bench.sizes.tokens, CLASSES).eval()
    for block in (*model.blocks, model.adaln_before_head):
        nn.init.normal_(block.adaLN_modulation[1].weight, std=0.02)
    return model.requires_grad_(False)


def sampler(bench: Bench) -> Cases:
    """Sampling with guidance: images per second, and the share of tokens equal to those of float32.

    ``equal`` compares samples, in which one different token changes all later ones; ``equal drawn`` compares single
    draws, each after the same tokens.
    """

    def tokens(model: RAR, count: int, amp: bool) -> Tensor:
        labels = torch.arange(count) * 37 % CLASSES
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=amp):
            return model.generate(labels, SAMPLING, image_rngs(0, range(count)))

    def draws(model: RAR, given: Tensor, amp: bool) -> Tensor:
        """The token (N, L) that would be drawn at each position after the given ones (N, L)."""
        rngs = image_rngs(0, range(len(given)))
        image_uniforms(rngs, given.shape[1])  # sampling first draws which tokens of a mixture are kept
        uniforms = image_uniforms(rngs, given.shape[1]).to(bench.device)
        labels = torch.arange(len(given)) * 37 % CLASSES
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=amp):
            logits = model.cached_logits(given, labels, SAMPLING)
        return torch.stack([draw_tokens(logits[:, i], uniforms[:, i], SAMPLING) for i in range(given.shape[1])], 1)

    def measure(size: str, dtype: torch.dtype, count: int, amp: bool = False, compiling: bool = False) -> dict:
        bench.free()
        model = copy.deepcopy(bench.once(("rar", size), lambda: build_rar(bench, size))).to(bench.device, dtype)
        torch._dynamo.utils.counters.clear()
        patch = mock.patch.object(torch, "compile", lambda f, **_: COMPILE(f, backend="eager", dynamic=False))
        with patch if bench.tiny else nullcontext():
            start = time.perf_counter()
            if compiling:
                model.compile_sampling()
                tokens(model, count, amp)
            else:
                tokens(model, min(count, 8), amp)
            if compiling:  # the second run records a CUDA graph, the third replays it
                tokens(model, count, amp)
            bench.wait()
            first = time.perf_counter() - start
            if bench.cuda:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            found = tokens(model, count, amp)
            bench.wait()
            seconds = time.perf_counter() - start
            row: dict[str, Any] = {"batch": count, "images/s": count / seconds, "ms/token": 1e3 * seconds / 257}
            reference = bench.made.get(("samples", size, count))
            if dtype == torch.float32 and not amp and not compiling:
                bench.made["samples", size, count] = found
            elif reference is not None:
                row["equal"] = (found == reference).float().mean().item()
            if reference is not None and count == bench.sizes.samples[0] and not compiling:
                row["equal drawn"] = (draws(model, reference, amp) == reference).float().mean().item()
        if compiling:
            counters = torch._dynamo.utils.counters
            row |= {"start s": first, "graphs": counters["stats"]["unique_graphs"]}
            row |= {"breaks": sum(counters["graph_break"].values()), "skips": counters["inductor"]["cudagraph_skips"]}
        return row | ({"peak GB": bench.peak_gb()} if bench.cuda else {})

    single, half = torch.float32, torch.bfloat16
    for count in bench.sizes.samples:
        yield f"rar-b/float32@{count}", partial(measure, "b", single, count)
    for count in bench.sizes.samples:
        yield f"rar-b/bf16-weights@{count}", partial(measure, "b", half, count)
    for count in bench.sizes.samples:
        yield f"rar-b/bf16-autocast@{count}", partial(measure, "b", single, count, amp=True)
    last = bench.sizes.samples
    for count in (*last[1:2], *last[2:], *last[:1]):
        yield f"rar-b/bf16-weights-compiled@{count}", partial(measure, "b", half, count, compiling=True)
    yield f"rar-l/bf16-weights@{last[-1]}", partial(measure, "l", half, last[-1])
    yield f"rar-l/bf16-weights-compiled@{last[-1]}", partial(measure, "l", half, last[-1], compiling=True)
    for count in last[:2]:
        yield f"rar-b/float32-compiled@{count}", partial(measure, "b", single, count, compiling=True)
    yield f"rar-b/bf16-autocast-compiled@{last[1]}", partial(measure, "b", single, last[1], True, True)


# Encoding, decoding, Inception, evaluation


@torch.no_grad()
def build_tokenizer(bench: Bench) -> RobusTok:
    """A tokenizer with random weights. Its codes are features of other images, and so as near as after training."""
    torch.manual_seed(0)
    words = ("data.path=x", *bench.sizes.tokenizer)
    model = RobusTok(load(tokenizer.TokenizerTrainingRun, TOKENIZER, words).tokenizer).eval()
    for block in (*model.encoder.backbone.blocks, *model.decoder.backbone.blocks):
        for scale in (block.ls1, block.ls2):
            scale.gamma.fill_(1.0)  # with the initial 1e-5 the blocks change nearly nothing
    model = model.requires_grad_(False).to(bench.device)
    images = torch.rand(max(2, bench.sizes.encoded // 4), 3, bench.sizes.side, bench.sizes.side, device=bench.device)
    with at_precision(bench.device, "float32"):
        features = model.features(images * 2 - 1).flatten(0, 1)
    chosen = torch.randint(len(features), (bench.sizes.codes,), generator=torch.Generator().manual_seed(0))
    model.quantizer.embedding.weight.copy_(nn.functional.normalize(features[chosen.to(bench.device)], dim=-1))
    return model


def encoding(bench: Bench) -> Cases:
    """The tokenizer on images on the device: images per second, and the share of tokens equal to those of float32."""
    names = ("float32", "tf32", "bf16-autocast", "bf16", "bf16-compiled")

    def measure(name: str) -> dict[str, Any]:
        model = bench.once("tokenizer", lambda: build_tokenizer(bench))
        images = bench.pixels(bench.sizes.encoded).float() / 127.5 - 1
        setting = name.partition("-")[0]
        if name.startswith("bf16") and name != "bf16-autocast":  # as the commands do it
            model = cast_weights(copy.deepcopy(model), "bf16")
        if name.endswith("compiled"):
            backend = {"backend": "eager"} if bench.tiny else {}
            for half in (model.encoder, model.decoder):
                half.forward = COMPILE(half.forward, dynamic=False, **backend)
        encode, decode = model.encode, model.decode
        with torch.no_grad(), at_precision(bench.device, setting):
            tokens = encode(images)
            exact = bench.made.setdefault("tokens", tokens)
            row = {"batch": len(images), "encoded/s": len(images) / bench.seconds(lambda: encode(images))}
            decoded = decode(exact).float()
            reference = bench.made.setdefault("decoded", decoded)
            row["decoded/s"] = len(images) / bench.seconds(lambda: decode(exact))
        row["equal tokens"] = (tokens == exact).float().mean().item()
        row["codes in use"] = len(tokens.unique())
        row["decoded difference"] = ((decoded - reference).abs().mean() / reference.abs().mean()).item()
        return row

    for name in names:
        yield name, partial(measure, name)


def build_inception(bench: Bench) -> inception.InceptionExtractor:
    """Random weights, large enough that the features do not vanish."""
    torch.manual_seed(0)
    network = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 4:
                parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5)
    torch.save(network.state_dict(), bench.folder / "inception.pth")
    return inception.InceptionExtractor(bench.folder / "inception.pth", bench.device)


def inception_features(bench: Bench) -> Cases:
    """Pixels on the device to pool features, and the relative distance of these to those of float32."""

    def measure(name: str, order: str) -> dict[str, Any]:
        extractor = bench.once("inception", lambda: build_inception(bench))
        pixels = bench.pixels(bench.sizes.encoded)
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        memory = torch.channels_last if order == "NHWC" else torch.contiguous_format
        network = copy.deepcopy(extractor.network).to(dtype, memory_format=memory)

        def features() -> Tensor:
            x = (inception.resize_like_tensorflow(pixels) - 128) / 128
            x = x.to(dtype, memory_format=memory)
            for stage_name, stage in network.named_children():
                if stage_name not in ("AvgPool", "fc"):
                    x = stage(x)
            return x.float().mean(dim=(2, 3))

        with torch.no_grad(), at_precision(bench.device, "tf32" if name == "tf32" else "float32"):
            found = features()
            seconds = bench.seconds(features)
        exact = bench.made.setdefault("features", found)
        return {
            "batch": len(pixels),
            "images/s": len(pixels) / seconds,
            "difference": ((found - exact).norm() / exact.norm()).item(),
        }

    for order in ("NCHW", "NHWC"):
        for name in ("float32", "tf32", "bf16"):
            yield f"{name}-{order}", partial(measure, name, order)


def fid(bench: Bench) -> Cases:
    """Tokens to images to statistics, as in `evaluate`, and the Frechet distance of two sets of statistics."""

    @torch.no_grad()
    def stream(batch: int, on_device: bool = False) -> dict[str, Any]:
        model = bench.once("tokenizer", lambda: build_tokenizer(bench))
        extractor = bench.once("inception", lambda: build_inception(bench))
        count = (1 if bench.tiny else 4) * bench.sizes.encoded
        tokens = torch.randint(
            bench.sizes.codes, (count, bench.sizes.tokens), generator=torch.Generator().manual_seed(0)
        )

        def collect(rows: int) -> None:
            collector = FeatureCollector(extractor, ())
            moments = GaussianStatistics(extractor.dim, bench.device)
            for part in tokens[:rows].split(batch):
                pixels = to_pixels(model.decode(part.to(bench.device)))
                if on_device:
                    moments.update(extractor(pixels))
                else:
                    collector.update(torch.arange(len(part)), pixels)

        collect(batch)
        seconds = bench.seconds(lambda: collect(count), 1, 0)
        return {"batch": batch, "images": count, "images/s": count / seconds, "50,000 take s": 50_000 * seconds / count}

    def distance(device: torch.device) -> dict[str, Any]:
        features, dim = (256, 64) if bench.tiny else (4096, 2048)
        rng = torch.Generator().manual_seed(0)
        a, b = (GaussianStatistics.of(torch.randn(features, dim, generator=rng).to(device)) for _ in range(2))
        factor = covariance_factor(b)
        return {
            "factor s": bench.seconds(lambda: covariance_factor(b), 1, 0),
            "distance s": bench.seconds(lambda: frechet_distance(a, b, factor), 1, 0),
        }

    def pairwise(device: torch.device) -> dict[str, Any]:
        real, fake, dim = (20, 30, 8) if bench.tiny else (10_000, 50_000, 2048)
        rng = torch.Generator().manual_seed(0)
        features = [torch.randn(n, dim, generator=rng).to(device) for n in (real, fake)]
        kid = bench.seconds(lambda: kernel_distance(features[1], features[0]), 1, 0)
        manifold = bench.seconds(lambda: precision_recall(real=features[0], fake=features[1]), 1, 0)
        return {"images": fake, "KID s": kid, "precision and recall s": manifold}

    yield "decode-and-features@64", partial(stream, 64)
    yield f"decode-and-features@{bench.sizes.encoded}", partial(stream, bench.sizes.encoded)
    yield f"statistics-on-device@{bench.sizes.encoded}", partial(stream, bench.sizes.encoded, True)
    yield "distance-on-device", partial(distance, bench.device)
    yield "distance-on-cpu", partial(distance, torch.device("cpu"))
    yield "kid-and-precision-recall", partial(pairwise, bench.device)


def lpips(bench: Bench) -> Cases:
    """Forward and backward pass of LPIPS (VGG) at the recipe's batch, whole or in chunks; ours and the package's."""

    def package() -> Callable[[Tensor, Tensor], Tensor]:
        import lpips

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torchvision's deprecated settings
            network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
        state = torch.load(bench.vgg(), weights_only=True)  # slice1.0.weight is features.0.weight
        names = network.net.state_dict()
        network.net.load_state_dict({name: state[f"features.{name.partition('.')[2]}"] for name in names})
        network = network.to(bench.device)
        return lambda a, b: network(b, a).mean()

    def measure(
        chunks: int, name: Precision, theirs: bool = False, compiling: bool = False, nchw: bool = False
    ) -> dict[str, Any]:
        bench.free()
        network = package() if theirs else perceptual.LPIPSLoss(str(bench.vgg()), name).to(bench.device)
        if compiling:
            network = COMPILE(network, dynamic=False, **({"backend": "eager"} if bench.tiny else {}))
        count, side = bench.sizes.batches["tokenizer"], bench.sizes.side
        rng = torch.Generator().manual_seed(0)
        images, found = (torch.rand(count, 3, side, side, generator=rng).to(bench.device) * 2 - 1 for _ in range(2))
        values = []

        def step() -> None:
            values.clear()
            for a, b in zip(images.chunk(chunks), found.chunk(chunks), strict=True):
                b = b.detach().requires_grad_()
                with at_precision(bench.device, name):
                    values.append(network(a, b) / chunks)
                    values[-1].backward()

        before = torch.cuda.memory_allocated() if bench.cuda else 0
        memory = torch.contiguous_format if nchw else layout(bench.device)
        with mock.patch.object(lpips_module, "layout", return_value=memory):
            row = {"batch": count, "chunks": chunks, "ms": 1e3 * bench.seconds(step, warm=2)}
        row["value"] = sum(value.item() for value in values)
        return row | ({"peak GB": bench.peak_gb() - before / 1e9} if bench.cuda else {})

    for chunks in (4, 1):
        yield f"bf16-{chunks}", partial(measure, chunks, "bf16")
    yield "bf16-4-compiled", partial(measure, 4, "bf16", compiling=True)
    yield "bf16-4-package", partial(measure, 4, "bf16", theirs=True)
    yield "bf16-4-NCHW", partial(measure, 4, "bf16", nchw=True)
    for name in ("tf32", "float32"):
        yield f"{name}-4", partial(measure, 4, name)
    yield "float32-4-package", partial(measure, 4, "float32", theirs=True)


# Data


def loader(bench: Bench) -> Cases:
    """Batches of random crops of JPEG files as images on the device, as in training.

    ``host ms`` is the CPU time of the main process for a batch.
    """
    cores = os.cpu_count() or 1
    batch = bench.sizes.batches["tokenizer"]

    def measure(workers: int) -> dict[str, Any]:
        data = data_at(bench.photographs()).model_copy(update={"holdout": 0})
        images = open_images(data, bench.sizes.side, augment=Augmentation(crop="random", flip=True))
        size = min(batch, len(images))
        steps = 2 if bench.tiny else max(3, 2 * workers)
        batches = training_batches(images, size, 0, 0, steps + 1, workers=workers, device=bench.device)
        stream = (batch.images for batch in batches)
        start = time.perf_counter()
        next(stream)
        first = time.perf_counter() - start
        start, host = time.perf_counter(), time.process_time()
        for _ in stream:
            pass
        if bench.cuda:
            torch.cuda.synchronize()
        seconds, host = time.perf_counter() - start, time.process_time() - host
        row = {"workers": workers, "batch": size, "images/s": steps * size / seconds, "host ms": 1e3 * host / steps}
        return row | {"first batch s": first}

    for workers in sorted({0, 1, cores // 2, max(1, cores - 2)}) if not bench.tiny else (0, 1):
        yield f"workers-{workers}", partial(measure, workers)


# Waits


def waits(bench: Bench) -> Cases:
    """How often the CPU waits for the GPU in a step that writes no line to the log, by line of the library's code.

    All terms of the recipes, small models and batches: the number does not depend on their size.
    """
    small = tiny_sizes()
    root = str(Path(robustok.__file__).parent)

    @contextmanager
    def counting(found: Counter) -> Iterator[None]:
        def note(message: Any, category: type, filename: str, lineno: int, *_: Any) -> None:
            if "synchronizing CUDA operation" in str(message):
                own = [f for f in traceback.extract_stack() if f.filename.startswith(root)]
                if own:
                    filename, lineno = Path(own[-1].filename).relative_to(root), own[-1].lineno
                found[f"{filename}:{lineno} {own[-1].line if own else ''}"[:110]] += 1

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            if bench.cuda:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                if bench.cuda:
                    torch.cuda.set_sync_debug_mode("default")

    def step(name: str, words: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        bench.free()
        own, calls, stack = Counter(), [0], ExitStack()
        inner = Bench(bench.device, True, bench.folder, bench.data)
        inner.made = {key: bench.made[key] for key in ("vgg", "lpips") if key in bench.made}

        def between() -> None:
            calls[0] += 1
            if calls[0] == 3:
                stack.enter_context(counting(own))
            elif calls[0] == 4:
                stack.close()

        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            words = ("batch_size=4", "precision=bf16", "compile=false", *words)
            train, run = training_run(inner, name, Path(folder), words, 16)
            run = run.model_copy(update={"steps": 5})
            with short_training(inner, between), stack:
                train(run)
        if "lpips" in inner.made:
            bench.made["lpips"] = inner.made["lpips"]
        return [{"waits": own.total()}] + [{"waits": n, "where": line} for line, n in own.most_common()]

    def sample(count: int) -> list[dict[str, Any]]:
        torch.manual_seed(0)
        model = RAR(small.rar["b"], small.codes, small.tokens, CLASSES).to(bench.device)
        draw = lambda: model.generate(torch.arange(count), SAMPLING, image_rngs(0, range(count)))  # noqa: E731
        draw()
        found: Counter = Counter()
        with counting(found):
            draw()
        return [{"waits": found.total(), "tokens": small.tokens}] + [
            {"waits": n, "where": line} for line, n in found.most_common()
        ]

    yield "tokenizer", partial(step, "tokenizer", ("clip_norm=1", "perturbation.proportion=1"))
    yield "rar", partial(step, "rar-b")
    yield "gpt", partial(step, "gpt")
    yield "post", partial(step, "post", ("clip_norm=1",))
    yield "sampler", partial(sample, 2)


# Commands


def command(bench: Bench, words: list[str]) -> str:
    """Run a command of Python in a process of its own, which must succeed; returns its last line."""
    environment = os.environ | ({} if bench.cuda else {"CUDA_VISIBLE_DEVICES": ""})
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-2000:])
    return (done.stdout.strip().splitlines() or [""])[-1]


def cuda_tests(bench: Bench) -> Cases:
    """The tests of the library on this GPU, from a checkout; toy sizes only collect them."""
    words = ["pytest", "-q", "-m", "cuda", "tests/test_cuda.py", *(["--collect-only"] if bench.tiny else [])]
    yield "all", lambda: {"result": command(bench, words)}


def demo(bench: Bench) -> Cases:
    """`robustok demo` from beginning to end; toy sizes only its `--dry-run`."""
    words = ["robustok", "demo", f"out={bench.folder / 'demo'}", *(["--dry-run"] if bench.tiny else [])]
    yield "all", lambda: {"result": command(bench, words)}


PARTS: dict[str, Callable[[Bench], Cases]] = {
    "ceilings": ceilings,
    "waits": waits,
    "training": training,
    "convolutions": convolutions,
    "sampler": sampler,
    "encoding": encoding,
    "inception": inception_features,
    "lpips": lpips,
    "fid": fid,
    "loader": loader,
    "tests": cuda_tests,
    "demo": demo,
}


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions of the software."""
    found = {"device": device.type, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    found |= {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"card": card.name, "memory_gb": card.total_memory / 1e9, "cuda": torch.version.cuda}
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def show(case: str, row: dict[str, Any]) -> None:
    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        return str(value)

    cells = "  ".join(f"{name} {text(value)}" for name, value in row.items() if value is not None)
    print(f"{case:<44} {cells}", flush=True)


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", help=f"comma-separated parts ({', '.join(PARTS)}) or beginnings of cases (sampler/rar-b)"
    )
    parser.add_argument("--without", default="", help="comma-separated beginnings of cases to leave out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to test the script")
    parser.add_argument("--data", type=Path, help="folder or parquet file of images; default: synthetic ones")
    parser.add_argument("--batches", default="", help="batches of trainings to start with: tokenizer=96,rar-b=128")
    parser.add_argument("--limit", type=float, default=480, help="seconds after which no case begins")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(words)
    only, without = (None if w is None else [x for x in w.split(",") if x] for w in (given.only, given.without))
    unknown = [word for word in only or [] if word.split("/")[0] not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]}; there are {', '.join(PARTS)}")
    device, begun = torch.device(given.device), time.perf_counter()
    report: dict[str, Any] = {"machine": machine(device), "command": words or sys.argv[1:], "rows": []}
    report |= {"errors": {}, "left_out": []}
    print(json.dumps(report["machine"]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, given.tiny, Path(folder), given.data)
        for word in filter(None, given.batches.split(",")):
            bench.sizes.batches[word.split("=")[0]] = int(word.split("=")[1])
        for part, function in PARTS.items():
            if only is not None and not any(word.split("/")[0] == part for word in only):
                continue
            print(f"\n{part}: {' '.join((function.__doc__ or '').split())}", flush=True)
            for name, case in function(bench):
                title = f"{part}/{name}"
                wanted = only is None or any(title == w or title.startswith(w.rstrip("/") + "/") for w in only)
                wanted = wanted or any(w != part and title.startswith(w) for w in only or [])
                if not wanted or any(title.startswith(word) for word in without or []):
                    continue
                if time.perf_counter() - begun > given.limit:
                    report["left_out"].append(title)
                    continue
                start = time.perf_counter()
                try:
                    found = case()
                    rows = found if isinstance(found, list) else [found | {"took s": time.perf_counter() - start}]
                    report["rows"] += [{"case": title} | row for row in rows]
                    for row in rows:
                        show(title, row)
                except Exception as error:
                    report["errors"][title] = f"{type(error).__name__}: {error}"
                    print(f"{title} failed", flush=True)
                    traceback.print_exc()
                sys.stderr.flush()
                if given.out:
                    given.out.write_text(json.dumps(report, indent=1))
            bench.free()
    if report["left_out"]:
        print(f"\nleft out after {given.limit:.0f} s: {', '.join(report['left_out'])}")
    print(f"\n{time.perf_counter() - begun:.0f} s, {len(report['errors'])} failed: {', '.join(report['errors'])}")
    return report


if __name__ == "__main__":
    sys.exit(bool(main()["errors"]))
