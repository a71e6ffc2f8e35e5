"""The order of training images: a function of (seed, step) alone.

Images that are downloaded in blocks are shuffled within a window, so that a block is needed for a while and then no
more: the blocks are put in a random order, and each image moves back by a random part of the window. At any time only
the blocks of the last ``WINDOW`` images are in use, and a new one comes as an old one ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from robustok.errors import UserError
from robustok.randomness import raw_numbers

WINDOW = 8192  # images


@dataclass(frozen=True, eq=False)
class Blocks:
    """The block that each image is downloaded in.

    Attributes:
        of: (N,) int32, numbers of blocks.
    """

    of: np.ndarray


def batch_indices(count: int, global_batch: int, seed: int, step: int, blocks: Blocks | None = None) -> np.ndarray:
    """Indices (global_batch,) int64 of a step's images: every epoch is shuffled and its incomplete last batch dropped.

    Args:
        count: images in the set.
        global_batch: images in a step.
        seed: of the order, >= 0.
        step: number of the step.
        blocks: of the images; the shuffle is then one within a window. None: every order is as likely.

    Raises:
        UserError: the batch is larger than the set.
    """
    if not 0 < global_batch <= count:
        raise UserError(
            f"the global batch is {global_batch} and the training set has {count} images; set a batch of 1 to {count}"
        )
    epoch, batch = divmod(step, count // global_batch)
    order = shuffle(count, seed, epoch) if blocks is None else shuffle_in_window(blocks, seed, epoch, WINDOW)
    return order[batch * global_batch : (batch + 1) * global_batch]


def batch_seeds(global_batch: int, seed: int, step: int) -> np.ndarray:
    """Seeds (global_batch,) int64 >= 0 of the augmentation of each row of a step's global batch."""
    return (raw_numbers((2, seed, step), global_batch) >> np.uint64(1)).astype(np.int64)


def bucket_steps(weights: Sequence[int], seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The bucket of each step, drawn in proportion to its weight, and how many steps it had before.

    More ``steps`` do not change the first ones.

    Returns:
        Buckets (steps,) int64, and the numbers of their own steps (steps,) int64.
    """
    uniform = (raw_numbers((4, seed), steps) >> np.uint64(11)) * 2.0**-53  # in [0, 1)
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


@lru_cache(maxsize=2)
def shuffle_in_window(blocks: Blocks, seed: int, epoch: int, window: int) -> np.ndarray:
    """A permutation (N,) int64 in which the images of a block are at most about ``window`` images apart.

    Args:
        blocks: of the images.
        seed: of the order, >= 0.
        epoch: number of the epoch.
        window: in images; with 0 whole blocks follow each other.
    """
    _, block, sizes = np.unique(blocks.of, return_inverse=True, return_counts=True)
    in_turn = raw_numbers((3, seed, epoch), len(sizes)).argsort(kind="stable")
    before = np.empty_like(sizes)  # images in the blocks before each block
    before[in_turn] = sizes[in_turn].cumsum() - sizes[in_turn]
    moved = (raw_numbers((1, seed, epoch), len(block)) >> np.uint64(32)).astype(np.int64)  # in units of 2^-32
    order = ((before[block] << 32) + window * moved).argsort(kind="stable")
    order.flags.writeable = False
    return order
