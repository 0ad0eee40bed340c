"""Which checkpoints of a run stay: the last ones, every n-th, and the best; and what a killed save left is removed.

- Only intact checkpoints count, and only those up to the run's current step: a run that went back to an earlier
  checkpoint did so because the later ones are damaged. Damaged and later ones are left as they are.
- Intact means here that every file is there and has its size. Checksums of gigabytes are for a resume, not for every
  save.
"""

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from inl_core.errors import ArtefactError
from inl_core.files import ASIDE
from inl_core.inference.checkpoint_files import checkpoint_step, list_checkpoints, verify_checkpoint
from inl_core.recipe.training import CheckpointSettings

TRIAL = "checkpoints.trial"
"""The directory in which a run tries whether it can save, before its first step."""


def complete_checkpoints(parent: Path, step: int) -> dict[int, Path]:
    """The checkpoints up to `step` of which every file is there and has its size, by step, oldest first."""
    return {
        checkpoint_step(path): path
        for path in list_checkpoints(parent)
        if checkpoint_step(path) <= step and _is_complete(path)
    }


def best_checkpoint(saved: Mapping[int, Path], scores: Mapping[int, float]) -> int | None:
    """Of the saved steps the one with the lowest score, the earlier of equals; None when none was scored."""
    return min((step for step in sorted(saved) if step in scores), key=lambda step: scores[step], default=None)


def retain(parent: Path, step: int, rules: CheckpointSettings, scores: Mapping[int, float]) -> None:
    """Remove the intact checkpoints that no rule of the recipe keeps.

    A checkpoint that was saved for its score, at a step where none was due, counts among the last ones only where too
    few others are left.

    Args:
        step: the run's current step, whose own checkpoint always stays.
        scores: by step, all on the same text, lower is better; the best one that is saved stays.
    """
    saved = complete_checkpoints(parent, step)
    for_score = {at for at in saved if at in scores and rules.every and at % rules.every}
    last = sorted(saved, key=lambda at: (at not in for_score, at))[-rules.keep_last :]
    kept = {step, best_checkpoint(saved, scores), *last}
    for at, path in saved.items():
        if at not in kept and not (rules.keep_every and at % rules.keep_every == 0):
            remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint as far as the disk allows; after a kill, what is left has no checkpoint's name any more."""
    doomed = path.with_name(f"{path.name}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    with suppress(OSError):
        path.replace(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(run: Path) -> None:
    """Remove what a killed process had half written in a run's directory, where nobody else may be training."""
    for path in (*run.glob("checkpoints/step-*.tmp"), run / TRIAL):
        shutil.rmtree(path, ignore_errors=True)
    for pattern in ("dynamics/step-*.tmp", f".*{ASIDE}", f"reports/.*{ASIDE}"):
        for path in run.glob(pattern):
            path.unlink(missing_ok=True)


def _is_complete(path: Path) -> bool:
    try:
        verify_checkpoint(path, purpose="resume", contents=False)
    except (ArtefactError, OSError):
        return False
    return True
