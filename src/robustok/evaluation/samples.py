"""Samples against real images: latents through one or more decoders, and finished images of any program."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robustok.data.dataset import ImageDataset
from robustok.data.latent_cache import LatentCache, check_cache
from robustok.data.pixels import to_pixels
from robustok.data.sources import data_at
from robustok.errors import UserError
from robustok.evaluation.evaluator import Evaluator
from robustok.evaluation.latents import gap
from robustok.evaluation.pixels import pair_lines, pair_values
from robustok.metrics.comparison import Score
from robustok.metrics.frechet import mean_and_standard_error
from robustok.snapshots import read_header
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.types import Measurement


def decoded_samples(evaluator: Evaluator, latents: list[Path], decoders: Mapping[str, Path]) -> list[Measurement]:
    """The metrics of each decoder on the same latents, differences of gFID, and the gap of the latents themselves."""
    sets = [LatentCache(path) for path in latents]
    evaluator.check_count("samples", min(len(cache) for cache in sets))
    samples, labels = sum(len(cache) for cache in sets), np.concatenate([cache.labels for cache in sets])
    shared = {"sets": len(sets), "samples_per_set": len(sets[0])} | _sampling_details(sets) | _balance(labels)
    found: list[Measurement] = []
    gfids: list[dict[str, list[float]]] = [{} for _ in evaluator.extractors]  # of each decoder's sets
    for name, path in decoders.items():
        tokenizer = load_tokenizer(path).to(evaluator.device)
        for cache in sets:
            check_cache(cache, encoder_digest(tokenizer))
        details = {"decoder": name} | _post_training_details(path) | shared
        lines: list[Callable[..., Measurement]] = []  # of each feature space
        if evaluator.wanted_of("samples"):
            compared = [
                evaluator.compare_set(evaluator.decoded(tokenizer, cache), len(cache), tokenizer.image_size)
                for cache in sets
            ]
            for space, scores in enumerate(zip(*compared, strict=True)):
                reference = evaluator.reference_name(tokenizer.image_size, space)
                lines.append(
                    partial(evaluator.measurement, samples=samples, reference=reference, space=space, **details)
                )
                found += _over_sets(scores, lines[space])
                if "gfid" in evaluator.wanted:
                    gfids[space][name] = [score["gfid"].estimate.value for score in scores]
        if "gap" in evaluator.wanted and evaluator.run.data is not None and name == next(iter(decoders)):
            found += gap(evaluator, tokenizer, sets, details)
        # The same latents decoded twice: the difference has far less noise than either value.
        for line, by_decoder in zip(lines, gfids, strict=bool(lines)):
            for other in list(by_decoder)[:-1]:
                pairs = zip(by_decoder[name], by_decoder[other], strict=True)
                change = mean_and_standard_error([a - b for a, b in pairs])
                found.append(line("gfid_difference", change, versus=other))
    return found


def finished_images(evaluator: Evaluator, name: str, path: Path, paired: bool = False) -> list[Measurement]:
    """Finished images, as they are, against the reference; image by image too where they are paired."""
    images = evaluator.open(data_at(path), None, "train")
    evaluator.check_count("samples", len(images))
    details = {"images": name, "source": images.describe()} | _balance(images.labels, images.classes)
    batches = ((batch.indices, to_pixels(batch.images).to(evaluator.device)) for batch in evaluator.batches(images))
    found: list[Measurement] = []
    if paired and evaluator.wanted_of("pairs"):
        found += _pairs(evaluator, images, details)
    if evaluator.wanted_of("samples"):
        for space, scores in enumerate(evaluator.compare_set(batches, len(images), images.shape, paired)):
            line = partial(
                evaluator.measurement, samples=len(images), reference=evaluator.reference_name(images.shape, space),
                space=space, uint8="as stored", **details,
            )  # fmt: skip
            found += _over_sets([scores], line)
    return found


def _pairs(evaluator: Evaluator, images: ImageDataset, details: dict[str, Any]) -> list[Measurement]:
    """PSNR, SSIM and LPIPS of images and their originals."""
    originals = evaluator.real_images(images.shape)
    if len(originals) != len(images):
        raise UserError(
            f"paired_images: {images.describe()} against {originals.describe()}; expected as many images on both sides"
        )
    values = []
    for batch in evaluator.batches(images):
        real = originals.read(batch.indices)
        if not torch.equal(real.indices, batch.indices):
            raise UserError(f"{originals.describe()} has broken images, so that pairs are missing; repair them")
        pair = (to_pixels(side.images).to(evaluator.device) for side in (batch, real))
        values.append((batch.indices, pair_values(evaluator, *pair)))
    line = partial(evaluator.measurement, samples=len(images), reference=originals.describe(), **details)
    return pair_lines(evaluator, evaluator.processes.in_order(values), line)


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


def _balance(labels: np.ndarray, classes: Collection[str] = ("", "")) -> dict[str, str]:
    """How many samples each class has, for sets with classes."""
    if len(classes) < 2 or not len(labels) or labels.min() < 0:
        return {}
    counts = np.unique(labels, return_counts=True)[1]
    low, high = int(counts.min()), int(counts.max())
    return {"balance": f"{low} of each class" if low == high else f"{low} to {high} of each class"}


def _post_training_details(path: Path) -> dict[str, Any]:
    """The sigma and steps of a post-trained decoder; nothing for others."""
    found = read_header(path).get("post_trained") or {}
    return {key: found[key] for key in ("sigma", "mode", "steps", "delta", "delta_scale") if key in found}


def _sampling_details(sets: list[LatentCache]) -> dict[str, Any]:
    """How the latents were drawn, if all sets agree."""
    settings = sets[0].manifest.source.get("sampling")
    same = all(cache.manifest.source.get("sampling") == settings for cache in sets)
    return {key: value for key, value in settings.items() if key != "name"} if same and settings else {}
