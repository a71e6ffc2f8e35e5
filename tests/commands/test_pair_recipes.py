"""The recipes of off-the-shelf pairs and of the small pairs: every one is a configuration that its command accepts."""

from pathlib import Path

import pytest

import robustok.config
from robustok.commands.post_train import PostTrainRun
from robustok.commands.pretrained_sources import check_given
from robustok.config import load, plain, validate
from robustok.errors import UserError
from robustok.generators import GENERATORS, check_sampling, default_sampling
from robustok.generators.gpt import GPTConfig
from robustok.hub import is_remote
from robustok.pretrained.families import FAMILIES, FOLDERS, dit, families_named, lightningdit, rar, sit
from robustok.tokenizers import TOKENIZERS
from robustok.training.generator import GeneratorTrainingRun
from robustok.training.tokenizer import TokenizerTrainingRun

CONFIGS = Path(robustok.config.__file__).parents[2] / "configs"
PAIRS = {path.stem: path for path in (CONFIGS / "pairs").glob("*.yaml")}
FILES = [name for name in PAIRS if name != "diffusers"]  # of which tokenizer and generator are two downloads
PATHS = (
    "data.path=images",
    "tokenizer=runs/tokenizer",
    "generator=runs/generator",
    "latents=runs/latents",
    "out=runs",
)


@pytest.mark.parametrize("name", PAIRS)
def test_a_recipe_of_a_pair_is_ten_epochs_of_its_pairs(name):
    run = load(PostTrainRun, PAIRS[name], PATHS)
    assert run.steps == 10 * run.mixture.count // run.batch_size
    assert run.sigma in run.sweep.sigmas
    assert 1.0 in run.sweep.sigmas  # the control
    assert run.ema_decay**run.steps < 0.2  # little of the untouched decoder is left in the average
    chosen = load(PostTrainRun, PAIRS[name], (*PATHS, "sigma=auto", "held_out.extractor.name=inception"))
    assert chosen.sigma == "auto"


def test_the_recipe_of_pipelines_takes_any_pipeline():
    run = load(PostTrainRun, "pairs/diffusers.yaml", ("pipeline=given", "data.path=photos", "out=runs/post"))
    assert (run.tokenizer.weights, run.generator.weights) == (Path("given"), Path("given"))
    assert (run.tokenizer.family, run.generator.family) == ("diffusers", "pipeline")
    assert validate(PostTrainRun, plain(run)) == run  # as from the config.yaml of a run folder
    bare = load(PostTrainRun, "pairs/diffusers.yaml", ("data.path=photos", "out=runs/post"))
    with pytest.raises(UserError, match="pipeline is missing; give pipeline=FOLDER"):
        check_given(bare.sources)


@pytest.mark.parametrize("name", FILES)
def test_the_command_in_a_recipe_is_all_that_its_files_need(name):
    lines = [line[1:].strip() for line in PAIRS[name].read_text().splitlines() if line.startswith("#   ")]
    program, command, file, *words = " ".join(lines).replace("\\ ", "").split()
    assert (program, command, file) == ("robustok", "post-train", f"pairs/{name}.yaml")
    run = load(PostTrainRun, file, words)
    for source, kind in ((run.tokenizer, "tokenizer"), (run.generator, "generator")):
        assert kind in {(FAMILIES | FOLDERS)[family].kind for family in families_named(source.family)}
        assert source.weights.suffix in (".pt", ".bin", ".safetensors") or source.family in FOLDERS
    bare = load(PostTrainRun, file, words[:2])
    for source, given in ((bare.tokenizer, run.tokenizer), (bare.generator, run.generator)):
        where = str(source.weights) if source.published is None else source.published
        assert given.weights.name in where or name == "maetok"  # whose generator's file has no name that is known
        assert source.weights is None or is_remote(source.weights)


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("robustok", rar.PUBLISHED[4096, 768]),
        ("maskgit", rar.PUBLISHED[1024, 1024]),
        ("maetok", sit.PUBLISHED),
        ("vavae", lightningdit.PUBLISHED),
        ("dit", dit.PUBLISHED),
    ],
)
def test_samplers_are_those_that_the_converted_generators_carry(name, sampling):
    assert load(PostTrainRun, PAIRS[name], PATHS).mixture.sampling == sampling


@pytest.mark.parametrize(
    ("pair", "tokenizer", "kind"), [("vq", "llamagen", "gpt"), ("kl", "kl", "lightningdit"), ("vit", "maetok", "sit")]
)
def test_the_small_pairs_fit_together(pair, tokenizer, kind):
    run = load(TokenizerTrainingRun, CONFIGS / "cifar10" / f"{pair}.yaml", ("out=run",))
    generator = load(GeneratorTrainingRun, CONFIGS / "cifar10" / f"{kind}.yaml", ("out=run", "latents=cache"))
    assert (run.tokenizer.name, generator.generator.name) == (tokenizer, kind)
    families = TOKENIZERS[tokenizer][0], GENERATORS[kind][0]
    assert families[0].kind == getattr(families[1], "kind", "discrete")
    assert families[0](run.tokenizer).latent_shape == (64, 8)
    check_sampling(kind, generator.sampling)
    assert plain(generator.sampling) != plain(default_sampling(kind))  # guided


def test_a_raster_generator_needs_no_word_about_orders():
    run = load(GeneratorTrainingRun, None, ("out=run", "latents=cache", "generator.name=gpt"))
    assert run.generator == GPTConfig()
