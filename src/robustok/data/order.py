"""The order of training images: a function of (seed, step) alone."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from robustok.errors import UserError
from robustok.randomness import raw_numbers


def batch_indices(count: int, global_batch: int, seed: int, step: int) -> np.ndarray:
    """Indices (global_batch,) int64 of a step's images: every epoch is shuffled and its incomplete last batch dropped.

    Raises:
        UserError: the batch is larger than the set.
    """
    if not 0 < global_batch <= count:
        raise UserError(
            f"the global batch is {global_batch} and the training set has {count} images; set a batch of 1 to {count}"
        )
    epoch, batch = divmod(step, count // global_batch)
    return shuffle(count, seed, epoch)[batch * global_batch : (batch + 1) * global_batch]


def batch_seeds(global_batch: int, seed: int, step: int) -> np.ndarray:
    """Seeds (global_batch,) int64 >= 0 of the augmentation of each row of a step's global batch."""
    return (raw_numbers((2, seed, step), global_batch) >> np.uint64(1)).astype(np.int64)


def bucket_steps(weights: Sequence[int], seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The bucket of each step, drawn in proportion to its weight, and how many steps it had before.

    More ``steps`` do not change the first ones.

    Returns:
        Buckets (steps,) int64, and the numbers of their own steps (steps,) int64.
    """
    uniform = (raw_numbers((3, seed), steps) >> np.uint64(11)) * 2.0**-53  # in [0, 1)
    buckets = np.searchsorted(np.cumsum(weights) / sum(weights), uniform, side="right")
    own = np.zeros(steps, np.int64)
    for bucket in range(len(weights)):
        here = buckets == bucket
        own[here] = np.arange(here.sum())
    return buckets, own


@lru_cache(maxsize=2)  # 100 MB each for ImageNet's ten crops
def shuffle(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation (count,) int64. Not NumPy's ``permutation``, whose results may change with its version."""
    order = raw_numbers((1, seed, epoch), count).argsort(kind="stable")
    order.flags.writeable = False
    return order
