import errno
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from robustok.data.latent_cache import (
    LatentCache,
    Manifest,
    caches_in,
    check_space,
    create_cache,
    missing_shards,
    shard_rows,
    write_shard,
)
from robustok.data.latent_checks import check_cache, check_center_crops, check_indices, check_squares
from robustok.data.order import batch_indices
from robustok.errors import UserError


def manifest(**changes):
    defaults = dict(
        kind="discrete", latent_shape=(6, 3), codebook_size=50, classes=4, count=23, shard_size=5, tokenizer="t1"
    )
    return Manifest(**(defaults | {"source": {"sigma": 0.7, "seeds": [1, 2]}} | changes))


def records(m, seed=0):
    """All records of a cache as one dictionary of arrays."""
    rng = np.random.default_rng(seed)
    length, width = m.latent_shape
    tokens = rng.integers(0, m.codebook_size or 1, (m.count, length))
    fields = rng.normal(size=(m.count, length, width)).astype(np.float32)
    return {
        "latents": tokens if m.kind == "discrete" else fields,
        "labels": rng.integers(0, m.classes, m.count),
        "indices": rng.permutation(m.count),
        "seeds": rng.integers(0, 2**62, m.count),
        "flips": rng.integers(0, 2, m.count),
        "crops": rng.integers(0, 6, m.count),
    }


def shard(m, k, whole):
    return {name: value[shard_rows(m, k).start : shard_rows(m, k).stop] for name, value in whole.items()}


def fill(path, m, whole=None, skip=()):
    whole = whole or records(m)
    create_cache(path, m)
    for k in missing_shards(path):
        if k not in skip:
            write_shard(path, k, shard(m, k, whole))
    return whole


KINDS = {
    "uint16": {},
    "int32": {"codebook_size": 70000},
    "float32": {"kind": "continuous", "codebook_size": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_written_records_are_read(tmp_path, kind):
    m = manifest(**KINDS[kind])
    whole = fill(tmp_path / "cache", m)
    cache = LatentCache(tmp_path / "cache")
    assert cache.manifest == m
    assert len(cache) == 23
    rows = np.random.default_rng(1).integers(0, 23, 40)  # any order, with repeats, over all shards
    for asked, taken in (
        (rows, rows),
        (slice(3, 17), np.arange(3, 17)),
        (torch.tensor([22, 0]), [22, 0]),
        ([], rows[:0]),
    ):
        found = cache.read(asked)
        assert found.latents.dtype == (torch.float32 if kind == "float32" else torch.int64)
        for name, value in whole.items():
            assert np.array_equal(getattr(found, name).numpy(), value[taken]), name
    assert np.array_equal(cache.labels, whole["labels"])
    assert np.array_equal(cache.indices, whole["indices"])


def test_tokens_take_two_bytes(tmp_path):
    m = manifest(latent_shape=(256, 3), codebook_size=65536, count=100, shard_size=100)
    fill(tmp_path, m)
    size = (tmp_path / "shard-00000.safetensors").stat().st_size
    assert 100 * 256 * 2 < size < 100 * 256 * 2 + 100 * 22 + 1000


def test_half_precision_stays_half(tmp_path):
    m = manifest(kind="continuous", codebook_size=None, count=5)
    whole = records(m)
    whole["latents"] = torch.from_numpy(whole["latents"]).half()
    fill(tmp_path, m, whole)
    found = LatentCache(tmp_path).read(slice(None)).latents
    assert torch.equal(found, whole["latents"].float())


def test_flips_and_crops_are_zero_where_none_were_written(tmp_path):
    m = manifest()
    whole = records(m)
    del whole["flips"], whole["crops"]
    fill(tmp_path, m, whole)
    found = LatentCache(tmp_path).read([0, 22])
    for field in (found.flips, found.crops):
        assert field.tolist() == [0, 0]
        assert field.dtype == torch.uint8


def test_ranks_share_the_shards_and_a_killed_run_goes_on(tmp_path):
    m = manifest()
    whole = records(m)
    create_cache(tmp_path, m)
    assert [missing_shards(tmp_path, r, 2) for r in range(2)] == [[0, 2, 4], [1, 3]]
    write_shard(tmp_path, 2, shard(m, 2, whole))
    half = {k: tmp_path / f".shard-0000{k}.safetensors.tmp" for k in (3, 4)}
    for file in half.values():
        file.write_bytes(b"half a shard")
    create_cache(tmp_path, manifest())  # the same command again
    assert missing_shards(tmp_path, 0, 2) == [0, 4]
    assert not half[4].exists()
    assert half[3].exists()  # rank 1 may be writing it
    assert missing_shards(tmp_path, 1, 2) == [1, 3]
    fill(tmp_path, m, whole)
    assert not [f for f in os.listdir(tmp_path) if f.endswith(".tmp")]
    assert np.array_equal(LatentCache(tmp_path).read(slice(None)).seeds, whole["seeds"])


def test_a_shard_that_was_cut_off_is_made_again(tmp_path, capsys):
    m = manifest()
    whole = records(m)
    fill(tmp_path, m, whole)
    file = tmp_path / "shard-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert missing_shards(tmp_path, 0, 2) == []  # it belongs to rank 1
    assert missing_shards(tmp_path) == [3]
    assert f"{file.name} is damaged" in " ".join(capsys.readouterr().err.split())
    fill(tmp_path, m, whole)
    assert np.array_equal(LatentCache(tmp_path).read(slice(None)).seeds, whole["seeds"])


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_a_flipped_bit_is_found_when_a_cache_is_continued_or_opened(tmp_path, kind, capsys):
    m = manifest(kind=kind, codebook_size=50 if kind == "discrete" else None)
    whole = fill(tmp_path, m)
    file = tmp_path / "shard-00003.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for place in (start, (start + len(content)) // 2, len(content) - 1):
        flipped = bytearray(content)
        flipped[place] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(UserError, match=r"shard-00003\.safetensors is damaged \(its checksum is another one\)"):
            LatentCache(tmp_path)
        assert missing_shards(tmp_path) == [3]
    assert f"{file.name} is damaged (its checksum" in " ".join(capsys.readouterr().err.split())
    fill(tmp_path, m, whole)
    assert file.read_bytes() == content
    save_file(load_file(file), file)  # as before there were checksums
    assert missing_shards(tmp_path) == []
    assert np.array_equal(LatentCache(tmp_path).read(slice(None)).seeds, whole["seeds"])


def test_paths_may_be_text(tmp_path):
    m = manifest()
    create_cache(str(tmp_path), m)
    for k in missing_shards(str(tmp_path)):
        write_shard(str(tmp_path), k, shard(m, k, records(m)))
    assert LatentCache(str(tmp_path)).path == tmp_path


def test_opening_an_unfinished_cache_leaves_the_writer_alone(tmp_path):
    create_cache(tmp_path, manifest())
    half = tmp_path / ".shard-00000.safetensors.tmp"
    half.write_bytes(b"being written")
    with pytest.raises(UserError, match="lacks 5 of 5"):
        LatentCache(tmp_path)
    assert half.exists()


def test_another_manifest_is_refused_by_name(tmp_path):
    create_cache(tmp_path, manifest(tokenizer="t0"))
    create_cache(tmp_path, manifest())  # of the first command there are no latents
    (tmp_path / "shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"tokenizer: t1 -> t2") as caught:
        create_cache(tmp_path, manifest(tokenizer="t2", source={"sigma": 0.5, "seeds": [1, 2]}))
    assert "source.sigma: 0.7 -> 0.5" in str(caught.value)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="unknown origin"):
        create_cache(tmp_path, manifest())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": None}, "a cache of discrete latents with codebook_size None"),
        ({"kind": "continuous"}, "a cache of continuous latents with codebook_size 50"),
        ({"count": 0}, "count\n.*greater than 0"),
        ({"shard_size": 0}, "shard_size\n.*greater than 0"),
        ({"latent_shape": (0, 3)}, r"latent_shape\.0\n.*greater than 0"),
        ({"codebook_size": 0}, "codebook_size\n.*greater than or equal to 1"),
        ({"codebook_size": 10**13}, "codebook_size\n.*less than or equal to 2147483648"),
        ({"classes": 10**13}, "classes\n.*less than or equal to 1000000"),
    ],
)
def test_impossible_manifests(changes, message):
    with pytest.raises(ValidationError, match=message):
        manifest(**changes)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("latents", np.full((5, 6), 50), "0 to 49"),
        ("latents", np.full((5, 6), -1), "-1 to -1"),
        ("latents", np.zeros((5, 7), int), "expected integers"),
        ("latents", np.zeros((4, 6), int), "expected integers"),
        ("latents", np.zeros((5, 6)), "float64"),
        ("labels", np.full(5, 4), "4 to 4, expected 0 to 3"),
        ("labels", np.full(5, -1), "expected 0 to 3"),
        ("seeds", np.zeros(5), "expected integers"),
        ("masks", np.zeros(5, int), "masks"),
        ("seeds", None, "has the fields"),
    ],
)
def test_wrong_shards_are_not_written(tmp_path, name, value, message):
    m = manifest()
    create_cache(tmp_path, m)
    arrays = shard(m, 0, records(m)) | {name: value}
    if value is None:
        del arrays[name]
    with pytest.raises(UserError, match=message):
        write_shard(tmp_path, 0, arrays)
    assert missing_shards(tmp_path) == [0, 1, 2, 3, 4]


def test_latents_that_are_not_finite_are_not_written(tmp_path):
    m = manifest(kind="continuous", codebook_size=None)
    create_cache(tmp_path, m)
    arrays = shard(m, 0, records(m))
    arrays["latents"][0, 0, 0] = np.nan
    with pytest.raises(UserError, match="finite"):
        write_shard(tmp_path, 0, arrays)


def test_unreadable_caches(tmp_path):
    with pytest.raises(UserError, match="no latents cache"):
        LatentCache(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"manifest\.json"):
        LatentCache(tmp_path)
    m = manifest()
    fill(tmp_path, m, skip=(1, 3))
    with pytest.raises(UserError, match="lacks 2 of 5 shards, first shard 1; run the command"):
        LatentCache(tmp_path)
    fill(tmp_path, m)
    damaged = tmp_path / "shard-00003.safetensors"
    content = damaged.read_bytes()
    for cut in (0, 4, 40, len(content) - 10):
        damaged.write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"shard-00003\.safetensors is damaged"):
            LatentCache(tmp_path)
    damaged.write_bytes((tmp_path / "shard-00004.safetensors").read_bytes())  # a shard of three records
    with pytest.raises(UserError, match=r"expected integers \(5, 6\)"):
        LatentCache(tmp_path)
    damaged.write_bytes(content)
    (tmp_path / "manifest.json").write_text('{"kind": "discrete"}')
    with pytest.raises(UserError, match="is no manifest"):
        LatentCache(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"count": 10**13},
        {"count": 10**30},
        {"shard_size": 1, "count": 10**13},
        {"latent_shape": [10**13, 3]},
        {"latent_shape": 6},
        {"latent_shape": ["6", "3"]},
        {"latent_shape": [6, "²"]},
        {"latent_shape": [6, 3, 1]},
        {"codebook_size": [50]},
        {"codebook_size": 1e400},
        {"codebook_size": True},
        {"classes": None},
        {"classes": "4"},
        {"kind": ["discrete"]},
        {"tokenizer": 5},
        {"source": []},
        {"dtype": "int8"},
        {"more": 1},
    ],
    ids=str,
)
def test_hostile_manifests_are_refused_before_anything_is_allocated(tmp_path, changes):
    fill(tmp_path, manifest())
    content = manifest().plain() | changes
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        LatentCache(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 10**5, "null", "[]", "5", "{", '{"source": 5}', "\x00"], ids=lambda t: t[:14])
def test_what_is_no_json_object_is_no_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="is no manifest"):
        LatentCache(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("latents", torch.zeros(5, 7, dtype=torch.uint16)),
        ("latents", torch.zeros(5, 6)),
        ("latents", torch.zeros(5, 6, dtype=torch.bfloat16)),
        ("latents", torch.zeros(5, 6, dtype=torch.float8_e4m3fn)),
        ("latents", torch.zeros(5, 6, dtype=torch.int64)),  # the other shards have uint16
        ("labels", torch.full((5,), float("nan"))),
        ("labels", torch.full((5,), -1)),
        ("labels", torch.zeros(5, 1, dtype=torch.int64)),
        ("labels", torch.zeros((), dtype=torch.int64)),
        ("indices", torch.zeros(5, dtype=torch.bool)),
        ("seeds", torch.zeros(4, dtype=torch.int64)),
        ("flips", torch.zeros(5, dtype=torch.complex64)),
        ("seeds", None),
    ],
)
def test_hostile_shards(tmp_path, name, value):
    fill(tmp_path, manifest())
    file = tmp_path / "shard-00003.safetensors"
    fields = load_file(file) | {name: value}
    save_file({key: field for key, field in fields.items() if field is not None}, file)
    with pytest.raises(
        UserError, match=r"(shard-00003\.safetensors.*remove it and run|shards of .* make the cache again)"
    ):
        LatentCache(tmp_path)


def test_a_pipe_in_place_of_a_shard_is_not_waited_for(tmp_path):
    fill(tmp_path, manifest(), skip=(2,))
    os.mkfifo(tmp_path / "shard-00002.safetensors")
    with pytest.raises(UserError, match=r"shard-00002\.safetensors: it is a FIFO"):
        LatentCache(tmp_path)


def test_what_cannot_fit_on_the_disk_is_not_begun(tmp_path):
    with pytest.raises(UserError, match=r"for 10,000,000,000,000 records, .* are free; free some space"):
        check_space(tmp_path / "cache", manifest(count=10**13), "encode")
    assert list(tmp_path.iterdir()) == []
    fill(tmp_path / "cache", manifest())  # the same folder, with a count that fits


def test_images_that_moved_are_the_same_images(tmp_path):
    fill(tmp_path, manifest(data="d1", source={"data": "photos train, d1", "seed": 0}), skip=(1,))
    create_cache(tmp_path, manifest(data="d1", source={"data": "moved train, d1", "seed": 0}))
    with pytest.raises(UserError, match=r"holds other latents .*data: d1 -> d2"):
        create_cache(tmp_path, manifest(data="d2", source={"data": "photos train, d1", "seed": 0}))


def test_contents_beyond_the_manifest_are_refused(tmp_path):
    m = manifest()
    whole = records(m)
    whole["latents"][11, 2] = 49
    whole["labels"][7] = 3
    fill(tmp_path / "a", m, whole)
    text = (tmp_path / "a" / "manifest.json").read_text()
    (tmp_path / "a" / "manifest.json").write_text(text.replace('"codebook_size": 50', '"codebook_size": 49'))
    with pytest.raises(UserError, match="to 49, expected 0 to 48"):
        LatentCache(tmp_path / "a").read(slice(10, 12))
    (tmp_path / "a" / "manifest.json").write_text(text.replace('"classes": 4', '"classes": 3'))
    with pytest.raises(UserError, match="to 3, expected 0 to 2"):
        LatentCache(tmp_path / "a")


def test_a_cache_of_another_tokenizer_is_refused(tmp_path):
    fill(tmp_path, manifest())
    cache = LatentCache(tmp_path)
    check_cache(cache, "t1", (6, 3), 50)
    for changes, message in (
        ({"tokenizer_digest": "t2"}, "tokenizer t1, expected t2"),
        ({"latent_shape": (6, 4)}, "latent_shape"),
        ({"codebook_size": 64}, "codebook_size 50, expected 64"),
    ):
        with pytest.raises(UserError, match=message):
            check_cache(cache, **changes)


def test_indices_beyond_the_images_are_refused(tmp_path):
    whole = fill(tmp_path, manifest())
    cache = LatentCache(tmp_path)
    check_indices(cache, 23)
    with pytest.raises(UserError, match=r"points to the images 0 to 22 of 22, which are 0 to 21; remove it"):
        check_indices(cache, 22)
    fill(tmp_path / "free", manifest(), whole | {"indices": np.full(23, -1)})
    with pytest.raises(UserError, match=r"points to the images -1 to -1"):
        check_indices(LatentCache(tmp_path / "free"), 23)


def test_ten_crops_are_refused_where_centre_crops_are_needed(tmp_path):
    for name, source in (("center", {"crops": "center-flip"}), ("other", {}), ("ten", {"crops": "ten"})):
        fill(tmp_path / name, manifest(source=source))
    check_center_crops(LatentCache(tmp_path / "center"))
    check_center_crops(LatentCache(tmp_path / "other"))  # pairs and samples
    with pytest.raises(UserError, match=r"ten crops.*crops=center"):
        check_center_crops(LatentCache(tmp_path / "ten"))


def test_full_disk_keeps_the_shards_before(tmp_path, monkeypatch):
    m = manifest()
    whole = records(m)
    create_cache(tmp_path, m)
    write_shard(tmp_path, 0, shard(m, 0, whole))

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: No space left on device"):
        write_shard(tmp_path, 1, shard(m, 1, whole))
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "shard-00000.safetensors"]
    fill(tmp_path, m, whole)
    assert np.array_equal(LatentCache(tmp_path).read(slice(None)).latents, whole["latents"])


def private_memory():
    """Bytes that only this process holds, without files mapped into memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of the process from /proc")
def test_training_streams_a_cache_larger_than_its_memory(tmp_path):
    budget = 16 * 2**20
    m = manifest(latent_shape=(256, 3), codebook_size=65536, count=160_000, shard_size=8_000)  # 82 MB of tokens
    create_cache(tmp_path, m)
    tokens = np.random.default_rng(0).integers(0, 65536, (m.shard_size, 256), dtype=np.uint16)
    zeros = np.zeros(m.shard_size, dtype=np.int64)
    for k in range(m.shards):
        numbers = np.arange(m.shard_size) + k * m.shard_size
        write_shard(tmp_path, k, {"latents": tokens ^ k, "labels": zeros, "indices": numbers, "seeds": zeros})
    assert sum(file.stat().st_size for file in tmp_path.glob("shard*")) > 5 * budget
    fill(tmp_path / "small", manifest())
    LatentCache(tmp_path / "small").read(range(8))  # libraries allocate some memory once
    before, peak, total = private_memory(), 0, 0
    cache = LatentCache(tmp_path)
    for step in range(m.count // 256):
        batch = cache.read(batch_indices(len(cache), 256, 0, step))
        total += batch.indices.sum().item()
        if step % 25 == 0:
            peak = max(peak, private_memory() - before)
            row = batch.indices[7].item()
            assert np.array_equal(batch.latents[7], tokens[row % m.shard_size] ^ (row // m.shard_size))
    assert total == m.count * (m.count - 1) // 2  # an epoch: every record once
    assert peak < budget


def test_a_cache_of_before_licences_were_noted_goes_on(tmp_path):
    fill(tmp_path, manifest(source={"seed": 1, "data": "images"}), skip=(1,))
    create_cache(tmp_path, manifest(source={"seed": 1, "data": "moved", "licence": "MIT"}))
    with pytest.raises(UserError, match="other latents"):
        create_cache(tmp_path, manifest(source={"seed": 2, "data": "images", "licence": "MIT"}))


def test_latents_of_a_bucket_keep_rows_and_columns(tmp_path):
    latents = np.random.default_rng(0).normal(size=(4, 2, 3, 5)).astype(np.float32)
    numbers = np.arange(4)
    for name, dtype in (("2x3", "float32"), ("3x2", "bfloat16")):
        m = manifest(kind="continuous", codebook_size=None, latent_shape=(2, 3, 5), count=4, shard_size=4, dtype=dtype)
        assert m.record_bytes == 30 * (4 if dtype == "float32" else 2) + 21
        create_cache(tmp_path / name, m)
        write_shard(tmp_path / name, 0, {"latents": latents, "labels": numbers, "indices": numbers, "seeds": numbers})
        found = LatentCache(tmp_path / name).read([2, 0]).latents.numpy()
        np.testing.assert_allclose(found, latents[[2, 0]], rtol=0 if dtype == "float32" else 1e-2)
    assert caches_in(tmp_path) == [tmp_path / "2x3", tmp_path / "3x2"]
    assert caches_in(tmp_path / "2x3") == [tmp_path / "2x3"]
    assert caches_in(tmp_path / "nothing") == [tmp_path / "nothing"]
    with pytest.raises(UserError, match="which generator sit does not take"):
        check_squares(LatentCache(tmp_path / "2x3"), "generator sit")
    for wrong in ((2,), (2, 3, 5, 1)):
        with pytest.raises(ValueError, match="latent_shape"):
            manifest(kind="continuous", codebook_size=None, latent_shape=wrong)
    with pytest.raises(ValueError, match="tokens with rows and columns"):
        manifest(latent_shape=(2, 3, 5))
