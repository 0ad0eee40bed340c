"""How tasks of lm-eval are run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from inl_core.model import Options

Progress = Callable[[str, int, int], None]
"""Is told what is done, how much of it, and of how much."""


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are run."""

    task_path: Path | None = None
    """A folder of task files besides lm-eval's own; paths in them count from it."""
    num_fewshot: int | None = None
    """Solved examples before each question; None leaves it to the task."""
    limit: int | None = None
    """Only the first so many examples of each task."""
    batch_size: int = 16
    options: Options = field(default_factory=Options)
    """Iterations and early stopping."""
    bf16: bool = False
    trust_task_code: bool = False
    """Whether the files in that folder may run Python code; without it, such files are refused."""
