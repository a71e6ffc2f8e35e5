"""Metrics of pairs of images: PSNR, SSIM and LPIPS, as means over images with their standard errors."""

from collections.abc import Callable

import torch
from torch import Tensor

from robustok.evaluation.evaluator import Evaluator
from robustok.metrics.frechet import Estimate
from robustok.metrics.pixels import psnr, ssim
from robustok.types import Measurement

PIXELS = ("psnr", "ssim", "lpips")


def pixel_scores(evaluator: Evaluator, pixels: Tensor, real: Tensor) -> Tensor:
    """PSNR, SSIM and LPIPS (n, 3) float64 of pairs, NaN for what is not wanted."""
    scores = torch.full((len(pixels), len(PIXELS)), torch.nan, dtype=torch.float64)
    if "psnr" in evaluator.wanted:  # identical images would make the mean infinite
        scores[:, 0] = psnr(pixels, real).clamp(max=100).cpu()
    if "ssim" in evaluator.wanted:
        scores[:, 1] = ssim(pixels, real).cpu()
    if evaluator.lpips is not None:
        scores[:, 2] = evaluator.lpips(pixels, real).double().cpu()
    return scores


def pixel_lines(evaluator: Evaluator, scores: Tensor, line: Callable[..., Measurement]) -> list[Measurement]:
    """A line for each of the scores (N, 3) that is wanted."""
    found = []
    for column, name in enumerate(PIXELS):
        if name in evaluator.wanted:
            facts = {"network": evaluator.lpips.extractor} if name == "lpips" else {}
            found.append(
                line(evaluator.lpips.name if name == "lpips" else name, over_images(scores[:, column]), **facts)
            )
    return found


def over_images(values: Tensor) -> Estimate:
    """Mean over images (N,) and its standard error."""
    return Estimate(values.mean().item(), (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None)
