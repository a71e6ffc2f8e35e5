"""What can be wrong with a command line and its inputs: one function for each kind of mutation.

Each takes a :class:`Try` and changes its words, its environment, its limits or its files, in the working folder.
"""

import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from hostile.world import Valid
from robustok.cli import COMMANDS
from robustok.settings import list_settings
from tiny_images import postscript

NOT_ROOT = 65534
SCRIPT = "<script>guard"


class NotHere(Exception):
    """The command has no such input."""


@dataclass
class Try:
    """One hostile try.

    Attributes:
        valid: what it is made from.
        rng: of all its choices.
        words: the command line.
        notes: what was changed.
        env: variables of the environment.
        limits: of resources, for ``setrlimit``.
        signal: sent after so many seconds.
        user: its user id; None is that of the tests.
        refused: whether exit code 0 would be wrong.
        changed: metrics that must have another value than with the valid inputs, if they are measured.
        again: whether the valid command must succeed afterwards, with the right result.
        free_out: whether ``out`` is another path, so that new names at the top of the working folder are right.
        equal: whether exit code 0 means the result of the valid command.
        planted: whether ``out`` is there before.
        closed: whether stdout is a pipe that nobody reads.
    """

    valid: Valid
    rng: random.Random
    words: list[str]
    notes: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    limits: dict[int, int] = field(default_factory=dict)
    signal: tuple[int, float] | None = None
    user: int | None = None
    refused: bool = False
    changed: tuple[str, ...] = ()
    again: bool = False
    free_out: bool = False
    equal: bool = False
    planted: bool = False
    closed: bool = False

    def file(self, *patterns: str) -> Path:
        """A random file among those that the command reads.

        Raises:
            NotHere: there is none.
        """
        return self._pick([p for p in self._read(patterns or ("*",)) if p.is_file()])

    def path(self) -> Path:
        """A random file or folder among those that the command reads."""
        return self._pick(list(self._read(("*",))))

    def inputs(self) -> list[Path]:
        """The inputs that the words name."""
        return [p for p in sorted(Path("in").iterdir()) if any(f"in/{p.name}" in self._names(w) for w in self.words)]

    @staticmethod
    def _names(word: str) -> list[str]:
        return word.partition("=")[2].replace("@", " ").translate(str.maketrans("[]{},", "     ")).split()

    def _read(self, patterns: tuple[str, ...]) -> list[Path]:
        found = {
            p for root in self.inputs() for pattern in patterns for p in (root, *root.rglob("*")) if p.match(pattern)
        }
        return sorted(found)

    def _pick(self, paths: list[Path]) -> Path:
        if not paths:
            raise NotHere
        chosen = self.rng.choice(paths)
        self.notes.append(str(chosen))
        return chosen


NUMBERS = ["nan", ".nan", ".inf", "-.inf", "-1", "0", "-0.0", "1e400", "1e-400", "0.5", "010", "0x10", "1_000", "1e3"]
NUMBERS += [str(2**31), str(2**63), str(2**64), "9" * 30, "9" * 5000, "²", "0.1.2", "12:30:45", "1e99"]
TEXTS = [
    "",
    " ",
    "null",
    "no",
    "yes",
    "true",
    "2024-05-01",
    "2024-02-31",
    "é",
    "\x1b[31m",
    "a\x00b",
    "\udcff",
    "\u202e",
]
TEXTS += ["a" * 300, "a" * 5000, "..", ".", "~", "~nosuchuser", "*", "**", "&a", "*a", "%s{0}", "in", "in/none", "name"]
TEXTS += ["# x", "'", '"', "\n", "a\nb", "in/photos/*", "in/tokenizer@nan", "guard/secret.txt", "in/classifier", "a #2"]
TREES = [
    "[]",
    "{}",
    "[1,2",
    "{a: b}",
    "[[[[]]]]",
    "[nan]",
    "[null]",
    "{name: null}",
    "{name: []}",
    "{name: {}}",
    "[0,-1]",
]
TREES += [
    "!!python/object/apply:os.system [touch guard/pwned]",
    "!!binary x",
    "[" * 2000,
    "{a: 1, a: 2}",
    "<<: 1",
    "? x",
]
TREES += [
    "&a [*a]",
    "{1: 2}",
    "{null: 1}",
    "[[1, 2], [3]]",
    "- - 1",
    "{name: folder}",
    "[a, a]",
    "!!set {a}",
    "{? [a]: b}",
]
WORK = ("steps", "count", "samples", "sets", "seeds", "scale", "blocks", "depth")  # more of these is more work, rightly


def settings_words(t: Try) -> None:
    """A setting with a value of another type, size or form, or a word that is no setting."""
    keys = [setting.key for setting in list_settings(COMMANDS[t.valid.command].load()[1])]
    key, value = t.rng.choice(keys), t.rng.choice(t.rng.choice([NUMBERS, TEXTS, TREES]))
    if t.rng.random() < 0.4:
        key = t.rng.choice([w.partition("=")[0] for w in t.valid.words[1:] if "=" in w])  # one that matters here
    if t.rng.random() < 0.1:
        key = t.rng.choice(
            ["", ".", "a..b", f"{key}.", f"{key}.x", "__class__", "a." * 1000 + "a", "\x1b[2J", "é", key[1:]]
        )
    if key.split(".")[0] in ("out", "cache") and value.strip() in ("", "..", "~", "in", ".", "in/classifier", "**"):
        value = "guard/secret.txt"
    t.free_out = key in ("out", "cache")
    if key.rpartition(".")[2].endswith(WORK) and value in NUMBERS:
        t.words.append("--dry-run")
    word = key if t.rng.random() < 0.03 else f"{key}={value}"
    if t.rng.random() < 0.95:
        t.words = [old for old in t.words if old.partition("=")[0] != key]
    t.words.append(word)
    t.notes.append(word)
    t.again = True


def yaml_files(t: Try) -> None:
    """A configuration file that is odd or no YAML."""
    text = t.rng.choice([
        "", "[]", "1", "a: b", "a: [", "\t\tx", "a: 1\na: 2\n", "steps: !!python/name:os.system", "? a", "- a", "%YAML 9.9", "a: *x",
        "settings: []", "settings: {}", "settings: {x: 1}", f"settings: {{{t.valid.command}: [1]}}", "data: {name: {a: 1}}",
        "data: [1]", "data: 2024-02-31", "? [1, 2]\n: 3", "1: 2", "null: 3", "out: [x]", "a: " + "[" * 3000, "{" * 3000,
        "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d]",
        "a: &a {b: *a}", "<<: {steps: 1}", "steps: 1e400", f"steps: {'9' * 5000}", "a: !!timestamp x", "x: \x07", "data: !!binary '*'",
    ])  # fmt: skip
    content = text.encode()
    if t.rng.random() < 0.3:
        content = t.rng.choice(
            [b"\xff\xfe" + content, b"\xef\xbb\xbf" + content, content.decode().encode("utf-16"), b"\x00" * 9]
        )
    name = t.rng.choice(["in/x.yaml", "in/x.yml", "in/x [1].yaml", "in/é.yaml"])
    Path(name).write_bytes(content)
    t.notes.append(f"{name}: {content[:60]!r}")
    t.words.insert(1, name)
    if t.rng.random() < 0.1:
        t.words.insert(
            1,
            t.rng.choice(
                ["guard/none.yaml", "in.yaml", "guard", "digits/tokenizer.yaml", ".yaml", "a" * 300 + ".yaml"]
            ),
        )


def bytes_of_files(t: Try) -> None:
    """Bytes flipped, cut off, inserted or doubled in a file of any kind."""
    file = t.file()
    content = bytearray(file.read_bytes())
    how = t.rng.choice(["flip", "flip early", "truncate", "insert", "empty", "double", "zeros", "text"])
    at = t.rng.randrange(max(len(content), 1))
    if how == "flip" and content:
        content[at] ^= 1 << t.rng.randrange(8)
    elif how == "flip early" and content:
        content[min(at, t.rng.randrange(64))] ^= 1 << t.rng.randrange(8)
    elif how == "truncate":
        del content[at:]
    elif how == "insert":
        content[at:at] = t.rng.randbytes(t.rng.choice([1, 8, 100]))
    else:
        replaced = {"empty": b"", "double": content * 2, "zeros": bytes(len(content)), "text": b"\xff\xfe hello"}
        content = replaced.get(how, content)
    file.write_bytes(content)
    t.notes.append(f"{how} at {at}")


ODD: list[Any] = [None, True, -1, 0, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", "x", "²", "a" * 5000]
ODD += [
    [],
    {},
    [1],
    [[1]],
    {"a": 1},
    ["a"],
    "../guard",
    "\x1b[31m",
    f"</script>{SCRIPT}",
    f"{SCRIPT}</script>",
    [2**40, 2**40],
    [-1, 4],
    "nan",
    [None],
    {"__tensor__": "x"},
]


def headers(t: Try) -> None:
    """A value of another type or size, or a missing or foreign key, in a JSON or YAML file."""
    file = t.file("*.json", "*.yaml", "*.jsonl")
    form = yaml.safe_load if file.suffix == ".yaml" else json.loads
    tree = form(file.read_text().splitlines()[0] if file.suffix == ".jsonl" else file.read_text())
    for _ in range(t.rng.choice([1, 1, 1, 3])):
        holder, key = t.rng.choice(list(_places(tree)))
        odd, how = t.rng.choice(ODD), t.rng.random()
        if how < 0.75:
            holder[key] = odd
        elif how < 0.9:
            del holder[key]
        elif isinstance(holder, dict):
            holder[t.rng.choice(["x", "name", "\x1b", "a" * 300])] = odd
        t.notes.append(f"{key}: {str(odd)[:40]!r} {how:.2f}")
        if not tree:
            break
    text = yaml.safe_dump(tree) if file.suffix == ".yaml" else json.dumps(tree) + "\n"
    file.write_text(text if t.rng.random() < 0.95 else text[1:])


def _places(tree: Any):
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list) and value:
            yield from _places(value)


def safetensors(t: Try) -> None:
    """The header of a safetensors file, or its numbers."""
    file = t.file("*.safetensors")
    if t.rng.random() < 0.4:
        tensors = load_file(file)
        name = t.rng.choice(sorted(tensors))
        value = t.rng.choice([float("nan"), float("inf"), 0.0, 1e30, -1e30])
        how = t.rng.choice(["numbers", "numbers", "type", "shape", "drop", "add"])
        if how == "numbers" and tensors[name].numel():
            whole = t.rng.random() < 0.5 or not tensors[name].is_floating_point()
            if tensors[name].is_floating_point():
                tensors[name].view(-1)[None if whole else 0] = value
                t.refused = value != value and file.name == "model.safetensors"
            else:
                tensors[name].view(-1)[0] = t.rng.choice([-1, 100, torch.iinfo(tensors[name].dtype).max])
        elif how == "type":
            tensors[name] = tensors[name].to(
                t.rng.choice([torch.float64, torch.float16, torch.int64, torch.bool, torch.uint8])
            )
        elif how == "shape":
            tensors[name] = tensors[name].flatten()[None]
        elif how == "drop":
            del tensors[name]
        else:
            tensors["x" * t.rng.choice([1, 3000])] = torch.zeros(3)
        t.notes.append(f"{name}: {how} {value}")
        save_file(tensors, file)
        return
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    entry = header[t.rng.choice(sorted(header))]
    how = t.rng.choice(["dtype", "shape", "offsets", "size", "json", "metadata", "nested"])
    if how == "dtype":
        entry["dtype"] = t.rng.choice(["F64", "I8", "X", "", None, "BOOL", "F8_E4M3", "F4"])
    elif how == "shape":
        entry["shape"] = t.rng.choice([[], [-1], [2**62, 4], [2**40], None, "x", [1.5], [0] * 1000, [1] * 100])
    elif how == "offsets":
        entry["data_offsets"] = t.rng.choice([[0, 2**62], [5, 1], [-1, 3], [0], None, [0, 0], ["a", "b"]])
    elif how == "metadata":
        header["__metadata__"] = t.rng.choice([1, {"a": 1}, {"format": "x" * 10**5}, {"\x1b[31m": "y"}, []])
    packed = (
        t.rng.choice([b"[]", b"{}", b"null", b'{"a":1}', b"\xff", b"{" * 9999])
        if how == "json"
        else json.dumps(header).encode()
    )
    if how == "nested":
        packed = b'{"a":' + b"[" * 50000 + b"]" * 50000 + b"}"
    length = t.rng.choice([0, 1, 2**63, 2**64 - 1, 10**9]) if how == "size" else len(packed)
    file.write_bytes(struct.pack("<Q", length) + packed + data)
    t.notes.append(f"header: {how} {str(entry)[:100]}")


def npz_members(t: Try) -> None:
    """Members of an npz file."""
    file = t.file("*.npz")
    with np.load(file) as arrays:
        content = dict(arrays)
    how = t.rng.choice(
        ["object", "dtype", "shape", "missing", "crc", "header", "path", "many", "nan", "fortran", "encrypted", "npy"]
    )
    pixels = content["arr_0"]
    if how == "object":
        content["arr_0"] = np.array([Evil(), None], dtype=object)
        t.refused = True
    elif how == "dtype":
        content["arr_0"] = pixels.astype(t.rng.choice(["f4", "f8", "i8", "u2", "c8", "S3", "U2", "M8[s]", ">u2", "?"]))
    elif how == "shape":
        content["arr_0"] = t.rng.choice(
            [pixels[0], pixels[:0], pixels[..., :1], pixels[None], pixels[:1], pixels.ravel(), pixels[:, :1, :1]]
        )
    elif how == "missing":
        content = {t.rng.choice(["arr_1", "x", "mu", "", "a/b"]): pixels}
    elif how == "nan":
        content["arr_0"] = np.full(pixels.shape, np.nan, "f4")
        t.refused = True
    elif how == "fortran":
        content["arr_0"] = np.asfortranarray(pixels)
    elif how == "many":
        content |= {f"x{i}": np.zeros(1) for i in range(300)}
    np.savez(file, **content)
    whole = bytearray(file.read_bytes())
    at = whole.find(b"\x93NUMPY")
    if how == "crc":
        whole[at + 128 + t.rng.randrange(1000)] ^= 255  # a pixel: the CRC of the member no longer fits
        t.refused = True
    elif how == "header" and at > 0:
        old = bytes(whole[at + 10 : at + 128])
        shape = t.rng.choice(
            [b"(99999999999, 16, 16, 3)", b"(-1, 16, 16, 3)", b"__import__('os')", b"((((", b"'x'", b"(1e9,)"]
        )
        new = b"{'descr': '|u1', 'fortran_order': False, 'shape': " + shape + b", }"
        whole[at + 10 : at + 128] = new.ljust(len(old) - 1) + b"\n"
    elif how == "encrypted":
        whole[6] |= 1
        whole[whole.find(b"PK\x01\x02") + 8] |= 1
    elif how == "npy":
        whole = whole[at:]
    file.write_bytes(whole)
    if how == "path":
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("../guard/pwned.npy", b"x")
    t.notes.append(f"npz {how}")


class Evil:
    """Unpickled, it writes to guard/."""

    def __reduce__(self):
        return os.system, ("touch guard/pwned",)


def pickles(t: Try) -> None:
    """A foreign checkpoint that is no dictionary of tensors, or does something when it is read."""
    file = t.file("*.pt", "*.safetensors", "*.npz", "*.json")
    weights = {"a": torch.zeros(3)}
    content = t.rng.choice([
        Evil(), {"model": Evil()}, {"state_dict": {"a": Evil()}}, weights | {"x": Evil()}, [], None, 1, "x", {}, {"model": {}},
        {1: torch.zeros(2)}, {"model": 3}, {"model": weights, "ema": weights}, torch.zeros(3), [torch.zeros(2)], {"a": {"b": {}}},
        {"model": {"a": float("nan")}}, torch.nn.Linear(2, 2), {"a": torch.zeros(3).to_sparse()}, {"a": torch.zeros(2, device="meta")},
        {"a": torch.zeros(1).expand(10**9)}, {"\x1b[31m": torch.zeros(3)}, {"a" * 5000: torch.zeros(1)}, {"a": np.zeros(3)},
    ])  # fmt: skip
    how = t.rng.choice(["zip", "legacy", "pickle", "tar", "deep", "zipped", "pointer", "html"])
    stream = io.BytesIO()
    if how in ("zip", "legacy"):
        torch.save(content, stream, _use_new_zipfile_serialization=how == "zip")
    elif how == "pickle":
        pickle.dump(content, stream)
    elif how == "tar":
        with tarfile.open(fileobj=stream, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("../guard/pwned"), io.BytesIO())
    elif how == "deep":
        stream.write(b"\x80\x02" + b"]" * 20000 + b"a" * 19999 + b".")
    elif how == "zipped":
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("../../guard/pwned", "x")
    else:
        stream.write(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
            if how == "pointer"
            else b"<!DOCTYPE html>"
        )
    file.write_bytes(stream.getvalue())
    t.refused = "pt" in file.suffix and how not in ("zip", "legacy")
    t.notes.append(f"{how} {type(content).__name__}")


def links(t: Try) -> None:
    """Links in the inputs: to the same content, in circles, to nothing, to a file that is none of our business."""
    path = t.path()
    target = t.rng.choice(["moved", "circle", "dangling", "secret", "guard", "parent", "long"])
    shutil.move(path, "moved")
    there = {
        "moved": Path("moved"),
        "circle": path,
        "secret": Path("guard/secret.txt"),
        "guard": Path("guard"),
        "parent": path.parent,
    }
    link = there.get(target, Path("none" if target == "dangling" else "x/" * 500)).absolute()
    path.symlink_to(link)
    t.notes.append(f"link to {target}")


def links_of_out(t: Try) -> None:
    """Links of somebody else in the folder ``out``, or in place of the file ``out``. The folder may be a link."""
    t.planted = True
    out = Path(next(word for word in t.words if word.startswith("out=")).removeprefix("out="))
    names = [
        "config.yaml",
        "log.jsonl",
        "metrics.jsonl",
        "snapshot",
        "state",
        "manifest.json",
        "pictures",
        "samples.npz",
        "x",
    ]
    name = t.rng.choice([*names, "shard-00000.safetensors", "README.md", ".lock"])
    name = t.rng.choice([name, name, f".{name}.tmp", f"{name}.tmp", f".{name}.old"])
    target = t.rng.choice(["secret.txt", "config.yaml", "photos", "none", "..", "../in", "../out"])
    if t.rng.random() < 0.5 and t.valid.begun:
        shutil.copytree(t.valid.begun, out)
    link = out if out.suffix else out / name
    link.parent.mkdir(exist_ok=True)
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(Path("guard", target).absolute())
    t.notes.append(f"{link} is a link to guard/{target}")


def special_files(t: Try) -> None:
    """A FIFO, socket, folder or file in place of something else, also in place of ``out``."""
    path = t.path() if t.rng.random() < 0.75 else Path(next(w for w in t.words if w.startswith("out="))[4:])
    if path.exists():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    how = t.rng.choice(["fifo", "fifo", "socket", "folder", "file", "full folder"])
    if how == "fifo":
        os.mkfifo(path)
    elif how == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif how == "file":
        path.write_bytes(b"")
    else:
        path.mkdir()
        if how == "full folder":
            (path / "notes.txt").write_text("mine")
    t.notes.append(f"{path} is a {how}")


def removed(t: Try) -> None:
    """Files or folders that are missing."""
    for _ in range(t.rng.choice([1, 1, 2])):
        if (path := t.path()).exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def images(t: Try) -> None:
    """Folders of images as they occur, and images that are odd."""
    folder = t._pick([p for p in Path("in").rglob("*") if p.is_dir() and "photos" in p.parts or p.name == "flat"])
    names = [
        "caf\udce9.png",
        "\x1b[31m.png",
        "a\nb.png",
        "é" * 80 + ".png",
        ".hidden.png",
        "x.PNG",
        "x.jpeg",
        "a b.png",
        "#.png",
        "x.tga",
    ]
    file = folder / t.rng.choice([*names, "x.txt", "metadata.jsonl", "metadata.csv", "Thumbs.db", "x.tar"])
    picture = Image.new(
        t.rng.choice(["RGB", "L", "1", "P", "RGBA", "LA", "I;16", "F", "CMYK", "I"]),
        t.rng.choice([(16, 16), (1, 1), (2000, 1), (17, 9)]),
    )
    form = {"RGB": "PNG", "CMYK": "JPEG", "F": "TIFF", "I": "TIFF"}.get(picture.mode, "PNG")
    stream = io.BytesIO()
    picture.save(stream, form)
    kinds = [
        stream.getvalue(),
        stream.getvalue()[:40],
        b"",
        postscript(),
        b"GIF89a\xff\xff\xff\xff",
        b"BM" + b"\xff" * 60,
        b"P6 99999 99999 255 ",
    ]
    file.write_bytes(t.rng.choice([kinds[0], kinds[0], *kinds]))
    beside = folder / t.rng.choice(["__MACOSX", "empty", "val", "test", "Train", "10", ".git", "logs", "\udcff"])
    beside.mkdir(exist_ok=True)
    if t.rng.random() < 0.5:
        shutil.copy(file, beside / "0.png")
    t.notes.append(str(beside))
    t.notes.append(f"{file!r} {picture.mode} {picture.size}")


def permissions(t: Try) -> None:
    """What may not be read or written, for a user without rights."""
    t.user = NOT_ROOT if os.getuid() == 0 else None
    if t.rng.random() < 0.3:
        Path(".").chmod(0o555)
        t.notes.append("nothing can be written")
        t.again = True
    else:
        t.path().chmod(t.rng.choice([0, 0o111, 0o444, 0o222]))


ENVIRONMENT = {
    "RANK": ["0", "1", "x", "-1", ""], "WORLD_SIZE": ["2", "0", "x"], "LOCAL_RANK": ["0", "7", "x"], "MASTER_PORT": ["x"],
    "ACCELERATE_MIXED_PRECISION": ["fp16", "fp8", "bf16", "x"], "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ["4", "x", "0"],
    "ACCELERATE_USE_DEEPSPEED": ["true"], "ACCELERATE_USE_FSDP": ["true"], "ACCELERATE_USE_CPU": ["false"],
    "ACCELERATE_DYNAMO_BACKEND": ["INDUCTOR", "x"], "ACCELERATE_USE_MEGATRON_LM": ["true"], "ACCELERATE_DISPATCH_BATCHES": ["x"],
    "PMI_RANK": ["1"], "PMI_SIZE": ["4"], "OMPI_COMM_WORLD_SIZE": ["4"], "OMPI_COMM_WORLD_RANK": ["1"], "SLURM_PROCID": ["1"],
    "HOME": ["/nonexistent", ""], "LANG": ["C"], "LC_ALL": ["xx"], "TMPDIR": ["/nonexistent"], "COLUMNS": ["x", "1", "0"],
    "ROBUSTOK_PROGRESS": ["x", "1", ""], "TERM": ["dumb", ""], "HF_HOME": ["/nonexistent"], "CUDA_VISIBLE_DEVICES": ["x"],
    "OMP_NUM_THREADS": ["x"], "NO_COLOR": ["1"], "FORCE_COLOR": ["1"], "MV2_COMM_WORLD_SIZE": ["3"], "ACCELERATE_DEBUG_MODE": ["1"],
}  # fmt: skip


def environment(t: Try) -> None:
    """Variables that launchers leave behind, or that are nonsense."""
    for name in t.rng.sample(sorted(ENVIRONMENT), t.rng.choice([1, 1, 2, 3])):
        t.env[name] = t.rng.choice(ENVIRONMENT[name])
    t.notes.append(str(t.env))
    t.again = True


def killed(t: Try) -> None:
    """A signal at a random moment; afterwards the same command goes on."""
    number = t.rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    t.signal = number, t.rng.uniform(0, 1.2 * t.valid.seconds)
    t.notes.append(f"{signal.Signals(number).name} after {t.signal[1]:.3f} s")
    t.again = True


def full_disk(t: Try) -> None:
    """No file may be larger than so many bytes, as on a full disk; or stdout is closed, or few files may be open."""
    if t.rng.random() < 0.8:
        t.limits[resource.RLIMIT_FSIZE] = t.rng.choice([0, 1, 10, 100, 1000, 5000, 20_000, t.rng.randrange(200_000)])
    elif t.rng.random() < 0.5:
        t.closed = True
    else:
        t.limits[resource.RLIMIT_NOFILE] = t.rng.choice([8, 12, 16])
    t.notes.append(f"{t.limits} closed={t.closed}")
    t.again = True


def other_content(t: Try) -> None:
    """Right files with another content, of which the numbers must tell."""
    if Path("in/flat").is_dir() and "in/flat.npz" in " ".join(t.words):
        if t.rng.random() < 0.5:
            with np.load("in/flat.npz") as arrays:
                pixels = arrays["arr_0"].copy()
            pixels[t.rng.randrange(12)] ^= 255
            np.savez("in/flat.npz", arr_0=pixels)
        else:
            file = t.file("in/flat/*.png")
            Image.eval(Image.open(file), lambda value: 255 - value).save(file)
        t.changed = ("gfid", "psnr")
    else:
        file = t.file("classifier/snapshot/*/model.safetensors", "tokenizer/snapshot/*/model.safetensors")
        save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file)
        t.changed = ("gfid", "rfid", "psnr") if t.valid.command == "evaluate" else ()
        t.notes.append("all weights are zero")


def resumed(t: Try) -> None:
    """A command that goes on after it was killed, while something in ``out`` or in its inputs has changed."""
    if t.valid.begun is None:
        raise NotHere
    shutil.copytree(t.valid.begun, "out")
    t.planted = t.equal = True
    how = t.rng.choice(["byte", "byte", "cut", "remove", "log", "nothing", "input", "temporary"])
    files = [p for p in sorted(Path("out").rglob("*")) if p.is_file() and p.name != "metrics.jsonl"]
    file = t._pick(files or [Path("out/metrics.jsonl")])
    if how == "byte" and files:
        content = bytearray(file.read_bytes())
        content[t.rng.randrange(len(content))] ^= 1 << t.rng.randrange(8)
        file.write_bytes(content)
        t.equal = "state" in file.parts  # states have a digest, shards do not
    elif how == "cut":
        file.write_bytes(file.read_bytes()[: t.rng.randrange(file.stat().st_size)])
    elif how == "remove":
        file = t._pick([p for p in Path("out").rglob("*") if p.name not in ("metrics.jsonl", "manifest.json")])
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    elif how == "log":
        for log in Path("out").glob("*.jsonl"):
            log.write_bytes(
                log.read_bytes()
                + t.rng.choice([b'{"step": 2, "lo', b"\xff\xfe", b"{}", b"null\n", b"\n\n", b"\0" * 50])
            )
    elif how == "input":
        file = t.file("*.png", "shard-00000.safetensors", "*/snapshot/*/model.safetensors")
        if file.suffix == ".png":
            Image.eval(Image.open(file), lambda value: 255 - value).save(file)
        else:
            save_file(
                {
                    name: -value if value.is_floating_point() else value.flip(0)
                    for name, value in load_file(file).items()
                },
                file,
            )
        t.refused, t.equal = Path("out/state").is_dir() or any(Path("out").glob("shard-*")), False
    elif how == "temporary":
        for name in (
            ".config.yaml.tmp",
            "state/.00000003.tmp",
            "snapshot/.00000003.tmp",
            ".manifest.json.tmp",
            "snapshot/.best.old",
        ):
            if Path("out", name).parent.is_dir():
                Path("out", name).mkdir() if t.rng.random() < 0.5 else Path("out", name).write_text("x")
    t.notes.append(how)
    t.notes[0] += f" {how} {file.name}"


PATHS = [
    "classifier",
    "tokenizer",
    "latents",
    "generator",
    "samples",
    "pairs",
    "post",
    "delta",
    "photos",
    "flat",
    "flat.npz",
    "release.pt",
]
NEVER = [
    "samples.latents=[in/latents]",
    "samples.latents=[in/pairs]",
    "pairs=in/latents",
    "pairs=in/samples",
    "latents=in/pairs",
]
NEVER += ["latents=in/samples", "tokenizer=in/generator", "generator=in/tokenizer", "extractor.path=in/tokenizer"]


def swapped(t: Try) -> None:
    """An input in place of another one."""
    places = [i for i, word in enumerate(t.words) if "=in/" in word or "=[in/" in word]
    if not places:
        raise NotHere
    place = t.rng.choice(places)
    key, _, value = t.words[place].partition("=")
    path = f"in/{t.rng.choice(PATHS)}"
    t.words[place] = f"{key}=[{path}]" if value.startswith("[") else f"{key}={path}"
    if t.valid.command == "post-train" and t.words[place] == "pairs=in/samples" or t.words[place] in NEVER:
        t.refused = True
    t.notes.append(t.words[place])
    t.notes[0] += f" {t.words[place]}"


KINDS: dict[Callable[[Try], None], int] = {
    settings_words: 16, yaml_files: 6, bytes_of_files: 14, headers: 14, safetensors: 8, npz_members: 4, pickles: 5, links: 5,
    links_of_out: 6, special_files: 6, removed: 3, images: 5, permissions: 4, environment: 5, killed: 6, full_disk: 5, other_content: 3, resumed: 9, swapped: 4,
}  # fmt: skip
