"""Inception Score: high where a classifier is certain of each image and all images together have many classes."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from robustok.errors import UserError


@dataclass(frozen=True)
class InceptionScore:
    """The score over splits of one set.

    Attributes:
        mean: over splits; from 1 to the number of classes.
        standard_deviation: over splits, divided by their number. It is no standard error of the score.
        splits: number of splits; fewer images in a split make a smaller score.
    """

    mean: float
    standard_deviation: float
    splits: int


def inception_score(
    logits: Tensor, splits: int = 10, *, rng: torch.Generator | None = None, shuffle: bool = True
) -> InceptionScore:
    """The exp of the mean KL divergence of p(class | image) from p(class), over splits of the shuffled images.

    Salimans et al. 2016; published scores are of the Inception logits without their bias. Shuffled first, because
    images sorted by class would leave a split with a single class (62 in place of 298 for one published set).

    Args:
        logits: (N, classes).
        splits: number of splits, at most N.
        rng: shuffles the images.
        shuffle: False splits the images as they come, which is ADM's evaluator where a split holds 5,000 images.

    Raises:
        UserError: logits of another shape or not finite, fewer images than splits, or nothing to shuffle with.
    """
    if logits.ndim != 2 or not torch.isfinite(logits).all():
        raise UserError(f"got logits {tuple(logits.shape)}, expected finite ones (N, classes); look for broken images")
    if not 1 <= splits <= len(logits):
        raise UserError(f"got {len(logits)} images for {splits} splits, expected at least one in each; use more images")
    if shuffle:
        if rng is None:
            raise UserError("the Inception Score shuffles its images; pass rng, or shuffle=False for ADM's way")
        logits = logits[torch.randperm(len(logits), generator=rng).to(logits.device)]
    log_p = logits.double().log_softmax(dim=1)  # (N, classes)
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    scores = torch.stack([_score(log_p[a:b]) for a, b in pairwise(bounds)])  # (splits,)
    return InceptionScore(scores.mean().item(), scores.std(correction=0).item(), splits)


def _score(log_p: Tensor) -> Tensor:
    # As logsumexp, because a class so unlikely in all images that it underflows would give 0 * infinity.
    marginal = log_p.logsumexp(dim=0) - math.log(len(log_p))  # (classes,)
    return (log_p.exp() * (log_p - marginal)).sum(dim=1).mean().exp()
