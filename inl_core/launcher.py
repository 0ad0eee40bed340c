"""Which process of a run this is, as torchrun or Slurm's srun say in the environment. It imports no torch.

- WORLD_SIZE decides where it is set, as torchrun does. Where it is 1, this is the only process: then a RANK that some
  other tool left in the environment means nothing.
- Else the variables of srun count, if it started several tasks. They do not say where the tasks meet: that is the first
  host of the node list, and a port that all can derive from the job's number.
- mpirun has no variables that say where to meet, so its tasks are refused.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from inl_core.errors import RecipeError

_LONGEST_NUMBER = 10
_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_FIX = "unset it, or start the processes with torchrun, which sets all of them"
_SRUN_FIX = "start the processes with srun in a job of Slurm, or with torchrun"
_FIRST_PORT, _NUM_PORTS = 10_000, 20_000
"""The ports that jobs of Slurm are given: below those that systems give out by themselves, from 32768 on."""


@dataclass(frozen=True)
class Place:
    """The place of one process among those of a run."""

    rank: int = 0
    """Its number among all processes, from 0."""
    size: int = 1
    """How many processes there are."""
    local_rank: int = 0
    """Its number among those of this machine, which picks its GPU."""
    meeting: str = "env://"
    """Where the processes find each other: the init_method of torch.distributed.init_process_group."""


def read_place(environment: Mapping[str, str] | None = None) -> Place:
    """This process's place, from `environment` (os.environ by default).

    Raises:
        RecipeError: a number is none or does not fit the others, something is missing that several processes need to
            find each other, or mpirun started several tasks, each of which would train alone.
    """
    given = os.environ if environment is None else environment
    if "WORLD_SIZE" in given:
        return _place_by_torchrun(given)
    num_tasks = _srun_tasks(given)
    _refuse_mpirun(given, num_tasks)
    return _place_by_srun(given, num_tasks) if num_tasks > 1 else Place()


def place_or_alone() -> Place:
    """As `read_place`, but alone where the environment makes no sense: for what must work in any environment."""
    try:
        return read_place()
    except RecipeError:
        return Place()


def _place_by_torchrun(given: Mapping[str, str]) -> Place:
    size = _number(given, "WORLD_SIZE", least=1)
    if size == 1:
        return Place()
    missing = [name for name in _NEEDED if not given.get(name)]
    if missing:
        raise RecipeError(f"WORLD_SIZE={size} without {missing[0]} in the environment: {_FIX}")
    rank, local_rank = _number(given, "RANK"), _number(given, "LOCAL_RANK")
    if rank >= size:
        raise RecipeError(f"RANK={rank} with WORLD_SIZE={size}: ranks go from 0 to {size - 1}; {_FIX}")
    return Place(rank, size, local_rank)


def _place_by_srun(given: Mapping[str, str], size: int) -> Place:
    rank, local_rank = (_number(given, name, fix=_SRUN_FIX) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    if rank >= size:
        raise RecipeError(f"SLURM_PROCID={rank} among {size} tasks: they go from 0 to {size - 1}; {_SRUN_FIX}")
    nodes = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST") or ""
    host, port = given.get("MASTER_ADDR") or first_host(nodes), given.get("MASTER_PORT")
    job, step = (_number(given, name, fix=_SRUN_FIX) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    if not host or not (port or given.get("SLURM_JOB_ID")):
        lacking = "SLURM_JOB_ID" if host else "SLURM_JOB_NODELIST"
        raise RecipeError(f"srun started {size} tasks without {lacking} in the environment: {_SRUN_FIX}")
    return Place(rank, size, local_rank, f"tcp://{host}:{port or _FIRST_PORT + (job + step) % _NUM_PORTS}")


def first_host(nodes: str) -> str:
    """The first host of a node list as Slurm writes it: gpu003 of `gpu[003-005,9],login`; "" of an empty list."""
    first = re.match(r"(?:[^,[]|\[[^]]*\]?)*", nodes)
    return re.sub(r"\[([^],-]*)[^]]*\]?", r"\1", first[0] if first else "")


def _refuse_mpirun(given: Mapping[str, str], srun_tasks: int) -> None:
    """RecipeError when mpirun started several tasks; within a job of Slurm, it may have started them by way of srun."""
    by_pmi = given.get("PMI_SIZE", "")  # srun sets this one too
    found = given.get("OMPI_COMM_WORLD_SIZE") or ("" if by_pmi == str(srun_tasks) else by_pmi)
    if _is_several(found):
        raise RecipeError(
            f"mpirun started {found} tasks, which would train {found} times the same: start one task a machine "
            "that runs torchrun --nproc-per-node N -m inl_cli ..., or, for runs of their own, each with one task"
        )


def _srun_tasks(given: Mapping[str, str]) -> int:
    """How many tasks srun started, this one among them; 1 when srun did not start this process."""
    # A batch script looks like task 0 of its job, but is a single process, however many tasks the job may start.
    is_script = "SLURM_JOB_ID" in given and given.get("SLURM_PROCID") == "0"
    found = given.get("SLURM_STEP_NUM_TASKS", "" if is_script else given.get("SLURM_NTASKS", ""))
    return int(found) if "SLURM_PROCID" in given and _is_several(found) else 1


def _is_several(found: str) -> bool:
    return found.isascii() and found.isdecimal() and len(found) <= _LONGEST_NUMBER and int(found) > 1


def _number(given: Mapping[str, str], name: str, *, least: int = 0, fix: str = _FIX) -> int:
    text = given.get(name, str(least)).strip()
    if not (text.isascii() and text.isdigit() and len(text) <= _LONGEST_NUMBER and int(text) >= least):
        raise RecipeError(f"{name}={text[:40]!r} in the environment: not a whole number from {least} up; {fix}")
    return int(text)
