"""What is counted without memory is what a real forward pass keeps."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import tiny
from robustok.generators.rar import RAR, RARConfig
from robustok.tokenizers.robustok import RobusTok
from robustok.training.activations import count_activations
from robustok.training.prepared import adapt_blocks, blocks_of


def kept(model, forward, samples):
    """Bytes of the storages that a real forward pass saves, weights aside."""
    storages, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no address is used twice
        return x

    with saved_tensors_hooks(note, lambda x: x):
        forward(model, samples)
    return sum(s.nbytes() for pointer, s in storages.items() if pointer not in weights)


def rar():
    return RAR(RARConfig(width=16, depth=5, heads=2), codebook_size=32, length=16, classes=3)


def tokenizer():
    run = tiny.main_run("x", "tokenizer.encoder.depth=3", "tokenizer.decoder.depth=3")
    return RobusTok(run.tokenizer)


FORWARD = {
    rar: lambda m, n: m(torch.zeros(n, 16, dtype=torch.long), torch.zeros(n, dtype=torch.long)).prediction.square(),
    tokenizer: lambda m, n: m(torch.zeros(n, 3, 16, 16)).reconstructions.square(),
}


@pytest.mark.parametrize("build", FORWARD, ids=lambda f: f.__name__)
def test_against_a_real_pass(build):
    counted = count_activations(build, FORWARD[build], "float32")
    small, large = (kept(build().eval(), FORWARD[build], n) for n in (8, 16))
    assert counted.sample == pytest.approx((large - small) / 8, rel=0.02)


@pytest.mark.parametrize("build", FORWARD, ids=lambda f: f.__name__)
def test_checkpointing_against_a_real_pass(build):
    counted = count_activations(build, FORWARD[build], "float32")
    model = build().eval()
    adapt_blocks(model, checkpointing=True, compiling=False)
    small, large = (kept(model, FORWARD[build], n) for n in (8, 16))
    one_block = (counted.sample - counted.checkpointed) / (len(blocks_of(model)) - 1)
    assert counted.checkpointed == pytest.approx((large - small) / 8 + one_block, rel=0.03)
    assert counted.checkpointed < 0.5 * counted.sample


def test_bf16_keeps_about_half_and_a_copy_of_the_weights():
    build = lambda: nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))  # noqa: E731
    wide, narrow = (count_activations(build, lambda m, n: m(torch.zeros(n, 64)), p) for p in ("float32", "bf16"))
    assert (wide.sample, wide.fixed) == (2 * 64 * 4, 0)
    assert narrow.sample == 2 * 64 * 2
    assert narrow.fixed == 64 * 64 * 2  # of the second layer: the first has no gradient to pass on
