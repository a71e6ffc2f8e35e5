import math

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
from robustok.data.latent_cache import LatentCache, Manifest, create_cache, write_shard
from robustok.errors import UserError
from robustok.generators import load_generator
from robustok.generators.rar import RAR, RARConfig
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.training import state as state_module
from robustok.training.generator import accuracy, cross_entropy, parameter_groups, train_generator
from robustok.types import GeneratorOutput


def test_a_few_steps_lower_the_loss(generator):
    lines = tiny.log(generator)
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert lines[0]["cross_entropy"] < math.log(32) + 0.1  # it starts near ln K
    assert lines[-1]["cross_entropy"] < 0.9 * lines[0]["cross_entropy"]
    assert lines[-1]["accuracy"] > lines[0]["accuracy"]
    assert all(line["total"] == line["cross_entropy"] for line in lines)


def test_orders_anneal_from_random_to_raster(generator):
    shares = [line["random_order"] for line in tiny.log(generator)]  # random until half of the 60 steps, raster from 45
    assert shares[:3] == [1, 1, 1]
    assert 0 < shares[4] < shares[3] < 1
    assert shares[5] == 0


def test_the_snapshot_says_what_sampling_needs(generator, tokenizer):
    header = yaml.safe_load((generator / "snapshot" / "00000060" / "config.yaml").read_text())
    loaded = load_generator(generator)
    assert (header["kind"], header["step"], header["classes"], header["codebook_size"]) == ("generator", 60, 10, 32)
    assert (loaded.latent_shape, loaded.latent_space) == ((16, 8), encoder_digest(load_tokenizer(tokenizer)))
    assert sorted(p.name for p in generator.iterdir()) == ["config.yaml", "log.jsonl", "snapshot", "state"]


def test_without_averaging_the_snapshot_holds_the_last_weights(tmp_path, latents, monkeypatch):
    """They are copied, and gathered where they are sharded, only when something is written."""
    copied, update = [], state_module.update_average
    monkeypatch.setattr(state_module, "update_average", lambda *words: copied.append(words[2]) or update(*words))
    words = ("steps=2", "log_every=2", "ema_decay=0", "sampling.temperature=0.9")
    train_generator(tiny.generator_run(tmp_path / "run", latents, *words))
    assert copied == [0.0]
    snapshot = load_file(tmp_path / "run" / "snapshot" / "00000002" / "model.safetensors")
    state = load_file(tmp_path / "run" / "state" / "00000002" / "state.safetensors")
    assert all(torch.equal(state[f"/generator/{name}"], value) for name, value in snapshot.items())
    assert load_generator(tmp_path / "run").sampling.temperature == 0.9


def test_weight_decay_excludes_what_the_authors_exclude():
    """Weight decay for weight matrices, and for the parameters that the authors' list of names misses."""
    model = RAR(RARConfig(width=16, depth=1, heads=2), codebook_size=8, length=4, classes=3)
    decayed, others = parameter_groups(model, 0.03)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.03, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for p in decayed["params"]}
    block = {
        f"blocks.0.{part}.weight" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    }
    assert found == block | {"lm_head.weight", "cls_token"}
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_cross_entropy_and_accuracy_by_hand():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, 2], [3, 4, 0]])
    output = GeneratorOutput(logits, targets)
    plain = [-logits[i, j].log_softmax(0)[targets[i, j]] for i in range(2) for j in range(3)]
    torch.testing.assert_close(cross_entropy(output)["cross_entropy"], torch.stack(plain).mean())
    hits = [int(logits[i, j].argmax()) == targets[i, j] for i in range(2) for j in range(3)]
    assert accuracy(output).item() == pytest.approx(sum(map(int, hits)) / 6)


def test_dropped_labels_are_what_guidance_needs(tmp_path, latents, monkeypatch):
    seen = []
    forward = RAR.forward

    def spy(self, tokens, labels, orders=None):
        seen.append(labels)
        return forward(self, tokens, labels, orders)

    monkeypatch.setattr(RAR, "forward", spy)
    words = ("steps=30", "batch_size=64", "log_every=30", "state_every=30", "generator.label_dropout=0.3")
    train_generator(tiny.generator_run(tmp_path / "run", latents, *words))
    labels = torch.stack(seen)
    share = (labels == 10).float().mean().item()
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / labels.numel())
    kept = labels != 10
    real = torch.from_numpy(np.unique(LatentCache(latents).labels))
    assert torch.isin(labels[kept], real).all()


def test_continuous_latents_are_refused(tmp_path):
    cache = tmp_path / "cache"
    manifest = Manifest("continuous", (4, 2), None, classes=3, count=5, shard_size=5, tokenizer="t")
    create_cache(cache, manifest)
    zeros = np.zeros(5, dtype=np.int64)
    write_shard(
        cache, 0, {"latents": np.zeros((5, 4, 2), np.float32), "labels": zeros, "indices": zeros, "seeds": zeros}
    )
    with pytest.raises(UserError, match="holds continuous latents, generator rar models tokens"):
        train_generator(tiny.generator_run(tmp_path / "run", cache))
    assert not (tmp_path / "run").exists()
