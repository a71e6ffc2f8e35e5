"""What can be wrong with what is where: links, special files, missing files, other inputs, an ``out`` that is there."""

import os
import shutil
import socket
from pathlib import Path

from hostile.contents import negative
from hostile.tries import NotHereError, Try
from hostile.world import copy_inputs


def links(t: Try) -> None:
    """Links in the inputs: to the same content, in circles, to nothing, to a file that is none of our business."""
    path = t.one(t.inputs())
    remove(Path("moved"))
    shutil.move(path, "moved")
    path.symlink_to(
        Path(t.one(["moved", path, "none", "guard/secret.txt", "guard", path.parent, "x/" * 500])).absolute()
    )


def links_of_out(t: Try) -> None:
    """Links of somebody else in the folder ``out``, or in place of the file ``out``. The folder may be a link."""
    names = "config.yaml log.jsonl metrics.jsonl snapshot state manifest.json pictures samples.npz x README.md .lock"
    name = t.rng.choice([*names.split(), "shard-00000.safetensors"])
    name = t.one([name, name, f".{name}.tmp", f"{name}.tmp", f".{name}.old"])
    if t.rng.random() < 0.5 and t.valid.begun and not t.out.exists():
        shutil.copytree(t.valid.begun, t.out)
    link = t.out if t.out.suffix else t.out / name
    link.parent.mkdir(exist_ok=True)
    remove(link)
    link.symlink_to(Path("guard", t.one("secret.txt config.yaml photos none .. ../in ../out")).absolute())
    t.planted = True


def special_files(t: Try) -> None:
    """A FIFO, socket, folder or file in place of something else, also in place of ``out``."""
    path = t.one(t.inputs()) if t.rng.random() < 0.75 else t.out
    remove(path)
    how = t.one("fifo fifo socket file folder full")
    if how == "fifo":
        os.mkfifo(path)
    elif how == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif how == "file":
        path.write_bytes(b"")
    else:
        path.mkdir()
        if how == "full":
            (path / "notes.txt").write_text("mine")
    t.notes.append(str(path))
    t.planted = t.planted or path == t.out  # an earlier mutation may have put something there


def removed(t: Try) -> None:
    """Files or folders that are missing."""
    for _ in range(t.rng.choice([1, 1, 2])):
        remove(t.one(t.inputs()))


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


PATHS = "classifier tokenizer latents generator samples pairs post delta photos flat flat.npz release.pt"
NEVER = "samples.latents=[in/latents] samples.latents=[in/pairs] pairs=in/latents pairs=in/samples latents=in/pairs "
NEVER += "tokenizer=in/generator generator=in/tokenizer generator=in/classifier extractor.path=in/tokenizer"


def swapped(t: Try) -> None:
    """An input in place of another one."""
    word = t.one([word for word in t.words if "=in/" in word or "=[in/" in word])
    key, path = word.partition("=")[0], f"in/{t.one(PATHS)}"
    other = f"{key}=[{path}]" if "=[" in word else f"{key}={path}"
    copy_inputs(t.base, [path])
    t.words[t.words.index(word)] = other
    t.refused = other in NEVER.split() and t.valid.command != "train-generator"


def resumed(t: Try) -> None:
    """A command that goes on after it was killed, while something in ``out`` or in its inputs has changed."""
    if t.valid.begun is None or Path("out").exists():
        raise NotHereError
    how = t.one("byte byte cut remove log input temporary")
    if how == "input":  # before anything is changed, for there may be none
        negative(t.file("*.png", "shard-00000.safetensors", "*/snapshot/*/model.safetensors"))
    shutil.copytree(t.valid.begun, "out")
    t.planted = t.equal = True
    inside = sorted(Path("out").rglob("*"))
    if how in ("byte", "cut"):
        file = t.one([p for p in inside if p.is_file() and p.name not in ("metrics.jsonl", "log.jsonl")])
        content, at = bytearray(file.read_bytes()), t.rng.randrange(file.stat().st_size)
        content[at] ^= 1 << t.rng.randrange(8)
        file.write_bytes(content if how == "byte" else content[:at])
        t.equal = how == "cut" or "state" in file.parts  # states have a digest, shards and samples do not
    elif how == "remove":
        remove(t.one([p for p in inside if p.name not in ("metrics.jsonl", "manifest.json")]))
    elif how == "log":
        for log in Path("out").glob("*.jsonl"):
            log.write_bytes(
                log.read_bytes() + t.one([b'{"step": 2, "lo', b"\xff\xfe", b"{}", b"null\n", b"\n\n", b"\0" * 50])
            )
    elif how == "input":
        t.refused, t.equal = Path("out/state").is_dir() or any(Path("out").glob("shard-*")), False
    else:
        for name in (".config.yaml.tmp", "state/.00000003.tmp", "snapshot/.best.old", ".manifest.json.tmp"):
            if (left := Path("out", name)).parent.is_dir():
                left.mkdir() if t.rng.random() < 0.5 else left.write_text("x")
