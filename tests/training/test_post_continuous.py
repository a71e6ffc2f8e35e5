"""Post-training of every family of tokenizers, and all commands in a row on continuous latents."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
from robustok.cli import main
from robustok.commands.encode import encode
from robustok.config import plain, validate
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache, Manifest, create_cache, write_shard
from robustok.data.sources import Digits
from robustok.errors import UserError
from robustok.snapshots import write_snapshot
from robustok.tokenizers import TOKENIZERS, encoder_digest, frozen_weights, load_tokenizer
from robustok.training.decoder import train_decoder
from tiny_models import TINY_TOKENIZERS, TWO_LEVELS

SIDES = {side: {"width": 8, "multipliers": [1, 1, 2], "blocks": 1, "groups": 4} for side in ("encoder", "decoder")}
VIT = {"width": 16, "depth": 1, "heads": 2}
QUANTIZER = {"quantizer": {"size": 32, "dim": 4}}
SIZES = {
    "robustok": {"encoder": VIT, "decoder": VIT, "patch_size": 4} | QUANTIZER,
    "llamagen": SIDES | {"z_channels": 12} | QUANTIZER,
    "maskgit": {s: v | {"attention": [], "middle_attention": False} for s, v in SIDES.items()} | QUANTIZER,
    "gigatok": SIDES
    | QUANTIZER
    | {"z_channels": 12, "latents": 8, "grid_to_row": VIT, "row_to_grid": VIT}
    | {"alignment": {"width": 10, "hidden": 20, "depth": 1}},
    "kl": SIDES | {"z_channels": 12, "dim": 5},
    "maetok": {"encoder": VIT, "decoder": VIT, "patch_size": 4, "latents": 6, "latent_dim": 5},
    "diffusers_kl": {
        "settings": {"block_out_channels": [8, 16], "latent_channels": 3} | TWO_LEVELS,
    },
    "robustok fsq": {"encoder": VIT, "decoder": VIT, "patch_size": 4}
    | {"quantizer": {"name": "fsq", "levels": [5, 4, 3]}},
    "llamagen lfq": SIDES | {"z_channels": 12, "quantizer": {"name": "lfq", "bits": 5}},
    "diffusers_dc": TINY_TOKENIZERS["diffusers_dc"],
    "diffusers_vq": TINY_TOKENIZERS["diffusers_vq"],
    "diffusers_qwen": TINY_TOKENIZERS["diffusers_qwen"],
}
GENERATOR = ("generator.name=sit", "generator.width=16", "generator.depth=1", "generator.heads=2")
ADVERSARY = (*tiny.ADVERSARY, "adversary_warmup=3")


def snapshot_of(name, path):
    """A tokenizer of this family with random weights."""
    torch.manual_seed(0)
    family, config = TOKENIZERS[name.split()[0]]
    model = family(validate(config, {"name": name.split()[0], "image_size": 16} | SIZES[name])).eval()
    header = {"kind": "tokenizer", "config": plain(model.config), "latent_space": encoder_digest(model)}
    write_snapshot(path, header, model.state_dict(), {})
    return path


def weights(path, name="model"):
    return load_file(path / f"{name}.safetensors")


@pytest.mark.parametrize("name", SIZES)
def test_the_decoder_of_every_family_learns_and_nothing_else(tmp_path, name):
    assert TOKENIZERS.keys() <= SIZES.keys()
    if name.startswith("diffusers") and importlib.util.find_spec("diffusers") is None:
        pytest.skip("needs diffusers")
    tokenizer = snapshot_of(name, tmp_path / "tokenizer")
    pairs = encode(tiny.tokens_run(tmp_path / "pairs", tokenizer))  # real latents are pairs too, those of the control
    words = ("steps=2", *ADVERSARY)  # an adaptive weight too, which asks every decoder for its last layer
    path = train_decoder(tiny.post_run(tmp_path / "run", tokenizer, pairs, *words))
    before, after = load_tokenizer(tokenizer), load_tokenizer(path)
    assert encoder_digest(before) == encoder_digest(after) == LatentCache(pairs).manifest.tokenizer
    frozen = frozen_weights(before)
    changed = {n for n, value in after.named_parameters() if not torch.equal(value, before.get_parameter(n))}
    assert not changed & frozen.keys()
    learning = {n for n, _ in before.named_parameters()} - frozen.keys()
    assert len(changed) > 0.8 * len(learning)
    last = tiny.log(tmp_path / "run")[-1]
    assert 0 < last["adaptive_weight"] <= 1e4
    header = yaml.safe_load((path / "config.yaml").read_text())
    assert header["protocol"]["adversary"] == "reinit_warmup, 3 steps"
    assert header.get("licence") == getattr(before, "licence", None)


@pytest.mark.parametrize("name", ["kl", "maetok"])
def test_all_commands_on_continuous_latents(tmp_path, name, classifier):
    def run(command, out, *words):
        assert main([command, f"out={tmp_path / out}", *words]) == 0, command
        return tmp_path / out

    short = [w for w in tiny.TRAINING if not w.startswith("steps")]
    sizes = [f"tokenizer.{key}={json.dumps(value)}" for key, value in {"image_size": 16, **SIZES[name]}.items()]
    losses = [
        "reconstruction.perceptual=none",
        "adversarial.weight=0",
        "teacher.name=none",
        "perturbation.proportion=0",
    ]
    tokenizer = run("main-train", "tokenizer", f"tokenizer.name={name}", *sizes, *tiny.DATA, *short, "steps=5", *losses)
    latents = run("encode", "latents", f"tokenizer={tokenizer}", *tiny.DATA, "cache.dtype=bfloat16")
    sampling = ("sampling.name=diffusion", "sampling.steps=4")
    generator = run("train-generator", "generator", f"latents={latents}", *GENERATOR, *short, "steps=5", *sampling)
    images = (f"tokenizer={tokenizer}", "images=npz")
    samples = run("generate", "samples", f"generator={generator}", "count=40", *images)
    mixing = ("sigma=0.5", "cache.dtype=float16")
    pairs = run("make-pairs", "pairs", f"generator={generator}", f"latents={latents}", *mixing)
    scored = (f"held_out.latents={samples}", f"held_out.extractor.path={classifier}")
    terms = ("reconstruction.perceptual=none", *tiny.DATA, *short, "steps=4", "snapshot_every=2", *ADVERSARY)
    post = run("post-train", "post", f"tokenizer={tokenizer}", f"pairs={pairs}", *terms, *scored)
    decoders = (
        f"samples.decoders.original={tokenizer}",
        f"samples.decoders.post_trained={post / 'snapshot' / '00000004'}",
    )
    metrics = (f"samples.latents=[{samples}]", f"extractor.path={classifier}", "metrics=[gfid]")
    measured = run("evaluate", "measured", *decoders, *metrics, *tiny.DATA)

    before, after = load_tokenizer(tokenizer), load_tokenizer(post / "snapshot" / "00000004")
    data = open_images(Digits(limit=128), 16).read(range(16)).images
    assert torch.equal(before.encode(data), after.encode(data))
    assert not torch.equal(before.decode(before.encode(data)), after.decode(before.encode(data)))
    stored = LatentCache(latents).read(range(16))
    torch.testing.assert_close(stored.latents, before.encode(data[:16]), atol=1e-5, rtol=2**-8)
    assert LatentCache(pairs).manifest.dtype == "float16"
    assert [line["step"] for line in tiny.log(post) if "held_out" in line] == [0, 2, 4]
    header = yaml.safe_load((post / "snapshot" / "00000004" / "config.yaml").read_text())
    assert (header["post_trained"]["sigma"], header["protocol"]["strategy"]) == (0.5, "sdedit")
    assert header["protocol"]["generator"] == LatentCache(samples).manifest.source["generator"]
    card = (post / "snapshot" / "00000004" / "README.md").read_text()
    assert "sigma" in card
    lines = [json.loads(line) for line in (measured / "metrics.jsonl").read_text().splitlines()]
    assert {line["decoder"] for line in lines if line["metric"] == "gfid"} == {"original", "post_trained"}


# Where the discriminator comes from


def policy_run(out, tokenizer, pairs, policy, *words):
    return tiny.post_run(out, tokenizer, pairs, "steps=1", *ADVERSARY, f"adversary={policy}", *words)


def test_auto_takes_what_is_there(tmp_path, tokenizer, pairs):
    train_decoder(policy_run(tmp_path / "auto", tokenizer, pairs, "auto"))
    train_decoder(policy_run(tmp_path / "carried", tokenizer, pairs, "carried"))
    found = [weights(tmp_path / name / "snapshot" / "00000001", "discriminator") for name in ("auto", "carried")]
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())
    header = yaml.safe_load((tmp_path / "auto" / "snapshot" / "00000001" / "config.yaml").read_text())
    assert header["protocol"]["adversary"] == "carried"


def test_a_warm_discriminator_knows_the_untouched_decoder(tmp_path, tokenizer, pairs):
    """After its warm-up it separates real from decoded images better than a new one; the decoder has not changed."""
    decoded = load_tokenizer(tokenizer)
    for name, words in {
        "fresh": (),
        "reinit_warmup": ("adversary_warmup=40", "adversarial.learning_rate=1e-2"),
    }.items():
        train_decoder(policy_run(tmp_path / name, tokenizer, pairs, name, "learning_rate=1e-12", *words))
    logs = {name: tiny.log(tmp_path / name) for name in ("fresh", "reinit_warmup")}
    assert [line["step"] for line in logs["reinit_warmup"]] == [0, 1]
    assert logs["reinit_warmup"][0]["adversary_warmup"] == 40
    assert [line["step"] for line in logs["fresh"]] == [1]
    assert logs["reinit_warmup"][-1]["d_hinge"] < 0.9 * logs["fresh"][-1]["d_hinge"]
    for name in logs:
        for key, value in weights(tmp_path / name / "snapshot" / "00000001").items():
            torch.testing.assert_close(value, decoded.state_dict()[key], atol=1e-9, rtol=0)


def test_none_is_no_discriminator(tmp_path, tokenizer, pairs):
    path = train_decoder(policy_run(tmp_path / "run", tokenizer, pairs, "none"))
    assert not (path / "discriminator.safetensors").exists()
    header = yaml.safe_load((path / "config.yaml").read_text())
    assert "discriminator" not in header
    assert header["protocol"]["adversary"] == "none"
    assert "adversarial" not in tiny.log(tmp_path / "run")[-1]


# Continuing


def test_a_run_continues_another(tmp_path, tokenizer, pairs):
    """With the same settings it is the same training; with others it goes on from the same weights."""
    words = (*ADVERSARY, "adversary=reinit_warmup", "min_learning_rate=1e-3", "adversarial.learning_rate=1e-3")
    whole = train_decoder(tiny.post_run(tmp_path / "whole", tokenizer, pairs, *words, "steps=6", "state_every=6"))
    train_decoder(tiny.post_run(tmp_path / "short", tokenizer, pairs, *words, "steps=2"))
    go_on = (*words, "steps=6", f"continue_from={tmp_path / 'short'}")
    long = train_decoder(tiny.post_run(tmp_path / "long", tokenizer, pairs, *go_on))
    assert [line["step"] for line in tiny.log(tmp_path / "long")] == [3, 4, 5, 6]
    for file in ("model", "discriminator"):
        for name, value in weights(whole, file).items():
            torch.testing.assert_close(weights(long, file)[name], value, atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match=r"cannot read .*nowhere.*No such file"):
        train_decoder(tiny.post_run(tmp_path / "c", tokenizer, pairs, f"continue_from={tmp_path / 'nowhere'}"))


# Storage


@pytest.mark.parametrize(
    ("dtype", "size", "error"), [("float32", 4, 0), ("float16", 2, 2**-11), ("bfloat16", 2, 2**-8)]
)
def test_latents_are_stored_as_asked(tmp_path, dtype, size, error):
    manifest = Manifest("continuous", (3, 2), None, 4, 5, 5, tokenizer="t", dtype=dtype)
    create_cache(tmp_path, manifest)
    latents = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    ints = np.arange(5) % 4
    write_shard(tmp_path, 0, {"latents": latents, "labels": ints, "indices": ints, "seeds": ints})
    found = LatentCache(tmp_path)
    assert found.read([4, 0]).latents.dtype == torch.float32
    torch.testing.assert_close(found.read([4, 0]).latents, latents[[4, 0]], atol=0, rtol=error)
    assert found.manifest == manifest
    assert manifest.record_bytes == 6 * size + 21
    assert weights(tmp_path, "shard-00000")["latents"].dtype == getattr(torch, dtype)


def test_latents_too_large_for_their_type(tmp_path):
    create_cache(tmp_path, Manifest("continuous", (1, 1), None, 1, 1, 1, tokenizer="t", dtype="float16"))
    zero = np.zeros(1, dtype=np.int64)
    fields = {"latents": np.full((1, 1, 1), 1e5), "labels": zero, "indices": zero, "seeds": zero}
    with pytest.raises(UserError, match="are too large for float16; store them as float32 or bfloat16"):
        write_shard(tmp_path, 0, fields)


def test_a_cache_that_cannot_fit_is_not_begun(tmp_path, tokenizer, monkeypatch):
    usage = lambda path: type("Usage", (), {"free": 1000})  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(UserError, match=r"needs 6.78e-06 GB for 128 records, 1e-06 GB are free; free some space"):
        encode(tiny.tokens_run(tmp_path / "cache", tokenizer))
