"""Differences between a tokenizer and its post-trained self: exact, small, and mixed at any strength."""

import copy
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import tiny
from robustok.cli import main
from robustok.commands.generate import GenerateRun, generate
from robustok.commands.make_delta import MakeDeltaRun, make_delta
from robustok.errors import UserError
from robustok.snapshots import read_header, read_snapshot, split_scale, write_snapshot
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.tokenizers.deltas import Delta, apply_delta, compute_delta


def moved(module, size=0.1, seed=0):
    """The same module with other weights."""
    rng, other = torch.Generator().manual_seed(seed), copy.deepcopy(module)
    for p in other.parameters():
        p.data += size * torch.randn(p.shape, generator=rng)
    return other


def same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)) for name in a | b)


@pytest.fixture(scope="module")
def post_trained(tmp_path_factory, tokenizer):
    """A snapshot of the tokenizer whose decoder moved, far enough that many weights changed their sign."""
    snapshot, other = read_snapshot(tokenizer, "tokenizer"), load_tokenizer(tokenizer)
    rng = torch.Generator().manual_seed(0)
    for module in other.decoder_modules():
        for p in module.parameters():
            p.data += 0.05 * torch.randn(p.shape, generator=rng)
    path = tmp_path_factory.mktemp("post") / "snapshot"
    header = snapshot.header | {"post_trained": {"steps": 5, "sigma": 0.5}}
    write_snapshot(path, header, other.state_dict(), {})
    return path


def saved(out, tokenizer, post_trained, **settings):
    return make_delta(MakeDeltaRun(out=out, tokenizer=tokenizer, post_trained=post_trained, **settings))


# Functions


def test_both_ends_are_exact_whatever_the_floats():
    """Also where the difference itself is rounded: weights of other sizes and signs, and zeros of both signs."""
    original, post_trained = nn.Linear(100, 40), nn.Linear(100, 40)
    rng = torch.Generator().manual_seed(0)
    for module in (original, post_trained):
        scales = 10.0 ** torch.randint(-12, 6, module.weight.shape, generator=rng)
        module.weight.data = scales * torch.randn(module.weight.shape, generator=rng)
    original.weight.data[0, :2], post_trained.weight.data[0, :2] = torch.tensor([0.0, -0.0]), torch.tensor([-0.0, 0.0])
    delta = compute_delta(original, post_trained)
    assert delta.relative_error == 0
    plain = original.weight + delta.tensors["weight"]
    assert not torch.equal(plain, post_trained.weight)  # the sum alone would not do
    assert same_bits(apply_delta(copy.deepcopy(original), delta, 0), original)
    assert same_bits(apply_delta(copy.deepcopy(original), delta), post_trained)


def test_in_between_is_the_straight_line():
    original = nn.Linear(30, 20)
    post_trained = moved(original)
    delta = compute_delta(original, post_trained)
    for strength in (-0.5, 0.25, 1.5):
        found = apply_delta(copy.deepcopy(original), delta, strength)
        expected = torch.lerp(original.weight.double(), post_trained.weight.double(), strength)
        torch.testing.assert_close(found.weight.double(), expected, atol=1e-6, rtol=0)


def test_what_did_not_change_takes_no_space():
    original = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    post_trained = copy.deepcopy(original)
    post_trained[1].bias.data += 1
    assert compute_delta(original, post_trained).tensors.keys() == {"1.bias"}
    nothing = compute_delta(original, original)
    assert (nothing.tensors, nothing.relative_error) == ({}, 0)


@pytest.mark.parametrize("layer", [nn.Linear(48, 32), nn.Conv2d(8, 24, 3)], ids=["matrix", "convolution"])
def test_a_difference_of_low_rank_is_found(layer):
    post_trained, rows = copy.deepcopy(layer), len(layer.weight)
    rng = torch.Generator().manual_seed(0)
    low = torch.randn(rows, 3, generator=rng) @ torch.randn(3, layer.weight[0].numel(), generator=rng)
    post_trained.weight.data += low.view_as(layer.weight)
    delta = compute_delta(layer, post_trained, rank=3)
    assert delta.tensors["weight:up"].shape == (rows, 3)
    assert delta.relative_error < 1e-6
    found = apply_delta(copy.deepcopy(layer), delta).weight
    torch.testing.assert_close(found, post_trained.weight, atol=1e-5, rtol=0)


def test_the_error_of_a_lora_is_that_of_the_lost_singular_values():
    original = nn.Linear(40, 30)
    post_trained = moved(original)
    found = compute_delta(original, post_trained, rank=5)
    difference = (post_trained.weight - original.weight).double()
    s = torch.linalg.svdvals(difference)
    bias = (post_trained.bias - original.bias).double().square().sum()  # kept whole
    expected = (s[5:].square().sum() / (s.square().sum() + bias)).sqrt().item()
    assert found.relative_error == pytest.approx(expected, rel=1e-4)
    errors = [compute_delta(original, post_trained, rank=rank).relative_error for rank in (1, 4, 9, 15)]
    assert errors == sorted(errors, reverse=True)
    whole = compute_delta(original, post_trained, rank=20)  # 20 * (40 + 30) numbers are more than 40 * 30
    assert whole.tensors.keys() == {"weight", "bias"}


def test_bfloat16_halves_the_size_and_says_what_it_costs():
    original = nn.Linear(50, 50)
    post_trained = moved(original)
    delta = compute_delta(original, post_trained, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in delta.tensors.values()} == {torch.bfloat16}
    assert 1e-4 < delta.relative_error < 2**-8
    found = apply_delta(copy.deepcopy(original), delta).weight
    lost = (found - post_trained.weight).norm() / (post_trained.weight - original.weight).norm()
    assert lost.item() == pytest.approx(delta.relative_error, rel=0.1)


def test_what_is_no_pair_is_refused():
    with pytest.raises(UserError, match="differ in more than numbers, first in bias"):
        compute_delta(nn.Linear(3, 2), nn.Linear(3, 2, bias=False))
    with pytest.raises(UserError, match="first in weight"):
        compute_delta(nn.Linear(3, 2), nn.Linear(4, 2))
    delta = compute_delta(original := nn.Linear(3, 2), moved(original))
    with pytest.raises(UserError, match=f"belongs to the tokenizer with the digest {delta.base}, this one has "):
        apply_delta(moved(original, seed=1), delta)


@pytest.mark.parametrize(
    "tensors",
    [
        {"other": torch.zeros(2, 3)},
        {"weight": torch.zeros(1)},
        {"weight": torch.zeros(2, 4)},
        {"weight:up": torch.zeros(2, 1)},
        {"weight:up": torch.zeros(2, 1), "weight:down": torch.zeros(2, 3)},
        {"weight": torch.zeros(2, 3), "weight:places": torch.tensor([10**13]), "weight:values": torch.zeros(1)},
    ],
    ids=lambda tensors: " ".join(tensors),
)
def test_a_difference_that_does_not_fit_is_refused(tensors):
    original = nn.Linear(3, 2)
    delta = compute_delta(original, moved(original))
    with pytest.raises(UserError, match=r"the difference of (weight|other) does not fit"):
        apply_delta(original, Delta(delta.base, tensors, 0.0))


# Snapshots


def test_a_delta_is_a_tokenizer(tmp_path, tokenizer, post_trained):
    found = saved(tmp_path / "delta", tokenizer, post_trained)
    assert found.relative_error == 0
    assert found.delta_bytes < 0.8 * found.tokenizer_bytes  # no encoder
    assert same_bits(load_tokenizer(tmp_path / "delta"), load_tokenizer(post_trained))
    assert same_bits(load_tokenizer(f"{tmp_path / 'delta'}@0"), load_tokenizer(tokenizer))
    half = load_tokenizer(f"{tmp_path / 'delta'}@0.5")
    assert encoder_digest(half) == encoder_digest(load_tokenizer(tokenizer))
    assert not half.training
    assert read_header(f"{tmp_path / 'delta'}@0.5")["post_trained"] == {
        **{"steps": 5, "sigma": 0.5},
        **{"delta": "whole", "delta_scale": 0.5},
    }
    assert read_header(tmp_path / "delta")["post_trained"]["delta_scale"] == 1
    assert "delta_scale" not in read_header(post_trained)["post_trained"]


def test_the_original_has_to_be_the_very_one(tmp_path, tokenizer, post_trained):
    home = tmp_path / "home"
    base = read_snapshot(tokenizer, "tokenizer")
    write_snapshot(home / "base", base.header, base.weights, {})
    saved(home / "delta", home / "base", post_trained)
    home = home.rename(tmp_path / "moved")  # together they may go anywhere
    assert same_bits(load_tokenizer(home / "delta"), load_tokenizer(post_trained))
    name = next(iter(base.weights))
    write_snapshot(home / "base", base.header, base.weights | {name: base.weights[name] + 1}, {})
    with pytest.raises(UserError, match=r"delta on .*base: the delta belongs to the tokenizer with the digest"):
        load_tokenizer(home / "delta")
    (home / "base").rename(home / "elsewhere")
    with pytest.raises(UserError, match=r"is a difference to .*base, which is missing; put .* delta\.base of "):
        load_tokenizer(home / "delta")


def test_strengths_are_for_deltas(tmp_path, tokenizer, post_trained):
    with pytest.raises(UserError, match=r"is no delta and has no strength; leave the 0\.5 out"):
        load_tokenizer(f"{post_trained}@0.5")
    with pytest.raises(UserError, match="holds no snapshot"):
        load_tokenizer(f"{post_trained}@half")
    odd = tmp_path / "a@2"
    odd.mkdir()
    assert split_scale(odd) == (odd, None)  # a folder may be called so
    first = saved(tmp_path / "delta", tokenizer, post_trained)
    assert saved(tmp_path / "delta", tokenizer, post_trained) == first  # once more, as after a kill
    with pytest.raises(UserError, match="exists and holds something else"):
        saved(tmp_path / "delta", tokenizer, tokenizer)
    with pytest.raises(UserError, match=r"delta@1e300: the strength 1e\+300 is no finite number"):
        load_tokenizer(f"{tmp_path / 'delta'}@1e300")


def test_generate_and_evaluate_take_strengths(tmp_path, tokenizer, post_trained, generator, samples, classifier):
    delta = tmp_path / "delta"
    words = [f"tokenizer={tokenizer}", f"post_trained={post_trained}", f"out={delta}", "rank=2", "dtype=bfloat16"]
    assert main(["make-delta", *words]) == 0
    assert yaml.safe_load((delta / "config.yaml").read_text())["delta"]["rank"] == 2
    assert {t.dtype for t in load_file(delta / "model.safetensors").values()} == {torch.bfloat16}
    out = tmp_path / "samples"
    generate(GenerateRun(out=out, generator=generator, count=4, tokenizer=f"{delta}@0.5", images="npz"))
    assert (out / "samples.npz").exists()
    decoders = {"original": tokenizer, "s0": f"{delta}@0", "s50": f"{delta}@0.5", "s100": delta}
    words = [f"samples.decoders.{name}={path}" for name, path in decoders.items()]
    words += [f"samples.latents=[{samples[0]}]", "metrics=[gfid]", f"extractor.path={classifier}", *tiny.DATA]
    assert main(["evaluate", *words, f"out={tmp_path / 'run'}"]) == 0
    lines = [yaml.safe_load(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {line["decoder"]: line for line in lines if line["metric"] == "gfid"}
    assert [found[name].get("delta_scale") for name in decoders] == [None, 0.0, 0.5, 1.0]
    assert found["s0"]["value"] == found["original"]["value"]
    assert len({found[name]["value"] for name in ("s0", "s50", "s100")}) == 3
    assert all(math.isfinite(line["value"]) for line in lines)


def test_the_card_of_a_delta_says_what_it_needs(tmp_path, tokenizer, post_trained):
    found = saved(tmp_path / "delta", tokenizer, post_trained, rank=1)
    card = (tmp_path / "delta" / "README.md").read_text()
    for said in ("rank 1, float32", f"{found.relative_error:.3g}", "`@0.5`", "| sigma | 0.5 |", "snapshot/00000060"):
        assert said in card
