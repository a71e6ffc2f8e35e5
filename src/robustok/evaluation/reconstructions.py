"""Tokenizers on real images: what they reconstruct, which codes they use, and what noise in the latents costs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustok.data.pixels import from_pixels, to_pixels
from robustok.evaluation.comparison import REFERENCE_IMAGES, FeatureCollector, bias_facts, paired_error
from robustok.evaluation.evaluator import Evaluator
from robustok.evaluation.pixels import over_images, pixel_lines, pixel_scores
from robustok.metrics.codebook import codebook_perplexity, codebook_usage, count_tokens
from robustok.metrics.frechet import Estimate, frechet_distance
from robustok.metrics.noise import noise_frechet
from robustok.metrics.pfid import perturbed_frechet, perturbed_protocol
from robustok.metrics.reference import Reference
from robustok.tokenizers import load_tokenizer
from robustok.types import Measurement, Tokenizer


def reconstructions(evaluator: Evaluator, path: Path) -> list[Measurement]:
    """Reconstruction metrics on the test split, encoded once: rFID, pFID, PSNR, use of the codebook and others."""
    tokenizer, wanted = load_tokenizer(path).to(evaluator.device), evaluator.wanted
    images, decode = evaluator.open(evaluator.run.data, tokenizer.image_size, "test"), evaluator.decoder(tokenizer)
    evaluator.check_counts({"rfid", "pfid", "noise_fd"}, len(images))
    halves = evaluator.run.halves if len(images) <= REFERENCE_IMAGES else 0  # more of them have next to no error
    needed = {"rfid", "errors"} if halves else {"rfid"}
    collectors = [FeatureCollector(e, needed) for e in evaluator.extractors] if "rfid" in wanted else []
    encoded, scores, again = [], [], []
    for batch in evaluator.batches(images):
        with torch.no_grad():
            latents = tokenizer.encode(batch.images.to(evaluator.device))
        pixels, real = decode(latents), to_pixels(batch.images).to(evaluator.device)
        encoded.append((batch.indices, latents.cpu()))
        scores.append((batch.indices, pixel_scores(evaluator, pixels, real)))
        if "token_agreement" in wanted and tokenizer.kind == "discrete":
            with torch.no_grad():
                same = (tokenizer.encode(from_pixels(pixels)) == latents).double().mean(dim=1)
            again.append((batch.indices, same.cpu()))
        for collector in collectors:
            collector.update(batch.indices, pixels)
    latents = evaluator.processes.in_order(encoded)  # (N, L) or (N, L, D), the same in every process
    line = partial(evaluator.measurement, samples=len(latents), reference=images.describe())
    found = pixel_lines(evaluator, evaluator.processes.in_order(scores), line)
    if "codebook" in wanted and tokenizer.kind == "discrete":
        counts = count_tokens(latents, len(tokenizer.codebook))
        found.append(line("codebook_usage", Estimate(codebook_usage(counts), None)))
        found.append(line("codebook_perplexity", Estimate(codebook_perplexity(counts), None)))
    if again:
        found.append(line("token_agreement", over_images(evaluator.processes.in_order(again))))
    for space, collector in enumerate(collectors):
        fake, reference = (
            collector.finish("reconstructions", evaluator.processes),
            evaluator.described(images, space, needed),
        )
        value = Estimate(frechet_distance(fake.statistics, reference.statistics, reference.factor), None)
        facts = bias_facts(reference.statistics, evaluator.official[space], paired=True)
        if halves:
            rng = torch.Generator().manual_seed(evaluator.run.seed)
            value = Estimate(value.value, paired_error(fake.features, reference.features, halves, rng))
            facts["standard_error_from"] = f"{halves} random halves of pairs"
        found.append(line("rfid", value, space=space, **facts))
    for space in range(len(evaluator.extractors)):
        if "pfid" in wanted and tokenizer.kind == "discrete":
            found += _perturbed(evaluator, tokenizer, latents, evaluator.described(images, space), space, line)
        elif "noise_fd" in wanted and tokenizer.kind == "continuous":
            found += _noised(evaluator, tokenizer, latents, evaluator.described(images, space), space, line)
    return found


def _perturbed(
    evaluator: Evaluator,
    tokenizer: Tokenizer,
    tokens: Tensor,
    reference: Reference,
    space: int,
    line: Callable[..., Measurement],
) -> list[Measurement]:
    """Every cell of pFID and their means, over the perturbation seeds."""
    run, codebook = evaluator.run, tokenizer.codebook
    protocol = perturbed_protocol(run.grid, len(codebook), run.include_self, len(tokens))
    summary = perturbed_frechet(
        run.grid,
        tokens,
        codebook.cpu(),
        evaluator.decoder(tokenizer),
        evaluator.extractors[space],
        reference.statistics,
        include_self=run.include_self,
        **_shared(evaluator),
    )
    facts = {key: value for key, value in protocol.items() if key not in ("rates", "strengths")}
    found = []
    for cell in summary.cells:
        estimate = Estimate(cell.value, cell.standard_error)
        found.append(line("pfid", estimate, space=space, rate=cell.rate, strength=cell.strength, **facts))
    facts = protocol | {"cells": len(summary.cells), "seconds": round(summary.seconds, 1)}
    found.append(line("pfid_mean", Estimate(summary.mean, summary.standard_error), space=space, **facts))
    geometric = Estimate(summary.geometric_mean, summary.geometric_standard_error)
    return [*found, line("pfid_geometric_mean", geometric, space=space, **facts)]


def _noised(
    evaluator: Evaluator,
    tokenizer: Tokenizer,
    latents: Tensor,
    reference: Reference,
    space: int,
    line: Callable[..., Measurement],
) -> list[Measurement]:
    """Every cell of noise_fd and their mean, over the seeds of the noise."""
    summary = noise_frechet(
        evaluator.run.noise, latents, evaluator.decoder(tokenizer), evaluator.extractors[space], reference.statistics,
        **_shared(evaluator),
    )  # fmt: skip
    facts = {"protocol": summary.protocol, "space": space}
    found = [
        line("noise_fd_cell", Estimate(cell.value, cell.standard_error), level=cell.level, **facts)
        for cell in summary.cells
    ]
    facts |= {"cells": len(summary.cells), "seconds": round(summary.seconds, 1)}
    return [*found, line("noise_fd", Estimate(summary.mean, summary.standard_error), **facts)]


def _shared(evaluator: Evaluator) -> dict[str, Any]:
    """How the grids of noise share their work, and their seeds."""
    run, processes = evaluator.run, evaluator.processes
    seeds = range(run.seed, run.seed + run.perturbation_seeds)
    add = processes.add if processes.world > 1 else None
    return {
        "seeds": list(seeds),
        "batch_size": run.batch_size,
        "rank": processes.rank,
        "processes": processes.world,
        "sum_over_processes": add,
    }
