"""A post-training step on cached latents, compared with the authors' procedure: CPU seconds and bytes on disk.

    python benchmarks/post_training.py [PHOTOGRAPHS.parquet] [--device cuda]

The authors' code stores each mixture as a PNG file. At every step it reads the file, encodes and quantises the image
again, runs the teacher, and trains everything except the encoder's transformer. Ours reads the latents and trains the
decoder. Both run at full size with all their losses (recipe ``imagenet256/post.yaml``), in the same training loop, on
one image and in one process. The authors' procedure runs twice: with our loop, and with losses that are differentiated
twice, for the adaptive weight and for the step, as is usual since taming-transformers. Backbones have random weights,
so nothing is downloaded. The photographs serve to measure the size of PNG files. Needs 9 GB. Goals: 2 times faster,
1/200 of the disk.
"""

import io
import itertools
import resource
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torchvision
from PIL import Image

from full_size import prepare, step_times, use_random_backbones
from robustok.commands.dry_run import RECORD
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache
from robustok.data.pixels import from_pixels, to_pixels
from robustok.data.sources import data_at
from robustok.tokenizers import load_tokenizer
from robustok.training import adversary, prepared
from robustok.training.authors import AuthorsStep
from robustok.training.decoder import DecoderTrainingRun
from timing import arguments

STEPS = 4  # the first is not timed


def decode_to_png(run: DecoderTrainingRun, path: Path) -> None:
    """Write the PNG file that the authors' procedure trains on."""
    tokenizer = load_tokenizer(run.tokenizer)
    with torch.no_grad():
        pixels = to_pixels(tokenizer.decode(LatentCache(run.pairs).read([0]).latents))[0]  # (3, H, W)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)


def from_png(path: Path):
    """A replacement of ``AuthorsStep.inputs`` that reads the image from a file, as the authors' code does."""

    @torch.no_grad()
    def inputs(self: AuthorsStep, latents: torch.Tensor) -> tuple:
        images = from_pixels(torchvision.io.decode_image(str(path))[None])  # (1, 3, H, W)
        return images, None, None, 0, self.teacher(images)

    return inputs


def seconds_a_step(name: str, folder: Path, twice: bool, device: str) -> list[float]:
    """Seconds of each step except the first, CPU time on a CPU; losses are differentiated once or twice."""
    run = prepare(name, folder, [f"steps={STEPS}", "log_every=100"])
    png = folder / "mixture.png"
    decode_to_png(run, png)
    differentiated = (lambda term, _inputs: term) if twice else prepared.differentiated
    with (
        mock.patch.object(prepared, "differentiated", differentiated),
        mock.patch.object(adversary, "differentiated", differentiated),
        mock.patch.object(AuthorsStep, "inputs", from_png(png)),
    ):
        times = step_times(run, device)
    return [after - before for before, after in itertools.pairwise(times)]


def png_bytes(photographs: Path) -> float:
    """Mean size of 200 photographs as PNG files."""
    data, sizes = open_images(data_at(photographs), 256), []
    for image in data.read(range(200)).images:
        buffer = io.BytesIO()
        Image.fromarray(to_pixels(image[None])[0].permute(1, 2, 0).numpy()).save(buffer, "PNG")
        sizes.append(buffer.tell())
    return sum(sizes) / len(sizes)


def main() -> None:
    words = arguments(__doc__)
    words.add_argument("photographs", nargs="?", type=Path, help="parquet file, to measure the size of PNG files")
    given = words.parse_args()
    use_random_backbones()
    found = {}
    for title, name, twice in (("ours", "post", False), ("authors", "authors", False), ("twice", "authors", True)):
        with tempfile.TemporaryDirectory() as folder:
            found[title] = seconds_a_step(name, Path(folder), twice, given.device)
        kind = "CPU " if given.device == "cpu" else ""
        print(f"{title:9} {'  '.join(f'{s:.3f}' for s in found[title])} {kind}seconds per step", flush=True)
    ratio, usual = (min(found[title]) / min(found["ours"]) for title in ("authors", "twice"))
    print(f"full size, batch 1, {given.device}, {torch.get_num_threads()} threads: ratio {ratio:.2f} (goal >= 2)")
    print(f"with losses differentiated twice: ratio {usual:.2f}")
    if given.device == "cuda":
        print(f"peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of the GPU")
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.1f} GB, both in one process")
    if given.photographs:
        record, png = 256 * 2 + RECORD, png_bytes(given.photographs)
        print(f"{png:,.0f} bytes per PNG file, {record} per record of tokens: ratio {png / record:.0f} (goal >= 200)")


if __name__ == "__main__":
    main()
