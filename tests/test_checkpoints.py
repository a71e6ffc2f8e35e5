"""Reading checkpoints of other projects: contents, errors, and that nothing in them is executed."""

import argparse
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict, UserList

import huggingface_hub
import pytest
import torch
import torch._utils
from safetensors.torch import save_file

from robustok.checkpoints import ALLOWED, choose_weights, read_checkpoint
from robustok.errors import UserError


class Arguments(UserList):
    """A foreign class, filled item by item."""


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def weights(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return {"first.weight": torch.randn(3, 2, generator=rng), "last.bias": torch.randn(4, generator=rng)}


def training_file(model, **more):
    """A file as other projects' training writes it, with arguments of foreign classes."""
    arguments = argparse.Namespace(rate=Arguments([0.1]), names=OrderedDict(a=1))
    return {"model": model, "optimizer": {"step": 3}, "steps": 7, "args": arguments, **more}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def prefixed(prefix, given):
    return {f"{prefix}{name}": tensor for name, tensor in given.items()}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize(
    ("content", "part", "seed"),
    [
        (training_file(weights(1), ema=weights(0)), "ema", 0),
        (training_file(weights(1), ema=None), "model", 1),
        (OrderedDict(weights(2)), "flat state dict", 2),
        ({"state_dict": weights(3), "callbacks": Arguments()}, "state_dict", 3),
        ({"module": prefixed("module.", weights(4))}, "module", 4),
        ({"model": {"state_dict": prefixed("module._orig_mod.", weights(5))}}, "state_dict of model", 5),
        ({"model_state_dict": weights(6), "optimizer_state_dict": {"state": {0: weights(7)}}}, "model_state_dict", 6),
        (training_file(weights(1), ema_model=prefixed("_orig_mod.module.", weights(6))), "ema_model", 6),
        (training_file(weights(1), model_ema=weights(7)), "model_ema", 7),
        ({"params": weights(1), "params_ema": weights(8)}, "params_ema", 8),
        ({"net": prefixed("module.", weights(9)), "net_d": weights(1), "net_e": weights(2)}, "net", 9),
        ({"generator": weights(1), "critic": weights(2)}, "generator", 1),
        ({"state_dict": prefixed("model.", weights(2))}, "state_dict", 2),
        ({"epoch": 3, "weights_of_the_autoencoder": weights(3)}, "weights_of_the_autoencoder", 3),
        (training_file(weights(4), ema={}), "model", 4),
        (training_file(weights(5), ema={"decay": 0.99}), "model", 5),
        (dict.fromkeys(("model", "ema"), weights(6)), "ema", 6),
    ],
)
def test_the_weights_are_found_in_training_files(tmp_path, zipped, content, part, seed):
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(tmp_path / "a.pt")
    assert found.part == part
    assert same(found.weights, weights(seed))
    assert (found.config, found.discriminator) == ({}, None)


def test_of_several_mappings_with_other_names_none_is_guessed():
    with pytest.raises(UserError, match="several state dicts: first, second; save the model's as 'model'"):
        choose_weights({"first": weights(), "second": weights(1)}, "the file")


def test_a_prefix_of_some_names_is_part_of_them():
    given = prefixed("module.", weights()) | {"other": torch.ones(1)}
    assert choose_weights(given, "weights").weights.keys() == given.keys()


def test_a_discriminator_is_found_beside_the_weights():
    found = choose_weights(training_file(weights(), discriminator=prefixed("module.", weights(1))), "weights")
    assert same(found.discriminator, weights(1))
    assert choose_weights(training_file(weights(), discriminator={"depth": 3}), "weights").discriminator is None


def test_views_parameters_and_other_dtypes_are_read(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    content = {
        "view": base.t()[1:],
        "parameter": torch.nn.Parameter(base),
        "half": base.half(),
        "bf16": base.bfloat16(),
    }
    for zipped in (True, False):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        assert same(read_checkpoint(tmp_path / "a.pt").weights, {name: t.detach() for name, t in content.items()})


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_payload_does_not_run(tmp_path, protocol, zipped):
    mark, how = tmp_path / "ran", {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    payload = Payload(f"touch {mark}")
    pickle.loads(pickle.dumps(payload))
    assert mark.exists()  # it works where it is let
    mark.unlink()
    torch.save(training_file(weights(), payload=payload), tmp_path / "a.pt", **how)
    if zipped or protocol == 2:  # torch recognises old files only with protocol 2
        assert same(read_checkpoint(tmp_path / "a.pt").weights, weights())  # beside the weights it is an empty object
    torch.save(weights() | {"last.bias": payload}, tmp_path / "b.pt", **how)
    with pytest.raises(UserError, match=r"'last.bias' is a _Stub" if zipped or protocol == 2 else "neither"):
        read_checkpoint(tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(pickle.dumps(payload))  # no file of torch's
    old = bytearray((tmp_path / "b.pt").read_bytes())
    (tmp_path / "d.pt").write_bytes(bytes(old) + pickle.dumps(payload))
    (tmp_path / "e.pt").write_bytes(OLD_HEAD + pickle.dumps(payload))  # instead of the version
    for name in ("c.pt", "d.pt", "e.pt"):
        with pytest.raises(UserError) as error:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not mark.exists()


OLD_HEAD = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # with which files from before 2020 begin


def test_a_tar_is_not_unpacked(tmp_path):
    """The oldest format of all, which torch would unpack into a temporary folder."""
    with tarfile.open(tmp_path / "a.pt", "w") as file:
        file.add(__file__, "storages")
    with pytest.raises(UserError, match="neither a PyTorch file"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_tar_that_begins_as_an_old_file_is_not_unpacked(tmp_path, monkeypatch):
    """The name of a tar's first member comes first in it."""
    unpacked = []
    monkeypatch.setattr(tarfile.TarFile, "extract", lambda self, member, **options: unpacked.append(member))
    with tarfile.open(tmp_path / "a.pt", "w", format=tarfile.GNU_FORMAT) as file:
        file.add(__file__, OLD_HEAD.decode("utf-8", "surrogateescape"))
        file.add(__file__, "storages")
    assert (tmp_path / "a.pt").read_bytes().startswith(OLD_HEAD)
    with pytest.raises(UserError, match="is a tar archive, which is never unpacked") as error:
        read_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(error.value)
    assert not unpacked


# Pickles by hand


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def pickled(value):
    """The opcodes of a value, without the first and the last."""
    return pickle.dumps(value, protocol=2)[2:-1]


def save_opcodes(file, opcodes, zipped):
    """A PyTorch file in which the pickle is these opcodes."""
    opcodes = b"\x80\x02" + opcodes + b"."
    if not zipped:
        head = [pickle.dumps(value, protocol=2) for value in (1001, {"little_endian": True})]
        file.write_bytes(OLD_HEAD + b"".join(head) + opcodes + pickle.dumps([], protocol=2))
        return
    torch.save(weights(), file)
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, opcodes if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("slots", [True, False])
@pytest.mark.parametrize("name", ["_rebuild_tensor_v2", "_rebuild_parameter"])
def test_a_pickle_sets_no_attribute_of_a_function(tmp_path, zipped, slots, name):
    """The opcode BUILD: the attributes of an object from a mapping, or by setattr where it has slots."""
    state = {"__name__": "other", "dump_patches": True}
    opcodes = f"ctorch._utils\n{name}\n".encode() + pickled((None, state) if slots else state) + b"b"
    save_opcodes(tmp_path / "a.pt", opcodes, zipped)
    for _ in range(2):  # nothing of the first reading is left for the second
        with pytest.raises(UserError, match="cannot be read as a PyTorch checkpoint") as error:
            read_checkpoint(tmp_path / "a.pt")
        assert "\n" not in str(error.value)
    for function in (*(function for key, function in ALLOWED.items() if key[1] == name), getattr(torch._utils, name)):
        assert not hasattr(function, "dump_patches")
        assert getattr(function, "__name__", name) == name


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("build", [True, False])
@pytest.mark.parametrize("kind", ["module", "other", "", None])
def test_a_pickle_refers_to_storages_only(tmp_path, monkeypatch, zipped, build, kind):
    """For a reference ("module", function, file, source) torch writes the difference to the function's source."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    state = (None, {"__name__": str(folder / "written"), "dump_patches": True})
    function = b"ctorch._utils\n_rebuild_tensor_v2\n" + (pickled(state) + b"b" if build else b"")
    opcodes = b"(" + text(kind) + function + text("file") + text("source") + b"tQ" if kind is not None else b"NQ"
    save_opcodes(tmp_path / "a.pt", opcodes, zipped)
    with pytest.raises(UserError, match="cannot be read as a PyTorch checkpoint") as error:
        read_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(error.value)
    assert build or "something other than the storage of a tensor" in str(error.value)
    assert [*folder.iterdir()] == []
    assert [file.name for file in tmp_path.iterdir() if file.name not in ("a.pt", "elsewhere")] == []


def test_a_program_that_only_torch_finds_is_not_executed(tmp_path, monkeypatch):
    """Two archives in one file: where the second's directory is read, torch follows a pointer to that of the first."""
    torch.save(weights(), tmp_path / "a.pt")
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "program.pt"))
    bodies, records = [], []
    for name in ("program.pt", "a.pt"):
        with zipfile.ZipFile(tmp_path / name) as old, zipfile.ZipFile(file := io.BytesIO(), "w") as new:
            for member in old.namelist():
                new.writestr(member, old.read(member))
        content = file.getvalue()
        count, size, start = struct.unpack("<HII", content[-12:-2])
        bodies.append(content[:-22])
        records.append(struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, start))
    locator = struct.pack("<IIQI", 0x07064B50, 0, len(bodies[0]), 1)
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (tmp_path / "b.pt").write_bytes(bodies[0] + records[0] + bodies[1] + records[1] + locator + end)
    started = []
    monkeypatch.setattr(torch.jit, "load", lambda *args, **options: started.append(args))
    with pytest.raises(UserError) as error:
        read_checkpoint(tmp_path / "b.pt")
    assert "\n" not in str(error.value)
    assert not started


def damage(file):
    """A whole archive whose pickle is cut."""
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data[: len(data) // 2] if name.endswith("data.pkl") else data)


def cut_off(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def program(file):
    """The file that TorchScript adds to an archive."""
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/constants.pkl", b"")


BROKEN = {  # change to a.pt, error message
    "truncated": (cut_off, "is cut off"),
    "damaged": (damage, "cannot be read as a PyTorch checkpoint"),
    "gone": (lambda file: file.unlink(), "No such file"),
    "text": (lambda file: file.write_text("<html>404</html>"), "neither a PyTorch file"),
    "empty": (lambda file: file.write_bytes(b""), "is cut off"),
    "program": (program, "TorchScript program"),
    "a list": (lambda file: torch.save([torch.ones(1)], file), "holds no state dict"),
    "nothing": (lambda file: torch.save({}, file), "holds no state dict"),
    "a number": (lambda file: torch.save(weights() | {"epoch": 3}, file), "'epoch' is a int"),
    "no name": (lambda file: torch.save({0: torch.ones(1)}, file), "0 is a Tensor"),
    "a pointer": (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid "), "git-lfs pointer"),
    "a pipe": (lambda file: (file.unlink(), os.mkfifo(file)), "it is a FIFO"),
    "very deep": (lambda file: save_opcodes(file, b"}" + b"X\1\0\0\0a}" * 10**5 + b"s" * 10**5, True), "no state dict"),
    "itself": (lambda file: torch.save(_cycle(), file), "holds no state dict|is a dict"),
}


def _cycle():
    content = {}
    content["model"] = content
    return content


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_line(tmp_path, case):
    happens, said = BROKEN[case]
    torch.save(weights(), tmp_path / "a.pt")
    happens(tmp_path / "a.pt")
    with pytest.raises(UserError, match=said) as error:
        read_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_an_old_file_that_is_cut_off_is_one_line(tmp_path, share):
    torch.save(weights(), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="cannot be read as a PyTorch checkpoint"):
        read_checkpoint(tmp_path / "a.pt")


# Metadata of a file


def test_metadata_list_the_tensors_and_the_configuration_of_the_model(tmp_path):
    more = weights() | {"output.images": torch.ones(2)}
    metadata = {"state_keys": json.dumps([*weights(), "gone"]), "config": json.dumps({"args": {"dim": 3}})}
    save_file(more, tmp_path / "a.safetensors", metadata)
    found = read_checkpoint(tmp_path / "a.safetensors")
    assert same(found.weights, weights())
    assert found.config == {"args": {"dim": 3}}
    save_file(more, tmp_path / "b.safetensors", {"format": "pt"})
    assert same(read_checkpoint(tmp_path / "b.safetensors").weights, more)
    for broken in ("[first", "[" * 10**5):
        save_file(more, tmp_path / "c.safetensors", {"state_keys": broken})
        with pytest.raises(UserError, match="no JSON"):
            read_checkpoint(tmp_path / "c.safetensors")
    for other in ('[["first"]]', "[5]", "7"):  # no names
        save_file(more, tmp_path / "d.safetensors", {"state_keys": other, "config": "[]"})
        assert same(read_checkpoint(tmp_path / "d.safetensors").weights, more)


def test_a_json_file_beside_the_weights_has_the_same_metadata(tmp_path):
    torch.save(weights() | {"input.x": torch.ones(1)}, tmp_path / "a.pt")
    (tmp_path / "config.json").write_text('{"vq_mean": 0.5}')
    assert read_checkpoint(tmp_path / "a.pt").config == {}  # config.json may belong to another file
    (tmp_path / "a.json").write_text(json.dumps({"config": {"depth": 2}, "state_dict_keys": [*weights()]}))
    found = read_checkpoint(tmp_path / "a.pt")
    assert (found.weights.keys(), found.config) == (weights().keys(), {"depth": 2})
    save_file(weights(), tmp_path / "model.safetensors")
    assert read_checkpoint(tmp_path / "model.safetensors").config == {"vq_mean": 0.5}
    (tmp_path / "model.json").write_text("[1, 2]")
    assert read_checkpoint(tmp_path / "model.safetensors").config == {}
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        read_checkpoint(tmp_path / "model.safetensors")


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one repository; yields the calls made of it."""
    calls = []
    folder = tmp_path / "cache"
    folder.mkdir()
    save_file(weights(), folder / "model.safetensors")
    torch.save(weights(1), folder / "old.pt")

    def fetch(repository, file, revision=None, token=None):
        calls.append((repository, file, revision, token))
        if file == "sub/config.json":
            (folder / "config.json").write_text('{"vq_mean": 0.5}')
        found = folder / file.removeprefix("sub/")
        if not found.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot reach the hub. Traceback:\n and more")
        return str(found)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return calls


def test_weights_come_from_the_hub(hub):
    found = read_checkpoint("hf://org/repo@v2/sub/model.safetensors")
    assert same(found.weights, weights())
    assert found.config == {"vq_mean": 0.5}
    assert [call[:3] for call in hub] == [
        ("org/repo", "sub/model.safetensors", "v2"),
        ("org/repo", "sub/config.json", "v2"),
    ]
    assert hub[0][3] is None  # the token of the library: HF_TOKEN, or its login
    assert same(read_checkpoint("hf:/org/repo/old.pt").weights, weights(1))  # as pathlib writes it
    assert hub[-1] == ("org/repo", "old.pt", None, None)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("hf://org/repo/gone.pt", "cannot download gone.pt of org/repo .*Cannot reach the hub.*give its path"),
        ("hf://org/model.pt", "expected hf://ORG/REPO/FILE"),
        ("hf://", "expected hf://ORG/REPO/FILE"),
    ],
)
def test_a_failed_download_is_one_line(hub, address, said):
    with pytest.raises(UserError, match=said) as error:
        read_checkpoint(address)
    assert "\n" not in str(error.value)


def test_a_repository_without_configuration_is_no_error(hub):
    assert read_checkpoint("hf://org/repo/model.safetensors").config == {}
