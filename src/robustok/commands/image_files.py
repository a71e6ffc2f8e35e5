"""Decoded samples on disk: one ``.npz`` for ADM's evaluation, or a folder of PNG files."""

import json
from collections import deque
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from robustok.config import differences
from robustok.data.arrays import write_npz
from robustok.data.latent_cache import LatentCache
from robustok.data.latent_checks import check_cache
from robustok.data.pixels import to_pixels
from robustok.errors import UserError
from robustok.files import json_lines, regular_file, tensor_digest, write_file, writing
from robustok.precision import Precision, at_precision, cast_weights
from robustok.tokenizers import encoder_digest
from robustok.types import Tokenizer


def write_images(
    out: Path,
    tokenizer: Tokenizer,
    kind: Literal["npz", "png"],
    batch_size: int,
    accelerator: Accelerator,
    precision: Precision = "float32",
) -> None:
    """Decode a cache to images on disk; what is already there is kept, what is missing is made.

    ``npz`` is one out/samples.npz as ADM's evaluation takes it: ``arr_0`` (N, H, W, 3) uint8 and the labels as
    ``arr_1``, in the order of the cache. ``png`` is a folder out/png with 000012_class0003.png and so on (without the
    class where there is one only). Samples of `generate` are class-balanced, record i has class i modulo the classes.
    All processes decode; each writes its own PNG files, the first one writes the .npz. Memory holds one batch.

    Raises:
        UserError: the cache or the images there belong to another tokenizer, or the disk is full.
    """
    cache = LatentCache(out)
    check_cache(cache, encoder_digest(tokenizer))
    target = out / ("samples.npz" if kind == "npz" else "png")
    facts = {"decoder": tensor_digest(tokenizer.state_dict()), "images": len(cache)}
    facts |= {} if precision == "float32" else {"precision": precision}
    device = next(tokenizer.parameters()).device
    with writing(out), at_precision(device, precision):
        if accelerator.is_main_process:
            _claim(target, facts)
        accelerator.wait_for_everyone()
        cast_weights(tokenizer, precision)
        if kind == "png":
            _write_pngs(target, cache, tokenizer, batch_size, accelerator)
        elif not target.exists():
            _write_npz(target, cache, tokenizer, batch_size, accelerator)
        accelerator.wait_for_everyone()


def _claim(target: Path, facts: dict[str, Any]) -> None:
    """Note beside the images which decoder makes them, so that two decoders never share a folder.

    Raises:
        UserError: other images are there.
    """
    note = target.with_name(f"{target.name}.json")
    found = facts
    if target.exists():
        notes = json_lines(regular_file(note).read_text(errors="replace"))[0] if note.exists() else []
        found = notes[0] if notes else {}
    if found != facts:
        raise UserError(
            f"{target} holds other images ({'; '.join(differences(found, facts))}); "
            f"move {target.name} and {note.name} away to make them again"
        )
    write_file(note, json.dumps(facts))


@torch.no_grad()
def _decoded(cache: LatentCache, tokenizer: Tokenizer, rows: np.ndarray) -> Tensor:
    """Pixels (n, H, W, 3) uint8 of these records, on the tokenizer's device."""
    device = next(tokenizer.parameters()).device
    return to_pixels(tokenizer.decode(cache.read(rows).latents.to(device))).permute(0, 2, 3, 1)


def _write_npz(file: Path, cache: LatentCache, tokenizer: Tokenizer, batch_size: int, accelerator: Accelerator) -> None:
    each, count = batch_size * accelerator.num_processes, len(cache)

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, count, each):
            rows = start + accelerator.process_index * batch_size + np.arange(batch_size)
            # Every process gathers as many as the others; what is past the end is cut off again.
            pixels = accelerator.gather(_decoded(cache, tokenizer, rows.clip(max=count - 1)).contiguous())
            yield pixels[: count - start].cpu().numpy()

    if accelerator.is_main_process:
        grid, square = cache.manifest.grid, (tokenizer.image_size, tokenizer.image_size)
        height, width = square if grid is None else (side * tokenizer.factor for side in grid)
        write_npz(file, batches(), (count, height, width, 3), cache.labels)
    else:
        deque(batches(), maxlen=0)


def _write_pngs(
    folder: Path, cache: LatentCache, tokenizer: Tokenizer, batch_size: int, accelerator: Accelerator
) -> None:
    folder.mkdir(exist_ok=True)
    width, labels = max(6, len(str(len(cache) - 1))), cache.labels
    for start in range(accelerator.process_index * batch_size, len(cache), batch_size * accelerator.num_processes):
        rows = np.arange(start, min(start + batch_size, len(cache)))
        classes = [f"_class{labels[i]:04d}" if cache.manifest.classes > 1 else "" for i in rows]
        files = [folder / f"{i:0{width}d}{name}.png" for i, name in zip(rows, classes, strict=True)]
        if all(file.exists() for file in files):
            continue
        # The whole batch again: rounding may depend on the neighbours, so the same images are decoded together.
        for file, pixels in zip(files, _decoded(cache, tokenizer, rows).cpu().numpy(), strict=True):
            if not file.exists():
                content = BytesIO()
                Image.fromarray(pixels).save(content, "PNG")
                write_file(file, content.getvalue())
