"""Pictures for the report: reconstructions, clean and perturbed, and the same samples decoded by several decoders."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop

from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache, caches_in
from robustok.data.latent_checks import check_cache
from robustok.data.loader import batches_in_order
from robustok.data.pixels import to_pixels
from robustok.data.sources import Data
from robustok.files import atomic_file
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.tokenizers.perturbation import nearest_codes, perturb

RATE, STRENGTH = 0.5, 0.1  # of the perturbed reconstructions: share of the tokens, share of the codebook


@torch.no_grad()
def draw_reconstructions(file: str | Path, tokenizers: Mapping[str, str | Path], data: Data, count: int = 16) -> None:
    """Write held-out images and their reconstructions from clean and from perturbed tokens, one row each.

    Args:
        file: the .npz file to write.
        tokenizers: names and snapshots or run folders.
        data: real images; those of the test split are shown.
        count: images in a row.
    """
    rows: list[Tensor] = []
    titles: list[str] = []
    for name, path in tokenizers.items():
        tokenizer = load_tokenizer(path)
        images = next(batches_in_order(open_images(data, tokenizer.image_size, "test"), count)).images
        if not rows:
            rows, titles = [images], ["original"]
        tokens = tokenizer.encode(images)
        codebook, levels = tokenizer.codebook, getattr(tokenizer, "code_levels", None)
        neighbours = nearest_codes(codebook, max(1, round(STRENGTH * len(codebook))), levels=levels)
        # The same random numbers for every tokenizer.
        perturbed = perturb(tokens, neighbours, RATE, 1.0, torch.Generator().manual_seed(0))
        rows += [tokenizer.decode(tokens), tokenizer.decode(perturbed)]
        titles += [f"{name}, clean tokens", f"{name}, {RATE:.0%} of the tokens perturbed"]
    images = np.stack([_nhwc(to_pixels(row)) for row in rows])
    _write(file, images=images, row_titles=np.array(titles), title=np.array("Reconstructions"))


@torch.no_grad()
def draw_samples(
    file: str | Path,
    decoders: Mapping[str, str | Path],
    samples: str | Path,
    data: Data,
    extractor: ExtractorConfig,
    count: int = 100,
) -> None:
    """Write the same samples before and after post-training, each with its distance to the nearest real image.

    Args:
        file: the .npz file to write.
        decoders: snapshots or run folders of ``before``, ``after`` and, if there is one, ``clean``, the control.
        samples: cache of free samples.
        data: real images; the nearest one is searched in the train split.
        extractor: feature space of the distances.
        count: samples shown.
    """
    cache = LatentCache(Path(samples))
    records = cache.read(slice(0, min(count, len(cache))))
    pixels = {}
    for name, path in decoders.items():
        tokenizer = load_tokenizer(path)
        check_cache(cache, encoder_digest(tokenizer))
        pixels[name] = to_pixels(tokenizer.decode(records.latents))  # (n, 3, H, W)
    space, real = load_extractor(extractor), open_images(data, tokenizer.image_size, "train")
    features = torch.cat([space(batch.pixels) for batch in batches_in_order(real, 256)])  # (N, F)
    distances = {
        f"score_{name}": torch.cdist(space(pixels[name]), features).min(1).values.numpy()  # (n,)
        for name in ("before", "after")
    }
    _write(
        file,
        **{name: _nhwc(part) for name, part in pixels.items()},
        **distances,
        score_name=np.array("distance to the nearest real image in feature space"),
        labels=records.labels.numpy(),
        title=np.array("Samples, before and after post-training"),
    )


@torch.no_grad()
def draw_before_after(
    file: Path, decoders: Sequence[Path], cache: Path, device: torch.device, count: int = 4, side: int = 512
) -> None:
    """Write a PNG of the middle of some generated images: a row for each decoder of the same latents.

    Images of several buckets keep their shapes, side by side on white.

    Args:
        file: what to write.
        decoders: snapshots or run folders, such as before and after.
        cache: of generated latents, or the folder of those of buckets, of which each gives some.
        device: of decoding, one image at a time.
        count: images.
        side: most pixels of each that are shown.
    """
    buckets, rows = [LatentCache(path) for path in caches_in(cache)], []
    turns = [divmod(i, len(buckets)) for i in range(count * len(buckets))]  # one of each bucket, then the next of each
    latents = [buckets[b].read([row]).latents for row, b in turns if row < len(buckets[b])][:count]
    for path in decoders:
        tokenizer = load_tokenizer(path).to(device)
        images = [to_pixels(tokenizer.decode(one.to(device)))[0].cpu() for one in latents]  # (3, H, W) each
        shown = [center_crop(image, [min(side, size) for size in image.shape[-2:]]) for image in images]
        height = max(image.shape[-2] for image in shown)
        shown = [F.pad(image, (0, 0, 0, height - image.shape[-2]), value=255) for image in shown]
        rows.append(torch.cat(shown, dim=-1))  # (3, h, sum of widths)
    with atomic_file(file) as temporary:
        Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).numpy()).save(temporary, "PNG")


def _nhwc(pixels: Tensor) -> np.ndarray:
    return pixels.permute(0, 2, 3, 1).numpy()  # (n, H, W, 3)


def _write(file: str | Path, **arrays: np.ndarray) -> None:
    with atomic_file(file) as temporary, temporary.open("wb") as handle:
        np.savez_compressed(handle, **arrays)
