"""`inl check resume`: a run that is stopped, resumed, killed and resumed is bit for bit the run that never stopped.

    straight   N steps
    parts      N/3 steps, SIGTERM | resumed, SIGKILL after 2N/3 steps | resumed to the end

- Every session is a process of its own (or several, under torchrun), as in real life. It sends itself the signal when
  the row of a certain step is written, so no clock decides where it ends.
- Compared are the last checkpoints (weights, optimizer, progress) and all rows of metrics but their times.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inl_core.errors import InlError
from inl_core.inference.checkpoint_files import checkpoint_step, list_checkpoints, verify_checkpoint
from inl_core.inference.tensor_files import open_tensors, read_tensor
from inl_core.recipe import Recipe
from inl_core.recipe.load import dump_recipe
from inl_core.training.checkpoint import read_progress
from inl_core.training.metrics import read_metrics
from inl_core.training.observer import Observer

FEWEST_STEPS = 6
_TIMES = ("time", "tokens_per_second", "memory_bytes", "validation_seconds")
"""Figures of a row that no two runs share."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Comparison:
    """One kind of things that the two runs have."""

    what: str
    compared: int
    """How many things were compared."""
    difference: str | None
    """The first that differs, and how; None when all are bit for bit the same."""


@dataclass(frozen=True)
class ResumeCheck:
    """What the check did and found."""

    steps: int
    processes: int
    sessions: tuple[str, ...]
    """What each session of the run in parts did."""
    comparisons: tuple[Comparison, ...]

    @property
    def problem(self) -> str | None:
        """The first difference; None when there is none."""
        return next((f"{one.what}: {one.difference}" for one in self.comparisons if one.difference), None)


def overrides_for_check(recipe: Recipe, steps: int) -> list[str]:
    """The changes that make a user's recipe the recipe of a check: short, with a row a step, and known to nobody else.

    Args:
        steps: at least FEWEST_STEPS.
    """
    settings = recipe.training
    tokens = min(settings.evaluation.tokens, 8 * settings.batch_tokens)
    return [
        f"training.steps={steps}",
        "training.tokens=null",
        f"training.checkpoint.every={max(1, steps // 4)}",
        f"training.evaluation.every={max(2, steps // 3)}",
        f"training.evaluation.tokens={tokens}",
        f"training.evaluation.final_tokens={tokens}",
        "training.logging.every=1",
        f"training.logging.dynamics_every={min(settings.logging.dynamics_every, steps // 2)}",
        "training.logging.tensorboard=false",
        "training.logging.wandb=false",
    ]


def check_resume(recipe: Recipe, work: Path, *, processes: int = 1, tell: Tell = lambda text: None) -> ResumeCheck:
    """Train a recipe twice below `work`, once straight and once with a stop and a kill, and compare the two runs.

    Args:
        recipe: with the changes of `overrides_for_check`; its data must be prepared.
        work: an empty directory.
        processes: of each session, started by torchrun if they are several.

    Raises:
        InlError: a session did not end as it must, with the last line that it said.
    """
    steps = recipe.training.num_steps
    stop, kill = max(1, steps // 3), max(3, 2 * steps // 3)
    (work / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    sessions = _Sessions(work, processes, tell)
    tell(f"{steps} steps straight")
    sessions.run("straight")
    found = []
    for what, arguments in (
        (f"SIGTERM in step {stop + 1}", ("--stop-after", stop, "--end-by", "TERM")),
        (f"resumed, SIGKILL after step {kill}", ("--resume", "--stop-after", kill, "--end-by", "KILL")),
        ("resumed to the end", ("--resume",)),
    ):
        tell(what)
        sessions.run("parts", *arguments)
        found.append(f"{what}; the newest checkpoint is then of step {sessions.newest('parts'):,}")
    last = f"checkpoints/step-{steps:08d}"
    return ResumeCheck(steps, processes, tuple(found), tuple(_compare(work / "straight", work / "parts", last)))


class _Sessions:
    """Starts the sessions of the two runs; what they say goes to files beside them."""

    def __init__(self, work: Path, processes: int, tell: Tell) -> None:
        self.work, self.processes, self.tell = work, processes, tell

    def run(self, run: str, *arguments: object) -> None:
        """One session, up to its end."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        start = [sys.executable, *(launcher if self.processes > 1 else []), "-m", "inl_cli", "check", "session"]
        command = [*start, str(self.work / "recipe.yaml"), str(self.work / run), *map(str, arguments)]
        log = self.work / f"{run}.log"
        with log.open("wb") as file:
            code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False).returncode
        wanted = {"TERM": 75, "KILL": -signal.SIGKILL}.get(str(arguments[-1]) if arguments else "", 0)
        if wanted and self.processes > 1:
            wanted = 1  # torchrun's own
        if code != wanted:
            told = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
            raise InlError(f"a session ended with exit code {code}, not {wanted}: {told[-1]}")

    def newest(self, run: str) -> int:
        """The step of the newest checkpoint."""
        return max(map(checkpoint_step, list_checkpoints(self.work / run / "checkpoints")), default=0)


class SignalsItself(Observer):
    """Sends its own process a signal when the row of a step is written."""

    def __init__(self, step: int | None, number: signal.Signals, warn: Tell) -> None:
        self.step, self.number, self.on_warning = step, number, warn  # type: ignore[method-assign]

    def on_metrics(self, row: dict[str, Any]) -> None:
        """A row was written."""
        if row["step"] == self.step:
            os.kill(os.getpid(), self.number)


def _compare(straight: Path, parts: Path, last: str) -> Iterator[Comparison]:
    rows = [[_without_times(row) for row in read_metrics(run)] for run in (straight, parts)]
    yield _compare_rows(*rows)
    for run in (straight, parts):
        verify_checkpoint(run / last, purpose="resume")
    names = [sorted(file.relative_to(straight / last).as_posix() for file in (straight / last).rglob("*.safetensors"))]
    names += [sorted(file.relative_to(parts / last).as_posix() for file in (parts / last).rglob("*.safetensors"))]
    if names[0] != names[1]:
        yield Comparison("files of tensors", len(names[0]), f"{', '.join(names[0])}, and {', '.join(names[1])}")
        return
    for name in names[0]:
        yield compare_tensors(name, straight / last / name, parts / last / name)
    times = {"seconds", "save_seconds"}
    first, second = (read_progress(run / last).model_dump(exclude=times) for run in (straight, parts))
    wrong = next((f"{key} differs" for key in first if first[key] != second[key]), None)
    yield Comparison("progress", len(first), wrong)


def _without_times(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in _TIMES}


def _compare_rows(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> Comparison:
    difference = None
    if len(first) != len(second):
        difference = f"{len(first)} rows, and {len(second)}"
    for one, other in zip(first, second, strict=False):
        keys = [key for key in one | other if one.get(key) != other.get(key)]
        if keys:
            difference = f"step {one['step']}: {keys[0]} is {one.get(keys[0])}, and {other.get(keys[0])}"
            break
    return Comparison("rows of metrics", len(first), difference)


def compare_tensors(what: str, first: Path, second: Path) -> Comparison:
    """Compare two safetensors files bit for bit, and name the first tensor that differs."""
    with open_tensors(first) as ours, open_tensors(second) as theirs:
        names, others = sorted(ours.keys()), set(theirs.keys())
        if missing := sorted(set(names) ^ others):
            return Comparison(what, len(names), f"{missing[0]} is in one of them alone")
        for name in names:
            one, other = read_tensor(first, name, ours), read_tensor(second, name, theirs)
            if not _same_bits(one, other):
                return Comparison(what, len(names), f"{name} differs{_by(one, other)}")
    return Comparison(what, len(names), None)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _by(one: Tensor, other: Tensor) -> str:
    if one.shape != other.shape:
        return f" in its shape: {list(one.shape)}, and {list(other.shape)}"
    differences = (one.double() - other.double()).abs()
    return f" in {int((differences != 0).sum()):,} of {one.numel():,} numbers, by up to {differences.max():.3g}"
