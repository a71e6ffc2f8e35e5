"""Two processes do what one does: the same global batches, the same numbers up to rounding, every image once."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import tiny
from robustok.data.latent_cache import LatentCache
from robustok.metrics.features.classifier import ClassifierConfig, SmallClassifier, save_classifier


def settings(tokenizer, latents, generator, samples, pairs, classifier, guide):
    """Command to its configuration in a folder; every command starts from the same inputs, made by one process."""
    everything = (*tiny.every_term(classifier), "adversarial.start=2", "log_every=2", "learning_rate=1e-3")
    held_out = (f"held_out.latents={samples[0]}", f"held_out.extractor.path={classifier}", "snapshot_every=3")
    frechet = (
        "objective=free",
        "pairs=null",
        f"samples={samples[0]}",
        "adversarial.adaptive=false",
        "frechet.weight=1",
        "frechet.decay=0.5",
    )
    frechet += (f"frechet.extractors=[{{path: {guide}}}]",)
    scored = (
        *tiny.DATA,
        "data.limit=101",
        f"tokenizer={tokenizer}",
        f"samples.latents=[{samples[0]},{samples[1]}]",
        f"extractor.path={classifier}",
        f"samples.decoders={{original: {tokenizer}}}",
        "metrics=[rfid,psnr,ssim,codebook,pfid,ifid,gfid,gfid_validation,fdr,kid,sliced_wasserstein,gap]",
        "pfid.grid.rates=[0.5]",
        "pfid.grid.shares=[0.1]",
    )
    return {
        "main-train": lambda out: tiny.main_run(out, *everything),
        "encode": lambda out: tiny.tokens_run(out, tokenizer, "cache.shard_size=30", "crops=ten"),
        "train-generator": lambda out: tiny.generator_run(out, latents, "generator.dropout=0", "learning_rate=1e-3"),
        "generate": lambda out: tiny.samples_run(
            out, generator, "cache.shard_size=11", f"tokenizer={tokenizer}", "images=npz"
        ),
        "make-pairs": lambda out: tiny.pairs_run(out, generator, latents, "cache.shard_size=50", "sigma=0.5"),
        "post-train": lambda out: tiny.post_run(
            out, tokenizer, pairs, *tiny.ADVERSARY[:2], "adversarial.start=2", *held_out, *frechet
        ),
        "evaluate": lambda out: tiny.load(tiny.EvaluateRun, None, (f"out={out}", *scored)),
    }


@pytest.fixture(scope="module")
def worlds(tmp_path_factory, tokenizer, latents, generator, samples, pairs, classifier):
    """Folder of results of one process, and of two."""
    guide = tmp_path_factory.mktemp("guide") / "saved"
    torch.manual_seed(0)
    save_classifier(SmallClassifier(ClassifierConfig(width=8, features=8), classes=10), guide)
    runs = settings(tokenizer, latents, generator, samples, pairs, classifier, guide)
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    for command, run in runs.items():
        tiny.COMMANDS[command][0](run(one / command))
    words = [
        word
        for command, run in runs.items()
        for word in tiny.command(command, run(two / command), two / f"{command}.yaml")
    ]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        tiny.__file__,
        *words,
    ]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return one, two


@pytest.mark.parametrize("command", ["main-train", "train-generator", "post-train"])
def test_trainings(worlds, command):
    one, two = (world / command for world in worlds)
    lines, others = tiny.log(one), tiny.log(two)
    assert [line.keys() for line in lines] == [line.keys() for line in others]
    for line, other in zip(lines, others, strict=True):
        assert other == pytest.approx(line, rel=1e-4, abs=1e-6)
    files = sorted(p.relative_to(one) for p in one.glob("snapshot/*/*.safetensors"))
    assert files == sorted(p.relative_to(two) for p in two.glob("snapshot/*/*.safetensors"))
    for file in files:
        weights, other = load_file(one / file), load_file(two / file)
        for name, value in weights.items():
            # A bias of all keys cancels in the softmax: its gradient is rounding, of which Adam makes steps.
            if name.endswith("k_norm.bias"):
                continue
            if name.endswith("attn.qkv.bias"):
                value, other[name] = value.unflatten(0, (3, -1))[[0, 2]], other[name].unflatten(0, (3, -1))[[0, 2]]
            # Adam takes steps of like size however small a gradient is, and the discriminator's are small at first.
            tolerance = (1e-3 if file.stem == "discriminator" else 1e-4) * value.abs().max().item()
            torch.testing.assert_close(other[name], value, rtol=0, atol=tolerance, msg=f"{file} {name}")


@pytest.mark.parametrize("command", ["encode", "generate", "make-pairs"])
def test_caches_are_the_same_files(worlds, command):
    one, two = (world / command for world in worlds)
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in two.iterdir())
    assert len(LatentCache(two)._shards) > 2
    for name in names:
        assert (two / name).read_bytes() == (one / name).read_bytes(), name


def test_measurements(worlds):
    one, two = (
        [json.loads(line) for line in (w / "evaluate" / "metrics.jsonl").read_text().splitlines()] for w in worlds
    )
    assert len(one) == len(two)
    assert {"rfid", "psnr", "ssim", "codebook_usage", "pfid", "pfid_mean", "gfid", "kid", "latent_distance"} <= {
        line["metric"] for line in one
    }
    for line, other in zip(one, two, strict=True):
        for measured in (line, other):
            measured.pop("seconds", None)  # wall time of pFID
            measured.pop("normalisers", None)  # of fdr, whose value they are in
        for key in ("value", "standard_error", "bias"):
            value = line.pop(key, None) or 0.0
            assert (other.pop(key, None) or 0.0) == pytest.approx(value, rel=1e-6, abs=1e-8), line["metric"]
        assert other == line
    counts = {line["metric"]: line["samples"] for line in two}
    assert (
        counts["rfid"] == counts["psnr"] == counts["pfid"] == 101
    )  # an odd number: nothing is padded or counted twice
    assert counts["gfid"] == counts["kid"] == 80
