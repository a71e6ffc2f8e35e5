"""Tokenizers on real images: their reconstructions, the use of their codes, and the effect of noise in the latents."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustok.console import track
from robustok.data.dataset import ImageDataset
from robustok.data.latent_cache import LatentCache
from robustok.data.latent_checks import check_cache, check_free_samples, check_squares
from robustok.data.pixels import from_pixels
from robustok.evaluation.collector import FeatureCollector
from robustok.evaluation.evaluator import Evaluator
from robustok.evaluation.interpolations import interpolations
from robustok.evaluation.pixels import over_images, pair_lines, pair_values
from robustok.metrics import METRICS
from robustok.metrics.comparison import REFERENCE_IMAGES
from robustok.metrics.frechet import Estimate
from robustok.metrics.grid import GridSummary
from robustok.metrics.noise import NoiseCell, NoiseFD
from robustok.metrics.pfid import PFID, PerturbedCell, perturbed_protocol
from robustok.tokenizers import encoder_digest, load_tokenizer
from robustok.types import Measurement, Tokenizer

Line = Callable[..., Measurement]


def reconstructions(evaluator: Evaluator, path: Path, samples: Sequence[Path] = ()) -> list[Measurement]:
    """Reconstruction metrics on the test split, encoded once: rFID, pFID, PSNR, use of the codebook and others.

    Args:
        evaluator: the real images.
        path: of the tokenizer.
        samples: caches of free samples, which choose the cells of a calibrated grid.
    """
    tokenizer = load_tokenizer(path).to(evaluator.device)
    caches = [LatentCache(path) for path in samples]
    for cache in caches:
        check_free_samples(cache)
        check_squares(cache, "evaluate")
        check_cache(cache, encoder_digest(tokenizer))
    evaluator.ready(tokenizer)
    generated = torch.cat([cache.read(slice(None)).latents for cache in caches]) if caches else None
    images, decode = evaluator.open(evaluator.run.data, tokenizer.image_size, "test"), evaluator.decoder(tokenizer)
    evaluator.check_count("reconstructions", len(images))
    compared = [name for name in evaluator.wanted_of("reconstructions") if METRICS[name].function is not None]
    of_tokens = evaluator.wanted_of("tokens") if tokenizer.kind == "discrete" else []
    # The standard error over halves is negligible for more images.
    errors = {"features"} if evaluator.run.comparison.halves and len(images) <= REFERENCE_IMAGES else set()
    parts = errors.union(*(METRICS[name].parts for name in compared))
    collectors = [FeatureCollector(extractor, parts) for extractor in evaluator.extractors if compared]
    encoded, pairs, again = [], [], []
    for batch in evaluator.batches(images):
        latents = evaluator.encode(tokenizer, batch.images)
        pixels, real = decode(latents), batch.pixels
        encoded.append((batch.indices, latents.cpu()))
        pairs.append((batch.indices, pair_values(evaluator, pixels, real)))
        if "token_agreement" in of_tokens:
            same = (evaluator.encode(tokenizer, from_pixels(pixels)) == latents).double().mean(dim=1)
            again.append((batch.indices, same.cpu()))
        for collector in collectors:
            collector.update(batch.indices, pixels)
    latents = evaluator.processes.in_order(encoded)  # (N, L) or (N, L, D), the same in every process
    line = partial(evaluator.measurement, samples=len(latents), reference=images.describe())
    found = pair_lines(evaluator, evaluator.processes.in_order(pairs), line)
    for name in of_tokens:
        if name == "token_agreement":
            found.append(line(name, over_images(evaluator.processes.in_order(again))))
        else:
            values = METRICS[name].function(latents, len(tokenizer.codebook))
            found += [line(key, Estimate(value)) for key, value in values.items()]
    for space, collector in enumerate(collectors):
        needed = errors.union(*(METRICS[name].reference_parts for name in compared))
        fake = collector.finish("reconstructions", evaluator.processes)
        sets = evaluator.comparison(fake, evaluator.real_features(images, space, needed), space, paired=True)
        for name in compared:
            score = METRICS[name].function(sets)
            found.append(line(name, score.estimate, space=space, **score.details))
    for space in range(len(evaluator.extractors)):
        found += _over_grids(evaluator, tokenizer, latents, images, space, generated, partial(line, space=space))
    if "ifid" in evaluator.wanted:
        found += interpolations(evaluator, tokenizer, latents, images, line)
    return found


def _over_grids(
    evaluator: Evaluator,
    tokenizer: Tokenizer,
    latents: Tensor,
    images: ImageDataset,
    space: int,
    generated: Tensor | None,
    line: Line,
) -> list[Measurement]:
    """Every cell and the mean of pFID for tokens, or of noise_fd for continuous latents, in one feature space."""
    settings, discrete = evaluator.run.pfid, tokenizer.kind == "discrete"
    bar: Iterator[int] = iter(())

    def advance(done: int, cells: int) -> None:
        nonlocal bar
        if done == 1:
            bar = track(range(cells), "measure perturbed", evaluator.processes.rank == 0)
        next(bar)

    if ("pfid" if discrete else "noise_fd") not in evaluator.wanted:
        return []
    shared = {
        "latents": latents,
        "decode": evaluator.decoder(tokenizer),
        "extractor": evaluator.extractors[space],
        "reference": evaluator.real_features(images, space).statistics,
        "seeds": range(evaluator.run.seed, evaluator.run.seed + settings.seeds),
        "batch_size": evaluator.run.batch_size,
        "processes": evaluator.processes,
        "generated": generated,
        "device": evaluator.device,
        "progress": advance,
    }
    if discrete:
        codes = {"codebook": tokenizer.codebook.cpu(), "levels": getattr(tokenizer, "code_levels", None)}
        return _pfid_lines(PFID(grid=settings.grid, include_self=settings.include_self, **codes, **shared), line)
    return _noise_lines(NoiseFD(grid=settings.noise, **shared).run(), line)


def _pfid_lines(pfid: PFID, line: Line) -> list[Measurement]:
    """Every cell of pFID and their means."""
    summary = pfid.run()
    protocol = perturbed_protocol(pfid.grid, len(pfid.codebook), pfid.include_self, summary.images, pfid.levels)
    details = {key: value for key, value in protocol.items() if key not in ("rates", "strengths")}
    found = []
    for cell in summary.cells:
        estimate = Estimate(cell.value, cell.standard_error)
        found.append(line("pfid", estimate, rate=cell.rate, strength=cell.strength, **_mmd(cell), **details))
    details = protocol | _of_all(summary)
    found.append(line("pfid_mean", summary.mean, **details))
    return [*found, line("pfid_geometric_mean", summary.geometric_mean, **details)]


def _noise_lines(summary: GridSummary, line: Line) -> list[Measurement]:
    """Every cell of noise_fd and their mean."""
    details = {"protocol": summary.protocol}
    found = [
        line("noise_fd_cell", Estimate(cell.value, cell.standard_error), level=cell.level, **_mmd(cell), **details)
        for cell in summary.cells
    ]
    return [*found, line("noise_fd", summary.mean, **details, **_of_all(summary))]


def _mmd(cell: PerturbedCell | NoiseCell) -> dict[str, Any]:
    return {} if cell.mmd is None else {"mmd": cell.mmd.value}


def _of_all(summary: GridSummary) -> dict[str, Any]:
    found = {"cells": len(summary.cells), "seconds": round(summary.seconds, 1)}
    return found if summary.calibration is None else found | summary.calibration.details()
