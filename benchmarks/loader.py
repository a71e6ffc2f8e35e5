"""The loader against reading in the main process, as it was before there was one.

    python benchmarks/loader.py PHOTOGRAPHS.parquet

The first 256 photographs are saved as JPEG files of 500 x 375. Batches have 128 crops of 256 pixels. Everything is CPU
time, which other work on the machine changes little: of the main process for a batch, and of whoever decodes for an
image. On a GPU the device does the conversion to float32 and the mirroring; they are listed apart. The same photographs
in a tar file are read in turn with the folder; so are they as a data set of a hub on this machine, in another process,
which is copied first (data.name=hf), or streamed with nothing and with all of it in the cache of blocks.
"""

import multiprocessing
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import numpy as np
import torch
from huggingface_hub import constants
from PIL import Image
from torch import Tensor

from robustok.data.crops import center_crop
from robustok.data.dataset import Augmentation, ImageDataset, open_images
from robustok.data.latent_cache import LatentCache, create_cache, write_shard
from robustok.data.loader import ahead, training_batches, training_draw
from robustok.data.manifest import Manifest
from robustok.data.order import batch_indices
from robustok.data.parquet_files import open_row, read_table
from robustok.data.pixels import from_pixels
from robustok.data.sources import Folder, HubDataset, Parquet, Tar
from robustok.training.objectives import Steps, _read_records
from timing import arguments

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # of the hub
PHOTOGRAPHS, BATCH, SIZE, TOKENS, CODES = 256, 128, 256, 256, 4096
BATCHES = 3


def save_photographs(parquet: Path, folder: Path) -> None:
    """The first photographs as JPEG files of 500 x 375."""
    table = read_table([parquet], parquet.parent, None)
    folder.mkdir()
    for row in range(PHOTOGRAPHS):
        image = open_row(table.groups, row).convert("RGB").resize((500, 375), Image.Resampling.BICUBIC)
        image.save(folder / f"{row:03d}.jpg", quality=92)


def make_pairs(folder: Path, fingerprint: str) -> LatentCache:
    """Random tokens with the indices of the photographs, half of them mirrored."""
    rng, count = np.random.default_rng(0), 2 * PHOTOGRAPHS
    manifest = Manifest("discrete", (TOKENS, 16), CODES, 1, count, 100, "none", fingerprint)
    create_cache(folder, manifest)
    for k in range(manifest.shards):
        rows = np.arange(count)[k * 100 : (k + 1) * 100]
        zeros = np.zeros(len(rows), dtype=np.int64)
        tokens = rng.integers(0, CODES, (len(rows), TOKENS))
        fields = {"latents": tokens, "labels": zeros, "seeds": zeros, "indices": rows // 2, "flips": rows % 2}
        write_shard(folder, k, fields)
    return LatentCache(folder)


def plain_random_crop(image: Image.Image, seed: int) -> np.ndarray:
    """The random crop as it was: all of the image is resized, then the square is cut."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=rng))  # noqa: E731
    factor = draw(SIZE, -(-5 * SIZE // 4)) / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    left, top = draw(0, image.width - SIZE), draw(0, image.height - SIZE)
    return np.array(image.crop((left, top, left + SIZE, top + SIZE)))


def plain_images(files: list[Path], crop: Callable[[int, Image.Image], np.ndarray], indices: list[int]) -> Tensor:
    """Images (N, 3, H, W) float32, decoded one after the other."""
    pixels = [torch.from_numpy(crop(row, Image.open(files[i]).convert("RGB"))) for row, i in enumerate(indices)]
    return from_pixels(torch.stack([one.permute(2, 0, 1) for one in pixels]))


def plain_main_training(files: list[Path]) -> Iterator[Tensor]:
    for step in range(BATCHES):
        draw = training_draw(len(files), BATCH, 0, slice(0, BATCH), step)
        seeds = draw.seeds.tolist()
        images = plain_images(files, lambda row, image: plain_random_crop(image, seeds[row]), draw.indices.tolist())  # noqa: B023
        mirrored = torch.from_numpy(draw.seeds) % 2 == 1
        images[mirrored] = images[mirrored].flip(-1)
        yield images


def plain_post_training(files: list[Path], pairs: LatentCache) -> Iterator[Tensor]:
    for step in range(BATCHES):
        records = pairs.read(batch_indices(len(pairs), BATCH, 0, step))
        images = plain_images(files, lambda _, image: center_crop(image, SIZE), records.indices.tolist())
        yield torch.where(records.flips.bool()[:, None, None, None], images.flip(-1), images)


def on_the_device(device: torch.device) -> Iterator[Tensor]:
    """Mirroring and conversion of pixels on the device; the main process waits, as a step does not."""
    pixels = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8, device=device)
    mirrored = torch.arange(BATCH, device=device) % 2 == 0
    for _ in range(BATCHES):
        yield from_pixels(torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels))


def worker_seconds() -> float:
    """CPU time of the workers so far."""
    ticks = 0
    for worker in multiprocessing.active_children():
        ticks += sum(map(int, Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(name: str, batches: Iterator, workers: int) -> None:
    """Print CPU time and rates of all batches but the first, for which workers start."""
    next(batches)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    main, others, wall = time.process_time(), worker_seconds(), time.perf_counter()
    for _ in range(BATCHES - 1):
        next(batches)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    main, others, wall = time.process_time() - main, worker_seconds() - others, time.perf_counter() - wall
    images = (BATCHES - 1) * BATCH
    row = f"{1e3 * main / (BATCHES - 1):8.1f} ms of the main process a batch"
    decoding = f"{images / (others if workers else main):8.1f} images/s a core"
    print(f"{name:<42} {row} {decoding if 'device' not in name else ''} {images / wall:8.1f} images/s", flush=True)
    getattr(batches, "close", lambda: None)()


def compare_tar(files: list[Path], data: ImageDataset, path: Path) -> None:
    """Time the same batches of the folder and of a tar file in turn: ratios with decoding, and of reading alone."""
    with tarfile.open(path, "w") as archive:
        for file in files:
            archive.add(file, file.name)
    packed = open_images(Tar(path=path, holdout=0), SIZE, augment=data.augment)
    packed._memory = data._memory = None
    totals = {"batches": [0.0, 0.0], "reading alone": [0.0, 0.0]}
    for turn in range(6):
        for which, one in enumerate((data, packed)) if turn % 2 else ((1, packed), (0, data)):
            started = time.process_time()
            for batch in training_batches(one, BATCH, turn, 0, 1):
                assert len(batch.pixels) == BATCH
            totals["batches"][which] += time.process_time() - started
            started = time.process_time()
            for row in range(len(one)):
                with one._source.open(row) as image:
                    assert image.size == (500, 375)
            totals["reading alone"][which] += time.process_time() - started
    for name, (folder, tar) in totals.items():
        print(f"tar against folder, {name:<28} {tar / folder:8.3f} of the CPU time", flush=True)


def save_parquet(files: list[Path], path: Path) -> None:
    """The photographs as a file of the Hub, in row groups of 64."""
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    features = datasets.Features({"image": datasets.Image()})
    path.parent.mkdir()
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(path, batch_size=64)


def serve(repository: str, path: Path, ready: Any) -> None:
    """A hub with one data set of one file, in a process of its own; says its address, then the bytes that it sent."""
    from hub_server import Hub

    hub = Hub()
    hub.repositories[f"datasets/{repository}"] = {path.name: path.read_bytes()}
    Thread(target=hub.serve_forever, daemon=True).start()
    ready.send(hub.address)
    while ready.recv():
        ready.send(hub.sent.total())


def compare_streaming(files: list[Path], data: ImageDataset, folder: Path) -> None:
    """Time the same number of batches of the folder, of a copy by ``datasets``, and streamed, in turn: ratios."""
    save_parquet(files, folder / "hub" / "train-0.parquet")
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    told = "me/photographs", folder / "hub" / "train-0.parquet", theirs
    server = multiprocessing.get_context("spawn").Process(target=serve, args=told, daemon=True)
    server.start()
    constants.ENDPOINT = address = ours.recv()
    constants.HUGGINGFACE_CO_URL_TEMPLATE = address + "/{repo_id}/resolve/{revision}/{filename}"
    remote = Parquet(path=Path("hf://datasets/me/photographs"), streaming=True, holdout=0, cache=folder / "cache")
    streamed = open_images(remote, SIZE, augment=data.augment)
    datasets.config.HF_DATASETS_CACHE = str(folder / "datasets")
    copied = open_images(HubDataset(path=str(folder / "hub"), holdout=0), SIZE, augment=data.augment)
    copied._memory = data._memory = None
    cases = {"folder": data, "a copy by datasets": copied, "streamed, nothing cached": streamed, "all cached": streamed}
    cpu, wall = dict.fromkeys(cases, 0.0), dict.fromkeys(cases, 0.0)
    for turn in range(6):
        for name in (
            list(cases) if turn % 2 else ["streamed, nothing cached", "all cached", "a copy by datasets", "folder"]
        ):
            if name == "streamed, nothing cached":
                shutil.rmtree(folder / "cache" / "blocks", ignore_errors=True)
            started, now = time.process_time(), time.perf_counter()
            for batch in training_batches(cases[name], BATCH, turn, 0, PHOTOGRAPHS // BATCH):
                assert len(batch.pixels) == BATCH
            cpu[name] += time.process_time() - started
            wall[name] += time.perf_counter() - now
    ours.send(True)
    sent = ours.recv() / sum(file.stat().st_size for file in files)
    server.terminate()
    for name in list(cases)[1:]:
        line = f"{cpu[name] / cpu['folder']:8.3f} of the CPU time, {wall[name] / wall['folder']:8.3f} of the time"
        print(f"{name:<30} against folder {line}", flush=True)
    print(f"fetched for 6 epochs from nothing, with the index: {sent:.3f} x the bytes of the images", flush=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("photographs", type=Path, help="parquet file of photographs")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(given.device)
    with tempfile.TemporaryDirectory() as folder:
        save_photographs(given.photographs, Path(folder) / "images")
        files = sorted((Path(folder) / "images").iterdir())
        with_crops = Augmentation(crop="random", flip=True)
        data = open_images(Folder(path=Path(folder) / "images", holdout=0), SIZE, augment=with_crops)
        pairs = make_pairs(Path(folder) / "pairs", data.fingerprint)
        measure("main training, plain", plain_main_training(files), 0)
        for workers in (0, given.workers):
            batches = training_batches(data, BATCH, 0, 0, BATCHES, workers=workers, device=device)
            measure(f"main training, {workers} workers", batches, workers)
        compare_tar(files, data, Path(folder) / "images.tar")
        compare_streaming(files, data, Path(folder))
        measure("post-training, plain", plain_post_training(files, pairs), 0)
        read = partial(_read_records, data, pairs, Steps(BATCH, 0, 0, BATCHES, 0, 1), None)
        for workers in (0, given.workers):
            measure(f"post-training, {workers} workers", ahead(read, range(BATCHES), workers, device), workers)
        measure("mirroring and conversion, on the device", on_the_device(device), 0)


if __name__ == "__main__":
    main()
