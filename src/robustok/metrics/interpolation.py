"""iFID: Frechet distance of images decoded from between latents of validation images and near training latents.

A generator's latents lie between those of real images; iFID asks what the decoder makes of such places, before there is
a generator. arXiv 2603.05630: for each validation latent its 10 nearest training latents by cosine similarity, of which
one is drawn by softmax(-MSE); both are interpolated spherically at 0.5 and decoded, and the images are compared with
the validation images. Tokens stand for their code vectors, and the decoder gets the interpolated vectors.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from robustok.config import Config
from robustok.errors import UserError
from robustok.precision import exact_float32
from robustok.randomness import image_draws

QUERIES, KEYS = 2048, 4096  # rows of a block of similarities: latents of validation images, and of training images


class InterpolationConfig(Config):
    """How iFID interpolates. The defaults are the paper's, but for the number of training images."""

    neighbours: int = Field(10, ge=1, description="nearest training latents by cosine similarity; one is drawn")
    alpha: float = Field(0.5, ge=0, le=1, description="0 is the validation latent, 1 its neighbour")
    train_images: int = Field(50_000, ge=1, description="at most so many training images, evenly spread")


@torch.no_grad()
def nearest_latents(latents: Tensor, training: Tensor, neighbours: int, vectors: Callable[[Tensor], Tensor]) -> Tensor:
    """The training latents of highest cosine similarity, of the whole flattened latents, found block by block.

    Args:
        latents: (N, L) or (N, L, D).
        training: (M, L) or (M, L, D).
        neighbours: number for each latent.
        vectors: such latents of n images to vectors (n, L, D) on the device that searches.

    Returns:
        Rows of ``training`` (N, neighbours) int64 on the CPU, increasing: rounding that swaps two of them changes
        nothing.

    Raises:
        UserError: more neighbours than training latents.
    """
    if neighbours > len(training):
        raise UserError(f"ifid.neighbours={neighbours}, but there are {len(training)} training latents; lower it")
    directions = lambda some: F.normalize(vectors(some).flatten(1).float())  # noqa: E731
    found = [torch.empty(0, neighbours, dtype=torch.int64)]
    for queries in map(directions, latents.split(QUERIES) if len(latents) else ()):  # (n, L D)
        best = queries.new_empty(len(queries), 0)
        rows = best.long()
        for start in range(0, len(training), KEYS):
            keys = directions(training[start : start + KEYS])  # (m, L D)
            with exact_float32(keys.device):
                similarity = queries @ keys.T  # (n, m)
            own = torch.arange(start, start + len(keys), device=keys.device).expand(len(queries), -1)
            best, kept = torch.cat([best, similarity], dim=1).topk(min(neighbours, start + len(keys)))
            rows = torch.cat([rows, own], dim=1).gather(1, kept)  # (n, neighbours)
        found.append(rows.sort(dim=1).values.cpu())
    return torch.cat(found)  # (N, neighbours)


def draw_neighbour(vectors: Tensor, near: Tensor, uniforms: Tensor) -> Tensor:
    """One of its neighbours for each latent, with probability softmax(-MSE), the mean being over the whole latent.

    Args:
        vectors: (n, L, D).
        near: neighbours (n, k, L, D).
        uniforms: (n,) in [0, 1).

    Returns:
        (n, L, D).
    """
    errors = (near.double() - vectors.double()[:, None]).square().flatten(2).mean(dim=2)  # (n, k)
    bounds = torch.softmax(-errors, dim=1).cumsum(dim=1)[:, :-1]  # (n, k - 1)
    chosen = (uniforms.to(bounds)[:, None] >= bounds).sum(dim=1)  # (n,)
    return near[torch.arange(len(near), device=near.device), chosen]


def spherical(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    """Spherical interpolation of latents (n, L, D), each taken as one vector of L x D numbers.

    With the angle w between the two, (sin((1 - alpha) w) start + sin(alpha w) end) / sin w: the length is kept where
    both have the same. Linear where the angle is 0 or half a turn, to within 1e-6.
    """
    a, b = start.double().flatten(1), end.double().flatten(1)
    cosine = F.cosine_similarity(a, b).clamp(-1, 1)
    angle = cosine.acos()[:, None]  # (n, 1)
    straight = angle.sin() < 1e-6
    sine = torch.where(straight, 1.0, angle.sin())
    left = torch.where(straight, 1 - alpha, ((1 - alpha) * angle).sin() / sine)
    right = torch.where(straight, alpha, (alpha * angle).sin() / sine)
    return (left * a + right * b).view_as(start).to(start)


def interpolated_latents(
    latents: Tensor,
    near: Tensor,
    training: Tensor,
    vectors: Callable[[Tensor], Tensor],
    alpha: float,
    seed: int,
    indices: Tensor,
) -> Tensor:
    """What the decoder gets for some validation images.

    Args:
        latents: of these images, (n, L) or (n, L, D).
        near: rows (n, k) of their neighbours in ``training``, from :func:`nearest_latents`.
        training: (M, L) or (M, L, D).
        vectors: as in :func:`nearest_latents`.
        alpha: see :class:`InterpolationConfig`.
        seed: of the draws.
        indices: (n,) of the images in the validation set, on which the draws depend alone.

    Returns:
        (n, L, D).
    """
    own = vectors(latents)  # (n, L, D)
    others = vectors(training[near.flatten()]).unflatten(0, near.shape)  # (n, k, L, D)
    uniforms = image_draws(torch.rand, f"ifid {seed}", indices, (1,))[:, 0]  # (n,)
    return spherical(own, draw_neighbour(own, others, uniforms), alpha)
