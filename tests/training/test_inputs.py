"""What makes another run and what does not: inputs, paths, steps, and what was removed from the folder."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from test_resume import assert_same_run, distance_to_the_original

import tiny
from robustok.commands.post_train import PostTrainRun, post_train
from robustok.config import load
from robustok.data.dataset import open_images
from robustok.data.sources import Folder
from robustok.errors import UserError
from robustok.runs import RunFolder
from robustok.tokenizers import load_tokenizer
from robustok.training.decoder import train_decoder
from robustok.training.generator import train_generator
from robustok.training.inputs import image_digest, path_digest
from robustok.training.tokenizer import train_tokenizer

HALF = ("steps=4", "state_every=2", "log_every=1", "min_learning_rate=1")  # a constant rate: steps may be raised


@pytest.fixture
def photos(tmp_path):
    """A folder of 32 bitmaps, all of one size on disk."""
    rng = np.random.default_rng(0)
    for i in range(32):
        file = tmp_path / "photos" / "ab"[i % 2] / f"{i:02d}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file)
    return tmp_path / "photos"


def on(photos, out, *words):
    return tiny.main_run(out, "data.name=folder", f"data.path={photos}", *HALF, *words)


def go_back(folder):
    """Remove what came after step 2: as if the run had been killed before it ended."""
    shutil.rmtree(folder / "state" / "00000004")
    shutil.rmtree(folder / "snapshot")


# Images


def test_images_may_move_but_not_change(tmp_path, photos):
    whole = train_tokenizer(on(photos, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    go_back(tmp_path / "run")
    moved = shutil.copytree(photos, tmp_path / "elsewhere")  # with other times of the files
    train_tokenizer(on(moved, tmp_path / "run"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["path"] == str(moved)
    file = moved / "a" / "00.bmp"
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)  # of the same name and size
    with pytest.raises(UserError, match=r"has done 4 steps with another content of data; give the same .* from step 0"):
        train_tokenizer(on(moved, tmp_path / "run"))
    assert train_tokenizer(on(photos, tmp_path / "run")).name == whole.name


def test_the_same_folder_in_other_words(tmp_path, photos, monkeypatch):
    train_tokenizer(on(photos, tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    train_tokenizer(on("photos", "run"))
    RunFolder(on("photos/../photos", "run"))


def test_digests_of_images(photos):
    def digest(**settings):
        return image_digest(open_images(Folder(path=photos), 16, **settings))

    first = digest()
    assert digest() == first
    assert digest(split="test") != first
    data = open_images(Folder(path=photos), 16)
    data.labels = 1 - data.labels
    assert image_digest(data) != first
    (photos / "a" / "00.bmp").rename(photos / "a" / "000.bmp")
    assert digest() != first


# Caches, tokenizers and other networks


def test_latents_may_move_but_not_change(tmp_path, latents):
    cache = shutil.copytree(latents, tmp_path / "latents")
    train_generator(tiny.generator_run(tmp_path / "run", cache, *HALF, "generator.depth=1"))
    cache = cache.rename(tmp_path / "moved")
    train_generator(tiny.generator_run(tmp_path / "run", cache, *HALF))
    shard = cache / "shard-00000.safetensors"
    fields = load_file(shard)
    fields["latents"][5, 3] = (fields["latents"][5, 3].int() + 1) % 32
    save_file(fields, shard)
    with pytest.raises(UserError, match="another content of latents;"):
        train_generator(tiny.generator_run(tmp_path / "run", cache, *HALF))


def test_pairs_and_tokenizer_may_move_but_not_change(tmp_path, tokenizer, pairs):
    before = [shutil.copytree(path, tmp_path / name) for path, name in ((tokenizer, "tokenizer"), (pairs, "pairs"))]
    train_decoder(tiny.post_run(tmp_path / "run", *before, *HALF))
    train_decoder(tiny.post_run(tmp_path / "run", tokenizer, pairs, *HALF))
    weights = max((before[0] / "snapshot").iterdir()) / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.startswith("decoder"))  # the latent space stays the same
    save_file(tensors | {name: tensors[name] + 1}, weights)
    with pytest.raises(UserError, match="another content of tokenizer;"):
        train_decoder(tiny.post_run(tmp_path / "run", before[0], pairs, *HALF))
    manifest = before[1] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"classes": 10', '"classes": 11'))
    with pytest.raises(UserError, match="another content of pairs;"):
        train_decoder(tiny.post_run(tmp_path / "run", tokenizer, before[1], *HALF))


def test_other_networks_count_too(tmp_path, classifier):
    teacher = shutil.copytree(classifier, tmp_path / "teacher")
    words = (*HALF, "teacher.name=classifier")
    train_tokenizer(tiny.main_run(tmp_path / "run", *words, f"teacher.path={teacher}"))
    train_tokenizer(tiny.main_run(tmp_path / "run", *words, f"teacher.path={classifier}"))
    weights = next(teacher.rglob("model.safetensors"))
    save_file({name: tensor * 2 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match=r"another content of teacher\.path;"):
        train_tokenizer(tiny.main_run(tmp_path / "run", *words, f"teacher.path={teacher}"))


def test_digests_of_paths(tmp_path, latents, tokenizer):
    assert path_digest(latents) == path_digest(shutil.copytree(latents, tmp_path / "latents"))
    assert path_digest(tokenizer) == path_digest(shutil.copytree(tokenizer, tmp_path / "tokenizer"))
    assert path_digest(tmp_path / "tokenizer@0.5").endswith("@0.5")
    missing = tmp_path / "missing"
    assert path_digest(missing) == str(missing)


def test_a_run_goes_on_from_the_tokenizer_it_began_with(tmp_path, tokenizer, pairs):
    """A state of another tokenizer would replace the frozen weights."""
    train_decoder(tiny.post_run(tmp_path / "first", tokenizer, pairs, *HALF))
    for folder in (tmp_path / "first" / "state").iterdir():
        file = folder / "state.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if name.startswith("/tokenizer/encoder"))
        save_file(tensors | {name: tensors[name] + 1}, file)
        forget(folder, "digest", "inputs")
    with pytest.raises(UserError, match="first is of another tokenizer; give that one"):
        train_decoder(tiny.post_run(tmp_path / "next", tokenizer, pairs, f"continue_from={tmp_path / 'first'}", *HALF))


def test_images_may_move_where_pairs_are_made_too(tmp_path, photos, tokenizer, generator):
    def words(folder, *more):
        sources = (f"tokenizer={tokenizer}", f"generator={generator}", "sigma=0.5", f"out={tmp_path / 'run'}")
        settings = (*tiny.TRAINING, "reconstruction.perceptual=none", "adversarial.weight=0", *HALF, *more)
        return [*sources, "data.name=folder", f"data.path={folder}", *settings]

    best = post_train(load(PostTrainRun, None, words(photos)))
    before = files(best)
    moved = photos.rename(tmp_path / "elsewhere")
    assert post_train(load(PostTrainRun, None, words(moved))) == best
    assert files(best) == before
    file = moved / "a" / "00.bmp"
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    with pytest.raises(UserError, match=r"latents holds other latents \(source\.images: "):
        post_train(load(PostTrainRun, None, words(moved)))
    with pytest.raises(UserError, match="another configuration: steps: 4 -> 5"):
        post_train(load(PostTrainRun, None, words(moved, "steps=5")))


# Steps, and settings that change no weight


@pytest.mark.parametrize("name", ["main", "generator", "post"])
def test_steps_may_be_raised_where_the_rate_is_constant(tmp_path, name, latents, tokenizer, pairs):
    def train(out, *words):
        if name == "main":
            return train_tokenizer(tiny.main_run(out, *HALF, *tiny.ADVERSARY, *words))
        if name == "generator":
            words = ("generator.dropout=0.2", "random_until=0", "raster_from=0", *words)
            return train_generator(tiny.generator_run(out, latents, *HALF, *words))
        return train_decoder(tiny.post_run(out, tokenizer, pairs, *HALF, *tiny.ADVERSARY[:2], *words))

    more = ("steps=7", "snapshot_every=4")
    train(tmp_path / "run", "snapshot_every=4")
    last = train(tmp_path / "run", *more)
    assert last.name == "00000007"
    train(tmp_path / "whole", *more)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["steps"] == 7
    with pytest.raises(UserError, match=r"steps: 7 -> 5, but it has done 7; set steps=7 or more, or .* from step 0"):
        train(tmp_path / "run", "steps=5")


def test_steps_of_a_cosine_are_fixed(tmp_path, latents, tokenizer, pairs):
    words = ("steps=4", "state_every=2", "learning_rate=1e-3", "min_learning_rate=1e-4")
    said = r"steps: 4 -> 6, which changes the schedule.* set steps=4 to go on to its end, or .* from step 0$"
    train_tokenizer(tiny.main_run(tmp_path / "main", *words))
    with pytest.raises(UserError, match=said):
        train_tokenizer(tiny.main_run(tmp_path / "main", *words, "steps=6"))
    train_generator(tiny.generator_run(tmp_path / "orders", latents, *HALF))
    with pytest.raises(UserError, match=said):  # the rate is constant, the share of random orders is not
        train_generator(tiny.generator_run(tmp_path / "orders", latents, *HALF, "steps=6"))
    train_decoder(tiny.post_run(tmp_path / "post", tokenizer, pairs, *words))
    with pytest.raises(UserError, match=said[:-1] + r" \(continue_from=.*post goes on from its state there\)"):
        train_decoder(tiny.post_run(tmp_path / "post", tokenizer, pairs, *words, "steps=6"))
    constant = ("min_learning_rate=1e-3", *tiny.ADVERSARY, "adversarial.learning_rate=1e-2")  # but not the adversary's
    train_tokenizer(tiny.main_run(tmp_path / "adversary", *words, *constant))
    with pytest.raises(UserError, match=said):
        train_tokenizer(tiny.main_run(tmp_path / "adversary", *words, *constant, "steps=6"))


def test_steps_may_be_raised_during_the_warm_up(tmp_path):
    words = ("warmup_steps=4", "learning_rate=1e-3", "min_learning_rate=1e-4")
    RunFolder(tiny.main_run(tmp_path / "run", *words, "steps=6")).start()
    folder = RunFolder(tiny.main_run(tmp_path / "run", *words, "steps=9"), later={"steps"})
    folder._check_steps(done=4)
    with pytest.raises(UserError, match="steps: 6 -> 9, which changes the schedule"):
        folder._check_steps(done=6)


def test_settings_that_change_no_weight(tmp_path):
    train_tokenizer(tiny.main_run(tmp_path / "run", *HALF))
    words = ("workers=1", "log_every=3", "state_every=5", "snapshot_every=1", "picture_every=4", "data.max_broken=0.5")
    run = tiny.main_run(tmp_path / "run", *HALF, *words, "gradient_accumulation=2", "gradient_checkpointing=true")
    train_tokenizer(run)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["workers"] == 1
    with pytest.raises(UserError, match=r"seed: 0 -> 1; set the old values .* where it starts from the beginning"):
        train_tokenizer(tiny.main_run(tmp_path / "run", *HALF, "seed=1"))


# What was removed or damaged


@pytest.fixture
def trainings(monkeypatch, tokenizer, latents, pairs, samples, classifier):
    monkeypatch.setattr("robustok.training.decoder._held_out_score", distance_to_the_original)
    held_out = (f"held_out.latents={samples[0]}", f"held_out.extractor.path={classifier}")
    return {
        "main": lambda out: train_tokenizer(tiny.main_run(out, *HALF, *tiny.ADVERSARY)),
        "generator": lambda out: train_generator(tiny.generator_run(out, latents, *HALF)),
        "post": lambda out: train_decoder(tiny.post_run(out, tokenizer, pairs, *HALF)),
        "held out": lambda out: train_decoder(tiny.post_run(out, tokenizer, pairs, *HALF, *held_out)),
    }


def files(folder):
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["main", "generator", "post"])
def test_a_removed_snapshot_is_written_again(tmp_path, trainings, name):
    last, whole = trainings[name](tmp_path / "run"), files(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "snapshot")
    assert trainings[name](tmp_path / "run") == last
    assert files(tmp_path / "run") == whole


def test_a_removed_best_snapshot(tmp_path, trainings, capsys):
    """The state holds the last step: the best one is made again where it is the last."""
    best = trainings["held out"](tmp_path / "run")
    assert best.name == "best"
    whole = files(tmp_path / "run")
    assert trainings["held out"](tmp_path / "run") == best
    shutil.rmtree(tmp_path / "run" / "snapshot")
    assert trainings["held out"](tmp_path / "run").name == "00000004"  # the original decoder was the best
    assert "best was removed and cannot be made again" in " ".join(capsys.readouterr().err.split())
    assert load_tokenizer(tmp_path / "run").config.name == "robustok"
    state = tmp_path / "run" / "state" / "00000004"
    content = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps(content | {"digest": None}).replace('["step", 0]', '["step", 4]', 1))
    shutil.rmtree(tmp_path / "run" / "snapshot")
    assert trainings["held out"](tmp_path / "run") == best
    assert files(tmp_path / "run").keys() == whole.keys()


@pytest.mark.parametrize("name", ["main", "generator", "post", "held out"])
def test_a_finished_run_without_its_state_trains_nothing(tmp_path, trainings, name, capsys):
    last = trainings[name](tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "state")
    whole = files(tmp_path / "run")
    capsys.readouterr()
    assert trainings[name](tmp_path / "run") == last
    assert "finished, without its state/: nothing is trained" in " ".join(capsys.readouterr().err.split())
    assert files(tmp_path / "run") == whole


def test_a_finished_run_without_its_state_goes_on_with_no_other_inputs(tmp_path, tokenizer, pairs):
    train_decoder(tiny.post_run(tmp_path / "run", tokenizer, pairs, *HALF))
    shutil.rmtree(tmp_path / "run" / "state")
    whole = files(tmp_path / "run")
    with pytest.raises(UserError, match="holds a run of another configuration: pairs: "):
        train_decoder(tiny.post_run(tmp_path / "run", tokenizer, shutil.copytree(pairs, tmp_path / "moved"), *HALF))
    assert files(tmp_path / "run") == whole


def test_more_steps_need_the_state(tmp_path):
    train_tokenizer(tiny.main_run(tmp_path / "run", *HALF))
    shutil.rmtree(tmp_path / "run" / "state")
    with pytest.raises(UserError, match=r"after 4 steps, without its state/: it cannot go on to 6; set steps=4"):
        train_tokenizer(tiny.main_run(tmp_path / "run", *HALF, "steps=6"))


def test_an_unfinished_run_without_a_state_says_that_it_starts_again(tmp_path, capsys):
    train_tokenizer(tiny.main_run(tmp_path / "whole", *HALF))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for name in ("state", "snapshot"):
        shutil.rmtree(tmp_path / "run" / name)
    capsys.readouterr()
    train_tokenizer(tiny.main_run(tmp_path / "run", *HALF))
    assert "holds no state: the run starts again from step 0" in " ".join(capsys.readouterr().err.split())
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def forget(state, *keys):
    """What earlier versions did not write."""
    content = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps({key: value for key, value in content.items() if key not in keys}))


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
def test_a_flipped_bit_is_noticed(tmp_path, capsys, file):
    train_tokenizer(tiny.main_run(tmp_path / "whole", *HALF))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    damaged = tmp_path / "run" / "state" / "00000004" / file
    content = bytearray(damaged.read_bytes())
    at = content.index(b"0.9") if file == "state.json" else len(content) - 3
    content[at] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    train_tokenizer(tiny.main_run(tmp_path / "run", *HALF))
    assert "its digest is not the one it was saved with" in " ".join(capsys.readouterr().err.split())
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    for state in (tmp_path / "run" / "state").iterdir():
        (state / file).write_bytes(b"\x00" + (state / file).read_bytes()[1:])
    whole = files(tmp_path / "run")
    with pytest.raises(UserError, match=r"none of its 2 states can be read.* start again from step 0"):
        train_tokenizer(tiny.main_run(tmp_path / "run", *HALF))
    assert files(tmp_path / "run") == whole


def test_states_of_earlier_versions_go_on(tmp_path, photos):
    train_tokenizer(on(photos, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    go_back(tmp_path / "run")
    forget(tmp_path / "run" / "state" / "00000002", "digest", "inputs")
    moved = shutil.copytree(photos, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"another configuration: data\.path: .*photos -> .*elsewhere; set the old"):
        train_tokenizer(on(moved, tmp_path / "run"))
    train_tokenizer(on(photos, tmp_path / "run"))
    whole, found = (dict(tiny.saved(tmp_path / name)) for name in ("whole", "run"))
    assert all(torch.equal(found[name], value) for name, value in whole.items() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(
    "change",
    [
        {"step": 10**13},
        {"step": -4},
        {"step": "4"},
        {"step": True},
        {"inputs": []},
        {"state": None},
        {"state": 5},
        {"state": {"__dict__": [[[], 1]]}},
        {"state": {"__dict__": 7}},
        {"state": {"__tensor__": []}},
        {"state": {"__dict__": [["tokenizer", {"__dict__": []}]]}},
        {"state": {"__dict__": [["tokenizer", {"__dict__": [["²", 1e400]]}]]}},
    ],
    ids=lambda change: str(change)[:50],
)
def test_hostile_states_end_in_one_line(tmp_path, change):
    run = tiny.main_run(tmp_path / "run", *HALF, "state_every=4")
    train_tokenizer(run)
    file = tmp_path / "run" / "state" / "00000004" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"digest": None} | change))
    with pytest.raises(UserError, match=r"none of its 1 states can be read|does not fit its config\.yaml") as error:
        train_tokenizer(run)
    assert "\n" not in str(error.value)
    file.write_text("[" * 10**5)
    with pytest.raises(UserError, match="none of its 1 states can be read"):
        train_tokenizer(run)
