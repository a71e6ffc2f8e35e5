"""Main training of the families other than robustok: the same loss for tokens, fewer terms for continuous latents."""

import json

import pytest
import torch
import yaml

import tiny
from robustok.commands.dry_run import estimate
from robustok.commands.encode import EncodeRun, encode
from robustok.config import load
from robustok.data.latent_cache import LatentCache
from robustok.errors import UserError
from robustok.tokenizers import TOKENIZERS, encoder_digest, load_tokenizer
from robustok.tokenizers.kl import KL, KLConfig, KLOutput
from robustok.training.tokenizer import ContinuousPass, TokenizerTrainingRun, draw_inputs, train_tokenizer

CONV = {"width": 8, "multipliers": [1, 1, 2], "blocks": 1, "attention": [], "middle_attention": False, "groups": 4}
CODES = {"size": 32, "dim": 4, "revive_every": 3}
BETWEEN = {"width": 16, "depth": 1, "heads": 2}
VIT = {"image_size": 16, "patch_size": 4, "encoder": BETWEEN, "decoder": BETWEEN}
GRID = {"image_size": 16, "encoder": CONV, "decoder": CONV}
FAMILIES = {
    "llamagen": GRID | {"z_channels": 8, "quantizer": CODES},
    "maskgit": GRID | {"quantizer": CODES | {"normalize": False}},
    "gigatok": GRID
    | {"z_channels": 8, "quantizer": CODES, "latents": 8, "grid_to_row": BETWEEN, "row_to_grid": BETWEEN},
    "llamagen fsq": GRID | {"z_channels": 8, "quantizer": {"name": "fsq", "levels": [5, 4, 3]}},
    "llamagen lfq": GRID | {"z_channels": 8, "quantizer": {"name": "lfq", "bits": 5}},
    "robustok fsq": VIT | {"quantizer": {"name": "fsq", "levels": [5, 4, 3]}},
    "robustok lfq": VIT | {"quantizer": {"name": "lfq", "bits": 5}},
    "kl": GRID | {"z_channels": 8, "dim": 4},
    "maetok": {
        "image_size": 16,
        "patch_size": 4,
        "latents": 8,
        "latent_dim": 4,
        "encoder": BETWEEN,
        "decoder": BETWEEN,
        "positions": "learned",
        "layer_scale": None,
        "init": "local",
    },
}
DISCRETE = [name for name in FAMILIES if TOKENIZERS[name.split()[0]][0].kind == "discrete"]
CONTINUOUS = [name for name in FAMILIES if name not in DISCRETE]
TERMS = {"kl": {"pixel", "kl"}, "maetok": {"pixel"}} | {name: {"pixel", "codebook", "commitment"} for name in DISCRETE}
TERMS |= {name: {"pixel"} for name in DISCRETE if "fsq" in name}
TERMS |= {name: {"pixel", "commitment", "entropy"} for name in DISCRETE if "lfq" in name}
LATENTS = {"gigatok": 8, "maetok": 8}  # the others have a grid of 4 x 4
RATES = ("learning_rate=1e-2", "min_learning_rate=1e-3")


def run_of(out, family, *words):
    """A few steps on the digits, perturbed where there are tokens, without adversary."""
    settings = json.dumps({"name": family.split()[0]} | FAMILIES[family])
    terms = ("reconstruction.perceptual=none", "adversarial.weight=0", "perturbation.strength=4", *RATES)
    words = (f"tokenizer={settings}", *tiny.DATA, *tiny.TRAINING, *terms, *words)
    return load(TokenizerTrainingRun, None, (f"out={out}", *words))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_steps_make_a_tokenizer(tmp_path, family):
    run = run_of(tmp_path / "run", family, "steps=12", "batch_size=16", *tiny.ADVERSARY, "adversarial.start=6")
    snapshot = train_tokenizer(run)
    lines = tiny.log(tmp_path / "run")
    assert lines[-1]["pixel"] < 0.7 * lines[0]["pixel"]
    for line in lines:
        terms = TERMS[family] | ({"adversarial"} if line["step"] > 6 else set())
        assert line["total"] == pytest.approx(sum(line[name] for name in terms), rel=1e-5)
        assert ("codebook_usage" in line) == (family in DISCRETE)
    loaded = load_tokenizer(snapshot)
    assert loaded.config == run.tokenizer
    header = yaml.safe_load((snapshot / "config.yaml").read_text())
    assert header["latent_space"] == encoder_digest(loaded)
    assert header["discriminator"]["width"] == 8  # for post-training
    assert estimate(run)["latents_per_image"] == loaded.latent_shape[0] == LATENTS.get(family, 16)
    encode(load(EncodeRun, None, (f"out={tmp_path / 'cache'}", f"tokenizer={snapshot}", *tiny.DATA, "data.limit=8")))
    latents = LatentCache(tmp_path / "cache").read(slice(None)).latents
    assert loaded.decode(latents).shape == (8, 3, 16, 16)


@pytest.mark.parametrize("family", ["gigatok", "kl"])
def test_an_interruption_changes_nothing(tmp_path, family):
    noise = ("latent_noise=0.5",) if family == "kl" else ()
    words = (*tiny.ADVERSARY, "adversarial.start=1", "state_every=2", "log_every=3", "steps=5", *noise)
    train_tokenizer(run_of(tmp_path / "whole", family, *words))
    with tiny.interrupted(3):
        train_tokenizer(run_of(tmp_path / "stopped", family, *words))
    torch.manual_seed(7)  # what happened in between must not matter
    train_tokenizer(run_of(tmp_path / "stopped", family, *words))
    found, expected = (dict(tiny.saved(tmp_path / name)) for name in ("stopped", "whole"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value, name


@pytest.mark.parametrize(
    ("family", "word"), [("llamagen", "perturbation.proportion=0.5"), ("maetok", "latent_noise=1")]
)
def test_wrong_latents_reach_the_loss(tmp_path, family, word):
    """Perturbed tokens, or noisy latents: the first reconstructions differ, and nothing else does."""
    pixels = {}
    for name, words in {"clean": ("perturbation.proportion=0",), "wrong": (word,)}.items():
        train_tokenizer(run_of(tmp_path / name, family, "steps=1", *words))
        (pixels[name],) = (line["pixel"] for line in tiny.log(tmp_path / name))
    assert pixels["wrong"] != pixels["clean"]


def small_kl():
    torch.manual_seed(0)
    return KL(KLConfig(**FAMILIES["kl"]))


def test_the_pass_of_a_variational_autoencoder_samples_its_posterior():
    kl, images, sample = small_kl(), torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 16, 4)
    output = ContinuousPass(kl)(images, sample)
    posterior = kl.posterior(images)
    assert isinstance(output, KLOutput)
    torch.testing.assert_close(output.latents, posterior.mean + posterior.std * sample)
    torch.testing.assert_close(output.reconstructions, kl.decode(output.latents))
    torch.testing.assert_close(output.kl_loss, posterior.divergence())
    torch.testing.assert_close(ContinuousPass(kl)(images, 0 * sample).reconstructions, kl(images).reconstructions)


def test_noise_is_as_large_as_its_level_says():
    kl, images, sample = small_kl(), torch.rand(2, 3, 16, 16) * 2 - 1, torch.zeros(2, 16, 4)
    decoded = []
    kl.decode = lambda latents: decoded.append(latents) or images
    output = ContinuousPass(kl)(images, sample, noise := torch.randn(2, 16, 4), torch.tensor([0.0, 0.5]))
    assert torch.equal(decoded[0][0], output.latents[0])
    torch.testing.assert_close(decoded[0][1] - output.latents[1], 0.5 * output.latents[1].std() * noise[1])


@pytest.mark.parametrize("family", ["maskgit", "kl"])
def test_the_draws_of_processes_are_rows_of_those_of_one(tmp_path, family):
    words = ("latent_noise=0.5",) if family in CONTINUOUS else ("perturbation.proportion=0.5",)
    run = run_of(tmp_path, family, *words, "batch_size=8")
    tensors = lambda draws: [t for x in draws for t in (vars(x).values() if hasattr(x, "rows") else [x])]  # noqa: E731
    draw = lambda rows, step=3: [  # noqa: E731
        t for t in tensors(draw_inputs(run, (16, 4), step, rows)) if isinstance(t, torch.Tensor)
    ]
    whole, halves = draw(slice(0, 8)), zip(draw(slice(0, 4)), draw(slice(4, 8)), strict=True)
    assert len(whole) == 3
    assert all(torch.equal(torch.cat(pair), one) for pair, one in zip(halves, whole, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(draw(slice(0, 8), step=4), whole, strict=True))


def test_a_teacher_gets_a_projection(tmp_path, classifier):
    words = ("teacher.name=classifier", f"teacher.path={classifier}", "steps=2")
    train_tokenizer(run_of(tmp_path / "run", "llamagen", *words))
    assert all(line["semantic"] > 0 for line in tiny.log(tmp_path / "run"))
    assert load_tokenizer(tmp_path / "run").from_teacher.in_features == 16


def test_settings_of_the_other_kind_are_refused(tmp_path):
    with pytest.raises(UserError, match="kl learns without a semantic teacher"):
        run_of(tmp_path, "kl", "teacher.name=classifier")
    with pytest.raises(UserError, match="latent_noise is for continuous latents, maskgit makes tokens"):
        run_of(tmp_path, "maskgit", "latent_noise=0.1")
    with pytest.raises(UserError, match="asks for more neighbours than a codebook of 32 codes has"):
        run_of(tmp_path, "gigatok", "perturbation.strength=33")
    assert run_of(tmp_path, "maetok", "perturbation.strength=100000").latent_noise == 0  # it has no codes to perturb


def test_a_configuration_without_the_family_is_of_the_papers_tokenizer(tmp_path):
    assert tiny.main_run(tmp_path).tokenizer.name == "robustok"
