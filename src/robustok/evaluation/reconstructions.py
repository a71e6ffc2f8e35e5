"""Tokenizers on real images: what they reconstruct, which codes they use, and what noise in the latents costs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustok.data.pixels import from_pixels, to_pixels
from robustok.evaluation.comparison import REFERENCE_IMAGES, Describer, honesty, paired_error
from robustok.evaluation.evaluator import Judge
from robustok.evaluation.pixels import over_images, pixel_lines, pixel_scores
from robustok.metrics.codebook import codebook_perplexity, codebook_usage, count_tokens
from robustok.metrics.frechet import Estimate, frechet_distance
from robustok.metrics.noise import noise_frechet
from robustok.metrics.pfid import perturbed_frechet, perturbed_protocol
from robustok.metrics.reference import Reference
from robustok.tokenizers import load_tokenizer
from robustok.types import Measurement, Tokenizer


def reconstructions(judge: Judge, path: Path) -> list[Measurement]:
    """Reconstruction metrics on the test split, encoded once: rFID, pFID, PSNR, use of the codebook and others."""
    tokenizer, wanted = load_tokenizer(path).to(judge.device), judge.wanted
    images, decode = judge.open(judge.run.data, tokenizer.image_size, "test"), judge.decoder(tokenizer)
    judge.check_counts({"rfid", "pfid", "noise_fd"}, len(images))
    halves = judge.run.halves if len(images) <= REFERENCE_IMAGES else 0  # more of them have next to no error
    needed = {"rfid", "errors"} if halves else {"rfid"}
    describers = [Describer(e, needed) for e in judge.extractors] if "rfid" in wanted else []
    encoded, scores, again = [], [], []
    for batch in judge.batches(images):
        with torch.no_grad():
            latents = tokenizer.encode(batch.images.to(judge.device))
        pixels, real = decode(latents), to_pixels(batch.images).to(judge.device)
        encoded.append((batch.indices, latents.cpu()))
        scores.append((batch.indices, pixel_scores(judge, pixels, real)))
        if "token_agreement" in wanted and tokenizer.kind == "discrete":
            with torch.no_grad():
                same = (tokenizer.encode(from_pixels(pixels)) == latents).double().mean(dim=1)
            again.append((batch.indices, same.cpu()))
        for describer in describers:
            describer.update(batch.indices, pixels)
    latents = judge.processes.in_order(encoded)  # (N, L) or (N, L, D), the same in every process
    line = partial(judge.measurement, samples=len(latents), reference=images.describe())
    found = pixel_lines(judge, judge.processes.in_order(scores), line)
    if "codebook" in wanted and tokenizer.kind == "discrete":
        counts = count_tokens(latents, len(tokenizer.codebook))
        found.append(line("codebook_usage", Estimate(codebook_usage(counts), None)))
        found.append(line("codebook_perplexity", Estimate(codebook_perplexity(counts), None)))
    if again:
        found.append(line("token_agreement", over_images(judge.processes.in_order(again))))
    for space, describer in enumerate(describers):
        fake, reference = describer.finish("reconstructions", judge.processes), judge.described(images, space, needed)
        value = Estimate(frechet_distance(fake.statistics, reference.statistics, reference.factor), None)
        facts = honesty(reference.statistics, judge.official[space], paired=True)
        if halves:
            rng = torch.Generator().manual_seed(judge.run.seed)
            value = Estimate(value.value, paired_error(fake.features, reference.features, halves, rng))
            facts["standard_error_from"] = f"{halves} random halves of pairs"
        found.append(line("rfid", value, space=space, **facts))
    for space in range(len(judge.extractors)):
        if "pfid" in wanted and tokenizer.kind == "discrete":
            found += _perturbed(judge, tokenizer, latents, judge.described(images, space), space, line)
        elif "noise_fd" in wanted and tokenizer.kind == "continuous":
            found += _noised(judge, tokenizer, latents, judge.described(images, space), space, line)
    return found


def _perturbed(
    judge: Judge,
    tokenizer: Tokenizer,
    tokens: Tensor,
    reference: Reference,
    space: int,
    line: Callable[..., Measurement],
) -> list[Measurement]:
    """Every cell of pFID and their means, over the perturbation seeds."""
    run, codebook = judge.run, tokenizer.codebook
    protocol = perturbed_protocol(run.grid, len(codebook), run.include_self, len(tokens))
    summary = perturbed_frechet(
        run.grid, tokens, codebook.cpu(), judge.decoder(tokenizer), judge.extractors[space], reference.statistics,
        include_self=run.include_self, **_shared(judge),
    )  # fmt: skip
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
    judge: Judge,
    tokenizer: Tokenizer,
    latents: Tensor,
    reference: Reference,
    space: int,
    line: Callable[..., Measurement],
) -> list[Measurement]:
    """Every cell of noise_fd and their mean, over the seeds of the noise."""
    summary = noise_frechet(
        judge.run.noise, latents, judge.decoder(tokenizer), judge.extractors[space], reference.statistics,
        **_shared(judge),
    )  # fmt: skip
    facts = {"protocol": summary.protocol, "space": space}
    found = [
        line("noise_fd_cell", Estimate(cell.value, cell.standard_error), level=cell.level, **facts)
        for cell in summary.cells
    ]
    facts |= {"cells": len(summary.cells), "seconds": round(summary.seconds, 1)}
    return [*found, line("noise_fd", Estimate(summary.mean, summary.standard_error), **facts)]


def _shared(judge: Judge) -> dict[str, Any]:
    """How the grids of noise share their work, and their seeds."""
    run, processes = judge.run, judge.processes
    seeds = range(run.seed, run.seed + run.perturbation_seeds)
    add = processes.add if processes.world > 1 else None
    return {
        "seeds": list(seeds),
        "batch_size": run.batch_size,
        "rank": processes.rank,
        "processes": processes.world,
        "sum_over_processes": add,
    }
