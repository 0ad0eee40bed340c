"""`inl inspect` and `inl inspect-params`: what an artefact holds, and what the dynamics of a trained model do."""

import csv as csv_module
import shlex
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.early import check_checkpoint, check_place
from inl_cli.loading import check_source, open_default_or_text, open_model
from inl_cli.options import (
    CheckpointArgument,
    JsonOption,
    QuietOption,
    check_page,
    given_place,
    path_option,
    run_argument,
    run_option,
)
from inl_cli.parameters_view import show_parameters
from inl_cli.progress import amount
from inl_core.errors import ArtefactError, RecipeError

if TYPE_CHECKING:
    from inl_core.analysis.inspection import Overview
    from inl_core.analysis.parameters import ParameterReport

_LONGEST_TABLE = 12

PathArgument = Annotated[
    Path, run_argument("PATH", "A recipe, or the directory of a data set, a run or a checkpoint.", given_place)
]
MeasuredTextOption = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="SOURCE",
        help="Measure on this text, in any form that prepare-data reads; default the run's validation split where it "
        "is at hand.",
    ),
]
MeasuredTokensOption = Annotated[int, typer.Option("--max-tokens", "--tokens", min=1, help="Tokens to measure on.")]
AgainstOption = Annotated[
    Path | None,
    run_option("--against", help="Another checkpoint or run of the same model: show how far each figure is from it."),
]
PageOption = Annotated[Path | None, path_option("--output", "-o", help="Also write it to this HTML file, as charts.")]
CsvOption = Annotated[bool, typer.Option("--csv", help="Print the layers' statistics as CSV on stdout.")]


@errors_to_exit_codes
def inspect(path: PathArgument, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Show the key facts of a recipe, a data set, a run or a checkpoint."""
    console = Console(json=json, quiet=quiet)
    check_place(path)
    from inl_core.analysis.inspection import inspect_path

    overview = inspect_path(path)
    head = {"kind": overview.kind, "path": overview.path, "problem": overview.problem}
    console.result(head | overview.sections, lambda: _show_overview(console, overview))
    if overview.problem:
        raise ArtefactError(overview.problem)


@errors_to_exit_codes
def inspect_params(
    checkpoint: CheckpointArgument = None,
    text: MeasuredTextOption = None,
    max_tokens: MeasuredTokensOption = 2048,
    against: AgainstOption = None,
    csv: CsvOption = False,
    output: PageOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what the dynamics of each layer learned, and what they do on real text."""
    if csv and json:
        raise RecipeError("--csv and --json: give one of them")
    check_page(output)
    console = Console(json=json, quiet=quiet)
    check_source(None, text)
    check_checkpoint(against)
    loaded = open_model(console, checkpoint)

    from inl_core.analysis.parameters import report_parameters
    from inl_core.analysis.report.learned import parameter_findings

    other = None if against is None else open_model(console, against)
    measured = open_default_or_text(console, loaded, text)
    report = report_parameters(loaded, measured, max_tokens=max_tokens, against=other)
    if output:
        from inl_core.analysis.report.documents import parameters_page
        from inl_core.analysis.report.page import write_page

        write_page(parameters_page(report, str(loaded.path)), output)
        console.info(f"written to {output}")
    if csv:
        _write_csv(report)
    else:
        console.result(
            {
                "checkpoint": loaded.path,
                "step": loaded.step,
                "findings": [said for said, _ in parameter_findings(report)],
                **asdict(report),
            },
            lambda: show_parameters(console, report, f"{loaded.path}"),
        )


def _show_overview(console: Console, overview: "Overview") -> None:
    console.write(f"{overview.kind} {overview.path}\n")
    for title, section in overview.sections.items():
        console.write("\n")
        if isinstance(section, dict):
            facts = [(key.replace("_", " "), _shown(key, value)) for key, value in section.items()]
            console.table(title, ("", ""), facts)
        elif section:
            _show_rows(console, title, section)


def _show_rows(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    # A model without an integrator has no iterations.
    told = (key for row in rows for key, value in row.items() if value is not None and (value or key != "iterations"))
    columns = list(dict.fromkeys(told))
    if len(rows) > _LONGEST_TABLE:
        title += f" (the last {_LONGEST_TABLE} of {len(rows):,})"
    cells = [[_shown(key, row.get(key)) for key in columns] for row in rows[-_LONGEST_TABLE:]]
    console.table(title, [column.replace("_", " ") for column in columns], cells)


def _shown(key: str, value: Any) -> Any:
    """A value as people read it: sizes in bytes, shares in percent, short fingerprints, lists on one line."""
    if value is None or isinstance(value, bool):
        return value
    if key == "bytes" or key.endswith("_bytes") or key.startswith("bytes_on"):
        return amount(value, "B")
    if key == "time" and isinstance(value, float):
        return datetime.fromtimestamp(value).astimezone().isoformat(timespec="seconds")
    if key == "command" and isinstance(value, list):
        return shlex.join(map(str, value))
    if key == "share":
        return f"{value:.1%}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or None
    return f"{value[:16]}..." if isinstance(value, str) and len(value) == 64 else value


def _write_csv(report: "ParameterReport") -> None:
    """The rows without their histograms, which are no single figures."""
    columns = list(dict.fromkeys(name for row in report.layers for name in row if name != "histogram"))
    writer = csv_module.DictWriter(sys.stdout, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(report.layers)
