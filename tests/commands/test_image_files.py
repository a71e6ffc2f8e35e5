"""Decoded samples on disk: names, resume, several processes, and never two decoders in one folder."""

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from robustok.commands.image_files import write_images
from robustok.data.arrays import open_array
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache, Manifest, create_cache, shard_rows, write_shard
from robustok.data.pixels import to_pixels
from robustok.data.sources import data_at
from robustok.errors import UserError
from robustok.tokenizers import encoder_digest
from tiny_models import CODES, tiny_tokenizer

COUNT, CLASSES, BATCH = 23, 4, 5


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer("robustok")


def samples(path, tokenizer, classes=CLASSES):
    m = Manifest("discrete", tokenizer.latent_shape, CODES["size"], classes, COUNT, 10, encoder_digest(tokenizer))
    create_cache(path, m)
    tokens = np.random.default_rng(0).integers(0, CODES["size"], (COUNT, m.latent_shape[0]))
    for k in range(m.shards):
        rows = np.asarray(shard_rows(m, k))
        write_shard(path, k, dict(latents=tokens[rows], labels=rows % classes, indices=rows * 0 - 1, seeds=rows))
    return path


@pytest.fixture
def cache(tmp_path, tokenizer):
    return samples(tmp_path / "samples", tokenizer)


@torch.no_grad()
def decoded(cache, tokenizer):
    tokens = LatentCache(cache).read(slice(None)).latents
    return to_pixels(tokenizer.decode(tokens)).permute(0, 2, 3, 1).numpy()


def alone(rank=0, world=1, **others):
    process = dict(process_index=rank, num_processes=world, is_main_process=rank == 0)
    return SimpleNamespace(**process, wait_for_everyone=lambda: None, gather=lambda pixels: pixels, **others)


def together(world, work):
    """Run work(accelerator) in threads that gather as processes do."""
    barrier, parts, errors = threading.Barrier(world, timeout=20), [None] * world, []

    def run(rank):
        def gather(pixels):
            parts[rank] = pixels
            barrier.wait()
            everything = torch.cat(parts)
            barrier.wait()
            return everything

        accelerator = alone(rank, world)
        accelerator.gather, accelerator.wait_for_everyone = gather, barrier.wait
        try:
            work(accelerator)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def count_decoding(tokenizer, monkeypatch):
    calls, plain = [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: calls.append(len(tokens)) or plain(tokens))
    return calls


@pytest.mark.parametrize("world", [1, 2, 3])
def test_npz_is_adms_and_the_same_for_any_number_of_processes(cache, tokenizer, world):
    together(world, lambda accelerator: write_images(cache, tokenizer, "npz", BATCH, accelerator))
    with np.load(cache / "samples.npz") as found:
        assert found["arr_0"].dtype == np.uint8
        assert np.array_equal(found["arr_0"], decoded(cache, tokenizer))
        assert found["arr_1"].tolist() == [i % CLASSES for i in range(COUNT)]
    array, labels = open_array(cache / "samples.npz")
    assert (array.compressed, labels.tolist()) == (False, [i % CLASSES for i in range(COUNT)])


@pytest.mark.parametrize("world", [1, 2])
def test_png_names_carry_number_and_class(cache, tokenizer, world):
    together(world, lambda accelerator: write_images(cache, tokenizer, "png", BATCH, accelerator))
    files = sorted((cache / "png").iterdir())
    assert [file.name for file in files] == [f"{i:06d}_class{i % CLASSES:04d}.png" for i in range(COUNT)]
    assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), decoded(cache, tokenizer))
    dataset = open_images(data_at(cache / "png"), None)  # the order of the folder is that of the cache
    pixels = to_pixels(dataset.read(range(COUNT)).images).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels, decoded(cache, tokenizer))


def test_png_names_without_classes(tmp_path, tokenizer):
    path = samples(tmp_path / "one", tokenizer, classes=1)
    write_images(path, tokenizer, "png", BATCH, alone())
    assert sorted(file.name for file in (path / "png").iterdir()) == [f"{i:06d}.png" for i in range(COUNT)]


def test_each_process_writes_its_share(cache, tokenizer):
    write_images(cache, tokenizer, "png", BATCH, alone(0, 2))
    numbers = sorted(int(file.name[:6]) for file in (cache / "png").iterdir())
    assert numbers == [*range(0, 5), *range(10, 15), *range(20, 23)]


def test_only_missing_files_are_made_again(cache, tokenizer, monkeypatch):
    write_images(cache, tokenizer, "png", BATCH, alone())
    files = sorted((cache / "png").iterdir())
    contents = [file.read_bytes() for file in files]
    for gone in (6, 7):
        files[gone].unlink()
    files[12].unlink()
    files[12].with_name(f".{files[12].name}.tmp").write_bytes(b"half an image")
    times = {file: file.stat().st_mtime_ns for file in files if file.exists()}
    calls = count_decoding(tokenizer, monkeypatch)
    write_images(cache, tokenizer, "png", BATCH, alone())
    assert calls == [5, 5]
    assert sorted((cache / "png").iterdir()) == files  # and nothing half written is left
    assert [file.read_bytes() for file in files] == contents
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())


def test_a_complete_npz_is_kept_and_an_interrupted_one_made(cache, tokenizer, monkeypatch):
    calls = count_decoding(tokenizer, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(LatentCache, "read", lambda self, rows: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_images(cache, tokenizer, "npz", BATCH, alone())
    assert not list(cache.glob("*.npz")) + list(cache.glob(".*.tmp"))
    write_images(cache, tokenizer, "npz", BATCH, alone())
    assert calls == [BATCH] * 5  # the last one is filled up
    write_images(cache, tokenizer, "npz", BATCH, alone())
    assert len(calls) == 5


@pytest.mark.parametrize(("kind", "name"), [("npz", "samples.npz"), ("png", "png")])
def test_images_of_another_decoder_are_refused(cache, tokenizer, kind, name):
    write_images(cache, tokenizer, kind, BATCH, alone())
    other = tiny_tokenizer("robustok")
    for parameter in other.decoder_modules()[0].parameters():
        parameter.data += 0.01
    assert encoder_digest(other) == encoder_digest(tokenizer)  # as after post-training
    with pytest.raises(UserError, match=rf"{name} holds other images \(decoder: .* -> .*move"):
        write_images(cache, other, kind, BATCH, alone())
    note = cache / f"{name}.json"
    for broken in (note.read_bytes()[:10], b"\xff", b"[]"):
        note.write_bytes(broken)
        with pytest.raises(UserError, match="holds other images"):
            write_images(cache, tokenizer, kind, BATCH, alone())
    note.unlink()
    with pytest.raises(UserError, match="holds other images"):
        write_images(cache, tokenizer, kind, BATCH, alone())


def test_a_note_without_images_is_no_obstacle(cache, tokenizer):
    (cache / "samples.npz.json").write_text(json.dumps({"decoder": "another", "images": 1}))
    write_images(cache, tokenizer, "npz", BATCH, alone())
    assert json.loads((cache / "samples.npz.json").read_text())["images"] == COUNT


def test_a_full_disk_is_the_users_to_solve(cache, tokenizer, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    for kind, function in (
        ("npz", "os.fsync"),
        ("png", "os.replace"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(function, full)
            with pytest.raises(UserError, match="No space left on device; free some space"):
                write_images(cache, tokenizer, kind, BATCH, alone())
    assert not (cache / "samples.npz").exists()
