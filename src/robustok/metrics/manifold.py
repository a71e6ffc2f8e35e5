"""Improved precision and recall: which share of one set lies within the manifold of the other.

Kynkaanniemi et al. 2019 with the choices of ADM's evaluator. A set's manifold is the union of balls around its
features, each as large as the distance to the k-th neighbour of its centre.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from robustok.types import UserError


@dataclass(frozen=True)
class PrecisionRecall:
    """Both numbers with what they depend on; values from sets of other sizes are not comparable.

    Attributes:
        precision: share in [0, 1] of the fake images within the real manifold.
        recall: share in [0, 1] of the real images within the fake manifold.
        k: neighbour that sets the radii.
        real: number of real images.
        fake: number of fake images.
    """

    precision: float
    recall: float
    k: int
    real: int
    fake: int


def precision_recall(*, real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall of generated images.

    A radius is the squared Euclidean distance to the k-th neighbour other than the image itself, and a point on the
    surface of a ball is inside. ADM takes 10,000 real and 50,000 fake images and computes distances in float16, which
    raises both values by about 0.002; here they are float64, a block of rows at a time.

    Args:
        real: features (N, F) of real images.
        fake: features (M, F) of generated images, of the same extractor.
        k: neighbour that sets the radii, at least 1.

    Raises:
        UserError: features of different length or not finite, or no more than k images on either side.
    """
    if real.ndim != 2 or real.shape[1:] != fake.shape[1:]:
        shapes = f"{tuple(real.shape)} and {tuple(fake.shape)}"
        raise UserError(f"got features {shapes}, expected (N, F) and (M, F); use one extractor for both sets")
    if not 1 <= k < min(len(real), len(fake)):
        raise UserError(
            f"got k={k} with {len(real)} real and {len(fake)} fake images, expected 1 <= k < images; use more images"
        )
    if not (torch.isfinite(real).all() and torch.isfinite(fake).all()):
        raise UserError("got features that are not finite; look for broken images or weights")
    centre = real.double().mean(dim=0)  # far from the origin, small distances would drown in rounding
    real, fake = real.double() - centre, fake.double() - centre
    radii_real, radii_fake = _radii(real, k), _radii(fake, k)  # (N,), (M,)
    inside_real, inside_fake = torch.zeros_like(radii_fake, dtype=torch.bool), []  # of fake images, of real ones
    for distances, radii in zip(_distances(real, fake), radii_real.split(_rows(fake)), strict=True):  # (n, M), (n,)
        inside_real |= (distances <= radii[:, None]).any(dim=0)  # (M,)
        inside_fake.append((distances <= radii_fake).any(dim=1))  # (n,)
    precision, recall = inside_real.double().mean().item(), torch.cat(inside_fake).double().mean().item()
    return PrecisionRecall(precision, recall, k, len(real), len(fake))


def _radii(features: Tensor, k: int) -> Tensor:
    """Squared distance (N,) of each feature to its k-th neighbour; the nearest of all, at 0, is the feature itself."""
    return torch.cat([block.kthvalue(k + 1, dim=1).values for block in _distances(features, features)])


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Squared Euclidean distances (n, M) of blocks of rows of x (N, F) to all rows of y (M, F)."""
    squares = y.square().sum(dim=1)  # (M,)
    for block in x.split(_rows(y)):
        scale = block.square().sum(dim=1, keepdim=True) + squares  # (n, M)
        distances = scale - 2 * block @ y.T
        # Rounding must not push an equal feature out of a ball of radius 0, as copies of one image have it.
        yield torch.where(distances > 1e-12 * scale, distances, 0.0)


def _rows(y: Tensor) -> int:
    """Rows of a block of distances to ``y``: 32 MB each, for 50,000 images as for 500."""
    return max(1, 2**22 // len(y))
