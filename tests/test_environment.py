import os
import warnings

import pytest

from robustok.devices import start_accelerator
from robustok.environment import GROUP, ignore_leftovers
from robustok.errors import UserError

COMPLETE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
PREFIXES = ("ACCELERATE_", "PMI_", "MPI_LOCAL", "OMPI_", "MV2_")


@pytest.fixture
def environment(monkeypatch):
    """Function that calls ``ignore_leftovers`` with these variables alone; returns those left, and the notes."""
    for name in [*GROUP, *(name for name in os.environ if name.startswith(PREFIXES))]:
        monkeypatch.delenv(name, raising=False)

    def with_variables(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            ignore_leftovers()
        return {name for name in variables if name in os.environ}, [str(note.message) for note in notes]

    return with_variables


def test_a_group_of_processes_keeps_its_variables_and_no_others(environment):
    mpi = {"PMI_SIZE": "4", "PMI_RANK": "3", "OMPI_COMM_WORLD_SIZE": "x", "MPI_LOCALRANKID": "1"}
    assert environment(COMPLETE | mpi) == (set(COMPLETE), [])


def test_mpirun_with_an_address_keeps_its_variables(environment):
    mpi = {"PMI_SIZE": "4", "PMI_RANK": "3", "MASTER_ADDR": "localhost"}
    assert environment(mpi) == (set(mpi), [])


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0"},
        {"RANK": "abc", "WORLD_SIZE": "1"},
        {"LOCAL_RANK": "0"},
        {"WORLD_SIZE": "1", "MASTER_ADDR": "x"},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
        {"OMPI_COMM_WORLD_RANK": "many"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"},
    ],
)
def test_what_a_launcher_left_is_put_aside(environment, variables):
    left, notes = environment(variables)
    assert left == {name for name in variables if name.startswith(("SLURM", "MASTER"))}
    assert [note for note in notes if "RANK" not in note] == []


def test_a_rank_that_would_silence_the_process_is_noted(environment):
    assert environment({"RANK": "3"}) == (set(), ["RANK in the environment ignored: this is a single process"])


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "WORLD_SIZE=2 in the environment"),
        (COMPLETE | {"RANK": "2"}, "RANK=2 and WORLD_SIZE=2 in the environment"),
        ({"PMI_SIZE": "4"}, "PMI_SIZE=4 in the environment"),
    ],
)
def test_processes_that_cannot_meet_are_refused(environment, variables, named):
    with pytest.raises(UserError, match=f"^{named}.*torchrun, or unset these variables"):
        environment(variables)
    assert "RANK" not in os.environ  # so that each process reports its error


def test_accelerate_follows_the_settings_and_not_its_environment(environment):
    left, notes = environment(
        {
            "ACCELERATE_MIXED_PRECISION": "bf16",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
            "ACCELERATE_DYNAMO_BACKEND": "NO",
            "ACCELERATE_DYNAMO_MODE": "default",
            "ACCELERATE_USE_FSDP": "true",
            "ACCELERATE_USE_CPU": "true",
        }
    )
    assert left == {"ACCELERATE_USE_CPU"}
    (note,) = notes
    assert note.endswith(
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4, ACCELERATE_MIXED_PRECISION=bf16, ACCELERATE_USE_FSDP=true"
    )


def test_what_accelerate_cannot_read_is_put_aside(environment):
    left, notes = environment({"ACCELERATE_USE_CPU": "x", "ACCELERATE_CPU_AFFINITY": "", "ACCELERATE_DEBUG_MODE": "1"})
    assert left == {"ACCELERATE_DEBUG_MODE"}
    assert [note.rpartition(": ")[2] for note in notes] == ["ACCELERATE_USE_CPU=x"]


def test_the_accelerator_has_no_precision_or_accumulation_of_its_own(environment, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.warns(UserWarning, match="ACCELERATE_DYNAMO_BACKEND=INDUCTOR"):
        accelerator = start_accelerator()
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == ("no", 1)
    assert accelerator.state.dynamo_plugin.backend == "NO"
