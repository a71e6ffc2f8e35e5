"""The estimate of activations against what autograd really saves in a training step."""

from contextlib import contextmanager

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import tiny
from robustok.commands.dry_run import estimate, saved_bytes
from robustok.generators.rar import RAR, RARConfig
from robustok.tokenizers.robustok import RobusTok
from robustok.training.generator import train_generator
from robustok.training.prepared import adapt_blocks
from robustok.training.tokenizer import train_tokenizer


@contextmanager
def measured(weights=()):
    """Yields a function that returns the bytes of the storages saved so far, without those of the weights."""
    storages, excluded = {}, {p.untyped_storage().data_ptr() for p in weights}

    def note(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no address is used twice
        return x

    with saved_tensors_hooks(note, lambda x: x):
        yield lambda: sum(s.nbytes() for pointer, s in storages.items() if pointer not in excluded)


def rar():
    return RAR(RARConfig(width=16, depth=5, heads=2), codebook_size=32, length=16, classes=3)


def tokenizer():
    run = tiny.main_run("x", "tokenizer.encoder.depth=3", "tokenizer.decoder.depth=3")
    return RobusTok(run.tokenizer)


INPUTS = {
    rar: lambda n: (torch.zeros(n, 16, dtype=torch.long), torch.zeros(n, dtype=torch.long)),
    tokenizer: lambda n: (torch.zeros(n, 3, 16, 16),),
}


def really_saved(build, count, checkpointing=False):
    model = build().eval()
    adapt_blocks(model, checkpointing, compiling=False)
    with measured(model.parameters()) as saved:
        model(*INPUTS[build](count))
        return saved()


def counted(build, count, checkpointing=False):
    with torch.device("meta"):
        model, inputs = build(), INPUTS[build](count)
    adapt_blocks(model, checkpointing, compiling=False)
    return saved_bytes(model, *inputs)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("build", INPUTS, ids=lambda f: f.__name__)
def test_a_forward_pass_is_counted_within_5_percent(build, checkpointing):
    found = counted(build, 16, checkpointing)
    assert found == pytest.approx(really_saved(build, 16, checkpointing), rel=0.05)
    per_sample = (found - counted(build, 8, checkpointing)) / 8
    real = (really_saved(build, 16, checkpointing) - really_saved(build, 8, checkpointing)) / 8
    assert per_sample == pytest.approx(real, rel=0.05)


def test_checkpointing_keeps_one_block_at_a_time(latents):
    facts = estimate(tiny.generator_run("x", latents, "generator.depth=5", "batch_size=16"))
    assert facts["checkpointed_activations_bytes"] < 0.5 * facts["activations_bytes"]
    plain, inputs = counted(rar, 16), counted(rar, 16, checkpointing=True)
    assert inputs + (plain - inputs) / 5 < 0.5 * plain


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_step_of_a_generator_is_estimated_within_a_factor_of_1_5(tmp_path, latents, precision):
    run = tiny.generator_run(tmp_path / "run", latents, "steps=1", "batch_size=64", f"precision={precision}")
    facts = estimate(run)
    with measured() as saved:
        train_generator(run)
        real = saved()
    assert facts["activation_dtype"] == precision
    assert 1 / 1.5 < facts["activations_bytes"] / real < 1.5


def test_a_step_of_a_tokenizer_is_estimated_within_a_factor_of_1_5(tmp_path):
    run = tiny.main_run(tmp_path / "run", "steps=1", "batch_size=64")
    facts = estimate(run)
    with measured() as saved:
        train_tokenizer(run)
        real = saved()
    assert 1 / 1.5 < facts["activations_bytes"] / real < 1.5
