"""Which checkpoints of a run stay: the last ones, every n-th, the best; and what a killed save left is cleared away.

- Only intact checkpoints are counted, and only those up to the run's current step: a run that went back to an earlier
  checkpoint has found the later ones damaged. Damaged and later ones are left as they are, never removed.
- Intact here means that every file is there in its size: checksums of gigabytes are for a resume, not for every save.
"""

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from inl_core.errors import ArtefactError
from inl_core.files import ASIDE
from inl_core.inference.checkpoint_files import checkpoint_step, list_checkpoints, verify_checkpoint

TRIAL = "checkpoints.trial"
"""Where a run tries to save before its first step."""


def complete_checkpoints(parent: Path, step: int) -> dict[int, Path]:
    """The checkpoints up to `step` whose files are all there in their sizes, by step, oldest first."""
    return {
        checkpoint_step(path): path
        for path in list_checkpoints(parent)
        if checkpoint_step(path) <= step and _is_complete(path)
    }


def best_checkpoint(saved: Mapping[int, Path], scores: Mapping[int, float]) -> int | None:
    """Of the saved steps the one with the lowest score, the earlier of equals; None when none was scored."""
    return min((step for step in sorted(saved) if step in scores), key=lambda step: scores[step], default=None)


def retain(
    parent: Path, *, step: int, every: int, keep_last: int, keep_every: int | None, scores: Mapping[int, float]
) -> list[Path]:
    """Delete the intact checkpoints that no rule keeps; they come back.

    Args:
        step: the run's current step, whose own checkpoint always stays.
        every: steps between the checkpoints that are due. One that was saved between them for its score counts among
            the last only where too few others are left.
        scores: of steps that were evaluated on the same text, lower is better; the best one that is saved stays.
    """
    saved = complete_checkpoints(parent, step)
    for_score = {at for at in saved if at in scores and every and at % every}
    last = sorted(saved, key=lambda at: (at not in for_score, at))[-keep_last:]
    kept = {step, best_checkpoint(saved, scores), *last}
    removed = [path for at, path in saved.items() if at not in kept and not (keep_every and at % keep_every == 0)]
    for path in removed:
        remove_checkpoint(path)
    return removed


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; a kill meanwhile leaves a directory that nobody takes for one. It may stay if it must."""
    doomed = path.with_name(f"{path.name}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    with suppress(OSError):
        path.replace(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(run: Path) -> None:
    """Clear away what a killed process had half written below a run's directory; nobody else may be training there."""
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
