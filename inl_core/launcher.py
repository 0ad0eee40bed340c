"""Which process of a run this is, as torchrun and tools like it say in the environment. It imports no torch.

Without WORLD_SIZE, or where it is 1, this is the only process: then a RANK that some other tool left in the environment
means nothing.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from inl_core.errors import RecipeError

_LONGEST_NUMBER = 10
_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_FIX = "unset it, or start the processes with torchrun, which sets all of them"


@dataclass(frozen=True)
class Place:
    """The place of one process among those of a run."""

    rank: int = 0
    """Its number among all processes, from 0."""
    size: int = 1
    """How many processes there are."""
    local_rank: int = 0
    """Its number among those of this machine, which picks its GPU."""


def read_place(environment: Mapping[str, str] | None = None) -> Place:
    """This process's place, from `environment` (os.environ by default).

    Raises:
        RecipeError: WORLD_SIZE, RANK or LOCAL_RANK is not a number or does not fit the others, or something is missing
            that several processes need to find each other.
    """
    given = os.environ if environment is None else environment
    if "WORLD_SIZE" not in given:
        return Place()
    size = _number(given, "WORLD_SIZE", least=1)
    if size == 1:
        return Place()
    missing = [name for name in _NEEDED if not given.get(name)]
    if missing:
        raise RecipeError(f"WORLD_SIZE={size} without {missing[0]} in the environment: {_FIX}")
    rank, local_rank = _number(given, "RANK", least=0), _number(given, "LOCAL_RANK", least=0)
    if rank >= size:
        raise RecipeError(f"RANK={rank} with WORLD_SIZE={size}: ranks go from 0 to {size - 1}; {_FIX}")
    return Place(rank, size, local_rank)


def place_or_alone() -> Place:
    """As `read_place`, but alone where the environment makes no sense: for what must work in any environment."""
    try:
        return read_place()
    except RecipeError:
        return Place()


def refuse_separate_tasks(environment: Mapping[str, str] | None = None) -> None:
    """RecipeError when srun or mpirun started several tasks that know nothing of each other: each would train alone."""
    given = os.environ if environment is None else environment
    if "WORLD_SIZE" in given:
        return
    tasks = {"srun": _srun_tasks(given), "mpirun": given.get("OMPI_COMM_WORLD_SIZE") or given.get("PMI_SIZE")}
    for launcher, found in tasks.items():
        if found and found.isdecimal() and int(found) > 1:
            raise RecipeError(
                f"{launcher} started {found} tasks, which would train {found} times the same: start one task a machine "
                "that runs torchrun --nproc-per-node N -m inl_cli ..., or, for runs of their own, each with one task"
            )


def _srun_tasks(given: Mapping[str, str]) -> str | None:
    """How many tasks srun started, this one among them; None when srun did not start this process."""
    if "SLURM_PROCID" not in given:
        return None
    # A batch script looks like task 0 of its job, but is a single process, however many tasks the job may start.
    is_script = "SLURM_JOB_ID" in given and given["SLURM_PROCID"] == "0"
    return given.get("SLURM_STEP_NUM_TASKS", None if is_script else given.get("SLURM_NTASKS"))


def _number(given: Mapping[str, str], name: str, *, least: int) -> int:
    text = given.get(name, str(least)).strip()
    if not (text.isascii() and text.isdigit() and len(text) <= _LONGEST_NUMBER and int(text) >= least):
        raise RecipeError(f"{name}={text[:40]!r} in the environment: not a whole number from {least} up; {_FIX}")
    return int(text)
