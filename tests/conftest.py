"""Tiny trained models on the digits, made once per session when the first test needs them; the option ``--golden``.

``pipeline`` runs all commands, a few steps each. The other fixtures train longer, through the Python API: long enough
that losses fall, and that tokens, samples and decoders differ.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["ROBUSTOK_PROGRESS"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are slower with more

import tiny
from robustok.commands.encode import encode
from robustok.commands.generate import generate
from robustok.commands.make_pairs import make_pairs
from robustok.data.dataset import open_images
from robustok.data.pixels import to_pixels
from robustok.data.sources import Digits
from robustok.metrics.features.classifier import ClassifierConfig, save_classifier
from robustok.training.classifier import fit_classifier
from robustok.training.generator import train_generator
from robustok.training.tokenizer import train_tokenizer

DATA = ["data.name=digits", "data.limit=48"]
VIT = [f"tokenizer.{side}.{size}" for side in ("encoder", "decoder") for size in ("width=16", "depth=1", "heads=2")]
TOKENIZER = [
    "tokenizer.image_size=16",
    "tokenizer.patch_size=8",
    "tokenizer.quantizer.size=16",
    "tokenizer.quantizer.dim=4",
]
TRAINING = ["steps=3", "batch_size=8", "state_every=1", "log_every=1", "precision=float32", "learning_rate=0.001"]
LOSSES = ["reconstruction.perceptual=none", "discriminator.width=8", "discriminator.depth=1"]
MAIN_TRAIN = [*DATA, *VIT, *TOKENIZER, *TRAINING, *LOSSES, "perturbation.strength=4", "perturbation.proportion=0.5"]
GENERATOR = ["generator.width=16", "generator.depth=1", "generator.heads=2"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--golden``, ``--hostile`` and ``--hostile-seed``."""
    parser.addoption("--golden", type=Path, metavar="FOLDER", help="only compare with the reference outputs in FOLDER")
    parser.addoption("--hostile", type=int, default=1000, metavar="N", help="how many hostile tries (1000)")
    parser.addoption("--hostile-seed", type=int, default=0, metavar="SEED", help="of the hostile tries (0)")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collect only tests/golden with ``--golden``, and everything else without it."""
    if collection_path.is_dir():
        return None
    return (collection_path.parent.name == "golden") != (config.getoption("golden") is not None) or None


# Files that `make quick` leaves out: those that take more than about 4 s of CPU time, fixtures included.
SLOW = {
    "commands/test_app.py",
    "commands/test_candidates.py",
    "commands/test_demo.py",
    "commands/test_evaluate.py",
    "commands/test_evaluate_images.py",
    "commands/test_parallel.py",
    "commands/test_post_train_buckets.py",
    "commands/test_post_train_dit.py",
    "commands/test_post_train_pipeline.py",
    "commands/test_post_train_pretrained.py",
    "data/test_streaming.py",
    "evaluation/test_evaluator.py",
    "evaluation/test_interpolations.py",
    "generators/test_compiled_sampling.py",
    "generators/test_ddpm.py",
    "generators/test_dit.py",
    "generators/test_pipeline.py",
    "hostile/test_hostile.py",
    "losses/test_guides.py",
    "losses/test_losses.py",
    "metrics/test_inception.py",
    "report/test_page_in_a_browser.py",
    "report/test_report.py",
    "test_backbones.py",
    "test_bad_input.py",
    "test_contributing.py",
    "test_docs.py",
    "test_gpu_benchmark.py",
    "test_install.py",
    "test_recipes.py",
    "test_tutorial.py",
    "tokenizers/test_deltas.py",
    "training/test_authors.py",
    "training/test_decoder_training.py",
    "training/test_diffusion_training.py",
    "training/test_other_tokenizers.py",
    "training/test_post_continuous.py",
    "training/test_prepared.py",
    "training/test_resume.py",
    "training/test_tokenizer_training.py",
}
MULTIPROCESS = {"training/test_sharded.py", "training/test_two_processes.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of these files."""
    here = Path(__file__).parent
    if missing := [name for name in sorted(SLOW | MULTIPROCESS) if not (here / name).is_file()]:
        raise pytest.UsageError(f"tests/conftest.py names {missing[0]}, which does not exist")
    for item in items:
        name = item.path.relative_to(here).as_posix()
        if name in SLOW:
            item.add_marker("slow")
        if name in MULTIPROCESS:
            item.add_marker("multiprocess")


def words(command: str, home: Path, out: str) -> list[str]:
    """The words of a command with tiny settings and its inputs in ``home``."""
    at = {name: f"{home / name}" for name in PIPELINE}
    settings = {
        "train-classifier": [
            *DATA,
            "image_size=16",
            "classifier.steps=4",
            "classifier.width=8",
            "classifier.features=8",
        ],
        "main-train": MAIN_TRAIN,
        "encode": [*DATA, f"tokenizer={at['tokenizer']}", "cache.shard_size=20"],
        "train-generator": [*TRAINING, *GENERATOR, f"latents={at['latents']}"],
        "generate": [f"generator={at['generator']}", "count=40"],
        "make-pairs": [f"generator={at['generator']}", f"latents={at['latents']}", "sigma=0.8", "cache.shard_size=20"],
        "post-train": [*DATA, *TRAINING, *LOSSES, f"tokenizer={at['tokenizer']}", f"pairs={at['pairs']}"],
        "evaluate": [
            *DATA,
            f"tokenizer={at['tokenizer']}",
            f"samples.latents=[{at['samples']}]",
            f"samples.decoders={{original: {at['tokenizer']}, post_trained: {at['post']}}}",
            f"extractor.path={at['classifier']}",
        ],
    }
    return [command, *settings[command], f"out={out}"]


def unchanged_by(path: Path, run: Callable[[], tuple[int, str, str]]) -> str:
    """The one line that a command is refused with; it wrote nothing below the path."""
    before = sorted(path.rglob("*"))
    code, printed, err = run()
    assert (code, printed, err.count("\n")) == (2, "", 1), err
    assert sorted(path.rglob("*")) == before
    return err


PIPELINE = {
    "classifier": "train-classifier",
    "tokenizer": "main-train",
    "latents": "encode",
    "generator": "train-generator",
    "samples": "generate",
    "pairs": "make-pairs",
    "post": "post-train",
}


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tiny classifier, tokenizer, cache of latents, generator, samples, pairs and post-trained tokenizer.

    Tests must not change it.
    """
    from robustok.cli import main

    home = tmp_path_factory.mktemp("pipeline")
    for name, command in PIPELINE.items():
        assert main(words(command, home, str(home / name))) == 0, command
    return home


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier of the digits: feature space, perceptual network and teacher."""
    data = open_images(Digits(limit=512), 16)
    batch = data.read(range(len(data)))
    path = tmp_path_factory.mktemp("classifier") / "saved"
    config = ClassifierConfig(width=8, features=16, steps=30, batch_size=64)
    save_classifier(fit_classifier(to_pixels(batch.images), batch.labels, config, seed=0), path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of main training, with a discriminator in its snapshot."""
    out = tmp_path_factory.mktemp("tokenizer") / "run"
    # Without revival one code would be in use after so short a training, and tests of tokens would test nothing.
    words = ("steps=60", "batch_size=32", "log_every=10", "state_every=60", "tokenizer.quantizer.revive_every=5")
    train_tokenizer(tiny.main_run(out, *words, *tiny.ADVERSARY))
    return out


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """Cache of the tokens of the training images, in two shards."""
    return encode(tiny.tokens_run(tmp_path_factory.mktemp("latents") / "cache", tokenizer, "cache.shard_size=64"))


@pytest.fixture(scope="session")
def generator(tmp_path_factory: pytest.TempPathFactory, latents: Path) -> Path:
    """Run folder of a generator trained on ``latents``."""
    out = tmp_path_factory.mktemp("generator") / "run"
    train_generator(tiny.generator_run(out, latents, "steps=60", "batch_size=32", "log_every=10", "state_every=60"))
    return out


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory, generator: Path) -> list[Path]:
    """Two independent sets of free samples."""
    folder = tmp_path_factory.mktemp("samples")
    return [generate(tiny.samples_run(folder / str(seed), generator, f"seed={seed}")) for seed in (1, 2)]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory, generator: Path, latents: Path) -> Path:
    """Cache of pairs with sigma 0.5."""
    return make_pairs(tiny.pairs_run(tmp_path_factory.mktemp("pairs") / "cache", generator, latents, "sigma=0.5"))
