"""Batches of images for training and evaluation, decoded ahead by worker processes where asked for."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader

from robustok.data.dataset import Draw, ImageDataset, Read
from robustok.data.order import batch_indices, batch_seeds
from robustok.devices import rank_rows
from robustok.types import Batch

# The order of training and evaluation


def training_batches(
    dataset: ImageDataset,
    global_batch: int,
    seed: int,
    first_step: int,
    steps: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """This rank's rows of the global batches of steps first_step..first_step+steps-1.

    A global batch is a function of (seed, step): starting at step k gives what an uninterrupted iteration gives, and
    the ranks' batches side by side are the batch of a single process.

    Args:
        dataset: what to learn from.
        global_batch: images in a step over all ranks.
        seed: of order and augmentation, >= 0.
        first_step: where to start.
        steps: how many batches.
        rank: number of this process.
        world: number of processes; must divide ``global_batch``.
        workers: processes that decode ahead. Images held in memory need none.

    Raises:
        UserError: the data set is smaller than the batch, ``world`` does not divide it, or too many images are broken.
    """
    rows = rank_rows(global_batch, rank, world)
    batch_indices(len(dataset), global_batch, seed, first_step)  # complain now rather than at the first batch
    draws = (
        Draw(batch_indices(len(dataset), global_batch, seed, step)[rows], batch_seeds(global_batch, seed, step)[rows])
        for step in range(first_step, first_step + steps)
    )
    return _batches(dataset, draws, workers)


def batches_in_order(
    dataset: ImageDataset, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Go once over the images rank, rank + world, ...: centre crops, none twice, no padding, broken ones left out."""
    mine = np.arange(rank, len(dataset), world)
    draws = (Draw(mine[start : start + batch_size]) for start in range(0, len(mine), batch_size))
    return (batch for batch in _batches(dataset, draws, workers) if len(batch.indices))


def batches_of(dataset: ImageDataset, draws: Iterator[np.ndarray], workers: int = 0) -> Iterator[Batch]:
    """A batch for each array (n,) of places, without augmentation; a broken image is replaced by the next good one.

    ``workers`` processes decode ahead, so ``draws`` is read ahead too.
    """
    return _batches(dataset, (Draw(places, np.zeros(len(places), dtype=np.int64)) for places in draws), workers)


def _batches(dataset: ImageDataset, draws: Iterator[Draw], workers: int) -> Iterator[Batch]:
    # Without a generator of its own the loader would draw from PyTorch's global random numbers.
    workers = 0 if dataset._memory is not None else workers
    loader = DataLoader(
        dataset, batch_size=None, sampler=draws, num_workers=workers, generator=torch.Generator(), collate_fn=_same
    )
    for read in loader:
        yield dataset._batch(read)


def _same(read: Read) -> Read:
    return read
