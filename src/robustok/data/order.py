"""The order in which training goes through a data set: a function of (seed, step) alone."""

from functools import lru_cache

import numpy as np

from robustok.errors import UserError


def batch_indices(count: int, global_batch: int, seed: int, step: int) -> np.ndarray:
    """Places (global_batch,) int64 of a step's images: a shuffle for each epoch, its incomplete last batch dropped.

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
    """Seeds (global_batch,) int64 >= 0, one for whatever is random about each row of a step's global batch."""
    return (np.random.PCG64([2, seed, step]).random_raw(global_batch) >> np.uint64(1)).astype(np.int64)


@lru_cache(maxsize=2)  # 100 MB each for ImageNet's ten crops
def shuffle(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation (count,) int64. NumPy promises that PCG64's raw stream never changes, but not ``permutation``."""
    order = np.random.PCG64([1, seed, epoch]).random_raw(count).argsort(kind="stable")
    order.flags.writeable = False
    return order
