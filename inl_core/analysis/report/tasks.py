"""What runs came to on lm-eval's tasks, as `inl eval --tasks` has kept it in them (inl_core/interop/harness)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from inl_core.analysis.report.parts import Finding, Part, Section
from inl_core.analysis.report.runs import RunRecord
from inl_core.errors import ArtefactError
from inl_core.files import read_json

_COLUMNS = ("run", "step", "task", "metric", "score", "stderr", "examples", "num_fewshot", "lm_eval")
_TOLD = 4
_KEY = "tasks"


def results_path(run: Path, checkpoint: str) -> Path:
    """Where a run keeps what its checkpoint of this name came to."""
    return run / "reports" / f"tasks-{checkpoint}.json"


def task_sections(runs: Sequence[RunRecord]) -> list[Section]:
    """A row for each metric of each task, of the newest checkpoint with results of each run; nothing without any.

    Raises:
        ArtefactError: a file of results is damaged.
    """
    rows = [row for run in runs for row in _rows(run)]
    see = (
        "stderr is lm-eval's standard error over the examples: scores that differ by less than two of it may be equal."
    )
    note = "By `inl eval --tasks`, of the newest checkpoint of each run that was scored so."
    part = Part(_KEY, "Scores on tasks of lm-eval", see, _COLUMNS, rows)
    return [Section("Tasks", [part], note, list(_findings(runs)))] if rows else []


def _findings(runs: Sequence[RunRecord]) -> Iterator[Finding]:
    """The first scores of each run, in one sentence."""
    for run in runs:
        rows = _rows(run)
        told = ", ".join(f"{task} {metric} {score:.4g}" for _, _, task, metric, score, *_ in rows[:_TOLD])
        more = f" and {len(rows) - _TOLD} more" if len(rows) > _TOLD else ""
        if rows:
            yield Finding(f"On tasks {run.name} scores {told}{more} at step {rows[0][1]:,}.", _KEY)


def _rows(run: RunRecord) -> list[tuple[Any, ...]]:
    files = sorted((run.path / "reports").glob(results_path(run.path, "step-*").name))
    if not files:
        return []
    found = read_json(files[-1])
    try:
        return [
            (
                run.name,
                int(found["step"]),
                task,
                metric["name"] if metric["filter"] == "none" else f"{metric['name']}, {metric['filter']}",
                float(metric["value"]),
                metric["stderr"],
                result["examples"],
                result["num_fewshot"],
                result["lm_eval"],
            )
            for task, result in found["tasks"].items()
            for metric in result["metrics"]
        ]
    except (LookupError, TypeError, ValueError, AttributeError):
        raise ArtefactError(f"{files[-1]}: damaged: not what `inl eval --tasks` writes; run it again") from None
