"""`inl inspect` and `inl inspect-params`: what an artefact holds, and what the dynamics of a trained model do."""

import csv as csv_module
import sys
from collections.abc import Iterable
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.loading import open_default_or_text, open_model
from inl_cli.options import CheckpointArgument, JsonOption, QuietOption, path_argument
from inl_cli.progress import amount
from inl_core.errors import ArtefactError, RecipeError

if TYPE_CHECKING:
    from inl_core.analysis.inspection import Overview
    from inl_core.analysis.parameters import ParameterReport

_LONGEST_TABLE = 12

PathArgument = Annotated[
    Path, path_argument("PATH", "A recipe, or the directory of a data set, a run or a checkpoint.")
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
CsvOption = Annotated[bool, typer.Option("--csv", help="Print the layers' statistics as CSV on stdout.")]


@errors_to_exit_codes
def inspect(path: PathArgument, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Show the key facts of a recipe, a data set, a run or a checkpoint."""
    from inl_core.analysis.inspection import inspect_path

    console = Console(json=json, quiet=quiet)
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
    csv: CsvOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what the dynamics of each layer learned, and what they do on real text."""
    if csv and json:
        raise RecipeError("--csv and --json: give one of them")
    console = Console(json=json, quiet=quiet)
    loaded = open_model(console, checkpoint)

    from inl_core.analysis.parameters import report_parameters

    measured = open_default_or_text(console, loaded, text)
    report = report_parameters(loaded, measured, max_tokens=max_tokens)
    if csv:
        _write_csv(report)
    else:
        console.result(
            {"checkpoint": loaded.path, "step": loaded.step, **asdict(report)},
            lambda: _show_report(console, report, f"{loaded.path}"),
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
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if value is not None))
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
    if key == "share":
        return f"{value:.1%}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or None
    return f"{value[:16]}..." if isinstance(value, str) and len(value) == 64 else value


def _write_csv(report: "ParameterReport") -> None:
    columns = list(dict.fromkeys(name for row in report.layers for name in row))
    writer = csv_module.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(report.layers)


def _show_report(console: Console, report: "ParameterReport", name: str) -> None:
    total = sum(report.parameters.values())
    parts = [(part, number, f"{number / total:.1%}") for part, number in report.parameters.items()]
    console.table(f"{name}: parameters", ("part", "number", "share"), [*parts, ("total", total, "100%")])
    if not report.layers:
        console.write("\nThis model has no integrator: no mu, gamma, phi, alpha, beta or gate to show.\n")
        return
    is_stream = "sub_layer" in report.layers[0]
    _show_learned(console, report, _OF_STREAM if is_stream else _OF_INTEGRATORS)
    console.write(f"\nMeasured on {report.tokens:,} tokens of {report.text}:\n\n")
    if is_stream:
        _show_depth(console, report)
    else:
        _show_measured(console, report)


_OF_INTEGRATORS = {
    "mu": "mu, the learned equilibrium",
    "gamma": "gamma, radians an iteration",
    "phi": "phi, radians",
}
_OF_STREAM = {
    "alpha": "alpha, momentum: the share of its velocity that a channel keeps",
    "transport": "b, transport: the share of the token before's velocity that moves this token, too",
    "anchor": "r, anchor: the share of its own embedding that a token gets back",
    "beta": "beta, the pull towards mu",
    "mu": "mu, the learned equilibrium",
    "gamma": "gamma, radians a step",
    "phi": "phi, radians",
}


def _show_learned(console: Console, report: "ParameterReport", titles: dict[str, str]) -> None:
    """A table for each learned quantity that the model has; mu also with its way from its start, gamma with periods."""
    spread = ("mean", "std", "min", "max")
    for quantity, title in titles.items():
        rows, column = _cells(report, quantity, (*spread, "drift") if quantity == "mu" else spread), ()
        if not rows:
            continue
        if quantity == "mu":
            column = ("distance from start",)
        elif quantity == "gamma":
            periods = (_finite(row["mean"]) for row in report.of("period"))
            rows = [(*row, period) for row, period in zip(rows, periods, strict=True)]
            column = (f"period, {title.split()[-1]}s",)
            title += f" (A = {report.amplitude:.4g})"
        console.write("\n")
        console.table(title, ("layer", *spread, *column), rows)


def _show_measured(console: Console, report: "ParameterReport") -> None:
    columns = ("mean", "std", "p5", "p50", "p95", "saturated")
    gains = [(row["layer"], row["quantity"], *_values(row, columns)) for row in report.layers if "saturated" in row]
    console.table("alpha, beta, gate", ("layer", "", *columns), gains)
    names = [row["quantity"] for row in report.layers if "residual" in row["quantity"]]
    names = ("velocity", *dict.fromkeys(names))  # the layers may differ in their iterations
    console.write("\n")
    titles = [name.replace("residual_", "step ") for name in names]
    title = "rms velocity, and rms change of the state in each iteration"
    console.table(title, ("layer", *titles), _means(report, names))


def _show_depth(console: Console, report: "ParameterReport") -> None:
    from inl_core.training.depth import share_groups

    motion = {"state": "rms x", "velocity": "rms v", "residual": "rms change of x"}
    console.table("x and v after each step, and how far it moved x", ("", *motion.values()), _means(report, motion))
    for title, names in share_groups({row["quantity"] for row in report.layers}).items():
        rows = [(place, *(_text(mean, ".1%") for mean in means)) for place, *means in _means(report, names)]
        console.write("\n")
        console.table(f"{title}: shares", ("", *names.values()), rows)


def _means(report: "ParameterReport", names: Iterable[str]) -> list[tuple[Any, ...]]:
    """A row for each layer (or sub-layer) that has one of these quantities, with their means."""
    names, found = tuple(names), {}
    for row in report.layers:
        if row["quantity"] in names:
            found.setdefault(_place(row), {})[row["quantity"]] = row["mean"]
    return [(place, *(_finite(means.get(name)) for name in names)) for place, means in found.items()]


def _finite(value: float | None) -> float | None:
    """None, which a table shows as a dash, where there is no number or one that is not finite."""
    return value if value is not None and isfinite(value) else None


def _text(value: float | None, form: str) -> str | None:
    return None if _finite(value) is None else format(value, form)


def _place(row: dict[str, Any]) -> Any:
    from inl_core.training.depth import place_name

    return place_name(row) if "sub_layer" in row else row["layer"]


def _cells(report: "ParameterReport", quantity: str, names: tuple[str, ...]) -> list[tuple[Any, ...]]:
    return [(_place(row), *_values(row, names)) for row in report.of(quantity)]


def _values(row: dict[str, Any], names: tuple[str, ...]) -> list[str | None]:
    return [_text(row[name], ".1%" if name == "saturated" else ".4f") for name in names]
