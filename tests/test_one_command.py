"""One command from released files to a released file whose decoder alone is another."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from robustok.cli import main
from robustok.convert import load_released
from robustok.latents import LatentCache
from robustok.tokenizers import frozen_weights, load_tokenizer
from tiny_models import CLASSES, RELEASES, released

QUICK = ["steps=2", "batch_size=8", "mixture.count=16", "precision=float32", "learning_rate=1e-2", "ema_decay=0.5"]
QUICK += ["log_every=1", "state_every=1", "snapshot_every=0", "reconstruction.perceptual=none", "adversary_warmup=1"]
QUICK += ["discriminator={name: patch, width: 8, depth: 1}", "adversarial.weight=0.1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images in as many classes as the tiny generators have."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir()
        for i in range(6):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{i}.png")
    return folder


def config_word(name, family):
    return f"{name}.config={json.dumps(RELEASES[family][1])}"


@pytest.fixture
def llamagen(tmp_path, images):
    """The words of the command, on tiny files in LlamaGen's layout."""
    files = {"tokenizer": "llamagen_tokenizer", "generator": "llamagen_gpt"}
    for name, family in files.items():
        torch.save({"model": released(family)[0]}, tmp_path / f"{name}.pt")
    sampling = ["mixture.sampling.guidance_scale=1.5"]
    given = [f"{name}.weights={tmp_path}/{name}.pt" for name in files]
    configs = [config_word(name, family) for name, family in files.items()]
    return ["post-train", "pairs/llamagen.yaml", *given, *configs, f"data.path={images}", *QUICK, *sampling]


def test_llamagen(capsys, tmp_path, llamagen):
    out = tmp_path / "post"
    assert main([*llamagen, f"out={out}"]) == 0, capsys.readouterr().err
