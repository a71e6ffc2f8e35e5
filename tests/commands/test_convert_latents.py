"""Latents in the files of RAR and LightningDiT become a cache, and the same files again."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import unchanged_by
from robustok.cli import main
from robustok.config import plain
from robustok.data.latent_cache import LatentCache
from robustok.generators import load_generator
from robustok.snapshots import write_snapshot
from robustok.tokenizers import encoder_digest, load_tokenizer
from tiny_models import tiny_tokenizer

CLASSES = 5


@pytest.fixture
def tokenizers(tmp_path):
    """Snapshots of a tokenizer of tokens and of a continuous one, of latents (16, 4)."""
    for name in ("robustok", "kl"):
        tokenizer = tiny_tokenizer(name)
        write_snapshot(
            tmp_path / name, {"kind": "tokenizer", "config": plain(tokenizer.config)}, tokenizer.state_dict(), {}
        )
    return tmp_path


def run(capsys, *words):
    capsys.readouterr()
    code = main(["convert-latents", *words])
    return code, *capsys.readouterr()


def refused(capsys, path, *words):
    return unchanged_by(path, lambda: run(capsys, *words))


def token_lines(count=23, length=16):
    """As in RAR's pre-tokenised files."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 16, (count, length), generator=rng).tolist()
    return [json.dumps({"class_id": i % CLASSES, "tokens": row}) + "\n" for i, row in enumerate(tokens)]


def latent_files(folder, sizes=(3, 4), dtype=torch.float32, flip=True):
    """As LightningDiT's extraction of features writes them."""
    rng = torch.Generator().manual_seed(0)
    folder.mkdir()
    draw = lambda n: torch.randn(n, 4, 4, 4, generator=rng).to(dtype)  # noqa: E731
    for k, n in enumerate(sizes):
        arrays = {"latents": draw(n), "latents_flip": draw(n), "labels": torch.arange(n) % CLASSES}
        save_file(
            {name: v for name, v in arrays.items() if flip or name != "latents_flip"}, folder / f"{k}.safetensors"
        )
    mean, std = torch.randn(1, 4, 1, 1, generator=rng), torch.rand(1, 4, 1, 1, generator=rng) + 0.5
    torch.save({"mean": mean, "std": std}, folder / "latents_stats.pt")
    return folder


def gathered(folder):
    parts = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# There and back


def test_tokens_come_and_go_to_the_byte(capsys, tokenizers):
    file, out = tokenizers / "tokens.jsonl", tokenizers / "cache"
    file.write_text("".join(token_lines()))
    words = ["layout=rar", f"path={file}", f"tokenizer={tokenizers}/robustok", "classes=5", "shard_size=7"]
    assert run(capsys, *words, f"out={out}") == (0, f"{out}\n", "")
    cache, records = LatentCache(out), [json.loads(line) for line in token_lines()]
    assert cache.read(range(23)).latents.tolist() == [record["tokens"] for record in records]
    assert cache.labels.tolist() == [record["class_id"] for record in records]
    assert cache.indices.tolist() == list(range(23))
    assert cache.manifest.tokenizer == encoder_digest(load_tokenizer(tokenizers / "robustok"))
    back = tokenizers / "back.jsonl"
    export = ["layout=rar", "to=export", f"path={out}", f"out={back}"]
    for _ in range(2):  # once more, as after a kill
        assert run(capsys, *export) == (0, f"{back}\n", "")
        assert back.read_bytes() == file.read_bytes()
    back.write_text("mine")
    assert "exists and holds something else" in refused(capsys, tokenizers, *export)


def test_an_interrupted_conversion_goes_on_and_empty_lines_do_not_count(capsys, tokenizers):
    file, out = tokenizers / "tokens.jsonl", tokenizers / "cache"
    file.write_text("\n\n".join(token_lines()))
    words = ["layout=rar", f"path={file}", f"tokenizer={tokenizers}/robustok", "shard_size=7", f"out={out}"]
    assert run(capsys, *words)[0] == 0
    whole = {shard.name: shard.read_bytes() for shard in out.iterdir()}
    for number in (0, 2):
        (out / f"shard-0000{number}.safetensors").unlink()
    assert run(capsys, *words)[0] == 0
    assert {shard.name: shard.read_bytes() for shard in out.iterdir()} == whole
    file.write_text("".join(token_lines(22)))
    assert "holds other latents" in refused(capsys, tokenizers, *words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard_size", [10_000, 3])
def test_latents_come_and_go_to_the_value(capsys, tokenizers, dtype, shard_size):
    given, out = latent_files(tokenizers / "theirs", dtype=dtype), tokenizers / "cache"
    words = ["layout=lightningdit", f"path={given}", f"tokenizer={tokenizers}/kl", f"shard_size={shard_size}"]
    assert run(capsys, *words, f"out={out}") == (0, f"{out}\n", "")
    cache, before = LatentCache(out), gathered(given)
    records = cache.read(range(14))
    assert records.flips.tolist() == [0, 1] * 7
    assert records.indices.tolist() == [i for i in range(7) for _ in range(2)]
    rows = before["latents"].float().flatten(2).transpose(1, 2)  # (7, 16, 4), row by row
    assert torch.equal(records.latents[::2], rows)
    back = tokenizers / "back"
    assert run(capsys, "layout=lightningdit", "to=export", f"path={out}", f"out={back}") == (0, f"{back}\n", "")
    after = gathered(back)
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    old, new = (torch.load(folder / "latents_stats.pt", weights_only=True) for folder in (given, back))
    assert all(torch.equal(new[name], old[name]) for name in ("mean", "std"))


def test_a_generator_learns_from_such_latents_with_their_statistics(capsys, tokenizers):
    given, out = latent_files(tokenizers / "theirs"), tokenizers / "cache"
    run(capsys, "layout=lightningdit", f"path={given}", f"tokenizer={tokenizers}/kl", "classes=5", f"out={out}")
    words = ["generator.name=lightningdit", "generator.width=16", "generator.depth=1", "generator.heads=2"]
    words += ["steps=1", "batch_size=4", "warmup_steps=0", "precision=float32", f"latents={out}"]
    assert main(["train-generator", *words, f"out={tokenizers}/generator"]) == 0
    found = torch.load(given / "latents_stats.pt", weights_only=True)
    generator = load_generator(tokenizers / "generator")
    assert torch.equal(generator.latent_mean.flatten().float(), found["mean"].flatten())
    assert torch.equal(generator.latent_std.flatten().float(), found["std"].flatten())


# Abuse


LINES = {  # what the third line is
    "no JSON": "tokens",
    "a list": "[1, 2]",
    "another key": '{"label": 1, "tokens": [1]}',
    "text": '{"class_id": "1", "tokens": [1, 2]}',
    "a fraction": '{"class_id": 1, "tokens": [1.5, 2]}',
    "nothing": '{"class_id": 1, "tokens": []}',
    "negative": '{"class_id": 1, "tokens": [-1]}',
    "nested": "[" * 10**5,
}


@pytest.mark.parametrize("case", LINES)
def test_a_line_that_is_no_record_is_named(capsys, tokenizers, case):
    lines = token_lines(4)
    (tokenizers / "a.jsonl").write_text("".join([*lines[:2], LINES[case] + "\n", *lines[2:]]))
    words = ["layout=rar", f"path={tokenizers}/a.jsonl", f"tokenizer={tokenizers}/robustok", f"out={tokenizers}/cache"]
    code, _, err = run(capsys, *words)
    assert (code, err.count("\n")) == (2, 1), err
    assert "line 3 of" in err
    assert "class_id" in err


def test_other_files_are_one_line(capsys, tokenizers):
    file = tokenizers / "a.jsonl"
    rar = ["layout=rar", f"path={file}", f"tokenizer={tokenizers}/robustok", f"out={tokenizers}/cache"]
    assert "No such file" in refused(capsys, tokenizers, *rar)
    os.mkfifo(file)
    assert "it is a FIFO" in refused(capsys, tokenizers, *rar)
    file.unlink()
    file.write_text("\n")
    assert "is empty" in refused(capsys, tokenizers, *rar)
    file.write_text("".join(token_lines(length=9)))
    assert "has latents of shape (9,)" in refused(capsys, tokenizers, *rar)
    file.write_text("".join(token_lines()))
    assert "makes continuous latents" in refused(capsys, tokenizers, *rar, f"tokenizer={tokenizers}/kl")
    assert "tokenizer is missing" in refused(capsys, tokenizers, *rar, "tokenizer=null")
    theirs = latent_files(tokenizers / "theirs", flip=False)
    folder = ["layout=lightningdit", f"path={theirs}", f"tokenizer={tokenizers}/kl", f"out={tokenizers}/flat"]
    assert run(capsys, *folder)[0] == 0
    back = ["layout=lightningdit", "to=export", f"path={tokenizers}/flat"]
    assert "does not hold each image" in refused(capsys, tokenizers, *back, f"out={tokenizers}/back")
    assert "set layout=lightningdit" in refused(capsys, tokenizers, *back, "layout=rar", f"out={tokenizers}/back")
    other = ["layout=lightningdit", f"tokenizer={tokenizers}/kl", f"out={tokenizers}/other", f"path={theirs}"]
    save_file({"latents": torch.ones(2, 4, 4, 4)}, theirs / "2.safetensors")
    assert "expected latents, latents_flip and labels in all" in refused(capsys, tokenizers, *other)
    save_file({"latents": torch.ones(2, 5, 4, 4), "labels": torch.ones(2)}, theirs / "2.safetensors")
    assert "several shapes" in refused(capsys, tokenizers, *other)
    save_file({"latents": torch.ones(2, 4, 4, 4).double(), "labels": torch.ones(2)}, theirs / "0.safetensors")
    (theirs / "2.safetensors").unlink()
    assert "latents of float64, expected float32 or" in refused(capsys, tokenizers, *other)
    (theirs / "2.safetensors").write_bytes(b"damaged")
    assert "damaged file" in refused(capsys, tokenizers, *other)
    (theirs / "2.safetensors").unlink()
    (theirs / "0.safetensors").unlink()
    torch.save({"mean": torch.ones(3)}, theirs / "latents_stats.pt")
    assert "does not hold mean and std of 4 channels" in refused(capsys, tokenizers, *other)
