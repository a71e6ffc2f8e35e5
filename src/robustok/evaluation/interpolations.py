"""iFID: images decoded from between the latents of validation images and near training latents."""

from collections.abc import Callable

import torch
from torch import Tensor

from robustok.data.dataset import Draw, ImageDataset
from robustok.data.loader import batches_of
from robustok.data.pixels import to_pixels
from robustok.evaluation.collector import FeatureCollector
from robustok.evaluation.evaluator import Evaluator
from robustok.metrics.frechet import Estimate
from robustok.metrics.interpolation import interpolated_latents, nearest_latents
from robustok.types import Measurement, Tokenizer


@torch.no_grad()
def interpolations(
    evaluator: Evaluator, tokenizer: Tokenizer, latents: Tensor, images: ImageDataset, line: Callable[..., Measurement]
) -> list[Measurement]:
    """Interpolation FID in every feature space, see :mod:`robustok.metrics.interpolation`.

    Args:
        evaluator: with settings and spaces.
        tokenizer: on the evaluator's device.
        latents: of the validation images, (N, L) or (N, L, D), the same in every process.
        images: the validation images.
        line: makes a result.
    """
    settings, seed = evaluator.run.ifid, evaluator.run.seed
    training = evaluator.open(evaluator.run.data, tokenizer.image_size, "train")
    keys = _encoded(evaluator, tokenizer, training, settings.train_images)
    discrete = tokenizer.kind == "discrete"
    decode = tokenizer.decode_vectors if discrete else tokenizer.decode

    def vectors(some: Tensor) -> Tensor:
        some = some.to(evaluator.device)
        return tokenizer.embed(some) if discrete else some  # (n, L, D)

    own = torch.cat([torch.empty(0, dtype=torch.int64), *evaluator.own(len(latents))])
    near = nearest_latents(latents[own], keys, settings.neighbours, vectors)  # (n, neighbours)
    collectors = [FeatureCollector(extractor, ()) for extractor in evaluator.extractors]
    for rows in torch.arange(len(own)).split(evaluator.run.batch_size):
        indices = own[rows]
        between = interpolated_latents(latents[indices], near[rows], keys, vectors, settings.alpha, seed, indices)
        with evaluator.precisely():
            pixels = to_pixels(decode(between))
        for collector in collectors:
            collector.update(indices, pixels)
    details = {
        "neighbours": settings.neighbours,
        "alpha": settings.alpha,
        "training_latents": len(keys),
        "training": training.describe(),
        "interpolation": "spherical, of whole latents",
        "decoded_from": "interpolated code vectors" if discrete else "interpolated latents",
    }
    found = []
    for space, collector in enumerate(collectors):
        fake = collector.finish("interpolations", evaluator.processes)
        sets = evaluator.comparison(fake, evaluator.real_features(images, space), space, paired=False)
        found.append(line("ifid", Estimate(sets.distance), space=space, **details, **sets.bias(fake.statistics)))
    return found


def _encoded(evaluator: Evaluator, tokenizer: Tokenizer, images: ImageDataset, count: int) -> Tensor:
    """Latents of at most ``count`` evenly spread images, the same in every process."""
    rows, parts = torch.arange(0, len(images), -(-len(images) // count)), []
    draws = (Draw(rows[indices].numpy()) for indices in evaluator.own(len(rows)))
    for batch in batches_of(images, draws, evaluator.run.workers, evaluator.device):
        if len(batch.indices):
            parts.append((batch.indices, evaluator.encode(tokenizer, batch.images).cpu()))
    return evaluator.processes.in_order(parts)
