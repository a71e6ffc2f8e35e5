"""Metrics of pairs of images, such as PSNR, SSIM and LPIPS, as means over images with their standard errors."""

from collections.abc import Callable

import torch
from torch import Tensor

from robustok.evaluation.evaluator import Evaluator
from robustok.metrics.frechet import Estimate
from robustok.types import Measurement


def pair_values(evaluator: Evaluator, pixels: Tensor, real: Tensor) -> Tensor:
    """Every metric of pairs (n, M) float64, NaN for those that are not wanted."""
    values = torch.full((len(pixels), len(evaluator.pair_metrics)), torch.nan, dtype=torch.float64)
    for column, (name, function) in enumerate(evaluator.pair_metrics.items()):
        if name in evaluator.wanted:
            values[:, column] = function(pixels, real).cpu()
    return values


def pair_lines(evaluator: Evaluator, values: Tensor, line: Callable[..., Measurement]) -> list[Measurement]:
    """A line for each metric of pairs that is wanted, from :func:`pair_values` of all images."""
    found = []
    for column, (name, function) in enumerate(evaluator.pair_metrics.items()):
        if name in evaluator.wanted:
            details = {"network": function.extractor} if name == "lpips" else {}
            name = function.name if name == "lpips" else name
            found.append(line(name, over_images(values[:, column]), **details))
    return found


def over_images(values: Tensor) -> Estimate:
    """Mean over images (N,) and its standard error."""
    return Estimate(values.mean().item(), (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None)
