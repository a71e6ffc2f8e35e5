import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
from robustok.config import load
from robustok.errors import UserError
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.training.tokenizer import TokenizerTrainingRun, train_tokenizer

TERMS = ("pixel", "perceptual", "codebook", "commitment", "semantic", "adversarial")


def everything(classifier):
    """Every term of the objective, annealed perturbation, revival, stochastic depth and clipping."""
    return (*tiny.every_term(classifier), "tokenizer.encoder.depth=2", "tokenizer.encoder.drop_path=0.2")


def state(out):
    return load_file(max((out / "state").iterdir()) / "state.safetensors")


def discriminator(out):
    return {name: value for name, value in state(out).items() if "/adversary/network/" in name}


def test_a_few_steps_lower_the_loss(tokenizer):
    lines = tiny.log(tokenizer)
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50, 60]
    assert lines[-1]["pixel"] < 0.6 * lines[0]["pixel"]
    assert lines[-1]["lr"] < lines[0]["lr"]
    assert 0 < lines[-1]["codebook_usage"] <= 1
    assert 1 <= lines[-1]["codebook_perplexity"] <= 32


def test_the_run_folder(tokenizer):
    assert sorted(p.name for p in tokenizer.iterdir()) == ["config.yaml", "log.jsonl", "snapshot", "state"]
    assert [p.name for p in (tokenizer / "snapshot").iterdir()] == ["00000060"]
    assert [p.name for p in (tokenizer / "state").iterdir()] == ["00000060"]
    names = ["README.md", "config.yaml", "discriminator.safetensors", "model.safetensors"]
    assert sorted(p.name for p in (tokenizer / "snapshot" / "00000060").iterdir()) == names
    header = yaml.safe_load((tokenizer / "snapshot" / "00000060" / "config.yaml").read_text())
    loaded = load_tokenizer(tokenizer)
    assert (header["kind"], header["step"], header["latent_space"]) == ("tokenizer", 60, encoder_digest(loaded))
    assert "digits train" in header["trained_on"]
    assert load(TokenizerTrainingRun, tokenizer / "config.yaml").tokenizer == loaded.config  # that file repeats the run
    assert not any(p.requires_grad for p in loaded.parameters())


def test_snapshots_hold_the_averaged_weights(tokenizer):
    average = {k.removeprefix("/average/"): v for k, v in state(tokenizer).items() if k.startswith("/average/")}
    snapshot = load_file(tokenizer / "snapshot" / "00000060" / "model.safetensors")
    assert all(torch.equal(snapshot[name], value) for name, value in average.items())
    assert snapshot.keys() == average.keys()
    assert not torch.equal(snapshot["to_latent.weight"], state(tokenizer)["/tokenizer/to_latent.weight"])


def test_the_logged_total_is_the_sum_of_the_logged_terms(tmp_path, classifier):
    train_tokenizer(
        tiny.main_run(
            tmp_path / "run", *everything(classifier), "adversarial.start=2", "snapshot_every=3", "picture_every=3"
        )
    )
    lines = tiny.log(tmp_path / "run")
    for line in lines:
        terms = [line[name] for name in TERMS if name in line]
        assert len(terms) == (6 if line["step"] > 2 else 5)
        assert line["total"] == pytest.approx(sum(terms), rel=1e-6)
        assert ("d_hinge" in line) == ("adaptive_weight" in line) == (line["step"] > 2)
    assert sorted(p.name for p in (tmp_path / "run" / "snapshot").iterdir()) == ["00000003", "00000006"]
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == ["00000003.png", "00000006.png"]
    assert load_tokenizer(tmp_path / "run").decode(torch.zeros(1, 16, dtype=torch.int64)).shape == (1, 3, 16, 16)


def test_nothing_of_the_adversary_runs_before_its_start(tmp_path):
    for name, words in {
        "one": ("steps=1",),
        "three": ("steps=3",),
        "started": ("steps=3", "adversarial.start=2"),
    }.items():
        train_tokenizer(tiny.main_run(tmp_path / name, *tiny.ADVERSARY, "adversarial.start=3", *words))
    first, third, started = (discriminator(tmp_path / name) for name in ("one", "three", "started"))
    assert len(first) > 4
    assert all(torch.equal(first[name], value) for name, value in third.items())
    assert not any(
        torch.equal(first[name], value) for name, value in started.items() if name.endswith(("original0", "bias"))
    )
    assert not any("adversary/optimizer" in name for name in state(tmp_path / "three"))
    skeleton = json.loads(next((tmp_path / "three" / "state").glob("*3/state.json")).read_text())
    assert '["lecam", {"__dict__": [["real", 0.0], ["fake", 0.0]]}]' in json.dumps(skeleton)


def test_a_weight_of_zero_trains_as_if_the_adversary_were_not_there_yet(tmp_path):
    train_tokenizer(tiny.main_run(tmp_path / "none", "steps=3"))
    train_tokenizer(tiny.main_run(tmp_path / "later", "steps=3", *tiny.ADVERSARY, "adversarial.start=100"))
    for name, value in state(tmp_path / "none").items():
        if name.startswith("/tokenizer/"):
            assert torch.equal(value, state(tmp_path / "later")[name])
    assert not (tmp_path / "none" / "snapshot" / "00000003" / "discriminator.safetensors").exists()


def test_perturbation_reaches_the_loss_and_the_seed_decides(tmp_path):
    pixels = {}
    for name, words in {"plain": ("perturbation.proportion=0",), "a": (), "b": (), "c": ("seed=1",)}.items():
        train_tokenizer(tiny.main_run(tmp_path / name, "steps=2", *words))
        pixels[name] = [line["pixel"] for line in tiny.log(tmp_path / name)]
    assert pixels["a"] == pixels["b"]
    assert pixels["a"] != pixels["c"]
    assert pixels["a"] != pixels["plain"]


def test_revival_brings_codes_into_use(tmp_path):
    usage = {}
    for every in (0, 5):
        out = tmp_path / str(every)
        train_tokenizer(tiny.main_run(out, "steps=30", f"tokenizer.quantizer.revive_every={every}", "log_every=15"))
        usage[every] = tiny.log(out)[-1]["codebook_usage"]
    assert usage[5] > usage[0]


def test_a_broken_loss_keeps_the_last_good_state(tmp_path):
    run = tiny.main_run(tmp_path / "run", "learning_rate=1e20", "min_learning_rate=1e20", "state_every=1")
    with pytest.raises(UserError, match=r"the loss is not finite at step \d \(pixel = "):
        train_tokenizer(run)
    assert all(
        value.isfinite().all() for name, value in state(tmp_path / "run").items() if name.startswith("/tokenizer/")
    )
    assert not (tmp_path / "run" / "snapshot").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="asks for more neighbours than a codebook of 32 codes has"):
        tiny.main_run(tmp_path / "run", "perturbation.strength=33")
    with pytest.raises(UserError, match="global batch is 500 and the training set has 128 images"):
        train_tokenizer(tiny.main_run(tmp_path / "run", "batch_size=500"))
    with pytest.raises(UserError, match=r"needs reconstruction\.perceptual_weights"):
        train_tokenizer(tiny.main_run(tmp_path / "run", "reconstruction.perceptual=classifier"))
    assert not (tmp_path / "run").exists()
