"""Objectives of post-training: what each decodes and compares with, mixtures, and that they learn what they should."""

import shutil
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
from robustok.commands.dry_run import estimate
from robustok.commands.encode import encode
from robustok.commands.post_train import PostTrainRun, post_train
from robustok.config import load
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache
from robustok.data.pixels import to_pixels
from robustok.data.sources import Digits
from robustok.errors import UserError
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.metrics.features.classifier import load_classifier, save_classifier
from robustok.metrics.frechet import GaussianStatistics, frechet_distance
from robustok.precision import cast_weights
from robustok.snapshots import read_header
from robustok.tokenizers import load_tokenizer
from robustok.training.decoder import DecoderTrainingRun, train_decoder
from robustok.training.decoder_losses import check_networks
from robustok.training.objectives import LatentNoise, Material, Steps, mixture, rows_of
from robustok.training.tokenizer import TokenizerTrainingRun, train_tokenizer
from tiny_models import save_resnet20

STEPS = Steps(global_batch=16, seed=0, first=0, count=2, rank=0, world=1)
SIDES = tuple(
    f"tokenizer.{side}={{width: 8, multipliers: [1, 1, 2], blocks: 1, groups: 4}}" for side in ("encoder", "decoder")
)
FREE = ("objective=free", *tiny.ADVERSARY, "adversarial.adaptive=false", "adversary=fresh")


def run_of(out, tokenizer, *words):
    """Post-training with any objective; without adversary unless the words say so."""
    terms = ("reconstruction.perceptual=none", "adversarial.weight=0", "learning_rate=1e-3", f"tokenizer={tokenizer}")
    return load(DecoderTrainingRun, None, (f"out={out}", *tiny.DATA, *tiny.TRAINING, *terms, *words))


def frechet_words(classifier):
    """The Frechet term in the features of a classifier."""
    return ("frechet.weight=2", "frechet.decay=0.5", f"frechet.extractors=[{{path: {classifier}}}]")


@pytest.fixture(scope="module")
def material(tokenizer, latents, samples, pairs):
    caches = {"pairs": LatentCache(pairs), "latents": LatentCache(latents), "samples": LatentCache(samples[0])}
    return Material(load_tokenizer(tokenizer), open_images(Digits(limit=128), 16), caches, LatentNoise(), "float32")


def examples_of(name, material, steps):
    return mixture([material], {name: 1.0}, 1.0, steps)


def test_clean_examples_are_real_latents_and_their_images(material):
    for examples in examples_of("clean", material, STEPS):
        assert torch.equal(material.tokenizer.encode(examples.targets), examples.latents)
        assert torch.equal(examples.real, examples.targets)


def test_noise_replaces_its_share_of_the_tokens_and_keeps_the_images(material):
    noisy = replace(material, noise=LatentNoise(rate=0.25, share=0.25))
    for a, b in zip(examples_of("noise", noisy, STEPS), examples_of("clean", material, STEPS), strict=True):
        assert torch.equal(a.targets, b.targets)
        changed = (a.latents != b.latents).sum(1)  # of 16 tokens; a neighbour may be the token itself
        assert changed.max() <= 4
        assert changed.sum() > 16
    none = next(examples_of("noise", replace(material, noise=LatentNoise(rate=0)), STEPS))
    assert torch.equal(none.latents, next(examples_of("clean", material, STEPS)).latents)


def test_noise_on_continuous_latents_has_its_level(tmp_path):
    words = ("tokenizer.name=kl", *SIDES, "tokenizer.z_channels=12", "tokenizer.dim=5", "tokenizer.image_size=16")
    terms = ("reconstruction.perceptual=none", "adversarial.weight=0", "steps=1")
    data = open_images(Digits(limit=128), 16)
    run = load(
        TokenizerTrainingRun,
        None,
        (f"out={tmp_path / 'kl'}", *tiny.DATA, *tiny.TRAINING[2:], *words, *terms, "batch_size=16"),
    )
    path = train_tokenizer(run)
    cache = LatentCache(encode(tiny.tokens_run(tmp_path / "latents", path)))
    material = Material(load_tokenizer(path), data, {"latents": cache}, LatentNoise(level=0.5), "float32")
    steps = STEPS._replace(global_batch=128, count=1)
    noisy, real = (next(examples_of(name, material, steps)).latents for name in ("noise", "clean"))
    scale = cache.read(slice(None)).latents.flatten(0, 1).std(0)
    relative = ((noisy - real) / scale).flatten(1).std(1)  # (N,), uniform from 0 to the level
    assert 0.45 < relative.max() < 0.6
    assert relative.min() < 0.05
    assert relative.mean() == pytest.approx(0.25, abs=0.05)


def test_free_examples_are_samples_and_what_the_original_decoder_shows(material):
    examples = next(examples_of("free", material, STEPS))
    cached = material.caches["samples"].read(slice(None)).latents
    assert all((cached == row).all(1).any() for row in examples.latents)
    assert torch.equal(examples.targets, material.tokenizer.decode(examples.latents).detach())
    images = material.data.read(range(128)).images.flatten(1)
    assert all((images == row).all(1).any() for row in examples.real.flatten(1))
    assert not torch.equal(examples.real, examples.targets)


def test_a_batch_does_not_depend_on_the_first_step_or_the_number_of_processes(material):
    names, steps = {"paired": 1, "free": 1, "noise": 2}, STEPS._replace(count=3)
    whole = list(mixture([material], names, 2.0, steps))
    later = next(mixture([material], names, 2.0, steps._replace(first=2, count=1)))
    assert all(torch.equal(getattr(later, n), getattr(whole[2], n)) for n in ("latents", "targets", "real"))
    halves = [next(mixture([material], names, 2.0, steps._replace(rank=rank, world=2))) for rank in (0, 1)]
    for i, part in enumerate(whole[0].parts):
        shared = torch.cat([half.latents[half.parts[i].rows] for half in halves])
        assert torch.equal(shared, whole[0].latents[part.rows])
    assert [(p.name, p.rows, p.weight) for p in whole[0].parts] == [
        ("paired", slice(0, 4), 0.25),
        ("free", slice(4, 8), 0.5),  # a quarter, twice for the consistency
        ("noise", slice(8, 16), 0.5),
    ]


def test_rows_follow_the_weights():
    assert rows_of({"paired": 1.0}, 7) == {"paired": 7}
    assert rows_of({"free": 1.0, "clean": 2.0}, 16) == {"free": 5, "clean": 11}
    assert rows_of({"free": 1.0, "clean": 2.0}, 16, multiple=4) == {"free": 4, "clean": 12}
    with pytest.raises(UserError, match="objective clean has no rows in a batch of 16; raise its weight 0"):
        rows_of({"free": 1.0, "clean": 0.01}, 16)


def test_caches_of_another_kind_are_refused(tmp_path, tokenizer, latents, samples, pairs):
    for words, says in (
        ((*FREE, f"samples={latents}"), "holds latents of real images, expected free samples"),
        (("objective=clean", f"latents={samples[0]}"), "holds free samples, expected latents of real images"),
        (("objective=noise", f"latents={pairs}"), "holds pairs, expected latents of real images"),
    ):
        with pytest.raises(UserError, match=says):
            train_decoder(run_of(tmp_path / "run", tokenizer, *words))
    assert not (tmp_path / "run").exists()


def test_clean_is_the_control_of_the_paired_objective(tmp_path, tokenizer, latents):
    paired = train_decoder(run_of(tmp_path / "a", tokenizer, f"pairs={latents}"))  # real latents as pairs
    control = train_decoder(run_of(tmp_path / "b", tokenizer, "objective=clean", f"latents={latents}"))
    before, (a, b) = load_tokenizer(tokenizer), (load_tokenizer(path).state_dict() for path in (paired, control))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], value) for name, value in before.state_dict().items())


def test_free_samples_move_the_decoder_by_the_adversary_alone(tmp_path, tokenizer, samples):
    path = train_decoder(run_of(tmp_path / "run", tokenizer, *FREE, f"samples={samples[0]}"))
    first, *_, last = tiny.log(tmp_path / "run")
    assert first["pixel"] < 1e-12  # the decoder began as the original one
    assert last["pixel"] > 1e-6
    assert abs(first["adversarial"]) > 1e-4
    header = read_header(path)["post_trained"]
    assert header == {"steps": 6, "samples": 40, "objective": {"free": 1.0}}
    assert "free: samples of a generator" in (path / "README.md").read_text()


@pytest.mark.parametrize("frechet", [False, True])
def test_an_interrupted_run_is_still_compared_with_the_original_decoder(
    tmp_path, tokenizer, samples, latents, classifier, frechet
):
    words = ("objective={free: 1, noise: 1}", f"samples={samples[0]}", f"latents={latents}", *FREE[1:])
    words += frechet_words(classifier) if frechet else ()
    whole = train_decoder(run_of(tmp_path / "whole", tokenizer, *words))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "state" / "00000006")
    shutil.rmtree(tmp_path / "resumed" / "snapshot")
    if frechet:  # its classifier may move, not change
        network = load_classifier(classifier)
        network.head.weight.add_(1)
        save_classifier(network, tmp_path / "changed")
        changed = (*words, *frechet_words(tmp_path / "changed"))
        with pytest.raises(UserError, match=r"with another content of frechet\.extractors\.0\.path"):
            train_decoder(run_of(tmp_path / "resumed", tokenizer, *changed))
        shutil.copytree(classifier, tmp_path / "moved")
        words += frechet_words(tmp_path / "moved")
    resumed = train_decoder(run_of(tmp_path / "resumed", tokenizer, *words))
    assert tiny.log(tmp_path / "resumed") == tiny.log(tmp_path / "whole")
    a, b = (load_tokenizer(path).state_dict() for path in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = (load_file(tmp_path / name / "state" / "00000006" / "state.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(name.startswith("/frechet/") for name in a) == frechet


def test_the_frechet_term_is_the_distance_of_decoded_samples_to_real_images(
    tmp_path, material, classifier, tokenizer, samples
):
    extract = load_extractor(ExtractorConfig(path=classifier))
    real = GaussianStatistics.of(extract(to_pixels(material.data.read(range(128)).images)))
    words = ("objective=free", f"samples={samples[0]}", *frechet_words(classifier), "frechet.decay=0", "log_every=1")
    path = train_decoder(run_of(tmp_path / "run", tokenizer, *words, "steps=60", "learning_rate=3e-3"))
    first, *_, last = tiny.log(tmp_path / "run")
    features = (
        extract.classifier.features(next(examples_of("free", material, STEPS)).targets.clamp(-1, 1)).double().detach()
    )
    batch = GaussianStatistics.from_moments(features.mean(0), torch.cov(features.T, correction=0), None)
    term = f"frechet_{extract.name}"
    assert first[term] == pytest.approx(2 * frechet_distance(batch, real) / real.covariance.trace().item(), rel=1e-4)
    assert last[term] < 0.8 * first[term]
    assert last["total"] == pytest.approx(last[term] + last["pixel"], rel=1e-6)
    assert read_header(path)["post_trained"]["frechet"] == 2.0


def test_the_frechet_term_does_not_evaluate(tmp_path, tokenizer, samples, classifier):
    held_out = (f"held_out.latents={samples[1]}", f"held_out.extractor.path={classifier}")
    run = run_of(tmp_path, tokenizer, "objective=free", f"samples={samples[0]}", *frechet_words(classifier), *held_out)
    for start in (train_decoder, check_networks):
        with pytest.raises(UserError, match=r"frechet\.extractors and held_out\.extractor are the same feature space"):
            start(run)
    assert not list(tmp_path.iterdir())


def test_a_stronger_consistency_keeps_the_images(tmp_path, tokenizer, samples):
    latents, before, moved = LatentCache(samples[0]).read(slice(None)).latents, load_tokenizer(tokenizer), []
    for weight in (0.01, 100):
        words = (*FREE, f"samples={samples[0]}", f"consistency={weight}", "steps=20", "log_every=10", "ema_decay=0")
        after = load_tokenizer(train_decoder(run_of(tmp_path / str(weight), tokenizer, *words)))
        moved.append((after.decode(latents) - before.decode(latents)).square().mean().item())
    assert moved[1] < 0.5 * moved[0]


def test_a_public_classifier_guides_and_is_the_discriminator_s_backbone(tmp_path, tokenizer, samples):
    weights = save_resnet20(tmp_path / "resnet20.safetensors")
    guide = ("reconstruction.perceptual=cifar-resnet", f"reconstruction.perceptual_weights={weights}")
    heads = ("discriminator.name=cifar-resnet", f"discriminator.weights={weights}", "discriminator.width=8")
    terms = ("objective=free", "adversarial.weight=0.1", "adversarial.adaptive=false", "adversary_warmup=2")
    words = (*guide, *heads, *terms, "adversary=reinit_warmup", f"samples={samples[0]}")
    path = train_decoder(run_of(tmp_path / "run", tokenizer, *words))
    first, *_, last = (line for line in tiny.log(tmp_path / "run") if "total" in line)
    assert first["perceptual"] < 1e-9
    assert last["perceptual"] > 1e-6
    assert last["d_hinge"] > 0
    assert read_header(path)["discriminator"]["name"] == "cifar-resnet"
    saved = load_file(path / "discriminator.safetensors")
    assert not any("network" in name for name in saved)  # the heads only
    carried = (*guide, *terms[:3], f"samples={samples[0]}", "adversary=carried")  # with the path in the snapshot
    train_decoder(run_of(tmp_path / "more", path, *carried))


def test_in_bf16_the_original_decoder_is_rounded_once_and_nothing_changes(tmp_path, tokenizer, samples, monkeypatch):
    cast = Mock(side_effect=cast_weights)
    words, found = (f"samples={samples[0]}", *FREE, "precision=bf16", "steps=2"), []
    for name, replacement in (("once", cast), ("autocast", lambda model, precision: model)):
        monkeypatch.setattr("robustok.training.decoder.cast_weights", replacement)
        path = train_decoder(run_of(tmp_path / name, tokenizer, *words))
        lines = [{key: v for key, v in line.items() if key != "seconds"} for line in tiny.log(tmp_path / name)]
        found.append((lines, (path / "model.safetensors").read_bytes()))
    assert found[0] == found[1]
    (call,) = cast.call_args_list
    assert torch.bfloat16 in {weight.dtype for weight in call.args[0].parameters()}
    assert {weight.dtype for weight in load_file(path / "model.safetensors").values()} == {torch.float32}


def test_the_terms_of_a_mixture_have_names_and_sum_up(tmp_path, tokenizer, samples, latents):
    words = ("objective={free: 1, clean: 1}", f"samples={samples[0]}", f"latents={latents}", *FREE[1:])
    train_decoder(run_of(tmp_path / "run", tokenizer, *words, "gradient_accumulation=2"))
    lines = [line for line in tiny.log(tmp_path / "run") if "total" in line]
    for line in lines:
        assert line["total"] == pytest.approx(line["free_pixel"] + line["clean_pixel"] + line["adversarial"], rel=1e-5)
    train_decoder(run_of(tmp_path / "whole", tokenizer, *words))
    for a, b in zip(lines, tiny.log(tmp_path / "whole"), strict=True):
        assert a["total"] == pytest.approx(b["total"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "objective paired needs pairs=PATH"),
        (("objective=clean", "pairs=x", "latents=y"), "objective clean does not use pairs; drop it"),
        (("objective={free: 1, clean: 1}", "samples=x"), "objective free and clean needs latents=PATH"),
        (("objective=free", "samples=x"), r"learns from the adversary, or the Frechet term; set adversarial\.weight"),
        (("objective=clean", "latents=x", *frechet_words("x")), "the Frechet term needs free samples; add free to"),
        (("objective=free", "samples=x", "adversarial.weight=1"), r"set adversarial\.adaptive=false"),
        (("objective=clean", "latents=x", "trainable=authors"), "set objective=paired"),
        (("objective=fre", "samples=x"), "Input should be 'paired', 'free', 'noise' or 'clean'"),
        (("objective.free=0", "samples=x"), "Input should be greater than 0"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, words, says):
    with pytest.raises(UserError, match=says):
        run_of(tmp_path / "run", tmp_path, *words)


def test_the_command_makes_what_the_objectives_need(tmp_path, tokenizer, generator):
    terms = ("reconstruction.perceptual=none", *FREE[1:], "learning_rate=1e-3")
    given = (f"tokenizer={tokenizer}", f"generator={generator}", "objective={free: 1, noise: 1}")
    run = load(PostTrainRun, None, (f"out={tmp_path / 'run'}", *given, *tiny.DATA, *tiny.TRAINING, *terms))
    facts = estimate(run)
    assert (facts["samples"], facts["samples_bytes"]) == (96, 96 * 53)  # 16 tokens of 2 bytes, and 21
    assert facts["latents_bytes"] == 96 * 53
    assert "pairs" not in facts
    path = post_train(run)
    assert path == tmp_path / "run" / "snapshot" / "best"
    made = {p.name: LatentCache(p).manifest for p in (tmp_path / "run" / "samples", tmp_path / "run" / "latents")}
    assert {name: manifest.count for name, manifest in made.items()} == {"samples": 96, "latents": 96}
    assert made["samples"].source["seed"] > 2**32  # none that a user would choose for samples to report
    header = yaml.safe_load((path / "config.yaml").read_text())
    assert header["post_trained"]["objective"] == {"free": 1.0, "noise": 1.0}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("objective=free",), "objective free has no samples: give samples=PATH, or generator"),
        (("objective=free", "generator=g", "sigma=0.5"), "objective free does not use sigma; drop it"),
        (("objective=clean", "generator=g"), "objective clean does not use generator"),
        (("pairs=p", "sigma=0.5"), "pairs are given, and so is sigma"),
        (("objective={paired: 1, free: 1}", "pairs=p"), "objective free has no samples"),
    ],
)
def test_the_command_names_what_is_missing_or_too_much(tmp_path, words, says):
    losses = ("adversarial.weight=0.1", "adversarial.adaptive=false", "data.name=digits")
    with pytest.raises(UserError, match=says):
        load(PostTrainRun, None, (f"out={tmp_path}", "tokenizer=t", *losses, *words))
