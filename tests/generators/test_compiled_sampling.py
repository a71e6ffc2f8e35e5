import os
import shutil
from importlib import import_module

import pytest
import torch

import tiny
from robustok.commands.generate import generate
from robustok.data.latent_cache import LatentCache
from robustok.errors import UserError
from robustok.randomness import image_rngs
from tiny_models import tiny_generator
from tiny_tokens import GUIDED, MODELS, batch, build, forced_logits, full_logits

COMPILER = shutil.which(os.environ.get("CXX", "g++"))


@pytest.fixture
def uncompiled(monkeypatch):
    """A ``torch.compile`` that leaves functions as they are: the static step is tested where no compiler is, too."""
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)
    monkeypatch.setattr(shutil, "which", lambda name: name)


def sample(model, count=4):
    return model.generate(batch(4)[1][:count], GUIDED, image_rngs(0, range(count)))


@torch.no_grad()
def compiled(name):
    """A model told to compile, after its logits and tokens have been those of one that was not, with any weights."""
    model, other = build(name), build(name, seed=1)
    tokens, labels, _ = batch(4)
    full, plain = full_logits(model, tokens, labels, GUIDED), sample(model)
    model.compile_sampling()
    static = forced_logits(model, tokens, labels, GUIDED)
    assert full.std() > 0.3
    assert (static - full).abs().max() < 1e-5 * max(1, full.abs().max())
    assert torch.equal(sample(model), plain)
    model.load_state_dict(other.state_dict())
    changed = sample(model)
    assert torch.equal(changed, sample(other))
    assert not torch.equal(changed, plain)
    return model, changed


@pytest.mark.parametrize("name", MODELS)
def test_a_static_step_gives_the_same_tokens_in_memory_that_is_kept(name, uncompiled):
    model, expected = compiled(name)
    cache = model._static_caches[0]
    memory = cache.keys.data_ptr()
    cache.values.fill_(torch.nan)  # of an earlier run
    assert torch.equal(sample(model), expected)
    assert cache.keys.data_ptr() == memory  # a CUDA graph remembers it
    with torch.autocast("cpu", torch.bfloat16):
        sample(model)
    assert cache.keys.dtype == torch.bfloat16
    assert torch.equal(sample(model, count=3), expected[:3])


@pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("name", ["rar", "llamagen"])
def test_a_compiled_step_gives_the_same_tokens(name):
    compiled(name)


def test_the_command_compiles_where_it_can(tmp_path, generator, samples, monkeypatch, uncompiled):
    made = LatentCache(generate(tiny.samples_run(tmp_path / "a", generator, "seed=1", "cache.compile=true")))
    assert torch.equal(made.read(slice(None)).latents, LatentCache(samples[0]).read(slice(None)).latents)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
        generate(tiny.samples_run(tmp_path / "b", generator, "cache.compile=true"))
    monkeypatch.setattr(
        import_module("robustok.commands.generate"), "load_generator", lambda path: tiny_generator("sit")
    )
    with pytest.raises(UserError, match="compile=true is for generators of tokens"):
        generate(tiny.samples_run(tmp_path / "c", generator, "cache.compile=true"))
