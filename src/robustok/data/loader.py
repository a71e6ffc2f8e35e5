"""Batches of images for training and evaluation, decoded ahead by worker processes where asked for."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader

from robustok.data.dataset import Draw, ImageDataset
from robustok.data.order import batch_indices, batch_seeds
from robustok.devices import rank_rows
from robustok.types import Batch


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

    A global batch is a function of (seed, step): starting at step k gives the batches of an uninterrupted iteration,
    and the ranks' batches concatenated are the batch of a single process.

    Args:
        dataset: the training images.
        global_batch: images in a step over all ranks.
        seed: of order and augmentation, >= 0.
        first_step: step of the first batch.
        steps: number of batches.
        rank: number of this process.
        world: number of processes; must divide ``global_batch``.
        workers: processes that decode ahead. Images held in memory need none.

    Raises:
        UserError: the data set is smaller than the batch, ``world`` does not divide it, or too many images are broken.
    """
    rows = rank_rows(global_batch, rank, world)
    batch_indices(len(dataset), global_batch, seed, first_step)  # raise now rather than at the first batch
    draws = (
        Draw(batch_indices(len(dataset), global_batch, seed, step)[rows], batch_seeds(global_batch, seed, step)[rows])
        for step in range(first_step, first_step + steps)
    )
    return _batches(dataset, draws, workers)


def batches_in_order(
    dataset: ImageDataset, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Centre crops of the images rank, rank + world, ..., each once: no padding, broken images left out."""
    mine = np.arange(rank, len(dataset), world)
    draws = (Draw(mine[start : start + batch_size]) for start in range(0, len(mine), batch_size))
    return (batch for batch in _batches(dataset, draws, workers) if len(batch.indices))


def batches_of(dataset: ImageDataset, draws: Iterator[np.ndarray], workers: int = 0) -> Iterator[Batch]:
    """A batch for each array (n,) of indices, without augmentation; a broken image is replaced by the next good one.

    ``workers`` processes decode ahead, so ``draws`` is read ahead too.
    """
    return _batches(dataset, (Draw(indices, np.zeros(len(indices), dtype=np.int64)) for indices in draws), workers)


def _batches(dataset: ImageDataset, draws: Iterator[Draw], workers: int) -> Iterator[Batch]:
    workers = 0 if dataset.in_memory else workers
    # The generator keeps the loader from drawing PyTorch's global random numbers.
    loader = DataLoader(dataset, batch_size=None, sampler=draws, num_workers=workers, generator=torch.Generator())
    yield from map(dataset.to_batch, loader)
