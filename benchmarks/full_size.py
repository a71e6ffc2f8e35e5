"""One real training step at full size on whatever machine this is: seconds, and peak memory against the estimate.

The recipes for ImageNet 256x256 run as they are, with all their losses, on one random image: the tokenizer with its
discriminator, teacher and LPIPS; RAR-L; post-training; post-training as it was released. Backbones are random, so
nothing is downloaded, and nothing is saved. Two steps each, the second is timed. Run it with ``python
benchmarks/full_size.py``; give names (``tokenizer generator post released``) for some, and KEY=VALUE for settings such
as ``precision=bf16`` or ``gradient_checkpointing=true``. Needs up to 12 GB.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from torchvision.models import vgg16

from robustok import runs
from robustok.commands.dry_run import estimate
from robustok.config import load, plain
from robustok.data.dataset import open_images
from robustok.data.latent_cache import Manifest, create_cache, write_shard
from robustok.losses import semantic
from robustok.losses.discriminators import dino
from robustok.snapshots import write_snapshot
from robustok.tokenizers import encoder_digest
from robustok.tokenizers import robustok as tokenizers
from robustok.tokenizers.robustok import RobusTok
from robustok.training import common, state
from robustok.training import decoder as post_training
from robustok.training import generator as generator_training
from robustok.training import tokenizer as main_training

COMMON = ["batch_size=1", "steps=2", "warmup_steps=0", "log_every=1", "precision=float32", "snapshot_every=0"]
LOSSES = ["adversarial.start=0", "adversarial.warmup_steps=null"]
RELEASED = ["trainable=authors", "teacher.name=timm"]
TRAININGS = {
    "main-train": main_training.train_tokenizer,
    "train-generator": generator_training.train_generator,
    "post-train": post_training.train_decoder,
}


def random_backbone(name: str, weights: object, role: str, setting: str, **sizes: int) -> torch.nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=0, **sizes)


def make_tokens(folder: Path, tokenizer: str, data: str | None, source: dict) -> list[str]:
    """A cache of one image's random tokens."""
    manifest = Manifest("discrete", (256, 64), 4096, 1000, 1, 1, tokenizer=tokenizer, data=data, source=source)
    create_cache(folder, manifest)
    zeros = np.zeros(1, dtype=np.int64)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 4096, (1, 256))
    write_shard(folder, 0, {"latents": tokens, "labels": zeros, "indices": zeros, "seeds": zeros})
    return [f"latents={folder}"]


def make_tokenizer(folder: Path, data: main_training.Data) -> list[str]:
    """A snapshot of the paper's tokenizer with random weights, and a pair for it."""
    config = load(main_training.TokenizerTrainingRun, "imagenet256/tokenizer.yaml", ["data.path=x"]).tokenizer
    model = RobusTok(config)
    space = encoder_digest(model)
    header = {"kind": "tokenizer", "config": plain(config), "latent_space": space}
    write_snapshot(folder / "tokenizer", header, model.state_dict(), {})
    make_tokens(folder / "pairs", space, open_images(data, 256).fingerprint, {"mode": "direct", "sigma": 0.7})
    return [f"tokenizer={folder / 'tokenizer'}", f"pairs={folder / 'pairs'}"]


def prepare(name: str, folder: Path, words: list[str]) -> tuple[str, common.TrainingConfig]:
    """The verb and its configuration; what it starts from is made in ``folder``."""
    np.save(folder / "image.npy", np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), dtype=np.uint8))
    image = ["data.name=npz", f"data.path={folder / 'image.npy'}", "data.holdout=0"]
    features = {f"features.{k}": v for k, v in vgg16(weights=None).features.state_dict().items()}
    torch.save(features, folder / "vgg16.pth")
    losses = [*image, *LOSSES, f"reconstruction.perceptual_weights={folder / 'vgg16.pth'}"]
    out = [f"out={folder / 'run'}", *COMMON]
    if name == "tokenizer":
        words = [*out, *losses, "workers=0", "picture_every=0", "perturbation.proportion=1", *words]
        return "main-train", load(main_training.TokenizerTrainingRun, "imagenet256/tokenizer.yaml", words)
    if name == "generator":
        words = [*out, *make_tokens(folder / "latents", "random", None, {}), *words]
        return "train-generator", load(generator_training.GeneratorTrainingRun, "imagenet256/generator-l.yaml", words)
    data = load(main_training.TokenizerTrainingRun, "imagenet256/tokenizer.yaml", image).data
    words = [*out, *losses, *make_tokenizer(folder, data), *(RELEASED if name == "released" else []), *words]
    return "post-train", load(post_training.DecoderTrainingRun, "imagenet256/post.yaml", words)


def measure(name: str, words: list[str]) -> dict[str, float]:
    """Run two steps in this process."""
    for module in (tokenizers, semantic, dino):
        module.pretrained_backbone = random_backbone
    runs.RunFolder.save_state = lambda *_: None
    moments, start = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        verb, run = prepare(name, Path(folder), words)
        main_training._write_snapshot = generator_training._write_snapshot = lambda *_: None
        post_training.Snapshots._write = lambda *_: None
        check = state.check_finite
        state.check_finite = lambda *a: moments.append(time.perf_counter()) or check(*a)  # once a step
        facts = estimate(run)
        TRAININGS[verb](run)
    expected = facts["training_memory_bytes"] + facts["activations_bytes"]
    if run.gradient_checkpointing:
        expected = facts["training_memory_bytes"] + facts["checkpointed_activations_bytes"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": moments[-1] - moments[0],
        "peak_gb": peak * 1024 / 1e9,
        "start_gb": start * 1024 / 1e9,
        "estimate_gb": expected / 1e9,
        "parameters": next(value for key, value in facts.items() if key.endswith("_parameters")),
    }


def main() -> None:
    names = [word for word in sys.argv[1:] if "=" not in word] or ["tokenizer", "generator", "post", "released"]
    settings = [word for word in sys.argv[1:] if "=" in word]
    if names[0] == "measure":
        print(json.dumps(measure(names[1], settings)))
        return
    print(f"one step of batch 1 with {torch.get_num_threads()} threads {' '.join(settings)}")
    for name in names:  # each in a process of its own, whose peak is its alone
        command = [sys.executable, __file__, "measure", name, *settings]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{name:10} {found['parameters']:13,} parameters  {found['seconds']:6.1f} s  "
            f"peak {found['peak_gb']:5.2f} GB, {found['start_gb']:.2f} GB of it Python and PyTorch; "
            f"estimated {found['estimate_gb']:5.2f} GB"
        )


if __name__ == "__main__":
    main()
