"""The small world of the hostile tries: a valid command line for every command, and the inputs that they read.

All paths are relative to the working folder: inputs in ``in/``, results in ``out``. ``guard/`` is no input: nothing
may be read or written there.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file

from conftest import DATA, GENERATOR, PIPELINE, TRAINING, words
from robustok.cli import COMMANDS, main
from robustok.files import bytes_digest, json_lines
from tiny_images import encoded, picture
from tiny_models import released, tiny_tokenizer

OUT = {"out", "out.html", "out.jsonl", "out.safetensors"}  # where results are written
SECRET = "the content of a file that is none of our business"
FOLDER = ("data.name=folder", "data.path=in/photos")
CLASSIFIER = ("classifier.steps=2", "classifier.width=8", "classifier.features=8", "classifier.batch_size=4")
IMAGES = ("evaluate", "extractor.path=in/classifier", "metrics=[gfid,psnr]")
LLAMAGEN = ("family=llamagen_tokenizer", "config.norm_groups=4", "config.image_size=8")


@dataclass(frozen=True)
class Valid:
    """A command line that succeeds.

    Attributes:
        words: with the command as the first.
        seconds: how long it takes.
        result: digests of the weights and latents that it writes, by path.
        values: metric to value in the metrics.jsonl that it writes.
        begun: folder with ``out`` as it is when the command is killed shortly before its end; None if it has no such.
    """

    words: tuple[str, ...]
    seconds: float
    result: dict[str, str]
    values: dict[str, float]
    begun: Path | None

    @property
    def command(self) -> str:
        return self.words[0]


def build_world(folder: Path) -> list[Valid]:
    """Make the inputs in ``folder``, the working directory, and run every valid command line once."""
    inputs = folder / "in"
    inputs.mkdir(parents=True)
    for name, command in PIPELINE.items():
        assert main(words(command, Path("in"), f"in/{name}")) == 0, command
    assert main(["make-delta", "tokenizer=in/tokenizer", "post_trained=in/post", "out=in/delta"]) == 0
    _save_images(inputs)
    weights, _ = released("rar")
    torch.save({"model": weights, "step": 3}, inputs / "release.pt")
    save_file(weights, inputs / "release.safetensors")
    torch.save({"ema": released("llamagen_tokenizer")[0]}, inputs / "tokenizer.ckpt")
    vae = tiny_tokenizer("diffusers_kl").vae
    vae.register_to_config(sample_size=8)
    vae.save_pretrained(inputs / "vae")
    assert main(["convert", "family=diffusers", "weights=in/vae", "out=in/kl"]) == 0
    assert main(["convert-latents", "layout=rar", "to=export", "path=in/latents", "out=in/tokens.jsonl"]) == 0
    _save_features(inputs / "features")
    features = ["layout=lightningdit", "path=in/features", "tokenizer=in/kl", "classes=2", "out=in/continuous"]
    assert main(["convert-latents", *features]) == 0
    assert main([*IMAGES, "cache=in/cache", "images.mine=in/flat", "reference=in/flat", "out=out"]) == 0
    remove(Path("out"))
    for state in inputs.rglob("state/00000002"):
        shutil.rmtree(state)  # the newest is enough
    measured = {"metric": "rfid", "value": 1.5, "standard_error": 0.1, "samples": 48, "seed": 0, "extractor": "tiny"}
    shutil.copytree(
        inputs / "post", inputs / "runs" / "post", ignore=shutil.ignore_patterns("*.safetensors", "log.jsonl")
    )
    (inputs / "runs" / "post" / "metrics.jsonl").write_text(json.dumps(measured) + "\n")
    (inputs / "runs" / "post" / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    (folder / "guard").mkdir()
    (folder / "guard" / "secret.txt").write_text(SECRET)
    (folder / "guard" / "config.yaml").write_text(f"title: {SECRET}\n")
    shutil.copytree(inputs / "photos", folder / "guard" / "photos")
    found = []
    for line in valid_words():
        start = time.monotonic()
        assert main(line) == 0, line
        result, values = digests(folder / "out"), measured_values(folder / "out")
        seconds = time.monotonic() - start
        found.append(Valid(tuple(line), seconds, result, values, _begun(folder, len(found))))
        remove(folder / "out")
    assert {valid.command for valid in found} | {"app", "push"} == set(COMMANDS)  # one serves, one uploads
    return found


def copy_inputs(base: Path, words: Sequence[str]) -> None:
    """Copy the inputs that these words name from the world in ``base``, unless they are there."""
    names = set(re.findall(r"\bin/([\w.]+)", " ".join(words)))
    for name in names | ({"tokenizer"} if "delta" in names else set()):  # a delta is read with its original
        source, target = base / "in" / name, Path("in", name)
        target.parent.mkdir(exist_ok=True)
        if source.is_dir() and not os.path.lexists(target):
            shutil.copytree(source, target)
        elif source.is_file() and not os.path.lexists(target):
            shutil.copy2(source, target)


def _begun(folder: Path, number: int) -> Path | None:
    """Keep ``out`` without its end: the last state and the snapshot of a training, the last shard of a cache."""
    last = [*(folder / "out").glob("state/00000003"), *(folder / "out").glob("snapshot")]
    last = last if len(last) == 2 else sorted((folder / "out").glob("shard-*.safetensors"))[1:][-1:]
    if not last and not (folder / "out" / "metrics.jsonl").is_file():
        return None
    begun = folder / "begun" / str(number)
    shutil.copytree(folder / "out", begun)
    for path in last:
        shutil.rmtree(begun / path.relative_to(folder / "out")) if path.is_dir() else (begun / path.name).unlink()
    return begun


def valid_words() -> list[list[str]]:
    """Command lines that succeed. The demo, of which the others are the stages, only shows its settings."""
    pipeline = [words(command, Path("in"), "out") for command in dict.fromkeys(PIPELINE.values())]
    classifier = ["train-classifier", *CLASSIFIER, "image_size=16", "out=out"]
    fast = ["metrics=[rfid,psnr,gfid,kid]", "pfid.grid.name=explicit", "pfid.grid.rates=[0.5]", "pfid.grid.codes=[2]"]
    images = [*IMAGES, "out=out"]
    made = ["tokenizer=in/tokenizer", "generator=in/generator", "latents=in/latents", "sigma=0.5", "mixture.count=24"]
    post = [word for word in words("post-train", Path("in"), "out") if not word.startswith(("tokenizer=", "pairs="))]
    generated = ["samples.generator=in/generator", "tokenizer=in/tokenizer", "samples.count=20", "samples.sets=2"]
    statistics = sorted(Path("in/cache").iterdir())[0]
    return [
        *pipeline,
        ["demo", *DATA, "out=out", "--dry-run"],
        [word for word in words("main-train", Path("in"), "out") if word not in DATA] + [*FOLDER, "data.holdout=0"],
        [*words("evaluate", Path("in"), "out"), *fast],
        [*words("generate", Path("in"), "out"), "tokenizer=in/delta@0.5", "images=npz", "cache.shard_size=20"],
        ["train-generator", *TRAINING, *GENERATOR, "generator.name=sit", "latents=in/continuous", "out=out"],
        [*classifier, *FOLDER],
        [*classifier, "data.name=parquet", "data.path=in/photos.parquet"],
        [*classifier, "data.name=npz", "data.path=in/photos.npz"],
        [*images, "images.mine=in/flat", "reference=in/flat.npz"],
        [*images, "paired_images.mine=in/flat.npz", "reference=in/flat"],
        [*images, "images.mine=in/photos", f"reference={statistics}"],
        [*images, *DATA, *generated],
        [*post, *made],
        [*classifier, "data.name=folder", "data.path=in/listed", "data.holdout=0.2"],
        ["make-delta", "tokenizer=in/tokenizer", "post_trained=in/post", "rank=2", "out=out"],
        ["report", "path=in/runs", "out=out.html"],
        ["convert", "family=rar", "weights=in/release.pt", "out=out"],
        ["convert", "family=rar", "weights=in/release.safetensors", "out=out"],
        ["convert-latents", "layout=rar", "path=in/tokens.jsonl", "tokenizer=in/tokenizer", "shard_size=20", "out=out"],
        ["convert-latents", "layout=lightningdit", "path=in/features", "tokenizer=in/kl", "classes=2", "out=out"],
        ["convert-latents", "layout=rar", "to=export", "path=in/latents", "out=out.jsonl"],
        ["convert", *LLAMAGEN, "weights=in/tokenizer.ckpt", "out=out"],
        ["convert", "family=diffusers", "weights=in/vae", "out=out"],
        ["convert", "family=robustok", "to=export", "weights=in/post", "out=out.safetensors"],
    ]


def _save_images(inputs: Path) -> None:
    pictures = [picture(i, 16, 16) for i in range(12)]
    for i, image in enumerate(pictures):
        for file in (inputs / "photos" / "ab"[i % 2] / f"{i:02d}.png", inputs / "flat" / f"{i:02d}.png"):
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    labels = [i % 2 for i in range(12)]
    pixels = np.stack([np.asarray(image) for image in pictures])
    np.savez(inputs / "photos.npz", arr_0=pixels, arr_1=np.array(labels))
    np.savez(inputs / "flat.npz", arr_0=pixels)
    shutil.copytree(inputs / "flat", inputs / "listed")
    rows = [json.dumps({"file_name": f"{i:02d}.png", "label": label}) for i, label in enumerate(labels)]
    (inputs / "listed" / "metadata.jsonl").write_text("\n".join(rows))
    cells = [{"bytes": encoded(image), "path": None} for image in pictures]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": labels}), inputs / "photos.parquet")


def _save_features(folder: Path) -> None:
    """Latents as LightningDiT stores them."""
    folder.mkdir()
    latents = torch.randn(24, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    arrays = {"latents": latents, "latents_flip": latents.flip(3), "labels": torch.arange(24) % 2}
    save_file(arrays, folder / "latents_rank00_shard000.safetensors")


def digests(folder: Path) -> dict[str, str]:
    """Digests of the weights, latents and arrays beneath a folder."""
    files = sorted(p for p in folder.rglob("*.safetensors") if p.parent.parent.name != "state")
    return {str(file.relative_to(folder)): bytes_digest(file.read_bytes()) for file in files}


def measured_values(folder: Path) -> dict[str, float]:
    """The last value of each metric in metrics.jsonl."""
    file = folder / "metrics.jsonl"
    lines = json_lines(file.read_text(errors="replace"))[0] if file.is_file() else []
    return {
        f"{line['metric']} {line['decoder']}": line["value"]
        for line in lines
        if {"metric", "value", "decoder"} <= line.keys()
    }


def listing(folder: Path, leave_out: set[str]) -> dict[str, tuple[int, str]]:
    """Kind, and digest or link target, of everything in a folder, but for some names at its top."""
    found = {}
    for at, folders, files in os.walk(folder):
        if Path(at) == folder:
            folders[:] = [name for name in folders if name not in leave_out]
        for name in (*folders, *files):
            path = Path(at, name)
            if path.parent != folder or name not in leave_out:
                found[str(path)] = path.lstat().st_mode >> 12, _content(path)
    return found


def _content(path: Path) -> str:
    if path.is_symlink():
        return os.readlink(path)
    return bytes_digest(path.read_bytes()) if path.is_file() else ""


def remove(path: Path) -> None:
    """Remove what is at the path and beside it, if there is something: out, out.html, ..."""
    for found in path.parent.glob(f"{path.name}*"):
        shutil.rmtree(found) if found.is_dir() and not found.is_symlink() else found.unlink()
