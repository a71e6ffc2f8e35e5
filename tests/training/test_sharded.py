"""Two processes that share the blocks' weights (FSDP2) do what one process does, and resume what one has begun."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import tiny
from robustok.training import generator as generator_training

SETTINGS = ("fsdp=true", "gradient_accumulation=2", "gradient_checkpointing=true", "learning_rate=1e-3", "clip_norm=1")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, tokenizer, latents, pairs, classifier):
    """Folder of results of one process, and of two; the runs ``resumed`` were begun by one process in both."""
    main = (*tiny.ADVERSARY, "adversarial.start=1", "tokenizer.quantizer.revive_every=2", "steps=4", *SETTINGS)
    main += ("teacher.name=classifier", f"teacher.path={classifier}")
    ar = ("generator.dropout=0", "generator.depth=2", *SETTINGS)
    post = (*tiny.ADVERSARY[:2], "steps=4", *SETTINGS)
    runs = {
        "main": ("main-train", lambda out: tiny.main_run(out, *main)),
        "generator": ("train-generator", lambda out: tiny.generator_run(out, latents, *ar)),
        "resumed": ("train-generator", lambda out: tiny.generator_run(out, latents, *ar)),
        "post": ("post-train", lambda out: tiny.post_run(out, tokenizer, pairs, *post)),
    }
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for world in (one, two):
        with tiny.interrupted(3):
            generator_training.train_generator(runs["resumed"][1](world / "resumed"))
    for name, (command, run) in runs.items():
        tiny.COMMANDS[command][0](run(one / name))
    words = [
        w for name, (command, run) in runs.items() for w in tiny.command(command, run(two / name), two / f"{name}.yaml")
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", tiny.__file__]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return one, two


@pytest.mark.parametrize("name", ["main", "generator", "resumed", "post"])
def test_same_logs_and_weights(worlds, name):
    one, two = (world / name for world in worlds)
    for line, expected in zip(tiny.log(two), tiny.log(one), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for file in (*one.glob("snapshot/*/*.safetensors"), max(one.glob("state/*/*.safetensors"))):
        found, expected = load_file(two / file.relative_to(one)), load_file(file)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].shape == value.shape  # whole, also the optimiser's moments
            if "attn.qkv.bias" in key or "k_norm.bias" in key:  # gradients that are rounding
                continue
            # Such gradients have moments too, without a name; 1e-7 is more than any of them.
            tolerance = 1e-3 * value.abs().max().item() + 1e-7
            torch.testing.assert_close(found[key], value, rtol=0, atol=tolerance, msg=f"{file.name} {key}")


def test_a_resumed_run_ends_as_one_without_interruption(worlds):
    for world in worlds:
        resumed, whole = (
            load_file(max(world.glob(f"{name}/snapshot/*/model.safetensors"))) for name in ("resumed", "generator")
        )
        for key, value in whole.items():
            if not key.endswith("k_norm.bias"):
                torch.testing.assert_close(resumed[key], value, rtol=1e-4, atol=1e-5, msg=key)
