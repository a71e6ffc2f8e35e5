"""Pictures for the report: reconstructions clean and perturbed, and the same samples decoded by several decoders."""

from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from robustok.config import Config
from robustok.data.dataset import open_images
from robustok.data.latent_cache import LatentCache, check_cache
from robustok.data.loader import batches_in_order
from robustok.data.pixels import to_pixels
from robustok.data.sources import Data
from robustok.metrics.features import ExtractorConfig, load_extractor
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.tokenizers.perturbation import nearest_codes, perturb


class PicturesRun(Config):
    """What to draw, into ``out``/PREFIX*.npz, which the report reads."""

    out: Path = Field(description="folder of the pictures, RUN/pictures for the report of RUN")
    data: Data = Field(description="real images")
    prefix: str = Field("", description="start of the files' names")
    tokenizers: dict[str, Path] = Field({}, description="names and tokenizers whose reconstructions are shown")
    rate: float = Field(0.5, ge=0, le=1, description="rate of the perturbed reconstructions")
    share: float = Field(0.1, gt=0, le=1, description="their strength, as a share of the codebook")
    images: int = Field(16, ge=1, description="images per row")
    decoders: dict[str, Path] = Field(
        {}, description="original, post_trained and, if there is one, control: decoders of the samples"
    )
    samples: Path | None = Field(None, description="cache of free samples")
    count: int = Field(96, ge=2, description="samples shown")
    extractor: ExtractorConfig | None = Field(
        None, description="feature space in which a sample's nearest real image is found"
    )


@torch.no_grad()
def draw_pictures(run: PicturesRun) -> list[Path]:
    """Draw what the settings name.

    Returns:
        The files written.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    files = []
    if run.tokenizers:
        files.append(_reconstructions(run))
    if run.decoders and run.samples is not None:
        files.append(_samples(run))
    return files


def _reconstructions(run: PicturesRun) -> Path:
    """Held-out images, and their reconstructions from clean and from perturbed tokens."""
    rows: list[Tensor] = []
    titles: list[str] = []
    for name, path in run.tokenizers.items():
        tokenizer = load_tokenizer(path)
        images = next(batches_in_order(open_images(run.data, tokenizer.image_size, "test"), run.images)).images
        if not rows:
            rows, titles = [images], ["original"]
        tokens = tokenizer.encode(images)
        neighbours = nearest_codes(tokenizer.codebook, max(1, round(run.share * len(tokenizer.codebook))))
        # The same random numbers for every tokenizer.
        perturbed = perturb(tokens, neighbours, run.rate, 1.0, torch.Generator().manual_seed(0))
        rows += [tokenizer.decode(tokens), tokenizer.decode(perturbed)]
        titles += [f"{name}, clean tokens", f"{name}, {run.rate:.0%} of the tokens perturbed"]
    path = run.out / f"{run.prefix}reconstructions.npz"
    np.savez_compressed(
        path,
        images=np.stack([_nhwc(row) for row in rows]),
        row_titles=np.array(titles),
        title=np.array("Reconstructions"),
    )
    return path


def _samples(run: PicturesRun) -> Path:
    """The same samples before and after, scored by the distance to the nearest real image in feature space."""
    cache = LatentCache(run.samples)
    records = cache.read(slice(0, min(run.count, len(cache))))
    pixels = {}
    for name, path in run.decoders.items():
        tokenizer = load_tokenizer(path)
        check_cache(cache, encoder_digest(tokenizer))
        pixels[name] = to_pixels(tokenizer.decode(records.latents))  # (n, 3, H, W)
    arrays = {"before": pixels["original"], "after": pixels["post_trained"]}
    if "control" in pixels:
        arrays["control"] = pixels["control"]
    fields = {name: part.permute(0, 2, 3, 1).numpy() for name, part in arrays.items()}  # (n, H, W, 3)
    if run.extractor is not None:
        extractor = load_extractor(run.extractor)
        real = torch.cat(
            [
                extractor(to_pixels(b.images))
                for b in batches_in_order(open_images(run.data, tokenizer.image_size, "train"), 256)
            ]
        )
        for name in ("before", "after"):
            fields[f"score_{name}"] = torch.cdist(extractor(arrays[name]), real).min(1).values.numpy()  # (n,)
        fields["score_name"] = np.array("distance to the nearest real image in feature space")
    path = run.out / f"{run.prefix}samples.npz"
    np.savez_compressed(
        path, **fields, labels=records.labels.numpy(), title=np.array("Samples, before and after post-training")
    )
    return path


def _nhwc(images: Tensor) -> np.ndarray:
    return to_pixels(images).permute(0, 2, 3, 1).numpy()  # (n, H, W, 3)
