"""How long a run may still go on: `training.max_hours`, and the end of the Slurm job that it runs in.

A run that would be ended from outside stops itself before, early enough to save. Rank 0 alone looks at the clock; the
other ranks learn of it as of a signal (interruption.py).
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

MAX_HOURS, SLURM = "training.max_hours", "Slurm's time limit"
"""What a limit is called in messages and in preempted.json."""
_MARGIN = 10.0
"""Seconds kept free besides the measured ones, for what is not measured: a slower disk, the end of the process."""


@dataclass
class TimeLimit:
    """The moment at which the process must have ended."""

    name: str
    """MAX_HOURS or SLURM."""
    end: float
    """By time.monotonic()."""
    needed: float = 0.0
    """Seconds that it may take from now until a step is over, another one is, and the state is saved."""

    def is_near(self) -> bool:
        """Whether the run must stop now, to have saved before the end."""
        return time.monotonic() + self.needed + _MARGIN >= self.end


def find_limit(max_hours: float | None, started: float) -> TimeLimit | None:
    """The limit that comes first, if there is any.

    Args:
        max_hours: the recipe's `training.max_hours`.
        started: when the process began, by time.monotonic().
    """
    limits = [] if max_hours is None else [TimeLimit(MAX_HOURS, started + 3600 * max_hours)]
    left = slurm_seconds_left(os.environ)
    if left is not None:
        limits.append(TimeLimit(SLURM, time.monotonic() + left))
    return min(limits, key=lambda limit: limit.end, default=None)


def slurm_seconds_left(environment: Mapping[str, str]) -> float | None:
    """Seconds until Slurm ends this process's job; None outside of Slurm, and where the job has no limit."""
    job = environment.get("SLURM_JOB_ID")
    if not job:
        return None
    with suppress(ValueError):
        return float(int(environment.get("SLURM_JOB_END_TIME", ""))) - time.time()
    with suppress(OSError, subprocess.SubprocessError):
        squeue = shutil.which("squeue", path=environment.get("PATH"))
        command = [squeue or "squeue", "--noheader", "--job", job, "--format", "%L"]
        left = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=30, check=True).stdout
        return _seconds(left.strip())
    return None


def _seconds(left: str) -> float | None:
    """Seconds in Slurm's days-hours:minutes:seconds; None for UNLIMITED and the like."""
    days, _, clock = left.rpartition("-")
    if not re.fullmatch(r"\d*", days) or not re.fullmatch(r"(\d+:){0,2}\d+", clock):
        return None
    total = 0
    for number in clock.split(":"):
        total = 60 * total + int(number)
    return float(total + 86400 * int(days or 0))
