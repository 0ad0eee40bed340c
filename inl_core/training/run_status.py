"""How a run stands: empty, running, done, preempted, failed or resumable. It is read in a moment and imports no torch.

- A session that a signal or a time limit stopped leaves preempted.json, one that an error ended leaves failed.json. The
  next session removes both as soon as it owns the run, so they always speak of the last one.
- A process that was killed leaves neither.
"""

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from inl_core.errors import ArtefactError, InlError, RecipeError
from inl_core.files import is_directory, read_json, shortened, write_whole
from inl_core.inference.checkpoint_files import (
    CONFIG,
    WEIGHTS,
    checkpoint_step,
    is_checkpoint,
    list_checkpoints,
    nearest_run,
    verify_checkpoint,
)
from inl_core.recipe import Recipe
from inl_core.recipe.load import load_recipe
from inl_core.training.claim import OWNER, RANKS, find_holder
from inl_core.training.metrics import read_last_row

PREEMPTED, FAILED = "preempted.json", "failed.json"
"""The files that a session leaves, for a scheduler, when it was stopped and when an error ended it."""
START_ANEW = "start a new run with another --run-dir"
"""The advice for a directory that neither `inl resume` nor `inl train` can use."""
_LONGEST_REASON = 1000

State = Literal["done", "preempted", "resumable", "running", "empty", "failed"]


@dataclass(frozen=True)
class Ending:
    """The end of a run that has nothing left to do."""

    checkpoint: Path
    step: int
    tokens: int
    """Target tokens that it was trained on."""
    evaluation: dict[str, Any] | None
    """The final scores by name; None where no target token was met."""


@dataclass(frozen=True)
class RunStatus:
    """How a run stands."""

    run: Path
    state: State
    """done: at its last step, saved and evaluated. running: a process owns it. preempted: a signal or a time limit
    stopped it in good order. failed: an error ended the last session. resumable: the last session was killed, or
    crashed, without a word. empty: nothing has been started here."""
    reason: str = ""
    """Who is running it, what stopped it, or the error."""
    recipe: Recipe | None = None
    """The run's recipe; None where it cannot be read."""
    checkpoint: Path | None = None
    """The newest whole checkpoint, from which a session goes on; None where it would begin at step 0."""
    ending: Ending | None = None
    """What a run that is done has reached."""

    @property
    def step(self) -> int:
        """The step of the newest whole checkpoint."""
        return checkpoint_step(self.checkpoint) if self.checkpoint else 0


def read_status(run: Path) -> RunStatus:
    """How the run in a directory stands. Of its checkpoints the files' sizes are checked, and not their checksums.

    Raises:
        RecipeError: `run` is a file.
        ArtefactError: it is a checkpoint, or holds something else than a run.
    """
    check_is_run_directory(run)
    if not run.is_dir():
        return RunStatus(run, "empty")
    checkpoint = newest_whole_checkpoint(run)
    recipe = _read_recipe(run, checkpoint)
    status = RunStatus(run, "resumable", recipe=recipe, checkpoint=checkpoint)
    if holder := find_holder(run):
        return replace(status, state="running", reason=holder)
    if recipe and (ending := read_ending(run, recipe.training.num_steps)):
        return replace(status, state="done", ending=ending)
    words: tuple[tuple[str, str, State], ...] = ((PREEMPTED, "signal", "preempted"), (FAILED, "error", "failed"))
    for name, key, state in words:
        if os.path.lexists(run / name):
            return replace(status, state=state, reason=_word(run / name, key))
    if is_taken(run) and not holds_run(run):
        raise ArtefactError(f"{run}: not a run; {START_ANEW}")
    return status if holds_run(run) else RunStatus(run, "empty")


def read_ending(run: Path, num_steps: int) -> Ending | None:
    """What the run has reached, where its last step is saved and evaluated; else None."""
    checkpoint = newest_whole_checkpoint(run)
    if checkpoint is None or checkpoint_step(checkpoint) != num_steps:
        return None
    try:
        row = read_last_row(run)
    except ArtefactError:
        return None
    if row is None or row["step"] != num_steps or "validation_loss" not in row:
        return None
    scores = {name.removeprefix("validation_"): row[name] for name in row if name.startswith("validation_")}
    return Ending(checkpoint, num_steps, row.get("tokens") or 0, scores if scores["loss"] is not None else None)


def newest_whole_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of which every file is there and has its size; None when there is none."""
    for path in reversed(list_checkpoints(run / "checkpoints")):
        with suppress(ArtefactError, OSError):
            verify_checkpoint(path, purpose="resume", contents=False)
            return path
    return None


def holds_run(path: Path) -> bool:
    """Whether a directory is recognised as a run's, by its recipe or by a checkpoint."""
    return (path / "recipe.yaml").is_file() or bool(list_checkpoints(path / "checkpoints"))


def check_holds_run(path: Path) -> None:
    """ArtefactError where a user named a run and there is none."""
    if not is_directory(path) or not holds_run(path):
        hint = nearest_run(path) or "; a run is a directory such as runs/tiny"
        raise ArtefactError(f"{path}: {'is no run' if path.exists() else 'no such directory'}{hint}")


def is_taken(path: Path) -> bool:
    """Whether a directory holds anything worth keeping; what a run that ended before its first step left is not."""
    if not path.exists():
        return False
    names = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
    if "metrics.jsonl" in names or any((path / "checkpoints").glob("step-*")):
        return True
    left = {OWNER, RANKS, PREEMPTED, FAILED, "checkpoints"}
    return not {"recipe.yaml", "checkpoints"} <= names and bool(names - left)


def check_is_run_directory(path: Path) -> None:
    """Refuse a path that can never be a run's: a file, or a checkpoint, into which nothing may be written.

    Raises:
        RecipeError: it is a file, or a link that leads nowhere.
        ArtefactError: it is a checkpoint.
    """
    if path.is_symlink() and not path.exists():
        raise RecipeError(
            f"{path}: a link that leads nowhere; make the directory {path.readlink()}, or remove the link"
        )
    if path.exists() and not path.is_dir():
        raise RecipeError(
            f"{path}: a file, not a run's directory; `inl train RECIPE` starts a run, `inl resume RUN` continues one"
        )
    real = path.resolve()
    has_files = any(os.path.lexists(real / name) for name in (CONFIG, WEIGHTS))
    if has_files or (is_checkpoint(real) and real.parent.name == "checkpoints"):
        run = Path(os.path.normpath(path / "../.."))
        advice = f"its run is {run}" if (run / "recipe.yaml").is_file() else "name a run instead"
        raise ArtefactError(f"{path}: is a checkpoint; {advice}")


def write_preempted(run: Path, step: int, asked_by: str) -> None:
    """Write that the run, which can go on from `step`, was asked to stop; OSError when it cannot be written.

    Args:
        asked_by: the name of a signal, or of a limit of time_limit.py.
    """
    write_whole(run / PREEMPTED, json.dumps({"step": step, "signal": asked_by, "time": time.time()}))


def write_failed(run: Path, error: Exception) -> None:
    """Write that an error ended the last session; OSError when it cannot be written."""
    word = {"error": shortened(str(error), _LONGEST_REASON), "kind": type(error).__name__, "time": time.time()}
    write_whole(run / FAILED, json.dumps(word))


def remove_words(run: Path) -> None:
    """Remove what the last session left; before anything is refused, or it would be taken for this session's word."""
    for name in (PREEMPTED, FAILED):
        (run / name).unlink(missing_ok=True)


def _word(path: Path, key: str) -> str:
    """What a session left under `key`; empty where that cannot be read."""
    with suppress(ArtefactError):
        return shortened(str(read_json(path, limit=100_000).get(key, "")), _LONGEST_REASON)
    return ""


def _read_recipe(run: Path, checkpoint: Path | None) -> Recipe | None:
    """The run's recipe, or its newest whole checkpoint's where that is damaged; None where neither can be read."""
    for directory in (run, checkpoint):
        with suppress(InlError):
            if directory is not None:
                return load_recipe(directory / "recipe.yaml", allow_pipe=False)
    return None
