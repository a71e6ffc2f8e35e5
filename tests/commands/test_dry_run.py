"""The memory that ``--dry-run`` estimates, against the tensors that live in real training steps."""

import gc

import pytest
import torch

import tiny
from robustok.commands.dry_run import estimate
from robustok.commands.step_memory import LiveBytes
from robustok.runs import RunFolder
from robustok.training.decoder import train_decoder
from robustok.training.generator import train_generator
from robustok.training.tokenizer import train_tokenizer

BLOCKS = tuple(f"tokenizer.{side}.{word}" for side in ("encoder", "decoder") for word in ("depth=3", "width=32"))
GENERATOR = ("generator.depth=4", "generator.width=64", "generator.dropout=0")
RUNS = {
    "tokenizer": (train_tokenizer, BLOCKS),
    "tokenizer, adversary": (train_tokenizer, (*BLOCKS, *tiny.ADVERSARY, "discriminator.width=16")),
    "tokenizer, adversary, parts": (train_tokenizer, (*BLOCKS, *tiny.ADVERSARY, "gradient_accumulation=4")),
    "generator": (train_generator, GENERATOR),
    "generator, parts": (train_generator, (*GENERATOR, "gradient_accumulation=4")),
    "post-training": (train_decoder, tiny.ADVERSARY),
}


@pytest.fixture
def second_step(monkeypatch):
    """What lives beside weights, averages and moments in the second step of a training."""
    steps, found = RunFolder.steps, []

    def counted(self, numbers, *rest):
        for step in steps(self, numbers, *rest):
            if step != 1:
                yield step
                continue
            with LiveBytes(x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)) as live:
                yield step
            found.append(live.peak)

    monkeypatch.setattr(RunFolder, "steps", counted)
    return found


def run_of(name, out, request, *words):
    train, more = RUNS[name]
    words = ("steps=3", "batch_size=64", "log_every=3", "state_every=3", *more, *words)
    if train is train_generator:
        return train, tiny.generator_run(out, request.getfixturevalue("latents"), *words)
    if train is train_decoder:
        caches = (request.getfixturevalue(name) for name in ("tokenizer", "pairs"))
        return train, tiny.post_run(out, *caches, *words)
    return train, tiny.main_run(out, *words)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_a_step_is_counted_within_15_percent(tmp_path, request, second_step, name, checkpointing):
    train, run = run_of(name, tmp_path / "run", request, f"gradient_checkpointing={str(checkpointing).lower()}")
    facts = estimate(run)
    train(run)
    trained = facts.get("trained_parameters") or facts.get("tokenizer_parameters") or facts["generator_parameters"]
    gradients = 4 * (trained + facts.get("discriminator_parameters", 0))
    counted = facts["checkpointed_activations_bytes" if checkpointing else "activations_bytes"] + gradients
    print(f"{name}, checkpointing {checkpointing}: {counted / second_step[-1] - 1:+.3f}")
    assert counted == pytest.approx(second_step[-1], rel=0.15)  # the last training; fixtures may have trained before


def test_checkpointing_keeps_one_block_at_a_time(latents):
    facts = estimate(tiny.generator_run("x", latents, "generator.depth=5", "batch_size=16"))
    assert facts["checkpointed_activations_bytes"] < 0.5 * facts["activations_bytes"]


def test_bf16_needs_less(tmp_path):
    float32, bf16 = (estimate(tiny.main_run(tmp_path, f"precision={name}")) for name in ("float32", "bf16"))
    assert (float32["activation_dtype"], bf16["activation_dtype"]) == ("float32", "bf16")
    copy = 2 * bf16["tokenizer_parameters"]
    assert bf16["activations_bytes"] == pytest.approx(0.7 * float32["activations_bytes"] + copy, rel=0.01)


def test_bytes_that_live():
    kept = torch.zeros(100)
    with LiveBytes([kept]) as live:
        view = kept.view(10, 10)  # no new memory
        first = view + 1
        second = first.exp()
        del first
        third = second[:5].clone()
    assert (live.peak, live.now) == (800, 600)
    assert third.shape == (5, 10)
