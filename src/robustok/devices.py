"""Devices and processes: the only module beside commands and training that imports accelerate."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from robustok.environment import ignore_leftovers
from robustok.errors import UserError
from robustok.precision import Precision, note_slow, use_precision

# How long processes wait for another in a collective. NCCL's default of 10 minutes is less than one process may take to
# convert weights, or to compute a Frechet distance on a busy host, while the others wait.
PATIENCE = timedelta(hours=2)


def rank_rows(global_batch: int, rank: int, world: int) -> slice:
    """The rows of the global batch that belong to a rank.

    Raises:
        UserError: ``world`` does not divide ``global_batch``.
    """
    if global_batch % world:
        raise UserError(
            f"a global batch of {global_batch} cannot be shared by {world} processes; set a multiple of {world}"
        )
    return slice(rank * global_batch // world, (rank + 1) * global_batch // world)


def start_accelerator(batch_size: int = 0, parts: int = 1, precision: Precision = "float32") -> Accelerator:
    """The accelerator of this process, alone or of several under `torchrun` or `accelerate launch`.

    Args:
        batch_size: global batch.
        parts: steps of gradient accumulation, into which every process divides its rows.
        precision: of float32 in this process from now on; a training in bf16 has autocast besides.

    Raises:
        UserError: the global batch does not divide among the processes, or its rows into parts; or the environment
            has some of a launcher's variables only.
    """
    ignore_leftovers()
    use_precision(precision)
    # Without cpu=True, every process of a `torchrun` without GPUs would be the only process of its own run.
    views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # no second copy of the gradients
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision="no", kwargs_handlers=[views, patience]
    )
    note_slow(accelerator.device, precision)
    share = rank_rows(batch_size, accelerator.process_index, accelerator.num_processes)
    if (share.stop - share.start) % parts:
        raise UserError(
            f"gradient_accumulation {parts} does not divide the {share.stop - share.start} samples of each process; "
            "choose a divisor"
        )
    return accelerator


def leave_processes() -> None:
    """Destroy the process group, if there is one, at the end of a successful program.

    Otherwise a thread of gloo that frees its buffers during interpreter shutdown may end the process with SIGABRT. Not
    for a program that failed: other processes may wait for it in a collective until the launcher ends them.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def first_to_fail() -> bool:
    """Whether none of the processes that were started together has called this before: then this one reports its error.

    They count in the store through which the launcher lets them meet. Without a store they have not met yet, and all
    have the same error: the first process reports it.
    """
    name = f"robustok/errors/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(address, port, timeout=timedelta(seconds=2), wait_for_workers=False)
        return store.add(name, 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return os.environ["RANK"] == "0"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device. The host does not wait: CUDA copies pinned memory while the host goes on."""
    pinned = tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor
    return pinned.to(device, non_blocking=True)


def layout(device: torch.device) -> torch.memory_format:
    """Order in memory of the images and features of a convolutional network.

    Channels last on a GPU: on an H100 the lpips package took 14 % less time so. On a CPU our LPIPS takes 12 % more, and
    group norms lose up to three digits.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


class Reading:
    """Numbers of a device on their way to the host, which goes on meanwhile.

    Args:
        values: (n,), on any device.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=values.is_cuda)  # into pinned memory
        self._copied = torch.cuda.Event() if values.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def numbers(self) -> list[float]:
        """The numbers; waits until they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set in any process; all processes get the same answer."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)
