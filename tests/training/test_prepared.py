"""Accumulation, checkpointing and compilation change memory and time, and nothing else."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import tiny
from robustok.commands.dry_run import estimate
from robustok.data.buckets import bucket_sizes
from robustok.devices import start_accelerator
from robustok.errors import UserError
from robustok.generators.rar import RAR, RARConfig
from robustok.losses.adversarial import adaptive_weight
from robustok.losses.semantic import contrastive_loss
from robustok.runs import RunFolder
from robustok.tokenizers.perturbation import PerturbationConfig, draw_perturbation
from robustok.tokenizers.robustok import RobusTok
from robustok.training import prepared
from robustok.training.adversary import last_layer
from robustok.training.decoder import train_decoder
from robustok.training.generator import cross_entropy, train_generator
from robustok.training.prepared import Prepared, PreparedInParts, adamw, adapt_blocks, blocks_of
from robustok.training.tokenizer import train_tokenizer
from tiny_models import TINY_TOKENIZERS, tiny_tokenizer


def run_with(*words):
    return tiny.main_run("x", *words)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("float32", None)])
def test_sharded_blocks_are_gathered_in_the_precision_of_the_run(monkeypatch, precision, dtype):
    found = []
    monkeypatch.setattr(prepared, "init_device_mesh", lambda *_: None)
    monkeypatch.setattr(prepared, "fully_shard", lambda *_, mp_policy=None, **__: found.append(mp_policy))
    prepared.shard_blocks(rar(), start_accelerator(), precision)
    policies = found[:-1]  # the last call shards nothing
    assert len(policies) == 4
    assert {policy.param_dtype for policy in policies} == {dtype}
    assert {policy.reduce_dtype for policy in policies} == {torch.float32 if dtype else None}
    assert {policy.cast_forward_inputs for policy in policies} == {dtype is None}  # the stream between blocks: float32


def rar(dropout=0.0, depth=2):
    torch.manual_seed(0)
    model = RAR(RARConfig(width=16, depth=depth, heads=2, dropout=dropout), codebook_size=32, length=16, classes=3)
    for module in (*model.blocks, model.adaln_before_head):  # or the blocks would be identities
        nn.init.normal_(module.adaLN_modulation[1].weight, std=0.1)
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def tokenizer_step(*words):
    """Gradients of a step whose losses couple the whole batch: negatives, and an adaptive weight at the last layer."""
    run = run_with("batch_size=8", "tokenizer.encoder.depth=2", *words)
    torch.manual_seed(0)
    model = RobusTok(run.tokenizer).double()
    layer = last_layer(model)
    prepared = PreparedInParts(model, run, start_accelerator(), layer)
    rng = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 16, 16, generator=rng, dtype=torch.float64)
    teacher = torch.randn(8, 16, generator=rng, dtype=torch.float64)
    p = PerturbationConfig(proportion=0.5, strength=4)
    draw = draw_perturbation(8, 16, 1.0, 0.5, rng)
    prepared.train()
    output = prepared(images, p, draw, 4, teacher)
    terms = prepared.means(lambda a, b: {"pixel": (a - b).square().mean()}, images, output.reconstructions)
    adversarial = output.reconstructions.pow(3).mean()
    found = [torch.autograd.grad(x, layer, retain_graph=True)[0] for x in (terms["pixel"], adversarial)]
    weight = adaptive_weight(*found)
    contrast = contrastive_loss(output.semantic_targets, output.semantic_latents)
    loss = terms["pixel"] + weight * adversarial + output.codebook_loss + 0.25 * output.commitment_loss + contrast
    prepared.backward(loss)
    return {"loss": loss.detach(), "weight": weight, "tokens": output.tokens} | gradients(model)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(parts):
    whole, found = tokenizer_step(), tokenizer_step(f"gradient_accumulation={parts}", "gradient_checkpointing=true")
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_term_goes_back_through_its_network_once_however_often_it_is_differentiated(parts):
    network, backward = nn.Linear(3, 1).double(), []
    network.requires_grad_(False).register_full_backward_hook(lambda *_: backward.append(1))
    images = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = nn.Parameter(torch.eye(3, dtype=torch.float64))
    prepared = PreparedInParts(nn.Linear(1, 1), run_with(f"gradient_accumulation={parts}"), start_accelerator(), layer)

    def score(a, b):
        return {"score": (network(a) - network(b).square()).square().mean()}

    expected = 3 * torch.autograd.grad(score(images, images @ layer)["score"], layer)[0]
    backward.clear()
    term = prepared.means(score, images, images @ layer)["score"]
    first = torch.autograd.grad(term, layer, retain_graph=True)[0]
    (2 * term).backward()
    torch.testing.assert_close(first + layer.grad, expected)
    assert len(backward) == parts


@pytest.mark.parametrize("parts", [1, 2])
def test_losses_between_images_in_chunks(monkeypatch, parts):
    """More pixels than fit: the same terms and gradients up to rounding, and no more images in the network at once."""
    torch.manual_seed(0)
    network, sizes = nn.Conv2d(3, 4, 3).double().requires_grad_(False), []
    network.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    images, start = torch.randn(2, 12, 3, 8, 8, dtype=torch.float64)

    def terms(a, b):
        return {"maps": (network(a) - network(b)).square().mean(), "pixel": (a - b).abs().mean()}

    def found():
        decoded = start.clone().requires_grad_()
        run = run_with(f"gradient_accumulation={parts}")
        layer = nn.Parameter(torch.ones(1))
        means = PreparedInParts(nn.Linear(1, 1), run, start_accelerator(), layer).means(terms, images, decoded)
        sum(means.values()).backward()
        return *means.values(), decoded.grad

    whole = found()
    assert set(sizes) == {12 // parts}
    monkeypatch.setattr(prepared, "CHUNK_PIXELS", 5 * 64)
    sizes.clear()
    for value, expected in zip(found(), whole, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    assert sizes == [5, 5, 5, 5, 2, 2]
    plain = start.clone().requires_grad_()
    sum(terms(images, plain).values()).backward()
    torch.testing.assert_close(whole[-1], plain.grad, rtol=1e-12, atol=1e-14)


def test_losses_of_the_parts_alone_would_be_others():
    """What the second pass is for: negatives from a half of the batch are another loss."""
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 8, 4, generator=rng)
    halves = [contrastive_loss(x, y) for x, y in zip(a.split(4), b.split(4), strict=True)]
    assert abs(sum(halves) / 2 - contrastive_loss(a, b)) > 0.1


def generator_step(*words):
    model = rar()
    prepared = Prepared(model, run_with(*words), start_accelerator())
    tokens = torch.randint(32, (8, 16), generator=torch.Generator().manual_seed(1))
    for rows in prepared.parts(8):
        terms = cross_entropy(prepared(tokens[rows], torch.zeros(rows.stop - rows.start, dtype=torch.long)))
        prepared.backward(terms["cross_entropy"])
    return {"norm": prepared.clip(0.05)} | gradients(model)


def test_parts_of_independent_samples():
    whole, found = generator_step(), generator_step("gradient_accumulation=4", "gradient_checkpointing=true")
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)
    assert torch.stack([g.norm() for name, g in found.items() if name != "norm"]).norm() == pytest.approx(
        0.05, rel=1e-4
    )


def test_both_passes_have_the_same_dropout():
    model = rar(dropout=0.5)
    prepared = PreparedInParts(model, run_with("gradient_accumulation=2"), start_accelerator(), model.lm_head.weight)
    seen = []
    model.register_forward_hook(lambda _module, _inputs, output: seen.append(output.prediction.detach()))
    prepared.train()
    torch.manual_seed(3)
    output = prepared(torch.zeros(4, 16, dtype=torch.long), torch.zeros(4, dtype=torch.long))
    prepared.backward(output.prediction.square().mean())
    first, second, *again = seen
    assert torch.equal(torch.stack(again), torch.stack([first, second]))
    assert not torch.equal(first, second)  # the parts themselves differ


def kept_numbers(model):
    """How many numbers autograd keeps."""
    kept = []
    tokens, labels = torch.zeros(4, 16, dtype=torch.long), torch.zeros(4, dtype=torch.long)
    with saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        cross_entropy(model(tokens, labels))["cross_entropy"].backward()
    return sum(kept)


def test_checkpointing_keeps_less_and_changes_no_gradient():
    plain, checkpointed = rar(dropout=0.2, depth=6).train(), rar(dropout=0.2, depth=6).train()
    adapt_blocks(checkpointed, checkpointing=True, compiling=False)
    torch.manual_seed(5)
    before = kept_numbers(plain)
    torch.manual_seed(5)
    after = kept_numbers(checkpointed)
    assert after < 0.3 * before
    expected = gradients(plain)
    assert all(torch.equal(value, expected[name]) for name, value in gradients(checkpointed).items())


def test_compilation_leaves_the_names(monkeypatch):
    compiled, original = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **words: compiled.append(f) or original(f, backend="eager", **words)
    )
    model, plain = rar(), rar()
    adapt_blocks(model, checkpointing=True, compiling=True)
    assert len(compiled) == 2
    assert model.state_dict().keys() == plain.state_dict().keys()
    tokens, labels = torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    for m in (model, plain):
        cross_entropy(m(tokens, labels))["cross_entropy"].backward()
    for name, value in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], value)


def test_a_decoder_is_compiled_for_every_bucket(monkeypatch):
    """Torch's own limit of 8 would leave the other sizes uncompiled, without an error."""
    sizes = bucket_sizes(1024, 16)
    assert len(sizes) > torch._dynamo.config.recompile_limit
    graphs, original = [], torch.compile
    count = lambda graph, _inputs: graphs.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda f, **words: original(f, backend=count, **words))
    model = tiny_tokenizer("kl").requires_grad_()
    adapt_blocks(model, checkpointing=False, compiling=True)
    for height, width in [*sizes, *sizes]:
        model.decoder(torch.zeros(1, model.config.z_channels, height // 64, width // 64))
    assert len(graphs) == len(sizes)


@pytest.mark.parametrize("name", [name for name in TINY_TOKENIZERS if name not in ("robustok", "maetok")])
def test_the_adaptive_weight_does_not_go_through_a_compiled_decoder(name, monkeypatch):
    """Its last layer is not compiled, so that its gradient needs no backward pass of the rest."""
    passes, original = [], torch.compile

    def noting(graph, _inputs):
        def run(*inputs):
            outputs = graph(*inputs)
            outputs[0].register_hook(lambda _gradient: passes.append(1))
            return outputs

        return run

    monkeypatch.setattr(torch, "compile", lambda f, **words: original(f, backend=noting, **words))
    model = tiny_tokenizer(name).requires_grad_()
    with torch.no_grad():
        latents = model.encode(torch.zeros(2, 3, 8, 8))
        expected = model.decode(latents)
    names = model.state_dict().keys()
    adapt_blocks(model, checkpointing=False, compiling=True)
    assert model.state_dict().keys() == names
    found, layer = model.decode(latents), last_layer(model)
    assert torch.equal(found, expected)
    (gradient,) = torch.autograd.grad(found.square().sum(), layer, retain_graph=True)
    assert not passes
    found.square().sum().backward()
    assert passes
    assert torch.equal(layer.grad, gradient)


def test_models_without_blocks_are_refused():
    for words in ((True, False), (False, True)):
        with pytest.raises(UserError, match=r"this model has none that learn; set .*=false"):
            adapt_blocks(nn.Linear(2, 2), *words)
    frozen = rar().requires_grad_(False)
    frozen.blocks[1].requires_grad_(True)
    assert blocks_of(frozen) == [frozen.blocks[1]]


def test_parts_must_divide_the_share_of_a_process():
    start_accelerator(16, 8)
    with pytest.raises(UserError, match="gradient_accumulation 3 does not divide the 16 samples of each process"):
        start_accelerator(16, 3)


# Whole runs


def assert_same_run(folder, other):
    for line, expected in zip(tiny.log(folder), tiny.log(other), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for file in sorted(other.glob("snapshot/*/*.safetensors")):
        found = load_file(folder / file.relative_to(other))
        for name, value in load_file(file).items():
            if not name.endswith(("k_norm.bias", "attn.qkv.bias")):  # a bias of all keys has rounding for a gradient
                tolerance = 1e-3 * value.abs().max().item()
                torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


SMALL = ("gradient_accumulation=4", "gradient_checkpointing=true")


def test_main_training_in_parts(tmp_path, classifier):
    words = (*tiny.ADVERSARY, "adversarial.start=1", "learning_rate=1e-3", "steps=4", "clip_norm=1.0")
    words += ("teacher.name=classifier", f"teacher.path={classifier}", "reconstruction.perceptual=classifier")
    words += (f"reconstruction.perceptual_weights={classifier}", "tokenizer.quantizer.revive_every=2")
    for name, more in (("whole", ()), ("parts", SMALL)):
        train_tokenizer(tiny.main_run(tmp_path / name, *words, *more))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_generator_training_in_parts(tmp_path, latents):
    words = ("generator.dropout=0", "learning_rate=1e-3", "steps=4")
    for name, more in (("whole", ()), ("parts", SMALL)):
        train_generator(tiny.generator_run(tmp_path / name, latents, *words, *more))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_post_training_in_parts(tmp_path, tokenizer, pairs):
    for name, more in (("whole", ()), ("parts", SMALL)):
        train_decoder(tiny.post_run(tmp_path / name, tokenizer, pairs, *tiny.ADVERSARY[:2], "steps=4", *more))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_runs_from_before_these_settings_go_on(tmp_path):
    run = tiny.main_run(tmp_path / "run")
    RunFolder(run).start()
    file = tmp_path / "run" / "config.yaml"
    settings = yaml.safe_load(file.read_text())
    for name in ("gradient_accumulation", "gradient_checkpointing", "compile", "fsdp"):
        del settings[name]
    file.write_text(yaml.safe_dump(settings))
    RunFolder(run)
    RunFolder(tiny.main_run(tmp_path / "run", "gradient_accumulation=2"))
    with pytest.raises(UserError, match=r"another configuration: fsdp: False -> True; set the old values"):
        RunFolder(tiny.main_run(tmp_path / "run", "fsdp=true"))
    file.write_text(json.dumps({"latents": "elsewhere", "steps": 6}))  # of another command
    with pytest.raises(UserError, match=r"another configuration: .*: None ->"):
        RunFolder(run)


class Eight(torch.optim.AdamW):
    """In the place of bitsandbytes' own."""


def test_adam_of_8_bits(tmp_path, monkeypatch):
    run = tiny.main_run(tmp_path, "optimizer=adamw8bit", "betas=[0.5,0.6]")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"needs bitsandbytes .*robustok\[adam8bit\]"):
        adamw(run, torch.device("cuda"))
    with pytest.raises(UserError, match="needs a GPU"):
        adamw(run, torch.device("cpu"))
    with pytest.raises(UserError, match="does not work on shards"):
        adamw(run.model_copy(update={"fsdp": True}), torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=Eight))
    assert adamw(run, torch.device("cuda")) is Eight
    few, many = (estimate(tiny.main_run(tmp_path, f"optimizer={name}")) for name in ("adamw8bit", "adamw"))
    saved = many["training_memory_bytes"] - few["training_memory_bytes"]
    assert saved == pytest.approx(6 * many["tokenizer_parameters"], rel=0.01)  # two moments of 1 byte, not 4
