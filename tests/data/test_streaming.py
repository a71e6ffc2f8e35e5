"""Images of remote files in blocks: their order, what is fetched, the bound of the cache, and what goes wrong."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import fsspec
import huggingface_hub
import numpy as np
import pytest

from conftest import LOSSES, TRAINING
from hub_server import TOKEN, serving
from robustok.cli import main
from robustok.data import dataset, order, remote_files, streaming
from robustok.data.buckets import check_sizes, open_buckets
from robustok.data.dataset import Augmentation, open_images
from robustok.data.loader import batches_in_order, training_batches
from robustok.data.sources import HubDataset, Parquet, Tar
from robustok.data.streaming import BlockCache
from robustok.errors import UserError
from robustok.files import bytes_digest
from tiny_images import encoded, picture

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

FILES, ROWS, GROUP = 3, 60, 10  # rows of a file and of a row group
NAME = "datasets/me/flowers"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine, of whose errors nobody waits for an end."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})  # commands read without workers
    huggingface_hub.HfFileSystem.clear_instance_cache()
    with serving(monkeypatch, tmp_path / "hub") as server:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.address)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
        yield server
    huggingface_hub.HfFileSystem.clear_instance_cache()


@cache
def image(number):
    """A file of a few kilobytes."""
    return encoded(picture(number, 40, 40))


def table(rows=ROWS, start=0, group=GROUP, metadata=None, column="image", **columns):
    """The bytes of a parquet file as of the Hub. Its images are large beside its footer."""
    images = [{"bytes": image(start + i), "path": f"{start + i}.png"} for i in range(rows)]
    columns = columns or {"label": [(7 * i) % 5 for i in range(rows)]}
    stream, found = io.BytesIO(), pyarrow.table({column: images, **columns})
    # Statistics hold the smallest and the largest value, here two whole images.
    parquet.write_table(found.replace_schema_metadata(metadata), stream, row_group_size=group, write_statistics=False)
    return stream.getvalue()


@pytest.fixture
def flowers(hub):
    """A data set of three files with 18 row groups of ten images."""
    hub.repositories[NAME] = {f"data/train-{k}.parquet": table(start=100 * k) for k in range(FILES)}
    return hub


def save(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def files(tmp_path):
    """The same data set in a folder, with a test split."""
    files = {f"train-{k}.parquet": table(start=100 * k) for k in range(FILES)}
    return save(tmp_path / "flowers", files | {"test-0.parquet": table(8, 900)})


def streamed(tmp_path, path=f"hf://{NAME}", kind=Parquet, side="train", **settings):
    settings = {"holdout": 0, "cache": tmp_path / "cache"} | settings
    return open_images(kind(path=path, streaming=True, **settings), 8, side, Augmentation(crop="random", flip=True))


def contents(batches):
    return [(b.indices.tolist(), b.labels.tolist(), bytes_digest(b.pixels.numpy().tobytes())) for b in batches]


def test_sizes_of_photographs_are_not_downloaded_before_they_are_needed(files, tmp_path):
    tokenizer = SimpleNamespace(image_size=64, factor=2, encode_grid=None, config=SimpleNamespace(name="diffusers_kl"))
    data = Parquet(path=f"file://{files}", streaming=True, holdout=0, cache=tmp_path / "cache")
    with pytest.raises(UserError, match=r"data.buckets reads the size of every photograph.*set data.streaming=false"):
        open_buckets(data.model_copy(update={"buckets": True}), tokenizer)
    check_sizes(open_buckets(data, tokenizer))  # of 40 pixels, smaller than 64
    local = Parquet(path=files, holdout=0)
    with pytest.raises(UserError, match="180 of 180 images are smaller than the pipeline's 64 pixels"):
        check_sizes(open_buckets(local, tokenizer))


# Order


def test_batches_do_not_depend_on_processes_workers_or_where_they_begin(files, tmp_path):
    data = streamed(tmp_path, f"file://{files}")
    expected = contents(training_batches(data, 12, 3, 0, 30))
    first_epoch = [index for indices, *_ in expected[:15] for index in indices]
    assert sorted(first_epoch) == list(range(FILES * ROWS))
    assert contents(training_batches(data, 12, 3, 0, 30, workers=2)) == expected
    assert contents(training_batches(data, 12, 3, 17, 13)) == expected[17:]
    ranks = [contents(training_batches(data, 12, 3, 0, 30, rank, 2)) for rank in range(2)]
    for a, b, both in zip(*ranks, expected, strict=True):
        assert a[0] + b[0] == both[0]
        assert a[1] + b[1] == both[1]
    other = streamed(tmp_path, f"file://{files}", cache=tmp_path / "another")
    assert contents(training_batches(other, 12, 3, 0, 30)) == expected


# The same as of a copy


def test_images_labels_and_splits_are_those_of_the_files_on_this_machine(files, tmp_path):
    """So a latent cache of one serves the other, and no test image becomes one of training."""
    for side, holdout in (("train", 0.2), ("test", 0.2)):
        local = open_images(Parquet(path=files, holdout=holdout), 8, side, Augmentation(crop="random", flip=True))
        data = streamed(tmp_path, f"file://{files}", side=side, holdout=holdout)
        assert data.fingerprint == local.fingerprint
        assert contents(batches_in_order(data, 7)) == contents(batches_in_order(local, 7))
    part = f"file://{files}/train-{{1..2}}.parquet"
    for side in ("train", "test"):
        local = open_images(Parquet(path=files / "train-{1..2}.parquet"), 8, side)
        data = streamed(tmp_path, part, side=side, holdout=0.1)
        assert data.labels.tolist() == local.labels.tolist()
    assert (
        streamed(tmp_path, part, side="test", holdout=0.1)._where(0).startswith(f"file://{files}/train-1.parquet row")
    )


def test_a_limit_keeps_whole_blocks(files, tmp_path):
    data = streamed(tmp_path, f"file://{files}", limit=25)
    assert len(data) == 25
    assert sorted(np.unique(data.blocks.of, return_counts=True)[1]) == [5, 10, 10]


def test_captions_and_missing_labels(flowers, tmp_path):
    captions = [f"a flower {i}" for i in range(10)]
    flowers.repositories[NAME] = {"a.parquet": table(10, text=captions), "b.parquet": table(10, text=captions[::-1])}
    data = streamed(tmp_path, captions="text")
    assert [data.captions[label] for label in data.labels] == captions + captions[::-1]
    plain = streamed(tmp_path)
    assert plain.classes == ["all"]
    assert not plain.labels.any()
    flowers.repositories[NAME] = {"a.parquet": table(10, text=[*captions[:9], None])}
    with pytest.raises(UserError, match=r"1 of 10 images have no caption \(.*a\.parquet row 9\)"):
        streamed(tmp_path, captions="text")
    with pytest.raises(UserError, match=r"has the columns image, text, not data\.label=kind"):
        streamed(tmp_path, label="kind")
    flowers.repositories[NAME] = {"a.parquet": table(10, label=[-1] * 10)}
    unlabelled = streamed(tmp_path)
    with pytest.raises(UserError, match="has the label -1 everywhere"):
        unlabelled.check_labels()


def test_a_path_in_the_place_of_an_image_is_not_read(files, tmp_path):
    rows = [{"bytes": None, "path": str(tmp_path / "secret.png")}, {"bytes": image(1), "path": None}, None]
    picture(0).save(tmp_path / "secret.png")
    parquet.write_table(pyarrow.table({"image": rows}), files / "train-0.parquet")
    data = streamed(tmp_path, f"file://{files}/train-0.parquet")
    with pytest.warns(UserWarning, match=r"train-0\.parquet row [02]: cannot identify image file, it is empty"):
        assert data.read(range(3)).indices.tolist() == [1]
    parquet.write_table(pyarrow.table({"image": rows})[:0], files / "n.parquet")
    with pytest.raises(UserError, match=r"has 0 images and none for the train split"):
        streamed(tmp_path, f"file://{files}/n.parquet")


def test_without_streaming_files_at_an_address_are_copied(files, tmp_path):
    local = open_images(Parquet(path=files, holdout=0), 8)
    copied = open_images(Parquet(path=f"file://{files}", holdout=0, cache=tmp_path / "copies"), 8)
    assert copied.fingerprint == local.fingerprint
    assert copied.blocks is None
    assert len(list((tmp_path / "copies").glob("*/*.parquet"))) == FILES + 1


def test_a_data_set_of_the_hub_by_its_name(hub, tmp_path):
    named = {
        "info": {"features": {"photo": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}
    }
    metadata = {"huggingface": json.dumps(named)}
    make = lambda rows, start: table(rows, start, metadata=metadata, column="photo", label=[i % 2 for i in range(rows)])  # noqa: E731
    hub.repositories["datasets/me/pets"] = {
        "data/train-00000-of-00001.parquet": make(30, 0),
        "data/validation-00000-of-00001.parquet": make(6, 50),
    }
    train, test = (streamed(tmp_path, "me/pets", HubDataset, side) for side in ("train", "test"))
    assert (len(train), train.classes, train.labels[:4].tolist(), len(test)) == (30, ["cat", "dog"], [0, 1, 0, 1], 6)
    assert train.name == "pets"
    copied = open_images(HubDataset(path="me/pets", holdout=0), 8, augment=Augmentation(crop="random", flip=True))
    assert contents(batches_in_order(train, 8)) == contents(batches_in_order(copied, 8))
    held = streamed(tmp_path, "me/pets", HubDataset, split="validation", holdout=0.5)
    assert len(held) == 3
    with pytest.raises(
        UserError, match=r"has the splits train, validation; streaming takes one of them, not train\[:9\]"
    ):
        streamed(tmp_path, "me/pets", HubDataset, split="train[:9]")
    with pytest.raises(UserError, match=r"has the columns photo .*; expected images, with their bytes, in label"):
        streamed(tmp_path, "me/pets", HubDataset, image="label")
    # What the Hub has converted: another revision.
    hub.repositories["datasets/me/pets@refs/convert/parquet"] = {"default/train/0000.parquet": table(20)}
    assert len(streamed(tmp_path, "hf://datasets/me/pets@refs/convert/parquet/default")) == 20
    hub.repositories["datasets/me/photos"] = {f"train/cat/{i}.png": image(i) for i in range(3)}
    said = r"kind imagefolder, .*data\.path=hf://datasets/me/photos@refs/convert/parquet/default, where the Hub"
    with pytest.raises(UserError, match=said):
        streamed(tmp_path, "me/photos", HubDataset)


# Tar files


def archive(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def samples(rows, start=0):
    members = {}
    for i in range(start, start + rows):
        members[f"{i:04d}.cls"] = str(i % 3).encode()
        members[f"{i:04d}.png"] = image(i)
        members[f"{i:04d}.txt"] = f"picture {i}".encode()
    return members


def test_tar_files_are_those_of_this_machine(hub, tmp_path, monkeypatch):
    """Bit for bit, with captions too; each byte is fetched once for the index, and once an epoch."""
    tars = {f"train-{k:02d}.tar": archive(samples(50, 50 * k)) for k in range(3)} | {
        "val.tar": archive(samples(5, 500))
    }
    hub.repositories["datasets/me/tars"] = tars
    total = sum(len(content) for name, content in tars.items() if name != "val.tar")
    local = save(tmp_path / "tars", tars)
    settings = {"augment": Augmentation(crop="random", flip=True)}
    for captions in (None, "txt"):
        for side in ("train", "test"):
            here = open_images(Tar(path=local, captions=captions), 8, side, **settings)
            data = streamed(tmp_path, "hf://datasets/me/tars", Tar, side, captions=captions)
            assert data.fingerprint == here.fingerprint
            assert data.names == here.names
            assert data.captions == here.captions
            assert contents(batches_in_order(data, 9)) == contents(batches_in_order(here, 9))
    index_and_images = sum(count for name, count in hub.sent.items() if name != "val.tar")
    assert total < index_and_images < 2.1 * total  # whatever the settings, the index was made once
    hub.sent.clear()
    data = streamed(tmp_path, "hf://datasets/me/tars", Tar, cache=tmp_path / "other")
    hub.sent.clear()
    monkeypatch.setattr("robustok.data.tar_stream.RUN_IMAGES", 8)
    assert len(contents(training_batches(data, 10, 0, 0, 15))) == 15
    assert hub.sent.total() <= 1.05 * total


def test_tar_files_in_a_tar_file_are_classes(tmp_path):
    inner = {f"{name}.tar": archive({f"{name}_{i}.png": image(i) for i in range(4)}) for name in ("cat", "dog")}
    store = fsspec.filesystem("memory")
    store.pipe("/streamed/all.tar", archive(inner))
    data = streamed(tmp_path, "memory://streamed/all.tar", Tar)
    assert data.classes == ["cat", "dog"]
    assert data.labels.tolist() == [0] * 4 + [1] * 4
    here = save(tmp_path / "here", {"all.tar": archive(inner)})
    local = open_images(Tar(path=here, holdout=0), 8, augment=Augmentation(crop="random", flip=True))
    assert contents(batches_in_order(data, 3)) == contents(batches_in_order(local, 3))


# What is fetched and kept


def bytes_of_images():
    """Of ``flowers``."""
    return sum(len(image(100 * k + i)) for k in range(FILES) for i in range(ROWS))


def size_of(folder):
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def test_each_block_is_fetched_once_an_epoch_and_the_cache_never_outgrows_its_limit(flowers, tmp_path, monkeypatch):
    """With a window of 40 of 180 images, and room for three quarters of them."""
    monkeypatch.setattr(order, "WINDOW", 40)
    monkeypatch.setattr(streaming, "WINDOW", 40)
    total = bytes_of_images()
    limit = int(0.75 * total)
    data = streamed(tmp_path, cache_gb=limit / 1e9)
    flowers.sent.clear()
    used = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *a: (used.append(size_of(tmp_path / "cache" / "blocks")), replace(*a)))
    for epoch in range(2):
        batches = contents(training_batches(data, 9, 0, 20 * epoch, 20))
        assert len({index for indices, *_ in batches for index in indices}) == FILES * ROWS
        assert flowers.sent.total() <= (epoch + 1) * 1.05 * total
    assert flowers.sent.total() > 1.3 * total  # of the first epoch not all was kept for the second
    assert len(used) > 20
    assert max(used) <= limit
    assert size_of(tmp_path / "cache" / "blocks") > limit / 2


SCRIPT = """
import sys
from robustok.data import dataset, order, remote_files, streaming
from robustok.data.dataset import Augmentation, open_images
from robustok.data.loader import training_batches
from robustok.data.sources import Parquet

order.WINDOW = streaming.WINDOW = 40  # in the workers too, which import this

if __name__ == "__main__":
    rank, cache, limit = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    data = Parquet(path="hf://datasets/me/flowers", streaming=True, cache=cache, cache_gb=limit, holdout=0)
    opened = open_images(data, 8, augment=Augmentation(crop="random"))
    for batch in training_batches(opened, 18, 0, 0, 10, rank, 2, workers=2):
        print(*batch.indices.tolist())
"""


@pytest.mark.multiprocess
def test_workers_and_processes_of_a_machine_share_what_is_fetched(flowers, tmp_path):
    """Two processes with two workers each, in an epoch of 180 images, with room for 0.9 of them."""
    (tmp_path / "script.py").write_text(SCRIPT)
    limit = int(0.9 * bytes_of_images())
    environment = os.environ | {
        "HF_ENDPOINT": flowers.address, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(streaming.__file__).parents[2]),
    }  # fmt: skip
    words = [sys.executable, str(tmp_path / "script.py")]
    ends = [str(tmp_path / "cache"), str(limit / 1e9)]
    streamed(tmp_path)  # makes the index
    flowers.sent.clear()
    running = [
        subprocess.Popen([*words, str(rank), *ends], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    read = [[*map(int, process.communicate()[0].split())] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sorted(read[0] + read[1]) == list(range(FILES * ROWS))
    assert bytes_of_images() <= flowers.sent.total() <= 1.3 * bytes_of_images()
    assert size_of(tmp_path / "cache" / "blocks") <= limit


def test_an_index_is_made_once_and_again_for_another_version(flowers, tmp_path):
    assert streamed(tmp_path).labels[1] == 2
    flowers.sent.clear()
    first = streamed(tmp_path)
    assert flowers.sent.total() == 0
    flowers.repositories[NAME]["data/train-1.parquet"] = table(start=100, label=[3] * ROWS)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    assert streamed(tmp_path).labels[ROWS] == 3
    assert set(flowers.sent) == {"data/train-1.parquet"}
    assert streamed(tmp_path).stamp != first.stamp


def test_a_damaged_block_is_fetched_again(flowers, tmp_path):
    data = streamed(tmp_path)
    expected = contents(batches_in_order(data, 20))
    for number, file in enumerate(file for file in (tmp_path / "cache" / "blocks").iterdir() if file.is_file()):
        file.write_bytes(b"" if number % 2 else bytes(file.stat().st_size))  # as after a loss of power
    assert contents(batches_in_order(data, 20)) == expected


def test_blocks_that_do_not_fit_are_refused(flowers, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"a window of 8,192 images takes .* GB .*data\.cache_gb is 1e-05; set data"):
        streamed(tmp_path, cache_gb=1e-5)
    with pytest.raises(UserError, match=r"a block of the data has 1e-05 GB and data\.cache_gb is 1e-06; raise it"):
        BlockCache(tmp_path / "small", 1000).image("a", 0, lambda: [bytes(9984)])
    assert not list((tmp_path / "small").glob("*a"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"cannot keep blocks of images in .*; set data\.cache to a folder"):
        BlockCache(tmp_path / "file", 1000).image("a", 0, lambda: [b"a"])


def test_images_in_the_order_of_their_classes_are_warned_of(flowers, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(dataset, "WINDOW", 12)
    streamed(tmp_path)
    assert not recwarn.list
    flowers.repositories[NAME] = {"a.parquet": table(label=[i // 10 for i in range(ROWS)])}
    with pytest.warns(UserWarning, match=r"are sorted by class, .* the first 12 of an epoch have 2 of 6 classes"):
        streamed(tmp_path)


# Commands


def test_latents_of_a_copy_serve_a_post_training_that_streams(pipeline, files, tmp_path, monkeypatch):
    """And of the images that it learns from, each block is fetched once; a second run goes on from its state."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})  # without workers, which would not see the window
    monkeypatch.setattr(order, "WINDOW", 40)
    remote = [
        "data.name=parquet",
        f"data.path=file://{files}",
        "data.streaming=true",
        f"data.cache={tmp_path / 'cache'}",
    ]
    encode = ["encode", f"tokenizer={pipeline / 'tokenizer'}"]
    assert main([*encode, "data.name=parquet", f"data.path={files}", f"out={tmp_path / 'a'}"]) == 0
    assert main([*encode, *remote, f"out={tmp_path / 'b'}"]) == 0
    for file in sorted((tmp_path / "a").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    shutil.rmtree(tmp_path / "cache" / "blocks")
    fetched, failing, read_range = [], [], remote_files.read_range

    def read(*part):
        fetched.append(part)
        if len(fetched) in failing:
            raise UserError("the network is gone")
        return read_range(*part)

    monkeypatch.setattr(remote_files, "read_range", read)
    train = ["post-train", f"tokenizer={pipeline / 'tokenizer'}", "objective={clean: 1}", f"latents={tmp_path / 'a'}"]
    train += [*remote, *TRAINING[1:], *LOSSES, "batch_size=20", "steps=9"]  # an epoch
    assert main([*train, f"out={tmp_path / 'post'}"]) == 0
    assert len(fetched) == len(set(fetched)) == FILES * ROWS // GROUP
    shutil.rmtree(tmp_path / "cache" / "blocks")
    fetched.clear()
    failing.append(12)
    words = [*train, f"out={tmp_path / 'again'}"]
    assert main(words) == 2
    assert 0 < len((tmp_path / "again" / "log.jsonl").read_text().splitlines()) < 9
    assert main(words) == 0  # goes on
    weights = "snapshot/00000009/model.safetensors"
    assert (tmp_path / "post" / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()


# What goes wrong


def run(tmp_path, *settings):
    words = ["train-classifier", "data.name=parquet", f"data.path=hf://{NAME}", "data.streaming=true", "image_size=16"]
    return main([*words, f"data.cache={tmp_path / 'cache'}", *settings, f"out={tmp_path / 'out'}"])


def refused(tmp_path, capsys, said, *settings):
    code, err = run(tmp_path, *settings), capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1), err
    assert re.search(said, err), err


def test_a_server_that_fails_now_and_then_is_asked_again(flowers, tmp_path):
    data = streamed(tmp_path)
    expected = contents(training_batches(streamed(tmp_path, cache=tmp_path / "other"), 9, 0, 0, 20))
    flowers.fault = lambda path, count: (None, 500, 0.5)[count % 3]
    assert contents(training_batches(data, 9, 0, 0, 20)) == expected


@pytest.mark.parametrize("fault", [500, 0.5])
def test_a_server_that_fails_is_one_line(flowers, tmp_path, capsys, fault):
    streamed(tmp_path)
    flowers.fault = lambda path, count: fault if path == "data/train-1.parquet" else None
    refused(tmp_path, capsys, r"cannot read hf://.*train-1\.parquet \(\w+: .*check the address, the network and ")


def test_a_server_without_parts_of_files_is_one_line(flowers, tmp_path, capsys):
    flowers.ranges = False
    refused(tmp_path, capsys, r"gave [\d,]+ bytes for a part of 65,536, .*set data\.streaming=false to copy them")


def test_a_data_set_that_is_not_public_needs_a_token(flowers, tmp_path, capsys, monkeypatch):
    flowers.private.add(NAME)
    refused(tmp_path, capsys, r"cannot read hf://datasets/me/flowers .*for a data set that is not public, HF_TOKEN")
    refused(tmp_path, capsys, r"cannot load me/flowers .*HF_TOKEN", "data.name=hf", "data.path=me/flowers")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    assert len(streamed(tmp_path)) == FILES * ROWS


@pytest.mark.parametrize("content", [b"no parquet" * 100, table(20)[:5000], b""], ids=["other", "truncated", "empty"])
def test_a_damaged_file_is_one_line(flowers, tmp_path, capsys, content):
    flowers.repositories[NAME]["data/train-1.parquet"] = content
    refused(tmp_path, capsys, r"cannot read hf://.*train-1\.parquet as parquet: .*; replace the file or leave it out")


def test_a_damaged_row_group_is_one_line(flowers, tmp_path, capsys):
    content = bytearray(table())
    content[10_000:40_000] = bytes(30_000)
    flowers.repositories[NAME] = {"a.parquet": bytes(content)}
    refused(tmp_path, capsys, r"cannot read hf://.*a\.parquet as parquet: |images .* cannot be read")


def test_a_tar_file_that_ends_early_is_one_line(hub, tmp_path, capsys):
    hub.repositories[NAME] = {"a.tar": archive(samples(9))[:20_000]}
    refused(tmp_path, capsys, r"hf://.*a\.tar ends early, after \d+ members", "data.name=tar")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.path={}"], "data.streaming=true reads remote files, .*is on this machine; set data.streaming=false"),
        (["data.name=tar", "data.path={}"], "data.streaming=true reads remote files, .*is on this machine"),
        (["data.name=hf", "data.path={}"], "data.streaming=true reads data sets of the Hub, .*is on this machine"),
        ([f"data.path=hf://{NAME}/none"], "no .parquet files at hf://datasets/me/flowers@[0-9a-f]{40}/none; give"),
        (["data.path=hf://datasets/me/nothing"], "cannot read hf://datasets/me/nothing .*HF_TOKEN"),
        (["data.path=s4://bucket/a"], "cannot read s4://bucket/a .*Protocol not known"),
    ],
)
def test_what_cannot_be_streamed_is_one_line(flowers, tmp_path, capsys, settings, said):
    refused(tmp_path, capsys, said, *[word.replace("{}", str(tmp_path)) for word in settings])


@pytest.mark.parametrize(("place", "what"), [("cache", "an index of the data"), ("cache/blocks", "blocks of images")])
def test_a_cache_that_cannot_be_written_is_one_line(flowers, tmp_path, capsys, place, what):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()  # a file in the place of the folder
    refused(tmp_path, capsys, f"cannot keep {what} in .*; set data.cache to a folder that you can write")
