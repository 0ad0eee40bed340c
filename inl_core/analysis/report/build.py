"""From runs to a report: which sections there are, and in which order."""

from collections.abc import Callable, Sequence
from pathlib import Path

from inl_core.analysis.report.history import history_section
from inl_core.analysis.report.parts import Report, Section
from inl_core.analysis.report.recipes import recipe_section
from inl_core.analysis.report.runs import RunRecord, open_runs
from inl_core.analysis.report.tasks import task_sections
from inl_core.analysis.report.training import training_section


def compare_runs(paths: Sequence[Path], note: Callable[[str], None] = lambda text: None) -> Report:
    """Curves, budgets and recipes of runs, by their files alone; `note` and what is raised are as in `open_runs`."""
    return Report(f"{len(paths)} runs compared", _of_files(open_runs(paths, note)))


def report_runs(
    paths: Sequence[Path],
    *,
    examine_run: Callable[[RunRecord], Section | None] = lambda run: None,
    note: Callable[[str], None] = lambda text: None,
) -> Report:
    """Everything there is to say of one or several runs; `note` and what is raised are those of `open_runs`.

    Args:
        examine_run: what to say of the run's newest checkpoint; None where there is nothing.
    """
    runs = open_runs(paths, note)
    sections = _of_files(runs)
    for run in runs:
        sections += [found for found in (history_section(run), examine_run(run)) if found]
    return Report(", ".join(run.name for run in runs), sections)


def _of_files(runs: Sequence[RunRecord]) -> list[Section]:
    recipes = [recipe_section(runs)] if len(runs) > 1 else []
    return [training_section(runs), *recipes, *task_sections(runs)]
