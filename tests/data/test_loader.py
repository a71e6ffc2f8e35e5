"""Reading ahead: the same batches whatever reads them, as before there were workers; and what workers report."""

import hashlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustok.data.crops import random_crop
from robustok.data.dataset import Augmentation, Draw, open_images
from robustok.data.latent_cache import LatentCache, create_cache, write_shard
from robustok.data.loader import ahead, batches_in_order, training_batches, worker_count
from robustok.data.manifest import Manifest
from robustok.data.sources import Folder
from robustok.errors import UserError
from tiny_images import picture, save_tree, truncate

COUNT, SHARD = 60, 17


def digest(*tensors):
    """Of the bytes of integers, which are the same on every machine."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return sha.hexdigest()[:16]


def parts(batches):
    return [x for batch in batches for x in (batch.pixels, batch.labels, batch.indices)]


@pytest.fixture(params=[10**9, 0], ids=["held", "decoded"])
def folder(tmp_path, monkeypatch, request):
    """Settings of a data set that is held in memory, or decoded when it is read."""
    monkeypatch.setattr("robustok.data.dataset.MEMORY_LIMIT", request.param)
    return Folder(path=save_tree(tmp_path / "d"), holdout=0)


# The same batches


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_those_of_before_there_were_workers(folder, workers):
    """Digests of commit 2cea2f7."""
    dataset = open_images(folder, 8, augment=Augmentation(flip=True))
    for world, expected in ((1, "6e18110c5ea42be6"), (2, "47856597c8d32678")):
        ranks = [training_batches(dataset, 6, 1, 2, 5, rank, world, workers) for rank in range(world)]
        assert digest(*(x for rank in ranks for x in parts(rank))) == expected
    assert digest(*parts(batches_in_order(dataset, 7, workers=workers))) == "0e1407cc2f2a2359"


def numbers(size, step):
    return torch.randn(size, generator=torch.Generator().manual_seed(step)), {"step": step}


@pytest.mark.parametrize("workers", [0, 1])
def test_draws_come_with_their_step(folder, workers):
    dataset = open_images(folder, 8)
    batches = training_batches(dataset, 6, 1, 3, 4, workers=workers, draw=partial(numbers, 5))
    for step, batch in enumerate(batches, start=3):
        drawn, said = batch.draws
        assert torch.equal(drawn, numbers(5, step)[0])
        assert said == {"step": step}


def test_only_the_square_is_resized_to_what_it_was():
    """A square cut after resizing, as before: the same but for one level in a few pixels."""
    image, size, differ = picture(3, 101, 77), 40, []
    for seed in range(30):
        rng = torch.Generator().manual_seed(seed)
        draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=rng))  # noqa: B023, E731
        factor = draw(size, 50) / 77
        scaled = image.resize((round(101 * factor), round(77 * factor)), Image.Resampling.BICUBIC)
        left, top = draw(0, scaled.width - size), draw(0, scaled.height - size)
        whole = np.asarray(scaled.crop((left, top, left + size, top + size))).astype(int)
        differ.append(np.abs(random_crop(image, size, torch.Generator().manual_seed(seed)).astype(int) - whole))
    assert np.max(differ) <= 1
    assert np.mean(differ) < 0.001


def test_a_copy_of_a_cache_maps_the_same_records(tmp_path):
    import pickle

    manifest = Manifest(
        kind="continuous", latent_shape=(4, 3), codebook_size=None, classes=2, count=COUNT, shard_size=SHARD,
        tokenizer="t", dtype="bfloat16",
    )  # fmt: skip
    create_cache(tmp_path, manifest)
    latents, flips = torch.randn(COUNT, 4, 3), torch.arange(COUNT) % 2
    for k in range(manifest.shards):
        rows = slice(k * SHARD, min((k + 1) * SHARD, COUNT))
        zeros = torch.zeros(len(flips[rows]), dtype=torch.int64)
        fields = {"latents": latents[rows], "labels": zeros, "indices": zeros, "seeds": zeros, "flips": flips[rows]}
        write_shard(tmp_path, k, fields)
    cache = LatentCache(tmp_path)
    content = pickle.dumps(cache)
    assert len(content) < 2000  # the path and the description, no latents
    asked = [59, 0, 17, 16, 3]
    for one, other in zip(*(vars(c.read(asked)).values() for c in (cache, pickle.loads(content))), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(cache.read(asked).latents, latents[asked].bfloat16().float())


def test_a_worker_gets_the_paths_of_the_images_once(tmp_path):
    import pickle

    dataset = open_images(Folder(path=save_tree(tmp_path), holdout=0), 8, augment=Augmentation(crop="random"))
    copy = pickle.loads(pickle.dumps(dataset))
    assert pickle.dumps(dataset).count(b"000.png") == 2  # cat and dog
    draw = Draw(np.arange(20), np.arange(20))
    assert torch.equal(copy[draw].pixels, dataset[draw].pixels)
    assert len(dataset.names) == 20


def test_the_default_leaves_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (worker_count(None), worker_count(None, 0), worker_count(3, 0), worker_count(0)) == (8, 0, 3, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert worker_count(None) == 2  # 3 cores for each process
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert worker_count(None) == 0


# What workers report


def test_broken_images_are_replaced_and_named_once_by_any_worker(tmp_path):
    truncate(save_tree(tmp_path) / "cat" / "004.png")
    found = []
    for workers in (0, 2):
        dataset = open_images(Folder(path=tmp_path, holdout=0), 8, augment=Augmentation(crop="random", flip=True))
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            found.append(digest(*parts(training_batches(dataset, 10, 0, 0, 6, workers=workers))))
        assert [str(one.message).count("004.png") for one in noted] == [1]
        assert list(dataset.broken) == [4]
    assert found[0] == found[1]


def trouble(kind, item):
    if item < 3:
        return torch.full((2,), item)
    if kind == "user":
        raise UserError("this cannot be read; give another")
    if kind == "bug":
        raise ZeroDivisionError("a bug")
    if kind == "warns":
        warnings.warn("half of it is lost", stacklevel=1)
        return item
    if kind == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))  # shared memory is files
        return torch.zeros(10**6)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        ("user", UserError, "^this cannot be read; give another$"),
        ("bug", ZeroDivisionError, "a bug"),
        ("full", UserError, "no shared memory for a batch.*docker run --shm-size"),
        ("dies", UserError, "a data worker has ended.*workers=0 reads in the process itself"),
    ],
)
def test_what_goes_wrong_in_a_worker_ends_the_process_that_waits(kind, error, says):
    made = ahead(partial(trouble, kind), range(5), workers=1)
    found = []
    with pytest.raises(error, match=says):
        found.extend(tensor.tolist() for tensor in made)
    assert found == [[0, 0], [1, 1], [2, 2]] or kind == "dies"  # perhaps before it has handed on what it made
    assert multiprocessing.active_children() == []


def test_a_worker_hands_on_its_warnings():
    with pytest.warns(UserWarning, match="half of it is lost") as noted:
        assert list(ahead(partial(trouble, "warns"), range(3, 5), workers=1)) == [3, 4]
    assert noted[0].filename == __file__


def test_leaving_early_ends_the_workers():
    made = ahead(partial(numbers, 3), range(10**6), workers=2)
    next(made)
    assert len(multiprocessing.active_children()) == 2
    made.close()
    assert multiprocessing.active_children() == []


LOOP = """
import signal, time
from operator import neg
from robustok.data.loader import ahead

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)  # as a training, which goes on for a while
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    for number in ahead(neg, range(10**6), workers=2):
        print(number, flush=True)
        time.sleep(0.02)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_training(tmp_path, number):
    """Ctrl-C and SIGTERM reach all processes of the group, as from a terminal or a job's end; SIGKILL the training."""
    (tmp_path / "loop.py").write_text(LOOP)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "loop.py")]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, env=environment, **options) as process:
        assert process.stdout.readline() == "0\n"
        workers = descendants(process.pid)
        assert len(workers) >= 3  # the server and its workers
        if number == signal.SIGINT:
            os.killpg(process.pid, signal.SIGTERM)
            assert [int(process.stdout.readline()) for _ in range(30)] == list(range(-1, -31, -1))
            os.killpg(process.pid, number)
        else:
            process.kill()
        errors = process.communicate(timeout=120)[1]
    assert errors.count("Traceback") == (number == signal.SIGINT)  # the training's own; a worker's death is no news
    end = time.monotonic() + 60
    while any(alive(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)


def descendants(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [one for child in map(int, children) for one in (child, *descendants(child))]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
