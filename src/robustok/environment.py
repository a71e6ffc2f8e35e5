"""Variables of launchers in the environment: those of a group of processes stay, what others have left is put aside.

`torchrun` gives each process of a group all variables of ``GROUP``. A job script, an MPI shell or accelerate's
configuration file may leave some of them, or others that accelerate obeys before the settings of a run.
"""

import os
import warnings

from robustok.errors import UserError

GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MPI = ("PMI_", "MPI_LOCAL", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_KEPT = ("ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE")  # if accelerate can read them
_TRUTH = ("0", "1", "n", "y", "f", "t", "no", "yes", "off", "on", "false", "true")
_UNSET = ("", "0", "1", "no", "none", "false", "default", "auto")


def ignore_leftovers() -> None:
    """Remove what launchers have left from the environment of this process; a note names what asked for something.

    Raises:
        UserError: the variables say that there are several processes, but not how they meet.
    """
    _ignore_accelerate()
    if all(_number(name) is not None or name == "MASTER_ADDR" for name in GROUP) and "MASTER_ADDR" in os.environ:
        if not _number("RANK") < _number("WORLD_SIZE"):
            _refuse("RANK", "WORLD_SIZE")
        _remove([name for name in os.environ if name.startswith(_MPI)])  # accelerate would read them first
        return
    if "MASTER_ADDR" in os.environ and any((_number(name) or 0) > 1 for name in _MPI_SIZES):
        return  # mpirun on CPUs, as accelerate supports it
    for name in ("WORLD_SIZE", *_MPI_SIZES):
        if (_number(name) or 0) > 1:
            _refuse(name)
    found = [name for name in GROUP[:3] if name in os.environ]
    other_than_first = os.environ.get("RANK", "0") != "0"
    _remove([*found, *(name for name in os.environ if name.startswith(_MPI))])
    if other_than_first:  # whose output would not be shown
        warnings.warn(f"{' and '.join(found)} in the environment ignored: this is a single process", stacklevel=2)


def _ignore_accelerate() -> None:
    """Precision, accumulation, compilation and sharding are settings of a run, whatever accelerate is configured to."""
    ours = [name for name in os.environ if name.startswith("ACCELERATE_") and name != "ACCELERATE_LOG_LEVEL"]
    found = [name for name in ours if name not in _KEPT or os.environ[name].lower() not in _TRUTH]
    if asked := [f"{name}={os.environ[name][:40]}" for name in found if os.environ[name].lower() not in _UNSET]:
        warnings.warn(
            f"ignored, as these are settings of a run (precision, gradient_accumulation, compile, fsdp): "
            f"{', '.join(sorted(asked))}",
            stacklevel=3,
        )
    _remove(found)


def _number(name: str) -> int | None:
    """The value of a variable; None if it is not set or no number."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _refuse(*names: str) -> None:
    values = " and ".join(f"{name}={os.environ[name]}" for name in names)
    _remove([name for name in GROUP if name in os.environ])  # this process reports its error itself
    raise UserError(
        f"{values} in the environment, as a launcher sets it, but not all of {', '.join(GROUP)}, with RANK below "
        "WORLD_SIZE; start several processes with torchrun, or unset these variables to run alone"
    )


def _remove(names: list[str]) -> None:
    for name in names:
        del os.environ[name]
