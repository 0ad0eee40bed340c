"""`inl report` and `inl compare`: what runs and their models say, as one HTML file, a terminal's tables, or JSON."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.early import check_runs, check_text
from inl_cli.loading import open_default_or_text, open_model
from inl_cli.options import DeviceOption, JsonOption, QuietOption, TextOption, check_page, path_option, run_argument
from inl_core.errors import RecipeError
from inl_core.files import output_file, refuse_no_directory

if TYPE_CHECKING:
    from inl_core.analysis.report.parts import Part, Report

RunsArgument = Annotated[list[Path], run_argument("RUN...", "One or several runs, e.g. runs/tiny runs/tiny-v4.")]
CsvOption = Annotated[
    Path | None, path_option("--csv", help="Also write every table to this directory, each as a CSV file.")
]
TablesOption = Annotated[
    Literal["none", "short", "all"],
    typer.Option("--tables", help="Which tables to print: none, those of up to 24 rows, or all."),
]
_LONGEST_TABLE = 24


@errors_to_exit_codes
def report(
    runs: RunsArgument,
    output: Annotated[
        Path | None,
        path_option("--output", "-o", help="The HTML file; default reports/report.html in the first run's directory."),
    ] = None,
    text: TextOption = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "--tokens", min=1, help="Measure each checkpoint on the first N tokens.")
    ] = 8192,
    device: DeviceOption = "auto",
    csv: CsvOption = None,
    tables: TablesOption = "none",
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write one HTML file that shows a run, or several: findings, curves, recipes, every number as a table.

    inl report runs/tiny --output tiny.html
    """
    console = Console(json=json, quiet=quiet)
    page = output or runs[0] / "reports" / "report.html"
    _check_outputs(page, csv)
    check_runs(runs)
    check_text(text)
    from inl_core.analysis.report.build import report_runs
    from inl_core.analysis.report.examination import examine
    from inl_core.analysis.report.parts import Section
    from inl_core.analysis.report.runs import RunRecord
    from inl_core.inference.checkpoint_files import list_checkpoints

    def examine_run(run: RunRecord) -> Section | None:
        if not list_checkpoints(run.path / "checkpoints"):
            console.info(f"{run.path}: has no checkpoint yet, so only its files are shown")
            return None
        loaded = open_model(console, run.path, device)
        source = open_default_or_text(console, loaded, text)
        with console.progress() as progress:
            progress.start(f"measuring {run.name}", "passes")
            return examine(run.name, loaded, source, max_tokens=max_tokens, progress=progress.update)

    found = report_runs(runs, examine_run=examine_run, note=console.warn)
    _hand_over(console, found, page, csv, tables)


@errors_to_exit_codes
def compare(
    runs: RunsArgument,
    output: Annotated[Path | None, path_option("--output", "-o", help="Also write it to this HTML file.")] = None,
    csv: CsvOption = None,
    tables: TablesOption = "short",
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare runs by their curves, at equal tokens, seconds and FLOPs, and by their recipes.

    inl compare runs/tiny runs/tiny-v4 --output compared.html
    """
    if len(runs) < 2:
        raise RecipeError(f"{runs[0]}: a comparison needs two runs or more; `inl report {runs[0]}` shows one")
    _check_outputs(output, csv)
    console = Console(json=json, quiet=quiet)
    check_runs(runs)
    from inl_core.analysis.report.build import compare_runs

    _hand_over(console, compare_runs(runs, console.warn), output, csv, tables)


def _check_outputs(output: Path | None, csv: Path | None) -> None:
    check_page(output)
    if csv:
        refuse_no_directory(csv, "--csv")


def _hand_over(console: Console, found: "Report", output: Path | None, csv: Path | None, tables: str) -> None:
    """Write the page and the tables that are wanted, and show the same numbers."""
    if csv:
        _write_tables(found, csv)
        console.info(f"{len(found.parts)} tables written to {csv}")
    if output:
        from inl_core.analysis.report.page import write_page

        write_page(found, output)
    data = {**found.summary(), "file": output}
    console.result(data, lambda: _show(console, found, tables))
    if output:
        console.info(f"written to {output}")


def _write_tables(found: "Report", directory: Path) -> None:
    """KEY.csv for each part, without what a file's name cannot hold."""
    import pandas as pd

    directory.mkdir(parents=True, exist_ok=True)
    for part in found.parts:
        name = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in part.key)
        pd.DataFrame(part.rows, columns=list(part.columns)).to_csv(output_file(directory / f"{name}.csv"), index=False)


def _show(console: Console, found: "Report", tables: str) -> None:
    """The findings under the notes of their sections, and the tables that are wanted."""
    for section in found.sections:
        if section.findings:
            note = f"{section.note}\n" if section.note else ""
            told = "".join(f"- {finding.sentence}\n" for finding in section.findings)
            console.write(f"{section.title}\n{note}{told}\n")
    most = {"none": -1, "short": _LONGEST_TABLE, "all": sys.maxsize}[tables]
    for part in found.parts:
        if len(part.rows) <= most:
            _show_table(console, part)
    if left_out := sum(len(part.rows) > most for part in found.parts):
        told = "1 table is" if left_out == 1 else f"{left_out} tables are"
        console.write(f"{told} not shown here; --tables all prints all of them, --json and HTML have them.\n")


def _show_table(console: Console, part: "Part") -> None:
    columns, rows = [name.replace("_", " ") for name in part.columns], part.rows
    if len(columns) > len(rows) + 4:  # a few wide rows are read more easily from top to bottom
        rows, columns = list(zip(columns, *rows, strict=True)), [""] * (len(rows) + 1)
    console.table(part.title, columns, rows)
    console.write("\n")
