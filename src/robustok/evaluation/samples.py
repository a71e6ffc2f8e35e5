"""Samples against real images: latents through one or more decoders, and finished images of any program."""

from collections.abc import Callable, Collection, Mapping
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
from robustok.evaluation.comparison import COMPARED
from robustok.evaluation.evaluator import Evaluator
from robustok.evaluation.latents import gap
from robustok.evaluation.pixels import PIXELS, pixel_lines, pixel_scores
from robustok.metrics.frechet import Estimate, mean_and_standard_error
from robustok.snapshots import read_header
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.types import Measurement


def decoded_samples(evaluator: Evaluator, latents: list[Path], decoders: Mapping[str, Path]) -> list[Measurement]:
    """Each decoder's metrics on the same latents, differences of gFID, and the gap of the latents themselves."""
    sets = [LatentCache(path) for path in latents]
    evaluator.check_counts(COMPARED, min(len(cache) for cache in sets))
    samples, labels = sum(len(cache) for cache in sets), np.concatenate([cache.labels for cache in sets])
    shared = {"sets": len(sets), "samples_per_set": len(sets[0])} | _sampling_facts(sets) | _balance(labels)
    found: list[Measurement] = []
    values: dict[int, dict[str, list[float]]] = {space: {} for space in range(len(evaluator.extractors))}
    for name, path in decoders.items():
        tokenizer = load_tokenizer(path).to(evaluator.device)
        for cache in sets:
            check_cache(cache, encoder_digest(tokenizer))
        facts = {"decoder": name} | _post_training_facts(path) | shared
        if COMPARED & evaluator.wanted:
            compared = [
                evaluator.compare_set(evaluator.decoded(tokenizer, cache), len(cache), tokenizer.image_size)
                for cache in sets
            ]
            for space, several in enumerate(zip(*compared, strict=True)):
                reference = evaluator.reference_name(tokenizer.image_size, space)
                line = partial(evaluator.measurement, samples=samples, reference=reference, space=space, **facts)
                found += _over_sets(several, line)
                values[space][name] = [one["gfid"][0].value for one in several if "gfid" in one]
        if "gap" in evaluator.wanted and evaluator.run.data is not None and name == next(iter(decoders)):
            found += gap(evaluator, tokenizer, sets, facts)
        # The same latents decoded twice: the difference has far less noise than either value.
        for space, by_decoder in values.items():
            reference = evaluator.reference_name(tokenizer.image_size, space) if "gfid" in evaluator.wanted else ""
            for other in list(by_decoder)[:-1] if "gfid" in evaluator.wanted else []:
                pairs = zip(by_decoder[name], by_decoder[other], strict=True)
                change = mean_and_standard_error([a - b for a, b in pairs])
                line = partial(evaluator.measurement, samples=samples, reference=reference, space=space, **facts)
                found.append(line("gfid_difference", change, versus=other))
    return found


def image_set(evaluator: Evaluator, name: str, path: Path) -> list[Measurement]:
    """Finished images, as they are, against the reference; image by image where they are paired."""
    images = evaluator.open(data_at(path), None, "train")
    evaluator.check_counts(COMPARED, len(images))
    facts = {"images": name, "source": images.describe()} | _balance(images.labels, images.classes)
    batches = ((batch.indices, to_pixels(batch.images).to(evaluator.device)) for batch in evaluator.batches(images))
    found: list[Measurement] = []
    if evaluator.run.paired and set(PIXELS) & evaluator.wanted:
        found += _paired(evaluator, images, facts)
    if COMPARED & evaluator.wanted:
        for space, one in enumerate(evaluator.compare_set(batches, len(images), images.shape, evaluator.run.paired)):
            reference = evaluator.reference_name(images.shape, space)
            line = partial(
                evaluator.measurement, samples=len(images), reference=reference, space=space, uint8="as stored", **facts
            )
            found += _over_sets([one], line)
    return found


def _paired(evaluator: Evaluator, images: ImageDataset, facts: dict[str, Any]) -> list[Measurement]:
    """PSNR, SSIM and LPIPS of images and their originals."""
    originals = evaluator.real_images(images.shape)
    if len(originals) != len(images):
        raise UserError(
            f"paired=true: {images.describe()} against {originals.describe()}; expected as many images on both sides"
        )
    scores = []
    for batch in evaluator.batches(images):
        real = originals.read(batch.indices)
        if not torch.equal(real.indices, batch.indices):
            raise UserError(f"{originals.describe()} has broken images, so that pairs are missing; repair them")
        pair = (to_pixels(side.images).to(evaluator.device) for side in (batch, real))
        scores.append((batch.indices, pixel_scores(evaluator, *pair)))
    line = partial(evaluator.measurement, samples=len(images), reference=originals.describe(), **facts)
    return pixel_lines(evaluator, evaluator.processes.in_order(scores), line)


def _over_sets(
    several: list[dict[str, tuple[Estimate, dict[str, Any]]]], line: Callable[..., Measurement]
) -> list[Measurement]:
    """One line for each metric: of the one set, or the mean over several with its standard error."""
    found = []
    for metric, (one, facts) in several[0].items():
        if len(several) > 1:
            one = mean_and_standard_error([estimates[metric][0].value for estimates in several])
            facts = {key: value for key, value in facts.items() if key != "standard_error_from"}
        found.append(line(metric, one, **facts))
    return found


def _balance(labels: np.ndarray, classes: Collection[str] = ("", "")) -> dict[str, str]:
    """How many samples each class has, for sets with classes."""
    if len(classes) < 2 or not len(labels):
        return {}
    counts = np.unique(labels, return_counts=True)[1]
    low, high = int(counts.min()), int(counts.max())
    return {"balance": f"{low} of each class" if low == high else f"{low} to {high} of each class"}


def _post_training_facts(path: Path) -> dict[str, Any]:
    """The sigma and steps of a post-trained decoder; nothing for one that only main training made."""
    found = read_header(path).get("post_trained") or {}
    return {key: found[key] for key in ("sigma", "mode", "steps", "delta", "delta_scale") if key in found}


def _sampling_facts(sets: list[LatentCache]) -> dict[str, Any]:
    """How the latents were drawn, if all sets agree."""
    settings = sets[0].manifest.source.get("sampling")
    same = all(cache.manifest.source.get("sampling") == settings for cache in sets)
    return {key: value for key, value in settings.items() if key != "name"} if same and settings else {}
