"""Batches for training and evaluation: read, decoded and drawn ahead by worker processes, then copied to the device.

Workers decode images to uint8 pixels. These go from pinned memory to the device, a quarter of the bytes of float32, and
the host does not wait for the copy; the device mirrors and converts them.

Workers are forked from a server process that has never used a device (``forkserver``). A fork of the training process
itself would copy the locks of its other threads (CUDA, NCCL, OpenMP) in whatever state they are, and may then wait for
one of them for ever.
"""

import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing import forkserver, get_context, parent_process, resource_tracker
from multiprocessing.context import BaseContext
from threading import Thread
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader

from robustok.data.dataset import Batch, Draw, ImageDataset, Read
from robustok.data.order import Blocks, batch_indices, batch_seeds
from robustok.devices import rank_rows
from robustok.errors import UserError
from robustok.files import one_line

CPU = torch.device("cpu")
MOST_WORKERS = 8  # by default
ENDING = {signal.SIGINT, signal.SIGTERM}
REMEDY = (
    "lower workers, or give more memory (docker run --shm-size); workers=0 reads in the process itself. A script of "
    'your own needs if __name__ == "__main__"'
)

Workers = Annotated[
    int | None,
    Field(
        ge=0,
        le=1024,
        description="data loader processes for each process; 0 reads in the process itself; null: where images are "
        f"decoded, one for each core but one, {MOST_WORKERS} at most",
    ),
]


def worker_count(workers: int | None, most: int = MOST_WORKERS) -> int:
    """``workers``, or where it is None as many as leave a core to each process on this machine, ``most`` at most."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(most, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


# Images


def training_batches(
    dataset: ImageDataset,
    global_batch: int,
    seed: int,
    first_step: int,
    steps: int,
    rank: int = 0,
    world: int = 1,
    workers: int | None = 0,
    device: torch.device = CPU,
    draw: Callable[[int], Any] | None = None,
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
        workers: processes that work ahead; None: as many as help, none for images held in memory.
        device: where the pixels are wanted.
        draw: picklable function of the step, called in the workers too; gives the ``draws`` of the batch.

    Raises:
        UserError: the data set is smaller than the batch, ``world`` does not divide it, or too many images are broken.
    """
    rows = rank_rows(global_batch, rank, world)
    training_draw(len(dataset), global_batch, seed, rows, first_step)  # raise now rather than at the first batch
    make = partial(_read_step, dataset, global_batch, seed, rows, draw)
    workers = worker_count(workers, 0 if dataset.in_memory else MOST_WORKERS)
    made = ahead(make, range(first_step, first_step + steps), workers, device)
    return (dataset.to_batch(read, drawn) for read, drawn in made)


def training_draw(
    count: int, global_batch: int, seed: int, rows: slice, step: int, blocks: Blocks | None = None
) -> Draw:
    """The images of a step, and the seeds of their augmentation: ``rows`` of the global batch, out of ``count``."""
    indices = batch_indices(count, global_batch, seed, step, blocks)
    return Draw(indices[rows], batch_seeds(global_batch, seed, step)[rows])


def _read_step(
    dataset: ImageDataset, global_batch: int, seed: int, rows: slice, draw: Callable[[int], Any] | None, step: int
) -> tuple[Read, Any]:
    read = dataset[training_draw(len(dataset), global_batch, seed, rows, step, dataset.blocks)]
    return read, None if draw is None else draw(step)


def batches_in_order(
    dataset: ImageDataset,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int | None = 0,
    device: torch.device = CPU,
) -> Iterator[Batch]:
    """Centre crops of the images rank, rank + world, ..., each once: no padding, broken images left out."""
    mine = np.arange(rank, len(dataset), world)
    draws = (Draw(mine[start : start + batch_size]) for start in range(0, len(mine), batch_size))
    return (batch for batch in batches_of(dataset, draws, workers, device) if len(batch.indices))


def batches_of(
    dataset: ImageDataset, draws: Iterable[Draw], workers: int | None = 0, device: torch.device = CPU
) -> Iterator[Batch]:
    """A batch for each draw. With workers ``draws`` is read ahead too. Images held in memory need no workers."""
    workers = 0 if dataset.in_memory else worker_count(workers)
    return map(dataset.to_batch, ahead(dataset.__getitem__, draws, workers, device))


# Anything


def ahead(
    make: Callable[[Any], Any], items: Iterable[Any], workers: int = 0, device: torch.device = CPU
) -> Iterator[Any]:
    """``make(item)`` of each item, in order.

    Args:
        make: makes a tensor, a tuple of such, or anything else. With workers it is called in them: it must be
            picklable, and what it makes a function of the item alone.
        items: with workers they are read ahead, two for each worker.
        workers: processes that work ahead; with 0 each item is made when it is asked for.
        device: where tensors are wanted, and other objects that have a method ``to(device)``.

    Raises:
        UserError: as ``make`` raises it; a worker has ended.
    """
    loader = DataLoader(
        _Maker(make),
        batch_size=None,
        sampler=items,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=device.type == "cuda",
        multiprocessing_context=_server(make) if workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # or the loader would draw one of PyTorch's global random numbers
    )
    made = iter(loader)
    try:
        while (found := _next(made, workers)) is not None:
            for message, category, file, line in found.noted:
                warnings.warn_explicit(message, category, file, line)
            if isinstance(found.value, UserError):
                raise found.value
            yield _each(found.value, partial(_move, device=device))
    finally:
        if workers:
            made._shutdown_workers()  # now, not when the last traceback that holds the loader is forgotten


def _next(made: Iterator["_Made"], workers: int) -> "_Made | None":
    """What comes next, or None at the end.

    Raises:
        UserError: a worker has ended.
    """
    try:
        return next(made, None)
    except (RuntimeError, EOFError, OSError) as error:
        if not workers or str(error).startswith("Caught "):  # an error of ``make``
            raise
        raise UserError(f"a data worker has ended ({one_line(error, 100)}); {REMEDY}") from None


class _Made(NamedTuple):
    """What was made, or the error that it raised, and the warnings of a worker: message, category, file, line."""

    value: Any
    noted: list[tuple[str, type[Warning], str, int]]


class _Maker:
    """``make`` as a data set of PyTorch's loader, which has items and no length."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __getitem__(self, item: Any) -> _Made:
        if torch.utils.data.get_worker_info() is None:
            return _Made(self.make(item), [])
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")  # the main process decides which are shown
            try:
                value = _each(self.make(item), _share)
            except UserError as error:
                value = error
        return _Made(value, [(str(one.message), one.category, one.filename, one.lineno) for one in found])


def _unchanged(made: _Made) -> _Made:
    return made


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """A value changed, or each part of a tuple."""
    if isinstance(value, tuple | list):  # pinning makes lists of tuples
        parts = [_each(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return change(value)


def _share(value: Any) -> Any:
    """Tensors in shared memory. PyTorch would do so later, where an error would leave the main process waiting."""
    try:
        return value.share_memory_() if isinstance(value, Tensor) else value
    except RuntimeError as error:
        raise UserError(f"no shared memory for a batch ({one_line(error, 100)}); {REMEDY}") from None


def _move(value: Any, device: torch.device) -> Any:
    """Tensors on the device, copied while the host goes on: for CUDA they are in pinned memory."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return value.to(device) if hasattr(value, "to") else value


def _server(make: Callable[[Any], Any]) -> BaseContext:
    """The server that workers are forked from. It imports the modules of ``make`` once for all workers.

    It ends with this process. Ctrl-C and a SIGTERM to all processes of a job do not end it or its workers, because the
    training then still has a step to finish and a state to save.
    """
    functions = [f for f in (make, *getattr(make, "args", ())) if callable(f)]  # with those that a partial hands on
    forkserver.set_forkserver_preload([__name__, *(getattr(f, "func", f).__module__ for f in functions)])
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        forkserver.ensure_running()  # inherits what is blocked
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return get_context("forkserver")


def _start_worker(_number: int) -> None:
    """Leave the process group: its Ctrl-C and SIGTERM are for the training, which ends its workers, or is killed."""
    os.setsid()
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)  # also forgets one that came while it was blocked
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    Thread(target=_end_with_training, daemon=True).start()


def _end_with_training() -> None:
    """End this worker when its training is gone: PyTorch's loader looks after the server, which waits for workers."""
    parent_process().join()
    os._exit(1)
