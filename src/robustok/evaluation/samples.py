"""Samples against real images: latents through one or more decoders, and finished images of any program."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustok.console import track
from robustok.data.dataset import Draw, ImageDataset, Read
from robustok.data.latent_cache import LatentCache
from robustok.data.latent_checks import check_cache, check_free_samples, check_independent, check_squares
from robustok.data.loader import MOST_WORKERS, ahead, worker_count
from robustok.data.sources import data_at
from robustok.errors import UserError
from robustok.evaluation.evaluator import Evaluator
from robustok.evaluation.latents import gap
from robustok.evaluation.pairing import partners
from robustok.evaluation.pixels import pair_lines, pair_values
from robustok.metrics.comparison import Score
from robustok.metrics.frechet import mean_and_standard_error
from robustok.snapshots import read_header
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.types import Measurement

DIFFERENCES = ("gfid", "gfid_validation", "fdr", "sliced_wasserstein")  # of which decoders are compared pair by pair


def decoded_samples(evaluator: Evaluator, latents: list[Path], decoders: Mapping[str, Path]) -> list[Measurement]:
    """The metrics of each decoder on the same latents, their differences, and the gap of the latents themselves."""
    sets = [LatentCache(path) for path in latents]
    for cache in sets:
        check_free_samples(cache)
        check_squares(cache, "evaluate")
    check_independent(sets)
    evaluator.check_count("samples", len(sets[0]))
    samples, labels = sum(len(cache) for cache in sets), np.concatenate([cache.labels for cache in sets])
    shared = {"sets": len(sets), "samples_per_set": len(sets[0])}
    shared |= _sampling_details(sets[0]) | _balance(labels, sets[0].manifest.classes)
    found: list[Measurement] = []
    earlier: dict[str, list[Sequence[dict[str, Score]]]] = {}  # of each decoder and space, the scores of each set
    bar = track(range(len(decoders) * len(sets)), "measure samples", evaluator.processes.rank == 0)
    for name, path in decoders.items():
        tokenizer = load_tokenizer(path).to(evaluator.device)
        for cache in sets:
            check_cache(cache, encoder_digest(tokenizer))
        evaluator.ready(tokenizer)
        details = {"decoder": name} | _post_training_details(path) | shared
        if evaluator.wanted_of("samples"):
            compared = [
                evaluator.compare_set(evaluator.decoded(tokenizer, cache), len(cache), tokenizer.image_size)
                for cache, _ in zip(sets, bar, strict=False)
            ]
            spaces = list(zip(*compared, strict=True))
            for space, scores in enumerate(spaces):
                reference = evaluator.reference_name(tokenizer.image_size, space)
                line = partial(evaluator.measurement, samples=samples, reference=reference, space=space, **details)
                found += _over_sets(scores, line)
                found += _differences(scores, {other: before[space] for other, before in earlier.items()}, line)
            earlier[name] = spaces
        if "gap" in evaluator.wanted and evaluator.run.data is not None and name == next(iter(decoders)):
            found += gap(evaluator, tokenizer, sets, details)
    next(bar, None)  # closes the progress bar
    return found


def finished_images(evaluator: Evaluator, name: str, path: Path, paired: bool = False) -> list[Measurement]:
    """Finished images, as they are, against the reference; image by image too where they are paired."""
    images = evaluator.open(data_at(path), None, "train")
    evaluator.check_count("samples", len(images))
    real = None if evaluator.given_statistics else evaluator.real_images(images.shape)
    indices = partners(images, real) if paired else torch.arange(len(images))
    details = {"images": name} | _balance(images.labels, max(len(images.classes), len(real.classes) if real else 0))
    found: list[Measurement] = []
    if paired and evaluator.wanted_of("pairs"):
        found += _pairs(evaluator, images, real, indices, details)
    if evaluator.wanted_of("samples"):
        batches = ((indices[batch.indices], batch.pixels) for batch in evaluator.batches(images))
        compared = evaluator.compare_set(batches, len(images), images.shape, paired)
        count = len(images) - len(images.broken)  # broken ones are known once all are read
        for space, scores in enumerate(compared):
            line = partial(
                evaluator.measurement, samples=count, reference=evaluator.reference_name(images.shape, space),
                space=space, uint8="as stored", source=images.describe(), **details,
            )  # fmt: skip
            found += _over_sets([scores], line)
    return found


def _pairs(
    evaluator: Evaluator, images: ImageDataset, originals: ImageDataset, indices: torch.Tensor, details: dict[str, Any]
) -> list[Measurement]:
    """PSNR, SSIM and LPIPS of images and their originals, whose ``indices`` (N,) int64 are given."""
    values = []
    workers = worker_count(evaluator.run.workers, 0 if images.in_memory and originals.in_memory else MOST_WORKERS)
    read = partial(_read_pairs, images, originals, indices.numpy())
    for pair in ahead(read, evaluator.own(len(images)), workers, evaluator.device):
        made, real = (side.to_batch(found) for side, found in zip((images, originals), pair, strict=True))
        if not torch.equal(real.indices, indices[made.indices]):
            raise UserError(f"{originals.describe()} has broken images, so that pairs are missing; repair them")
        if len(made.indices):
            values.append((made.indices, pair_values(evaluator, made.pixels, real.pixels)))
    values = evaluator.processes.in_order(values)
    details = {"source": images.describe()} | details
    line = partial(evaluator.measurement, samples=len(values), reference=originals.describe(), **details)
    return pair_lines(evaluator, values, line)


def _read_pairs(
    images: ImageDataset, originals: ImageDataset, partners: np.ndarray, rows: torch.Tensor
) -> tuple[Read, Read]:
    """Images that can be read, and their originals."""
    made = images[Draw(rows.numpy())]
    return made, originals[Draw(partners[made.indices])]


def _over_sets(sets: Sequence[dict[str, Score]], line: Callable[..., Measurement]) -> list[Measurement]:
    """One line for each metric: of the one set, or the mean over several with its standard error."""
    found = []
    for metric, score in sets[0].items():
        estimate, details = score.estimate, dict(score.details)
        if len(sets) > 1:
            estimate = mean_and_standard_error([scores[metric].estimate.value for scores in sets])
            details.pop("standard_error_from", None)
        found.append(line(metric, estimate, **details))
    return found


def _differences(
    sets: Sequence[dict[str, Score]],
    earlier: Mapping[str, Sequence[dict[str, Score]]],
    line: Callable[..., Measurement],
) -> list[Measurement]:
    """One decoder's distances minus those of each earlier one.

    The same latents decoded twice: the difference has far less noise than either value.
    """
    found = []
    for other, before in earlier.items():
        for metric in (metric for metric in DIFFERENCES if metric in sets[0]):
            pairs = zip(sets, before, strict=True)
            change = mean_and_standard_error([a[metric].estimate.value - b[metric].estimate.value for a, b in pairs])
            kept = {key: v for key, v in sets[0][metric].details.items() if key in ("reference", "extractor")}
            found.append(line(f"{metric}_difference", change, versus=other, **kept))
    return found


def _balance(labels: np.ndarray, classes: int) -> dict[str, str]:
    """How many samples each class has, of a set or a reference with several classes; nothing without labels."""
    if classes < 2 or not len(labels) or labels.min() < 0:
        return {}
    counts = np.bincount(labels, minlength=classes)
    low, high = int(counts.min()), int(counts.max())
    return {"balance": f"{low} of each class" if low == high else f"{low} to {high} of each class"}


def _post_training_details(path: Path) -> dict[str, Any]:
    """The sigma and steps of a post-trained decoder; nothing for others."""
    found = read_header(path).get("post_trained") or {}
    return {key: found[key] for key in ("sigma", "mode", "steps", "delta", "delta_scale") if key in found}


def _sampling_details(cache: LatentCache) -> dict[str, Any]:
    """How the latents were drawn."""
    settings = cache.manifest.source.get("sampling") or {}
    return {key: value for key, value in settings.items() if key != "name"}
