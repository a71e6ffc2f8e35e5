"""What can be wrong inside of files: bytes, headers, numbers, pickles, pictures."""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from hostile.tries import Try
from tiny_images import postscript

SCRIPT = "<script>guard"
ODD: list[Any] = [None, True, -1, 0, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", "x", "²", "a" * 5000]
ODD += [[], {}, [1], [[1]], {"a": 1}, ["a"], [2**40, 2**40], [-1, 4], [None], "nan", "../guard", {"__tensor__": "x"}]
ODD += ["\x1b[31m", f"</script>{SCRIPT}", f"{SCRIPT}</script>"]


def file_bytes(t: Try) -> None:
    """Bytes flipped, cut off, inserted or doubled in a file of any kind."""
    file = t.file()
    content = file.read_bytes()
    at, how = t.rng.randrange(len(content) or 1), t.one("flip flip early cut insert empty double zeros text")
    at = min(at, t.rng.randrange(64)) if how == "early" else at
    before, byte, after = content[:at], content[at : at + 1], content[at + 1 :]
    flipped = before + bytes([byte[0] ^ 1 << t.rng.randrange(8)]) + after if byte else b""
    inserted = before + t.rng.randbytes(t.rng.choice([1, 8, 100])) + byte + after
    results = {
        "flip": flipped,
        "early": flipped,
        "cut": before,
        "insert": inserted,
        "empty": b"",
        "double": 2 * content,
    }
    file.write_bytes((results | {"zeros": bytes(len(content)), "text": b"\xff\xfe hello"})[how])
    t.notes.append(f"at {at}")


def headers(t: Try) -> None:
    """A value of another type or size, or a missing or foreign key, in a JSON or YAML file."""
    file = t.file("*.json", "*.yaml", "*.jsonl")
    text = file.read_text()
    tree = (
        yaml.safe_load(text)
        if file.suffix == ".yaml"
        else json.loads(text.partition("\n" * (file.suffix == ".jsonl") or "\0")[0])
    )
    for _ in range(t.rng.choice([1, 1, 1, 3])):
        holder, key = t.one(list(_places(tree)))
        how = t.rng.random()
        if how < 0.75:
            holder[key] = t.one(ODD)
        elif how < 0.9 or isinstance(holder, list):
            del holder[key]
        else:
            holder[t.one(["x", "name", "\x1b", "a" * 300])] = t.one(ODD)
        if not tree:
            break
    file.write_text(yaml.safe_dump(tree) if file.suffix == ".yaml" else json.dumps(tree) + "\n")


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list) and value:
            yield from _places(value)


def tensors(t: Try) -> None:
    """The tensors of a safetensors file: their numbers, types, shapes and names."""
    file = t.file("*.safetensors")
    found = load_file(file)
    name, how = t.one(sorted(found)), t.one("numbers numbers type shape drop add")
    value = found[name]
    if how == "numbers" and value.is_floating_point():
        number = t.one([float("nan"), float("inf"), 0.0, 1e30, -1e30])
        value.view(-1)[None if t.rng.random() < 0.5 else 0] = number
        t.refused = not -1e31 < number < 1e31 and file.name == "model.safetensors"
    elif how == "numbers":
        value.view(-1)[0] = t.one([-1, 100, torch.iinfo(value.dtype).max])
    elif how == "type":
        found[name] = value.to(t.one([torch.float64, torch.float16, torch.int64, torch.bool, torch.uint8]))
    elif how == "shape":
        found[name] = value.flatten()[None]
    elif how == "drop":
        del found[name]
    else:
        found["x" * t.one([1, 3000])] = torch.zeros(3)
    save_file(found, file)


def tensor_headers(t: Try) -> None:
    """The header of a safetensors file."""
    file = t.file("*.safetensors")
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    entry, how = header[t.one(sorted(header))], t.one("dtype shape data_offsets size json __metadata__")
    odd = {
        "dtype": ["F64", "I8", "X", "", None, "BOOL", "F8_E4M3", "F4"],
        "shape": [[], [-1], [2**62, 4], [2**40], None, "x", [1.5], [0] * 1000, [1] * 100],
        "data_offsets": [[0, 2**62], [5, 1], [-1, 3], [0], None, [0, 0], ["a", "b"]],
        "__metadata__": [1, {"a": 1}, {"format": "x" * 10**5}, {"\x1b[31m": "y"}, []],
    }
    if how in odd:
        (header if how == "__metadata__" else entry)[how] = t.one(odd[how])
    packed = json.dumps(header).encode()
    if how == "json":
        packed = t.one(
            [b"[]", b"{}", b"null", b'{"a":1}', b"\xff", b"{" * 9999, b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"]
        )
    length = t.one([0, 1, 2**63, 2**64 - 1, 10**9]) if how == "size" else len(packed)
    file.write_bytes(struct.pack("<Q", length) + packed + data)


def npz_members(t: Try) -> None:
    """Members of an npz file."""
    file = t.file("*.npz")
    with np.load(file) as arrays:
        content = dict(arrays)
    name = t.one(sorted(content))
    p = content[name]
    types = [p.astype(kind) for kind in ("f4", "f8", "i8", "u2", "c8", "S3", "U2", "M8[s]", ">u2", "?")]
    shapes = [p[:0], p[:1], p[..., :1], p[None], p.ravel(), p.ravel()[0], np.asfortranarray(p)]
    how = t.one("type shape object nan missing many crc header encrypted npy path")
    if how == "missing":
        content = {t.one(["arr_1", "x", "mu", "sigma", "", "a/b"]): p}
    elif how == "many":
        content |= {f"x{i}": np.zeros(1) for i in range(300)}
    elif how in ("type", "shape"):
        content[name] = t.rng.choice(types if how == "type" else shapes)
    elif how in ("object", "nan"):
        content[name] = np.full(p.shape, np.nan, "f4") if how == "nan" else np.array([Evil(), None], dtype=object)
    np.savez(file, **content)
    whole = bytearray(file.read_bytes())
    at = whole.find(b"\x93NUMPY")
    if how == "crc":
        whole[at + 128 + t.rng.randrange(8)] ^= 255  # a number: the CRC of the member no longer fits
    elif how == "header":
        shape = t.one(
            [b"(99999999999, 16, 16, 3)", b"(-1, 16, 16, 3)", b"__import__('os')", b"((((", b"'x'", b"(1e9,)"]
        )
        new = b"{'descr': '|u1', 'fortran_order': False, 'shape': " + shape + b", }"
        whole[at + 10 : at + 128] = new.ljust(117) + b"\n"
    elif how == "encrypted":
        whole[6] |= 1
        whole[whole.find(b"PK\x01\x02") + 8] |= 1
    file.write_bytes(whole[at:] if how == "npy" else whole)
    if how == "path":
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("../guard/pwned.npy", b"x")
    t.refused = how in ("object", "crc", "header", "encrypted") and set(content) <= {"arr_0"}


class Evil:
    """Unpickled, it writes to guard/."""

    def __reduce__(self):
        return os.system, ("touch guard/pwned",)


def pickles(t: Try) -> None:
    """A foreign checkpoint that is no dictionary of tensors, or does something when it is read."""
    file, w, zeros = t.file("*.pt", "*.safetensors", "*.npz", "*.json"), {"a": torch.zeros(3)}, torch.zeros(2)
    content: list[Any] = [
        Evil(),
        {"model": Evil()},
        {"state_dict": {"a": Evil()}},
        w | {"x": Evil()},
        torch.nn.Linear(2, 2),
    ]
    content += [[], None, 1, "x", {}, zeros, [zeros], {"model": {}}, {1: zeros}, {"model": 3}, {"model": w, "ema": w}]
    content += [{"a": {"b": {}}}, {"model": {"a": float("nan")}}, {"a": zeros.to_sparse()}, {"a": zeros.to("meta")}]
    content += [{"a": torch.zeros(1).expand(10**9)}, {"\x1b[31m": zeros}, {"a" * 5000: zeros}, {"a": np.zeros(3)}]
    how, stream, chosen = t.one("zip legacy pickle tar deep zipped pointer html"), io.BytesIO(), t.one(content)
    if how in ("zip", "legacy"):
        torch.save(chosen, stream, _use_new_zipfile_serialization=how == "zip")
    elif how == "pickle":
        pickle.dump(chosen, stream)
    elif how == "tar":
        with tarfile.open(fileobj=stream, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("../guard/pwned"), io.BytesIO())
    elif how == "zipped":
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("../../guard/pwned", "x")
    else:
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
        deep = b"\x80\x02" + b"]" * 20000 + b"a" * 19999 + b"."
        stream.write({"pointer": pointer, "deep": deep, "html": b"<!DOCTYPE html>"}[how])
    file.write_bytes(stream.getvalue())
    t.refused = file.suffix == ".pt"


def pictures(t: Try) -> None:
    """Folders of images as they occur, and images that are odd."""
    folder = t.one([p for p in t.inputs() if p.is_dir() and ("photos" in p.parts or p.name == "flat")])
    names = [
        "caf\udce9.png",
        "\x1b[31m.png",
        "a\nb.png",
        "é" * 80 + ".png",
        ".hidden.png",
        "x.PNG",
        "x.jpeg",
        "a b.png",
    ]
    names += ["#.png", "x.tga", "x.txt", "metadata.jsonl", "metadata.csv", "Thumbs.db", "x.tar"]
    image = Image.new(t.one("RGB L 1 P RGBA LA I;16 F CMYK I"), t.one([(16, 16), (1, 1), (2000, 1), (17, 9)]))
    stream = io.BytesIO()
    image.save(stream, {"CMYK": "JPEG", "F": "TIFF", "I": "TIFF"}.get(image.mode, "PNG"))
    right = stream.getvalue()
    wrong = [right[:40], b"", postscript(), b"GIF89a\xff\xff\xff\xff", b"BM" + b"\xff" * 60, b"P6 99999 99999 255 "]
    file = folder / t.one(names)
    file.write_bytes(t.one([right] * 4 + wrong))
    beside = folder / t.one("__MACOSX empty val test Train 10 .git logs \udcff")
    beside.mkdir(exist_ok=True)
    if t.rng.random() < 0.5:
        (beside / "0.png").write_bytes(right)


def parquet(t: Try) -> None:
    """Columns and rows of a parquet file."""
    file = t.file("*.parquet")
    table = pyarrow.parquet.read_table(file)
    cells, labels = table["image"].to_pylist(), table["label"].to_pylist()
    how = t.one("cell label type name metadata nothing")
    if how == "cell":
        cells[t.rng.randrange(12)] = t.one(
            [None, {"bytes": None, "path": None}, {"bytes": b"", "path": "x"}, {"bytes": b"x"}]
        )
    elif how == "label":
        labels[t.rng.randrange(12)] = t.one([-1, None, 2**62, 10**6])
    elif how == "type":
        cells, labels = t.one(
            [(cells, list("abcdefghijkl")), (["x"] * 12, labels), ([[1]] * 12, labels), (cells, [0.5] * 12)]
        )
    names = (
        t.one([["x", "y"], ["image", "image"], ["img", "fine_label"], ["image", ""]])
        if how == "name"
        else ["image", "label"]
    )
    new = pyarrow.table([cells, labels], names=names)
    if how == "metadata":
        features = {
            "label": {
                "names": t.one([["a"], [], None, [1, 2], "ab", ["a", "a"], ["\x1b[31m", "b"]]),
                "_type": "ClassLabel",
            }
        }
        packed = t.one(
            [json.dumps({"info": {"features": features}}), json.dumps({"info": {"features": None}}), "[]", "x", "{"]
        )
        new = new.replace_schema_metadata({"huggingface": packed})
    pyarrow.parquet.write_table(new[:0] if how == "nothing" else new, file)


def other_content(t: Try) -> None:
    """Right files with another content, of which the numbers must tell."""
    if any("in/flat.npz" in word for word in t.words):
        file = t.file("flat.npz", "flat/*.png")
        if file.suffix == ".npz":
            with np.load(file) as arrays:
                pixels = arrays["arr_0"].copy()
            pixels[t.rng.randrange(12)] ^= 255
            np.savez(file, arr_0=pixels)
        else:
            negative(file)
        t.changed = ("gfid", "psnr")
    else:
        file = t.file("classifier/snapshot/*/model.safetensors", "tokenizer/snapshot/*/model.safetensors")
        save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file)
        t.changed = ("gfid", "rfid", "psnr") if t.valid.command == "evaluate" else ()


def negative(file: Path) -> None:
    """Change what is in a picture, in weights or latents, so that it is another one of the same form."""
    if file.suffix == ".png":
        Image.eval(Image.open(file), lambda value: 255 - value).save(file)
    else:
        found = load_file(file)
        save_file({key: -value if value.is_floating_point() else value.flip(0) for key, value in found.items()}, file)
