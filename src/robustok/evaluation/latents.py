"""The gap before any decoder: generated latents against those of real images, and the generator's predictions."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from robustok.data.labels import check_same_classes
from robustok.data.latent_cache import LatentCache
from robustok.data.pixels import from_pixels
from robustok.evaluation.evaluator import Evaluator
from robustok.generators import load_generator
from robustok.metrics.codebook import count_tokens
from robustok.metrics.frechet import Estimate
from robustok.metrics.latent_gap import Figure, latent_gap, prediction_scores, reencoding_gap, teacher_forcing
from robustok.snapshots import read_header
from robustok.types import Measurement, Tokenizer

GAP_IMAGES = 2_000  # decoded and encoded again, or predicted by the generator, on either side
BEST = 10  # k of generator_top_k


def gap(
    evaluator: Evaluator, tokenizer: Tokenizer, sets: list[LatentCache], details: dict[str, Any]
) -> list[Measurement]:
    """How far the generated latents are from those of real images, and how well the generator predicts these."""
    images = evaluator.open(evaluator.run.data, tokenizer.image_size, "train")
    encoded, labels = [], []
    for batch in evaluator.batches(images):
        encoded.append((batch.indices, evaluator.encode(tokenizer, batch.images).cpu()))
        labels.append((batch.indices, batch.labels))
    encoded, labels = evaluator.processes.in_order(encoded), evaluator.processes.in_order(labels)
    generated = torch.cat([cache.read(slice(None)).latents for cache in sets])
    codebook = tokenizer.codebook.cpu() if tokenizer.kind == "discrete" else None
    line = partial(evaluator.measurement, reference=images.describe(), **details)
    found = _lines(line, latent_gap(generated, encoded, codebook))
    some = [_spread(latents, GAP_IMAGES) for latents in (generated, encoded)]
    pairs = [side for latents in some for side in (latents, _encoded_again(evaluator, tokenizer, latents))]
    found += _lines(line, reencoding_gap(*pairs, codebook))
    if evaluator.run.samples.generator is not None and codebook is not None:
        images.check_labels()
        found += _teacher_forced(evaluator, some[1], _spread(labels, GAP_IMAGES), images.classes, line)
    return found


def _lines(line: Callable[..., Measurement], figures: dict[str, Figure], **details: Any) -> list[Measurement]:
    """A line for each figure, with its baseline."""
    return [
        line(name, Estimate(f.value, f.standard_error), samples=f.images, baseline=f.baseline, **details)
        for name, f in figures.items()
        if math.isfinite(f.value)  # latents that are all alike have no distance to measure others by
    ]


def _encoded_again(evaluator: Evaluator, tokenizer: Tokenizer, latents: Tensor) -> Tensor:
    """The latents of the images, rounded to uint8, that these latents decode to."""
    decode, found = evaluator.decoder(tokenizer), []
    for indices in evaluator.own(len(latents)):
        found.append((indices, evaluator.encode(tokenizer, from_pixels(decode(latents[indices]))).cpu()))
    return evaluator.processes.in_order(found)


def _teacher_forced(
    evaluator: Evaluator, tokens: Tensor, labels: Tensor, classes: list[str], line: Callable[..., Measurement]
) -> list[Measurement]:
    """How well the generator predicts the tokens (N, L) of real images with these labels (N,) of these classes."""
    path = evaluator.run.samples.generator
    generator = evaluator.ready(load_generator(path)).to(evaluator.device)
    check_same_classes(read_header(path).get("class_names"), classes, str(path), "the images")
    k, scores = min(BEST, generator.codebook_size), []
    for indices in evaluator.own(len(tokens)):
        real = tokens[indices].to(evaluator.device)
        with torch.no_grad(), evaluator.precisely():
            logits = generator.logits(real, labels[indices].to(evaluator.device))[:, :-1]
        scores.append((indices, prediction_scores(logits, real, k)))
    counts = count_tokens(tokens, generator.codebook_size)
    return _lines(line, teacher_forcing(evaluator.processes.in_order(scores), counts, k), k=k)


def _spread(rows: Tensor, count: int) -> Tensor:
    """At most ``count`` rows, evenly spread."""
    return rows[:: -(-len(rows) // count)]
