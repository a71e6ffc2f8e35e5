import copy
import os
import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch

import tiny
from robustok.commands.generate import generate
from robustok.data.latent_cache import LatentCache
from robustok.errors import UserError
from robustok.generators.sampling import Sampling
from robustok.generators.token_batch import cache_lengths
from robustok.precision import cast_weights
from robustok.randomness import image_rngs
from tiny_models import tiny_generator
from tiny_tokens import GUIDED, MODELS, batch, build, forced_logits, full_logits
from waiting_copies import Copies

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
    """A model with a compiled step, whose tokens equal those of an uncompiled one, whatever the weights."""
    model, other = build(name), build(name, seed=1)
    plain = sample(model)
    model.compile_sampling()
    assert torch.equal(sample(model), plain)
    model.load_state_dict(other.state_dict())
    changed = sample(model)
    assert torch.equal(changed, sample(other))
    assert not torch.equal(changed, plain)
    return model, changed


@pytest.mark.parametrize("name", MODELS)
def test_a_static_step_gives_the_same_tokens_in_memory_that_is_kept(name, uncompiled):
    model, expected = compiled(name)
    cache = model._compiled.batch.caches[0]
    memory = cache.keys.data_ptr()
    cache.values.fill_(torch.nan)  # of an earlier run
    assert torch.equal(sample(model), expected)
    assert torch.equal(sample(model, count=3), expected[:3])  # in the memory of four
    assert model._compiled.batch.caches[0].keys.data_ptr() == memory  # a CUDA graph remembers it


def test_a_generator_without_attention_samples_one_batch_after_another(uncompiled):
    """The bigram of CONTRIBUTING.md, which has no keys and values to keep."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    bigram = {"__name__": "bigram"}
    exec(re.search(r"^```python\n(# src/robustok/generators/bigram.py\n.*?)^```", text, re.M | re.S)[1], bigram)
    torch.manual_seed(0)
    model = bigram["Bigram"](bigram["BigramConfig"](), codebook_size=32, length=9, classes=5)
    expected = sample(model)
    model.compile_sampling()
    memory = [(sample(model), model._compiled.batch)[1] for _ in range(2)]
    assert memory[0] is memory[1]
    assert torch.equal(sample(model), expected)
    assert torch.equal(sample(model, count=3), expected[:3])
    with torch.autocast("cpu", torch.bfloat16):  # of another type
        sample(model)
    assert model._compiled.batch is not memory[0]


@pytest.mark.parametrize("sampling", [Sampling(), GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_static_step_has_the_same_logits(name, sampling, uncompiled):
    model = build(name).double()
    tokens, labels, _ = batch(4)
    full = full_logits(model, tokens, labels, sampling)
    model.compile_sampling()
    assert (forced_logits(model, tokens, labels, sampling) - full).abs().max() < 1e-11


def test_under_autocast_rounded_weights_and_a_static_step_give_the_same_tokens(uncompiled):
    model = build("rar")
    with torch.autocast("cpu", torch.bfloat16):
        expected = sample(model)
        cast_weights(model, "bf16")
        assert torch.equal(sample(model), expected)
        model.compile_sampling()
        assert torch.equal(sample(model), expected)
    assert model._compiled.batch.caches[0].keys.dtype == torch.bfloat16


def test_a_copy_of_a_compiled_model_is_not_compiled(uncompiled):
    model = build("rar")
    model.compile_sampling()
    sample(model)
    other = copy.deepcopy(model)
    assert other._compiled.functions is None
    assert other._compiled.batch is None
    assert torch.equal(sample(other), sample(model))


@pytest.mark.parametrize(("name", "sampling"), [("rar", GUIDED), ("gigatok_adaln", GUIDED), ("llamagen", Sampling())])
def test_blocks_share_one_graph_for_each_length_of_the_cache(name, sampling, monkeypatch):
    """And the draw has one. Other weights and smaller batches compile nothing."""
    graphs, backend = [], torch.compile
    counting = lambda graph, inputs: graphs.append(graph) or graph  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda f, **settings: backend(f, backend=counting, **settings))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    model, length = build(name, length=25, depth=2), 25
    labels = batch(4)[1]
    generate = lambda count: model.generate(labels[:count], sampling, image_rngs(0, range(count)))  # noqa: E731
    expected = generate(4)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_sampling()
    first = generate(4)
    used = {model._compiled.batch.end(position) for position in range(model._compiled.batch.first + 1, length)}
    assert len(used) == 4
    assert len(graphs) == 4 + 1
    for count in (4, 3, 1):
        assert torch.equal(generate(count), expected[:count])
    model.load_state_dict(build(name, seed=1, length=25, depth=2).state_dict())
    changed = generate(4)
    assert len(graphs) == 4 + 1
    assert not torch._dynamo.utils.counters["graph_break"]  # fullgraph=True would raise
    assert torch.equal(first, expected)
    assert not torch.equal(changed, expected)


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_sampling_does_not_wait_for_the_device(name, static, uncompiled):
    """On PyTorch's meta device reading a tensor is an error; copies of pageable memory wait."""
    model = build(name).to("meta")
    if static:
        model.compile_sampling()
    reference, labels, _ = batch(4)
    with Copies() as copies:
        tokens = model.generate(labels, GUIDED, image_rngs(0, range(4)), reference, 0.5)
    assert tokens.is_meta
    assert tokens.shape == reference.shape
    assert not copies.waiting


def test_cache_lengths_cover_the_sequence():
    assert cache_lengths(257) == [72, 144, 216, 264]
    assert cache_lengths(256) == [64, 128, 192, 256]
    assert cache_lengths(10) == [8, 16]
    assert cache_lengths(3) == [8]
    for capacity in range(1, 700):
        lengths = cache_lengths(capacity)
        assert lengths == sorted(set(lengths))
        assert len(lengths) <= 4
        assert capacity <= lengths[-1] < capacity + 8


@pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_step_gives_the_same_tokens():
    compiled("rar")


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
