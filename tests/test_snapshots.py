import errno
import pickle

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from torch import nn

from robustok import files, snapshots
from robustok.errors import UserError
from robustok.files import atomic_folder, tensor_digest
from robustok.snapshots import load_weights, read_snapshot, read_weights, resolve, write_snapshot
from robustok.tokenizers import load_tokenizer


def header(kind="tokenizer", **more):
    return {"kind": kind, "config": {"name": "robustok", "sizes": [1, 2]}, "step": 7, **more}


def weights(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(3, 4, generator=rng), "bias": torch.randn(3, generator=rng)}


def write(path, seed=0, extra=None, **more):
    write_snapshot(path, header(**more), weights(seed), extra or {})


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_round_trip(tmp_path):
    write(tmp_path / "a", extra={"discriminator": {"x": torch.ones(2)}})
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["README.md", "config.yaml", "discriminator.safetensors", "model.safetensors"]
    found = read_snapshot(tmp_path / "a", "tokenizer")
    assert found.header == header()
    assert all(torch.equal(found.weights[name], value) for name, value in weights().items())
    assert torch.equal(read_weights(tmp_path / "a" / "discriminator.safetensors")["x"], torch.ones(2))
    layer = nn.Linear(4, 3)
    load_weights(layer, found)
    assert torch.equal(layer.weight, weights()["weight"])
    card = (tmp_path / "a" / "README.md").read_text()
    assert "robustok.load_tokenizer" in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "robustok"


@pytest.mark.parametrize(
    ("licence", "named"),
    [
        ("MIT", "mit"),
        ("CC-BY-NC-4.0, that of DiT's code and weights", "cc-by-nc-4.0"),
        ("Apache-2.0 for the weights of RAR; those of RobusTok were released without a licence", "other"),
        ("none: the weights were released without a licence", "other"),
        (None, None),
    ],
)
def test_the_card_has_the_licence_and_the_origin_for_the_hub(tmp_path, licence, named):
    more = {"licence": licence} if licence else {}
    write(tmp_path / "a", **more, source={"file": "hf://org/repo@v1/a/b.pt", "part": "ema", "family": "vq"})
    card = (tmp_path / "a" / "README.md").read_text()
    data = yaml.safe_load(card.split("---")[1])
    assert (data.get("license"), data["base_model"], data["tags"]) == (named, "org/repo", ["image-tokenizer"])
    assert ("## Licence" in card) == (licence is not None)
    assert ModelCard(card).data.license == named
    write(tmp_path / "b", source={"file": "theirs.pt", "part": "ema", "family": "vq"})
    assert "base_model" not in (tmp_path / "b" / "README.md").read_text()


def test_an_exception_leaves_the_old_one(tmp_path):
    write(tmp_path / "a", seed=1)

    def cut_off():
        with atomic_folder(tmp_path / "a") as folder:
            (folder / "config.yaml").write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        cut_off()
    assert names(tmp_path) == ["a"]
    assert torch.equal(read_snapshot(tmp_path / "a", "tokenizer").weights["bias"], weights(1)["bias"])
    write(tmp_path / "a", seed=2)  # and is replaced by a whole one
    assert names(tmp_path) == ["a"]
    assert torch.equal(read_snapshot(tmp_path / "a", "tokenizer").weights["bias"], weights(2)["bias"])


@pytest.mark.parametrize("function", ["save_file", "replace_folder"])
def test_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch, function):
    write(tmp_path / "a", seed=1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshots if function == "save_file" else files, function, full)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device; free some space"):
        write(tmp_path / "a", seed=2)
    assert names(tmp_path) == ["a"]
    assert torch.equal(read_snapshot(tmp_path / "a", "tokenizer").weights["bias"], weights(1)["bias"])


def test_a_half_written_folder_is_no_snapshot(tmp_path):
    write(tmp_path / "run" / "snapshot" / "00000010")
    half = tmp_path / "run" / "snapshot" / ".00000020.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert resolve(tmp_path / "run").name == "00000010"
    write(tmp_path / "run" / "snapshot" / "00000020")
    assert names(tmp_path / "run" / "snapshot") == ["00000010", "00000020"]
    assert resolve(tmp_path / "run").name == "00000020"
    write(tmp_path / "run" / "snapshot" / "best")
    assert resolve(tmp_path / "run").name == "best"
    assert resolve(tmp_path / "run" / "snapshot" / "00000010").name == "00000010"


def test_another_kind(tmp_path):
    write(tmp_path / "a", kind="generator")
    with pytest.raises(UserError, match="is a snapshot of a generator, expected a tokenizer"):
        read_snapshot(tmp_path / "a", "tokenizer")
    with pytest.raises(UserError, match="holds no snapshot"):
        read_snapshot(tmp_path / "nothing", "tokenizer")


def test_a_truncated_or_missing_file(tmp_path):
    write(tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    whole = file.read_bytes()
    for length in (len(whole) - 5, 100, 4, 0):
        file.write_bytes(whole[:length])
        with pytest.raises(
            UserError, match=r"model\.safetensors cannot be read as safetensors .*copy or train it again"
        ):
            read_snapshot(tmp_path / "a", "tokenizer")
    file.write_bytes(whole)
    (tmp_path / "a" / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"cannot read .*config\.yaml: No such file"):
        read_snapshot(tmp_path / "a", "tokenizer")
    with pytest.raises(UserError, match="is missing; the snapshot is incomplete"):
        read_weights(tmp_path / "a" / "other.safetensors")


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_never_read(tmp_path):
    write(tmp_path / "a")
    trap = tmp_path / "sprung"
    (tmp_path / "a" / "model.safetensors").write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        read_snapshot(tmp_path / "a", "tokenizer")
    (tmp_path / "a" / "config.yaml").write_text(f"!!python/object/apply:builtins.open ['{trap}', 'w']")
    with pytest.raises(UserError, match="is not valid YAML"):
        read_snapshot(tmp_path / "a", "tokenizer")
    assert not trap.exists()


def test_weights_that_do_not_fit_are_named(tmp_path):
    write(tmp_path / "a")
    with pytest.raises(UserError, match=r"weights do not fit its config.yaml: weight is \(3, 4\), expected \(3, 5\)"):
        load_weights(nn.Linear(5, 3), read_snapshot(tmp_path / "a", "tokenizer"))
    with pytest.raises(UserError, match="unexpected bias"):
        load_weights(nn.Linear(4, 3, bias=False), read_snapshot(tmp_path / "a", "tokenizer"))
    write_snapshot(tmp_path / "b", {"kind": "tokenizer", "config": {"name": "other"}}, weights(), {})
    with pytest.raises(UserError, match="unknown tokenizer family 'other'"):
        load_tokenizer(tmp_path / "b")


def test_the_digest_depends_on_names_shapes_types_and_values():
    base = {"a": torch.zeros(2, 3), "b": torch.ones(())}
    others = [
        {"c": torch.zeros(2, 3), "b": torch.ones(())},
        {"a": torch.zeros(3, 2), "b": torch.ones(())},
        {"a": torch.zeros(2, 3).double(), "b": torch.ones(())},
        {"a": torch.full((2, 3), 1e-30), "b": torch.ones(())},
    ]
    assert len({tensor_digest(tensors) for tensors in (base, *others)}) == 5
    assert tensor_digest(base) == tensor_digest(
        {"b": torch.ones(()), "a": torch.zeros(3, 2).T}
    )  # order and memory layout do not matter
