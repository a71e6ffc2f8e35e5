import errno
import os
import pickle

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import nn

from robustok import files, snapshots
from robustok.errors import UserError
from robustok.files import atomic_folder, tensor_digest
from robustok.model_card import add_licence, licence_fields
from robustok.snapshots import (
    build,
    check_finite_weights,
    read_extra,
    read_header,
    read_snapshot,
    read_weights,
    resolve,
    split_scale,
    write_snapshot,
)
from robustok.tokenizers import load_tokenizer
from tiny_user import as_nobody


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
    assert torch.equal(build(lambda: nn.Linear(4, 3), found).weight, weights()["weight"])
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


@pytest.mark.parametrize(
    ("old", "added", "together", "use"),
    [
        ("MIT", "MIT", "MIT", None),
        ("MIT", None, "MIT", None),
        (None, "MIT", "several: MIT (generator)", None),
        ("MIT", "CC-BY-NC-4.0", "several: MIT (tokenizer); CC-BY-NC-4.0 (generator)", "NOT PERMITTED"),
        ("several: MIT (tokenizer); X (generator)", "X", "several: MIT (tokenizer); X (generator)", None),
        (
            "several: MIT (tokenizer); X (generator)",
            "Y",
            "several: MIT (tokenizer); X (generator); Y (generator)",
            None,
        ),
        ("CC-BY-NC-4.0", "none", "several: CC-BY-NC-4.0 (tokenizer); none (generator)", "NOT PERMITTED"),
        ("MIT", "none", "several: MIT (tokenizer); none (generator)", "UNCLEAR"),
    ],
)
def test_what_is_made_of_several_weights_has_all_their_licences(old, added, together, use):
    header = {"kind": "tokenizer"} | (licence_fields(old) if old else {})
    add_licence(header, added, "generator")
    assert header["licence"] == together
    assert header.get("commercial_use", "None").startswith(str(use))


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
    for name in ("backup", "bz", "1x", "100000000", "99999999"):
        write(tmp_path / "other" / "snapshot" / name)
    assert resolve(tmp_path / "other").name == "100000000"


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


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    broken = {"x": torch.tensor([0.0, float(value)])}
    with pytest.raises(UserError, match=r"a/discriminator\.safetensors: x holds NaN .*; nothing is written"):
        write(tmp_path / "a", extra={"discriminator": broken})
    assert not (tmp_path / "a").exists()
    write(tmp_path / "a")
    save_file(broken, tmp_path / "a" / "discriminator.safetensors")
    read_snapshot(tmp_path / "a", "tokenizer")
    with pytest.raises(UserError, match=r"discriminator\.safetensors: x holds NaN or infinite numbers"):
        read_extra(tmp_path / "a", "discriminator")
    write(tmp_path / "b")
    save_file(weights() | broken, tmp_path / "b" / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: x holds NaN or infinite numbers"):
        read_snapshot(tmp_path / "b", "tokenizer")
    check_finite_weights(
        {"counts": torch.tensor([2**62]), "largest": torch.full((2,), 1e308, dtype=torch.float64)}, "here"
    )
    with pytest.raises(UserError, match="here: small holds"):
        check_finite_weights({"small": torch.tensor([float("nan")]).to(torch.float8_e4m3fn)}, "here")
    with pytest.raises(UserError, match=f"the scale {value} is no finite number"):
        split_scale(f"{tmp_path}/a@{value}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": ["tokenizer"]}, "kind = "),
        ({"config": "robustok"}, "config = 'robustok'"),
        ({"classes": 0}, "classes = 0"),
        ({"classes": "10"}, "classes = '10'"),
        ({"classes": None}, "classes = None"),
        ({"codebook_size": 2.5}, "codebook_size = 2.5"),
        ({"codebook_size": True}, "codebook_size = True"),
        ({"latent_shape": [16]}, "latent_shape = "),
        ({"latent_shape": [16, "²"]}, "latent_shape.1 = '²'"),
        ({"latent_shape": 16}, "latent_shape = 16"),
        ({"latent_space": 5}, "latent_space = 5"),
        ({"licence": ["MIT"]}, "licence = "),
        ({"source": "a.pt"}, "source = "),
        ({"post_trained": [1]}, "post_trained = "),
        ({"discriminator": "patch"}, "discriminator = "),
        ({"delta": "whole"}, "delta = "),
        ({"delta": {"digest": "0", "relative_error": 0.0}}, "'delta.base' is missing"),
        ({"delta": {"base": "a", "digest": "0", "relative_error": float("nan")}}, "delta.relative_error = nan"),
        ({"delta": {"base": "a", "digest": "0", "relative_error": 0.0, "rank": -1}}, "delta.rank = -1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_header_of_other_types_is_refused(tmp_path, change, said):
    write(tmp_path / "a")
    (tmp_path / "a" / "config.yaml").write_text(yaml.safe_dump(header() | change))
    with pytest.raises(UserError, match=r"a/config\.yaml: ") as error:
        read_header(tmp_path / "a")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pipe_in_place_of_weights_is_not_waited_for(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "a" / "model.safetensors")
    with pytest.raises(UserError, match=r"cannot read .*: it is a FIFO"):
        read_snapshot(tmp_path / "a", "tokenizer")


def test_what_may_not_be_read_is_not_called_missing(tmp_path):
    for name in ("folder", "list", "weights"):
        write(tmp_path / name / "snapshot" / "00000001")
    (tmp_path / "folder").chmod(0)
    (tmp_path / "list" / "snapshot").chmod(0o711)
    (tmp_path / "weights" / "snapshot" / "00000001" / "model.safetensors").chmod(0)
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "manifest.json").write_text("{}")
    (tmp_path / "latents" / "manifest.json").chmod(0)
    code = """
for name in ("folder", "list", "weights", "latents"):
    path = Path(FOLDER, name)
    try:
        LatentCache(path) if name == "latents" else read_snapshot(path, "tokenizer")
    except (OSError, UserError) as error:
        print(name, error, file=sys.stderr)
"""
    imports = (
        "from pathlib import Path; from robustok.data.latent_cache import LatentCache; from robustok.errors import"
    )
    imports += " UserError; from robustok.snapshots import read_snapshot"
    tmp_path.chmod(0o755)
    said = as_nobody(imports, code.replace("FOLDER", repr(str(tmp_path))), tmp_path).splitlines()
    assert [line.split()[0] for line in said] == ["folder", "list", "weights", "latents"], said
    assert all("Permission denied" in line for line in said), said


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
        build(lambda: nn.Linear(5, 3), read_snapshot(tmp_path / "a", "tokenizer"))
    with pytest.raises(UserError, match="unexpected bias"):
        build(lambda: nn.Linear(4, 3, bias=False), read_snapshot(tmp_path / "a", "tokenizer"))
    write_snapshot(tmp_path / "b", {"kind": "tokenizer", "config": {"name": "other"}}, weights(), {})
    with pytest.raises(UserError, match="unknown tokenizer family 'other'"):
        load_tokenizer(tmp_path / "b")


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(10**8, 10**8),
        lambda: nn.ModuleList(nn.Linear(1, 1) for _ in range(10**13)),
        lambda: nn.ModuleList(nn.Identity() for _ in range(10**13)),
        lambda: nn.Linear(10**13, 10**13),
        lambda: nn.Linear(-1, 3),
        lambda: nn.Conv2d(3, 5, 1, groups=2),
    ],
    ids=["wide", "deep", "deep and empty", "overflow", "negative", "groups"],
)
def test_a_giant_is_refused_before_anything_is_allocated(tmp_path, make):
    write(tmp_path / "a")
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=r"a/config\.yaml asks for a model (larger than|that cannot be made)"):
        build(make, read_snapshot(tmp_path / "a", "tokenizer"))
    assert torch.equal(torch.get_rng_state(), state)


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
