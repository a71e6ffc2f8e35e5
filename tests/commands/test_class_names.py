"""Names of classes on their way from images through caches and generators, and what happens where they differ."""

import json
from dataclasses import replace

import pytest

import tiny
from robustok.commands.encode import EncodeRun, encode
from robustok.commands.generate import generate
from robustok.commands.make_pairs import make_pairs
from robustok.commands.train_classifier import TrainClassifierRun, train_classifier
from robustok.data.latent_cache import LatentCache
from robustok.errors import UserError
from robustok.snapshots import read_header
from robustok.training.decoder import train_decoder
from robustok.training.generator import train_generator
from tiny_images import picture, save_tree

NAMES = [str(i) for i in range(12)]


def encoded(out, tokenizer, path, *words):
    data = ("data.name=folder", f"data.path={path}", "data.holdout=0")
    return encode(tiny.load(EncodeRun, None, (f"out={out}", f"tokenizer={tokenizer}", *data, *words)))


def write_manifest(cache, **changes):
    manifest = replace(LatentCache(cache).manifest, **changes)
    (cache / "manifest.json").write_text(json.dumps(manifest.plain()))


def test_names_go_from_the_images_to_samples_and_pairs(tmp_path, tokenizer):
    save_tree(tmp_path / "photos", NAMES, 2)
    cache = encoded(tmp_path / "latents", tokenizer, tmp_path / "photos")
    assert LatentCache(cache).manifest.class_names == NAMES
    assert LatentCache(cache).labels.tolist() == [i for i in range(12) for _ in range(2)]
    generator = tmp_path / "generator"
    train_generator(tiny.generator_run(generator, cache, "steps=2"))
    assert read_header(generator)["class_names"] == NAMES
    samples = generate(tiny.samples_run(tmp_path / "samples", generator))
    pairs = make_pairs(tiny.pairs_run(tmp_path / "pairs", generator, cache))
    assert [LatentCache(path).manifest.class_names for path in (samples, pairs)] == [NAMES, NAMES]
    data = ("data.name=folder", f"data.path={tmp_path / 'photos'}", "data.holdout=0", "data.limit=null")
    train_decoder(tiny.post_run(tmp_path / "post", tokenizer, pairs, *data))
    # A cache without names goes on, and one with other numbers is refused.
    write_manifest(cache, class_names=None)
    encoded(cache, tokenizer, tmp_path / "photos")
    make_pairs(tiny.pairs_run(tmp_path / "old", generator, cache))
    write_manifest(cache, class_names=sorted(NAMES))
    with pytest.raises(UserError, match=r"class 2 has number 2 in .*generator and 4 in .*latents; give both the same"):
        make_pairs(tiny.pairs_run(tmp_path / "other", generator, cache))


def test_images_without_labels_are_refused_where_labels_count(tmp_path, tokenizer):
    save_tree(tmp_path / "set" / "train", count=6)
    (tmp_path / "set" / "val").mkdir()
    for i in range(4):
        picture(i).save(tmp_path / "set" / "val" / f"{i}.png")
    with pytest.raises(UserError, match=r"val has no class folders, .*data\.labels=FILE"):
        encoded(tmp_path / "latents", tokenizer, tmp_path / "set", "split=test")
    words = ("data.name=folder", f"data.path={tmp_path / 'set'}", f"out={tmp_path / 'c'}", "classifier.steps=2")
    words += ("classifier.width=8", "classifier.batch_size=4", "image_size=16")
    with pytest.raises(UserError, match=r"val has no class folders, .*data\.labels=FILE"):
        train_classifier(tiny.load(TrainClassifierRun, None, words))
    assert not (tmp_path / "latents").exists()
    assert not (tmp_path / "c" / "snapshot").exists()
    (tmp_path / "list.txt").write_text("dog\ncat\ncat\ndog\n")
    labels = f"data.labels={tmp_path}/list.txt"
    cache = encoded(tmp_path / "latents", tokenizer, tmp_path / "set", "split=test", labels)
    assert LatentCache(cache).labels.tolist() == [1, 0, 0, 1]
    assert train_classifier(tiny.load(TrainClassifierRun, None, (*words, labels))).samples == 4


def test_a_classifier_counts_the_images_that_it_saw(tmp_path):
    save_tree(tmp_path / "set" / "train")
    save_tree(tmp_path / "set" / "test", count=6)
    (tmp_path / "set" / "test" / "cat" / "000.png").write_bytes(b"broken")
    words = ("data.name=folder", f"data.path={tmp_path / 'set'}", f"out={tmp_path / 'c'}", "classifier.steps=2")
    words += ("classifier.width=8", "classifier.batch_size=4", "image_size=16")
    with pytest.warns(UserWarning, match="000.png"):
        assert train_classifier(tiny.load(TrainClassifierRun, None, words)).samples == 11
