"""A mistake of the user ends in one line and exit code 2; nothing is written or lost."""

import errno
import importlib.util
import json
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from conftest import LOSSES, MAIN_TRAIN, PIPELINE, TOKENIZER, TRAINING, VIT, words
from robustok.cli import main
from robustok.tokenizers import load_tokenizer

MODEL = [*VIT, *TOKENIZER, *TRAINING, *LOSSES, "perturbation.strength=4"]


@pytest.fixture
def refused(capsys, tmp_path):
    """Function that runs a command and checks: one line, code 2, and nothing written to ``tmp_path``."""

    def check(*arguments: str, said: tuple[str, ...], notes: int = 0, writes: bool = False) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        code = main(arguments)
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert (code, out) == (2, ""), err
        assert len(lines) == 1 + notes, err
        assert all(line.startswith("robustok: note: ") for line in lines[:-1])
        assert lines[-1].startswith("robustok: ")
        for part in said:
            assert part in lines[-1]
        if not writes:
            assert contents(tmp_path) == before
        return lines[-1]

    return check


def contents(folder: Path) -> dict[str, bytes]:
    """Every file beneath the folder with its bytes, and every folder."""
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def weights(snapshot: Path) -> dict[str, torch.Tensor]:
    return load_file(snapshot / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Settings


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("tokenizer.widht=32", ("did you mean 'tokenizer.encoder.width'",)),
        ("stepps=4", ("'stepps'", "did you mean 'steps'")),
        ("tokenizer.encoder.depth=10000000000000", ("tokenizer.encoder.depth", "less than or equal to 10000")),
        ("tokenizer.encoder.width=16000000", ("settings tokenizer.* ask for a model larger than", "lower its sizes")),
        ("tokenizer.encoder.width=16000000000000", ("settings tokenizer.* ask for a model larger than",)),
        ("workers=10000000000000", ("workers", "less than or equal to 1024")),
        ("tokenizer.quantizer.sise=32", ("'tokenizer.quantizer.sise'", "did you mean 'tokenizer.quantizer.size'")),
        ("perturbation.rat=1", ("did you mean 'perturbation.rate'",)),
        ("data.path=here", ("'data.path'", "folder")),
        ("steps=many", ("steps", "'many'", "integer")),
        ("steps=[1,2]", ("steps", "[1, 2]")),
        ("learning_rate=0", ("learning_rate = 0", "greater than 0")),
        ("perturbation.rate=1.5", ("perturbation.rate = 1.5", "less than or equal to 1")),
        ("precision=fp8", ("precision", "'fp8'", "'bf16'")),
        ("data.name=imagenet", ("data", "'imagenet'", "'folder'")),
        ("tokenizer=small", ("tokenizer", "'small'")),
        ("tokenizer.patch_size=5", ("image_size 16", "patch_size 5", "divisor")),
        ("tokenizer.encoder.heads=3", ("heads 3", "width 16")),
        ("perturbation.strength=17", ("perturbation.strength 17", "(16)", "lower it")),
        ("steps", ("'steps'", "KEY=VALUE")),
    ],
)
def test_settings(refused, tmp_path, word, said):
    refused("main-train", *MAIN_TRAIN, f"out={tmp_path / 'run'}", word, said=said)


def test_a_process_of_its_own_says_one_line_too(tmp_path):
    command = [
        sys.executable,
        "-m",
        "robustok",
        "main-train",
        *MAIN_TRAIN,
        f"out={tmp_path / 'run'}",
        "batch_size=500",
    ]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("robustok: the global batch is 500 and the training set has 48 images")
    assert answer.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sigma", [-0.1, 1.1])
def test_preservation_outside_of_its_range(refused, pipeline, tmp_path, sigma):
    arguments = words("make-pairs", pipeline, str(tmp_path / "pairs"))
    refused(*arguments, f"sigma={sigma}", said=(f"sigma = {sigma}", "equal to"))


def test_more_neighbours_than_codes_in_an_evaluation(refused, pipeline, tmp_path):
    grid = ["pfid.grid.name=explicit", "pfid.grid.rates=[0.5]", "pfid.grid.codes=[17]"]
    refused(
        *words("evaluate", pipeline, str(tmp_path / "e")), *grid, said=("strength is 17", "16 codes", "16 neighbours")
    )


@pytest.mark.parametrize("command", ["main-train", "train-generator", "post-train"])
def test_not_enough_images_for_the_batch(refused, pipeline, tmp_path, command):
    arguments = [*words(command, pipeline, str(tmp_path / "run")), "batch_size=64"]
    refused(*arguments, said=("batch is 64", "has 48", "1 to 48"))


# Images


@pytest.fixture
def photos(tmp_path_factory) -> Path:
    """An image folder of two classes, twelve pictures each."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(0)
    for i in range(24):
        file = folder / "ab"[i % 2] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(file)
    return folder


def truncate(file: Path) -> str:
    file.write_bytes(file.read_bytes()[:300])
    return file.name


def test_folder_missing_or_empty(refused, tmp_path):
    folder = tmp_path / "photos"
    arguments = ["main-train", *MODEL, f"out={tmp_path / 'run'}", "data.name=folder"]
    refused(*arguments, said=("'data.path' is missing",))
    refused(*arguments, f"data.path={folder}", said=(f"no folder {folder}", "CLASS/FILE"))
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "notes.txt").write_text("no image")
    refused(*arguments, f"data.path={folder}", said=(f"no images in {folder}", ".txt", ".png"))


def test_too_many_truncated_images(refused, photos, tmp_path):
    names = [truncate(file) for file in sorted(photos.rglob("*.png"))[:8]]
    arguments = [
        "main-train",
        *MODEL,
        f"out={tmp_path / 'run'}",
        "data.name=folder",
        f"data.path={photos}",
        "data.holdout=0",
    ]
    refused(*arguments, said=("8 of 24 images", "at most 5", names[0], "max_broken"))


def test_one_truncated_image_is_named_and_skipped(capsys, photos, tmp_path):
    name = truncate(photos / "a" / "04.png")
    data = ["data.name=folder", f"data.path={photos}", "data.holdout=0"]
    capsys.readouterr()
    assert main(["main-train", *MODEL, f"out={tmp_path / 'run'}", *data]) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 2
    assert "data: photos train: 24 images, 2 classes (a, b); classes from folders\n" in err
    assert err.startswith("robustok: note: skipping an image")
    assert name in err
    assert "23 images" in yaml.safe_load((tmp_path / "run/snapshot/00000003/config.yaml").read_text())["trained_on"]


def parquet(path: Path, labels: list[int]) -> Path:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path.with_suffix(".png"))
    images = [{"bytes": path.with_suffix(".png").read_bytes(), "path": None}] * len(labels)
    schema = {"info": {"features": {"label": {"names": ["cat", "dog"]}}}}
    table = pyarrow.table({"image": images, "label": labels}).replace_schema_metadata(
        {"huggingface": json.dumps(schema)}
    )
    pyarrow.parquet.write_table(table, path)
    return path


@pytest.mark.parametrize(("labels", "said"), [([0, 1, 2], "labels from 0 to 2"), ([0, -1, 1], "labels from -1 to 1")])
def test_labels_out_of_range(refused, tmp_path, labels, said):
    file = parquet(tmp_path / "images.parquet", labels * 8)
    arguments = ["main-train", *MODEL, f"out={tmp_path / 'run'}", "data.name=parquet", f"data.path={file}"]
    refused(*arguments, said=(said, "expected 0 to 1"))


def test_classes_that_the_generator_does_not_know(refused, pipeline, tmp_path):
    refused(*words("generate", pipeline, str(tmp_path / "s")), "classes=[3,10]", said=("class 10", "0 to 9"))


# Snapshots


@pytest.mark.parametrize(("given", "kind"), [("generator", "generator"), ("classifier", "classifier")])
def test_a_snapshot_of_another_kind(refused, pipeline, tmp_path, given, kind):
    arguments = [*words("encode", pipeline, str(tmp_path / "latents")), f"tokenizer={pipeline / given}"]
    refused(*arguments, said=(f"is a snapshot of a {kind}", "expected a tokenizer"))


def test_no_snapshot_at_all(refused, pipeline, tmp_path):
    arguments = words("encode", pipeline, str(tmp_path / "latents"))
    refused(*arguments, f"tokenizer={tmp_path / 'none'}", said=("none holds no snapshot", "snapshot/STEP"))
    refused(*arguments, f"tokenizer={pipeline / 'latents'}", said=("latents holds no snapshot",))


def damaged(pipeline: Path, name: str, tmp_path: Path, change) -> Path:
    """A copy of a snapshot whose header went through ``change``."""
    copy = tmp_path / f"damaged-{name}"
    shutil.copytree(pipeline / name / "snapshot" / "00000003", copy)
    header = yaml.safe_load((copy / "config.yaml").read_text())
    change(header)
    (copy / "config.yaml").write_text(yaml.safe_dump(header))
    return copy


def test_weights_of_another_shape(refused, pipeline, tmp_path):
    copy = damaged(pipeline, "tokenizer", tmp_path, lambda h: h["config"]["encoder"].update(width=32))
    arguments = [*words("encode", pipeline, str(tmp_path / "latents")), f"tokenizer={copy}"]
    refused(*arguments, said=("weights do not fit its config.yaml", "expected"))
    copy = damaged(pipeline, "generator", tmp_path, lambda h: h.update(codebook_size=99))
    arguments = [*words("generate", pipeline, str(tmp_path / "samples")), f"generator={copy}"]
    refused(*arguments, said=("weights do not fit its config.yaml",))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h.pop("config"), "lacks the settings"),
        (lambda h: h.pop("latent_shape"), "lacks latent_shape"),
        (lambda h: h["config"].update(name="vae"), "'vae'"),
        (lambda h: h["config"].update(widht=3), "'widht'"),
        (lambda h: h["config"].update(width=16 * 10**8), "asks for a model"),
        (lambda h: h["config"].update(depth=10**13), "asks for a model"),
        (lambda h: h.update(classes=10**13), "asks for a model"),
        (lambda h: h.update(codebook_size=10**18), "asks for a model"),
        (lambda h: h.update(latent_shape=[10**13, 1]), "asks for a model"),
        (lambda h: h.update(latent_shape=["16", 8]), "latent_shape.0 = '16'"),
    ],
)
def test_a_damaged_header(refused, pipeline, tmp_path, change, said):
    copy = damaged(pipeline, "generator", tmp_path, change)
    refused(*words("generate", pipeline, str(tmp_path / "samples")), f"generator={copy}", said=(said,))


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml"])
@pytest.mark.parametrize("damage", ["cut", "remove", "fill"])
def test_damaged_files(refused, pipeline, tmp_path, name, damage):
    copy = damaged(pipeline, "tokenizer", tmp_path, lambda h: None)
    content = (copy / name).read_bytes()
    if damage == "remove":
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(content[:100] if damage == "cut" else bytes(200))
    refused(*words("encode", pipeline, str(tmp_path / "latents")), f"tokenizer={copy}", said=(str(copy),))


# Runs and caches that do not belong together


@pytest.mark.parametrize(
    ("command", "name", "change", "said"),
    [
        ("main-train", "tokenizer", "seed=5", "seed: 0 -> 5"),
        ("train-generator", "generator", "generator.width=32", "generator.width: 16 -> 32"),
        ("post-train", "post", "steps=9", "steps: 3 -> 9"),
        ("train-classifier", "classifier", "classifier.steps=5", "classifier.steps: 4 -> 5"),
    ],
)
def test_a_run_folder_of_another_configuration(refused, pipeline, tmp_path, command, name, change, said):
    shutil.copytree(pipeline / name, tmp_path / "run")
    said = ("another configuration", said, "choose another out")
    refused(*words(command, pipeline, str(tmp_path / "run")), change, said=said)


@pytest.mark.parametrize("command", ["main-train", "train-generator", "post-train", "train-classifier"])
def test_a_folder_that_holds_something_else(refused, pipeline, tmp_path, command):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("text")
    refused(*words(command, pipeline, str(tmp_path / "run")), said=("is not empty", "choose another out"))
    refused(*words(command, pipeline, str(tmp_path / "run" / "thesis.tex")), said=("thesis.tex",))


@pytest.mark.parametrize("command", ["encode", "generate", "make-pairs", "evaluate"])
def test_a_file_where_a_folder_should_be(refused, pipeline, tmp_path, command):
    (tmp_path / "file").write_text("")
    refused(*words(command, pipeline, str(tmp_path / "file" / "out")), said=(f"{tmp_path / 'file'}",))


@pytest.fixture(scope="session")
def other(pipeline, tmp_path_factory) -> Path:
    """The miniature with another tokenizer: seed 1."""
    home = tmp_path_factory.mktemp("other")
    for name in ("tokenizer", "latents", "generator", "pairs", "samples"):
        assert main([*words(PIPELINE[name], home, str(home / name)), *(["seed=1"] if name == "tokenizer" else [])]) == 0
    return home


def test_a_cache_of_another_tokenizer(refused, pipeline, other, tmp_path):
    out = str(tmp_path / "out")
    said = ("was made by another tokenizer",)
    refused(*words("make-pairs", pipeline, out), f"latents={other / 'latents'}", said=said)
    refused(*words("post-train", pipeline, out), f"pairs={other / 'pairs'}", said=said)
    refused(*words("evaluate", pipeline, out), f"samples.latents=[{other / 'samples'}]", said=said)
    held_out = [f"held_out.latents={other / 'samples'}", f"held_out.extractor.path={pipeline / 'classifier'}"]
    refused(*words("post-train", pipeline, out), *held_out, said=said)
    decode = ["images=npz", f"tokenizer={other / 'tokenizer'}"]
    refused(*words("generate", pipeline, out), *decode, said=("is not the tokenizer",))


def test_a_cache_folder_of_other_latents(refused, pipeline, tmp_path):
    shutil.copytree(pipeline / "samples", tmp_path / "samples")
    refused(
        *words("generate", pipeline, str(tmp_path / "samples")), "seed=1", said=("holds other latents", "seed: 0 -> 1")
    )


def test_pairs_of_other_images(refused, pipeline, tmp_path):
    refused(
        *words("post-train", pipeline, str(tmp_path / "out")), "data.limit=40", said=("other images", "encoded from")
    )


def test_an_incomplete_cache(refused, pipeline, tmp_path):
    shutil.copytree(pipeline / "latents", tmp_path / "latents")
    (tmp_path / "latents" / "shard-00001.safetensors").unlink()
    arguments = [*words("train-generator", pipeline, str(tmp_path / "run")), f"latents={tmp_path / 'latents'}"]
    refused(*arguments, said=("lacks 1 of 3 shards", "again"))
    refused(*arguments, f"latents={tmp_path / 'none'}", said=("no latents cache", "manifest.json"))


def test_a_damaged_cache(refused, pipeline, tmp_path):
    shutil.copytree(pipeline / "latents", tmp_path / "latents")
    arguments = [*words("train-generator", pipeline, str(tmp_path / "run")), f"latents={tmp_path / 'latents'}"]
    shard = tmp_path / "latents" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    refused(*arguments, said=("is damaged", "remove it"))
    (tmp_path / "latents" / "manifest.json").write_text("{}")
    refused(*arguments, said=("is no manifest",))


# What losses and metrics need


def test_missing_perceptual_weights(refused, tmp_path):
    arguments = ["main-train", *MAIN_TRAIN, f"out={tmp_path / 'run'}", "reconstruction.perceptual=classifier"]
    refused(*arguments, said=("reconstruction.perceptual_weights", "classifier"))
    refused(*arguments, "reconstruction.perceptual_weights=none", said=("none holds no snapshot",))
    lpips = [*arguments, "reconstruction.perceptual=lpips", f"reconstruction.perceptual_weights={tmp_path / 'vgg.pth'}"]
    refused(*lpips, said=("vgg16" if importlib.util.find_spec("lpips") else "pip install 'robustok[lpips]'",))


def test_missing_teacher_discriminator_and_extractor(refused, pipeline, tmp_path):
    out = f"out={tmp_path / 'run'}"
    refused("main-train", *MAIN_TRAIN, out, "teacher.name=classifier", said=("teacher.path",))
    bare = damaged(pipeline, "tokenizer", tmp_path, lambda h: h.pop("discriminator"))
    carried = [*words("post-train", pipeline, str(tmp_path / "run")), "adversary=carried"]
    refused(*carried, f"tokenizer={bare}", said=("no discriminator", "fresh"))
    arguments = words("evaluate", pipeline, str(tmp_path / "run"))
    without = [word for word in arguments if "extractor" not in word]
    refused(*without, said=("needs extractor.path",))
    refused(*arguments, "extractor.path=none", said=("none holds no snapshot",))
    refused("evaluate", "data.name=digits", out, said=("nothing to evaluate", "tokenizer=PATH"))


# Failures in the middle of a run


@pytest.mark.parametrize("command", ["main-train", "train-generator", "post-train"])
def test_a_loss_that_is_not_finite(refused, pipeline, tmp_path, command):
    out = tmp_path / "run"
    arguments = [*words(command, pipeline, str(out)), "learning_rate=1e20", "steps=20", "clip_norm=0", "state_every=1"]
    line = refused(*arguments, said=("the loss is not finite at step", "lower learning_rate", "is kept"), writes=True)
    step = int(line.split("at step ")[1].split()[0])
    states = sorted((out / "state").iterdir())
    assert states[-1].name == f"{step:08d}"  # what step 0 to step - 1 made
    assert str(states[-1]) in line
    assert all(tensor.isfinite().all() for tensor in load_file(states[-1] / "state.safetensors").values())


def test_after_a_broken_loss_the_run_goes_on_from_the_last_good_state(refused, pipeline, tmp_path, monkeypatch):
    from robustok.losses import reconstruction

    arguments = [*words("main-train", pipeline, str(tmp_path / "run")), "steps=6"]
    real, calls = reconstruction.pixel_loss, []

    def break_down(*things):
        calls.append(things)
        return real(*things) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(reconstruction, "pixel_loss", break_down)
    refused(*arguments, said=("not finite at step 4 (pixel = nan", "00000004, is kept"), writes=True)
    monkeypatch.setattr(reconstruction, "pixel_loss", real)
    assert main(arguments) == 0
    assert main([*arguments, f"out={tmp_path / 'whole'}"]) == 0
    snapshots = [tmp_path / run / "snapshot" / "00000006" for run in ("run", "whole")]
    assert same(*map(weights, snapshots))


@contextmanager
def file_size_limit(size: int):
    """Let every write beyond ``size`` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command", ["main-train", "train-generator", "post-train"])
def test_a_disk_that_is_full_from_the_start(refused, pipeline, tmp_path, command):
    out = tmp_path / "run"
    with file_size_limit(5000):  # enough for config.yaml and the log
        refused(*words(command, pipeline, str(out)), said=("cannot write", "free some space"), writes=True)
    assert not list(out.rglob("*.safetensors"))
    assert main(words(command, pipeline, str(out))) == 0


def test_a_disk_that_fills_up_while_a_state_is_saved(refused, pipeline, tmp_path, monkeypatch):
    from robustok import states

    arguments = [*words("main-train", pipeline, str(tmp_path / "run")), "steps=6"]
    real, calls = states.save_file, []

    def fill_up(tensors, file):
        calls.append(file)
        if len(calls) == 4:
            Path(file).write_bytes(bytes(100))
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, file)

    monkeypatch.setattr(states, "save_file", fill_up)
    said = ("No space left on device", "free some space", "last good state is kept")
    refused(*arguments, said=said, writes=True)
    assert sorted(p.name for p in (tmp_path / "run" / "state").iterdir()) == ["00000002", "00000003"]
    monkeypatch.setattr(states, "save_file", real)
    assert main(arguments) == 0
    assert main([*arguments, f"out={tmp_path / 'whole'}"]) == 0
    snapshots = [tmp_path / run / "snapshot" / "00000006" for run in ("run", "whole")]
    assert same(*map(weights, snapshots))


@pytest.mark.parametrize("command", ["encode", "generate", "make-pairs"])
def test_a_disk_that_fills_up_while_a_cache_is_written(refused, pipeline, tmp_path, command):
    out = tmp_path / "cache"
    arguments = words(command, pipeline, str(out))
    with file_size_limit(900):
        refused(*arguments, said=("cannot write", "same command again"), writes=True)
    assert main(arguments) == 0
    original = pipeline / {"encode": "latents", "generate": "samples", "make-pairs": "pairs"}[command]
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in original.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        (["generate", "images=npz"], 8000),
        (["generate", "images=png"], 0),
        (["evaluate"], 0),
    ],
)
def test_a_disk_that_is_full_for_other_files(refused, pipeline, tmp_path, arguments, limit):
    command, *more = arguments
    out = tmp_path / "out"
    tokenizer = [f"tokenizer={pipeline / 'tokenizer'}"] if command == "generate" else []
    if command == "generate":
        assert main(words(command, pipeline, str(out))) == 0
    with file_size_limit(limit):
        refused(*words(command, pipeline, str(out)), *more, *tokenizer, said=("cannot write", "space"), writes=True)
    assert main([*words(command, pipeline, str(out)), *more, *tokenizer]) == 0


def test_a_disk_that_is_full_for_pictures(refused, pipeline, tmp_path, monkeypatch):
    def fill_up(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_up)
    arguments = [*words("main-train", pipeline, str(tmp_path / "run")), "picture_every=1"]
    refused(*arguments, said=("samples/00000001.png", "No space left"), writes=True)


def test_a_state_that_was_cut_is_passed_over(capsys, pipeline, tmp_path):
    shutil.copytree(pipeline / "tokenizer", tmp_path / "run")
    for file in (tmp_path / "run" / "state" / "00000003").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    shutil.rmtree(tmp_path / "run" / "snapshot")
    capsys.readouterr()
    assert main(words("main-train", pipeline, str(tmp_path / "run"))) == 0
    assert "skipping the state" in capsys.readouterr().err
    assert same(weights(tmp_path / "run/snapshot/00000003"), weights(pipeline / "tokenizer/snapshot/00000003"))
    assert load_tokenizer(tmp_path / "run").latent_shape == (4, 4)


# Counts far too large


@pytest.mark.parametrize(
    ("command", "word", "said"),
    [
        ("generate", "count=10000000000000", "free some space, choose another out=FOLDER, or lower count"),
        ("train-generator", "generator.depth=10000000000000", "ask for a model larger than this machine's memory"),
        ("train-generator", "generator.width=10000000000000", "ask for a model larger than this machine's memory"),
        ("main-train", "tokenizer.quantizer.size=10000000000000", "ask for a model larger than"),
        ("main-train", "batch_size=10000000000000", "set a batch of 1 to 48"),
        ("train-classifier", "classifier.batch_size=10000000000000", "less than or equal to 1000000"),
        ("evaluate", "pfid.seeds=10000000000000", "less than or equal to 1000"),
        ("evaluate", "comparison.halves=10000000000000", "less than or equal to 1000"),
        ("encode", f"seed={2**64}", "the largest is 2^64 - 1"),
    ],
)
def test_counts_far_too_large_leave_nothing_behind(capsys, pipeline, tmp_path, command, word, said):
    capsys.readouterr()
    assert main([*words(command, pipeline, str(tmp_path / "out")), word]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
