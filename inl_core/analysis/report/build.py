"""From runs to a report: which sections there are, and in which order."""

from collections.abc import Callable, Sequence
from pathlib import Path

from inl_core.analysis.report.examination import Examined
from inl_core.analysis.report.history import history_section
from inl_core.analysis.report.parts import Finding, Report, Section
from inl_core.analysis.report.recipes import recipe_findings, recipe_section
from inl_core.analysis.report.runs import RunRecord, open_runs
from inl_core.analysis.report.tasks import task_findings, task_sections
from inl_core.analysis.report.training import training_findings, training_section


def compare_runs(paths: Sequence[Path], note: Callable[[str], None] = lambda text: None) -> Report:
    """Curves, budgets and recipes of runs, by their files alone; `note` and what is raised are as in `open_runs`."""
    findings, sections = _of_files(open_runs(paths, note))
    return Report(f"{len(paths)} runs compared", findings, sections)


def report_runs(
    paths: Sequence[Path],
    *,
    examine_run: Callable[[RunRecord], Examined | None] = lambda run: None,
    note: Callable[[str], None] = lambda text: None,
) -> Report:
    """Everything there is to say of one or several runs; `note` and what is raised are those of `open_runs`.

    Args:
        examine_run: what to say of the run's newest checkpoint; None where there is nothing.
    """
    runs = open_runs(paths, note)
    findings, sections = _of_files(runs)
    for run in runs:
        if found := history_section(run):
            sections.append(found[0])
            findings += found[1]
        if examined := examine_run(run):
            sections.append(examined.section)
            findings += examined.findings
    return Report(", ".join(run.name for run in runs), findings, sections)


def _of_files(runs: Sequence[RunRecord]) -> tuple[list[Finding], list[Section]]:
    findings, sections = [*training_findings(runs)], [training_section(runs)]
    if len(runs) > 1:
        findings += recipe_findings(runs)
        sections.append(recipe_section(runs))
    return [*findings, *task_findings(runs)], [*sections, *task_sections(runs)]
