"""The recipes for ImageNet: sizes and schedules of the paper, and the preset of the authors' code."""

import pytest
import torch
import torch.nn.functional as F

from robustok.cli import COMMANDS
from robustok.commands.dry_run import estimate
from robustok.commands.post_train import PostTrainRun
from robustok.config import load, read_yaml, recipe
from robustok.tokenizers.perturbation import draw_perturbation, perturb_latents
from robustok.tokenizers.robustok import RobusTok
from robustok.training.common import learning_rate
from robustok.training.generator import GeneratorTrainingRun
from robustok.training.tokenizer import TokenizerTrainingRun

EPOCH = 1251


def tokenizer_run(*files, words=()):
    return load(
        TokenizerTrainingRun, ["imagenet256/tokenizer.yaml", *files], ["data.path=x", *words], command="main-train"
    )


def post_run(*files):
    return load(PostTrainRun, ["imagenet256/post.yaml", *files], ["data.path=x"], command="post-train")


def test_the_tokenizer_is_counted_exactly(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    facts = estimate(tokenizer_run())
    assert facts["tokenizer_parameters"] == 172_288_064
    assert facts["discriminator_parameters"] == 7_386_245
    assert facts["frozen_parameters"] == 85_863_168 + 21_665_664 + 14_714_688  # teacher, DINO, VGG
    assert (facts["steps"], facts["samples_seen"], facts["samples_at_once"]) == (250_200, 250_200 * 1024, 128)
    assert facts["cache_bytes_per_image"] == 256 * 2 + 21
    weights = 4 * (5 * 172_288_064 + 4 * 7_386_245 + facts["frozen_parameters"])
    assert facts["training_memory_bytes"] == weights
    parts = estimate(tokenizer_run(words=["gradient_accumulation=8"]))
    assert parts["samples_at_once"] == 16
    assert 3 < facts["activations_bytes"] / parts["activations_bytes"] < 8  # the discriminator takes all 128 at once
    assert facts["checkpointed_activations_bytes"] < 0.4 * facts["activations_bytes"]


@pytest.mark.parametrize(
    ("size", "parameters"), [("b", 265_645_312), ("l", 467_962_880), ("xl", 963_292_416), ("xxl", 1_507_174_528)]
)
def test_generators_are_counted_exactly(size, parameters, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "32")
    run = load(GeneratorTrainingRun, f"imagenet256/generator-{size}.yaml", ["latents=not/there"])
    facts = estimate(run)
    assert facts["generator_parameters"] == parameters
    assert "not/there is not there yet" in facts["latents"]
    assert (facts["steps"], facts["samples_per_process_and_step"]) == (250_000, 64)
    whole = 4 * 5 * parameters
    assert facts["training_memory_bytes"] == whole if size != "xxl" else facts["training_memory_bytes"] < 0.3 * whole
    assert (learning_rate(run, 62_500), learning_rate(run, 250_000)) == pytest.approx((4e-4, 1e-5))
    assert learning_rate(run, 156_250) == pytest.approx((4e-4 + 1e-5) / 2)
    assert (int(run.random_until * run.steps), int(run.raster_from * run.steps)) == (125_000, 187_500)


def test_the_schedules_are_the_papers():
    run = tokenizer_run()
    found = {epoch: run.perturbation.at(epoch * EPOCH) for epoch in (0, 40, 60, 80, 100, 120, 199)}
    halved = {120: (0.5, 50), 199: (0.5, 50)}
    assert found == {0: (1.0, 100), 40: (1.0, 100), 60: (0.875, 87), 80: (0.75, 75), 100: (0.625, 62)} | halved
    rates = [learning_rate(run, epoch * EPOCH) for epoch in (1, 100, 199)]
    assert rates == pytest.approx([2.4e-4, 1.45e-4, 5.001e-5], rel=0.01)
    assert run.adversarial.start == 56 * EPOCH
    post = post_run()
    assert post.steps == 40 * 195
    rates = [learning_rate(post, epoch * 195) for epoch in (1, 20, 39)]
    assert rates == pytest.approx([5e-5, 3.1e-5, 1.007e-5], rel=0.02)
    assert (post.adversary, post.trainable, post.discriminator.name) == ("fresh", "decoder", "dino")


# Each change of the preset, compared with the paper's recipe

CODES = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.5], [0.9, -0.6], [-1.0, 0.1]]), dim=1)  # (4, 2)


def perturbed(config, feature, token, strength, seeds=200):
    """The tokens that replace one token in many draws."""
    found = set()
    for seed in range(seeds):
        draw = draw_perturbation(1, 1, 1.0, 1.0, torch.Generator().manual_seed(seed))
        features, tokens = F.normalize(torch.tensor([[feature]]), dim=-1), torch.tensor([[token]])
        found.add(perturb_latents(features, tokens, CODES, draw, strength, config)[1].item())
    return found


@pytest.fixture(scope="module")
def configs():
    """Perturbation of the paper, and of the authors' code."""
    return tokenizer_run().perturbation, tokenizer_run("imagenet256/authors.yaml").perturbation


def test_neighbours_of_the_feature_not_of_the_code(configs):
    paper, authors = (c.model_copy(update={"include_self": False}) for c in configs)
    feature = [0.9, -0.25]  # its code is the first, whose nearest is the second; its own second nearest is the third
    assert perturbed(paper, feature, 0, strength=1) == {1}
    assert perturbed(authors, feature, 0, strength=1) == {2}


def test_a_token_is_among_its_own_neighbours_in_both(configs):
    for config in (c.model_copy(update={"neighbour_of": "code"}) for c in configs):
        assert perturbed(config, [1.0, 0.0], 0, strength=2) == {0, 1}
        assert perturbed(config.model_copy(update={"include_self": False}), [1.0, 0.0], 0, strength=2) == {1, 2}


def test_tokens_are_drawn_independently_and_images_are_the_first(configs):
    counts, images = [], []
    for config in configs:
        settings = config.selection, config.image_selection
        rngs = [torch.Generator().manual_seed(seed) for seed in range(20)]
        draws = [draw_perturbation(20, 100, 0.5, 0.1, rng, *settings) for rng in rngs]
        counts.append({int(n) for draw in draws for n in draw.positions.sum(1)})
        images.append({tuple(draw.images.nonzero()[:, 0].tolist()) for draw in draws})
    assert counts[0] == {50}
    assert len(counts[1]) > 10
    assert len(images[0]) > 10
    assert images[1] == {(0, 1)}


def test_the_semantic_loss_uses_perturbed_latents(configs):
    settings = ["image_size=16", "patch_size=4", "quantizer.size=32", "quantizer.dim=4"]
    vit = [f"{side}.{size}" for side in ("encoder", "decoder") for size in ("width=16", "depth=1", "heads=2")]
    vit += ["encoder.pretrained=null", "decoder.pretrained=null"]
    run = tokenizer_run(words=[f"tokenizer.{word}" for word in (*settings, *vit)] + ["perturbation.strength=8"])
    torch.manual_seed(0)
    model, images = RobusTok(run.tokenizer).eval(), torch.randn(4, 3, 16, 16)
    draw = draw_perturbation(4, 16, 1.0, 1.0, torch.Generator().manual_seed(0))
    clean = model(images).semantic_latents
    latents = [model(images, config, draw, 8).semantic_latents for config in configs]
    torch.testing.assert_close(latents[0], clean)
    assert (latents[1] - clean).abs().max() > 0.01


def test_the_preset_changes_nothing_else():
    paper, authors = tokenizer_run(), tokenizer_run("imagenet256/authors.yaml")
    switches = {"neighbour_of", "selection", "image_selection", "semantic_on"}
    assert authors.model_copy(update={"perturbation": paper.perturbation}) == paper
    old, new = paper.perturbation.model_dump(), authors.perturbation.model_dump()
    assert {name for name in old if old[name] != new[name]} == switches
    paper, authors = post_run(), post_run("imagenet256/authors.yaml")
    assert authors.trainable == "authors"  # see test_authors.py
    assert authors.teacher.name == "timm"
    assert authors.model_copy(update={"trainable": "decoder", "teacher": paper.teacher}) == paper


def test_the_preset_names_commands():
    assert read_yaml(recipe("imagenet256/authors.yaml"))["settings"].keys() <= COMMANDS.keys()
