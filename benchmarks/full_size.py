"""Seconds and peak memory of one training step at full size on this machine, and the estimate of ``--dry-run``.

    python benchmarks/full_size.py [tokenizer] [generator] [post] [authors] [KEY=VALUE ...] [--device cpu]

The ImageNet 256x256 recipes run with all their losses on one random image: the tokenizer with discriminator, teacher
and LPIPS; RAR-L; post-training; post-training by the authors' procedure. Two steps each; the second is timed.
Backbones have random weights, so nothing is downloaded, and nothing is saved. Settings are such as ``precision=bf16``
or ``gradient_checkpointing=true``. Needs up to 12 GB.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torchvision.models import vgg16

from robustok.commands.dry_run import estimate
from robustok.config import load, plain
from robustok.data.dataset import open_images
from robustok.data.latent_cache import Manifest, create_cache, write_shard
from robustok.data.sources import Data
from robustok.losses import semantic
from robustok.losses.discriminators import dino
from robustok.snapshots import write_snapshot
from robustok.tokenizers import encoder_digest
from robustok.tokenizers import robustok as tokenizers
from robustok.tokenizers.robustok import RobusTok
from robustok.training.common import TrainingConfig
from robustok.training.decoder import DecoderTrainingRun, train_decoder
from robustok.training.generator import GeneratorTrainingRun, train_generator
from robustok.training.tokenizer import TokenizerTrainingRun, train_tokenizer
from timing import arguments, trainings_on

COMMON = ["batch_size=1", "steps=2", "warmup_steps=0", "log_every=1", "precision=float32", "snapshot_every=0"]
LOSSES = ["adversarial.start=0", "adversarial.warmup_steps=null"]
AUTHORS = ["trainable=authors", "teacher.name=timm"]
TRAIN = {
    TokenizerTrainingRun: train_tokenizer,
    GeneratorTrainingRun: train_generator,
    DecoderTrainingRun: train_decoder,
}


class StepsDoneError(Exception):
    """Ends a training before it saves anything."""


def random_backbone(name: str, weights: object, role: str, setting: str, **sizes: int) -> torch.nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=0, **sizes)


def make_tokens(folder: Path, tokenizer: str, data: str | None, source: dict) -> list[str]:
    """Write a cache with the random tokens of one image."""
    manifest = Manifest("discrete", (256, 64), 4096, 1000, 1, 1, tokenizer=tokenizer, data=data, source=source)
    create_cache(folder, manifest)
    zeros = np.zeros(1, dtype=np.int64)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4096, (1, 256))
    write_shard(folder, 0, {"latents": tokens, "labels": zeros, "indices": zeros, "seeds": zeros})
    return [f"latents={folder}"]


def make_tokenizer(folder: Path, data: Data) -> list[str]:
    """Write a snapshot of the paper's tokenizer with random weights, and a cache with one pair."""
    config = load(TokenizerTrainingRun, "imagenet256/tokenizer.yaml", ["data.path=x"]).tokenizer
    model = RobusTok(config)
    space = encoder_digest(model)
    header = {"kind": "tokenizer", "config": plain(config), "latent_space": space}
    write_snapshot(folder / "tokenizer", header, model.state_dict(), {})
    make_tokens(folder / "pairs", space, open_images(data, 256).fingerprint, {"mode": "direct", "sigma": 0.7})
    return [f"tokenizer={folder / 'tokenizer'}", f"pairs={folder / 'pairs'}"]


def prepare(name: str, folder: Path, words: list[str]) -> TrainingConfig:
    """The configuration of a training; its inputs are written to ``folder``."""
    np.save(folder / "image.npy", np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), dtype=np.uint8))
    image = ["data.name=npz", f"data.path={folder / 'image.npy'}", "data.holdout=0"]
    features = {f"features.{k}": v for k, v in vgg16(weights=None).features.state_dict().items()}
    torch.save(features, folder / "vgg16.pth")
    losses = [*image, *LOSSES, f"reconstruction.perceptual_weights={folder / 'vgg16.pth'}"]
    out = [f"out={folder / 'run'}", *COMMON]
    if name == "tokenizer":
        words = [*out, *losses, "workers=0", "picture_every=0", "perturbation.proportion=1", *words]
        return load(TokenizerTrainingRun, "imagenet256/tokenizer.yaml", words)
    if name == "generator":
        words = [*out, *make_tokens(folder / "latents", "random", None, {}), *words]
        return load(GeneratorTrainingRun, "imagenet256/generator-l.yaml", words)
    data = load(TokenizerTrainingRun, "imagenet256/tokenizer.yaml", image).data
    words = [*out, *losses, *make_tokenizer(folder, data), *(AUTHORS if name == "authors" else []), *words]
    return load(DecoderTrainingRun, "imagenet256/post.yaml", words)


def use_random_backbones() -> None:
    """Give every pretrained backbone random weights, so that nothing is downloaded."""
    for module in (tokenizers, semantic, dino):
        module.pretrained_backbone = random_backbone


def step_times(run: TrainingConfig, device: str, clock: Callable[[], float] = time.process_time) -> list[float]:
    """Train, and return the time at the end of each step; the training ends before it saves anything.

    The clock is of a CPU; on a GPU it is the time at which the device has finished.
    """
    if device == "cuda":
        clock = lambda: (torch.cuda.synchronize(), time.perf_counter())[1]  # noqa: E731
    times: dict[int, list[float]] = {}  # of each optimiser: the decoder's or generator's, the discriminator's

    def after_step(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        times.setdefault(id(optimizer), []).append(clock())
        if min(map(len, times.values())) == run.steps:
            raise StepsDoneError

    hook = register_optimizer_step_post_hook(after_step)
    try:
        with trainings_on(device):
            TRAIN[type(run)](run)
    except StepsDoneError:
        return list(times.values())[-1]
    finally:
        hook.remove()
    raise RuntimeError("the training ended early")


def measure(name: str, words: list[str], device: str) -> dict[str, float]:
    """Run two steps in this process."""
    use_random_backbones()
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(name, Path(folder), words)
        sizes = estimate(run)
        first, second = step_times(run, device, time.perf_counter)
    activations = "checkpointed_activations_bytes" if run.gradient_checkpointing else "activations_bytes"
    return {
        "seconds": second - first,
        "gpu_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "start_gb": start * 1024 / 1e9,
        "estimate_gb": (sizes["training_memory_bytes"] + sizes[activations]) / 1e9,
        "parameters": next(value for key, value in sizes.items() if key.endswith("_parameters")),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("words", nargs="*", help="trainings, and settings KEY=VALUE")
    given = parser.parse_args()
    names = [word for word in given.words if "=" not in word] or ["tokenizer", "generator", "post", "authors"]
    settings = [word for word in given.words if "=" in word]
    if names[0] == "measure":
        print(json.dumps(measure(names[1], settings, given.device)))
        return
    print(f"one step of batch 1 on {given.device} with {torch.get_num_threads()} threads {' '.join(settings)}")
    for name in names:  # each in a process of its own, so that peaks are separate
        command = [sys.executable, __file__, "measure", name, *settings, "--device", given.device]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:10} {found['parameters']:13,} parameters  {found['seconds']:6.1f} s  "
            f"peak {found['peak_gb']:5.2f} GB, {found['start_gb']:.2f} GB of it Python and PyTorch; "
            f"estimated {found['estimate_gb']:5.2f} GB, on the GPU {found['gpu_gb']:.2f} GB"
        )


if __name__ == "__main__":
    main()
