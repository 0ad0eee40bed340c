"""`inl convergence-report`: whether the states of a checkpoint converge, oscillate, drift or are ignored."""

from pathlib import Path
from typing import Annotated, Any

import typer

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.early import check_checkpoint
from inl_cli.loading import check_source, open_model, open_source
from inl_cli.options import (
    CheckpointArgument,
    DataOption,
    DeviceOption,
    JsonOption,
    QuietOption,
    SplitOption,
    TextOption,
    path_option,
)
from inl_core.files import refuse_no_directory

OutputOption = Annotated[
    Path | None,
    path_option("--output", "-o", help="Directory of the report; default reports/convergence-step-N of the run."),
]
TokensOption = Annotated[int, typer.Option("--max-tokens", "--tokens", min=1, help="Measure on the first N tokens.")]
WindowOption = Annotated[
    int | None, typer.Option(help="Tokens the model sees at once; default what it was trained on.")
]
FollowedOption = Annotated[
    int | None,
    typer.Option(
        "--iterations",
        metavar="N",
        max=10_000,
        help="Iterations to follow in each layer; default 2 T, and at least 8. Not for v5, which is followed whole.",
    ),
]
EpsilonOption = Annotated[float, typer.Option(help="A dimension has converged when it is closer than this.")]
SampleOption = Annotated[
    int, typer.Option("--sample-tokens", min=1, help="About how many tokens' trajectories are kept.")
]


@errors_to_exit_codes
def convergence_report(
    checkpoint: CheckpointArgument = None,
    output: OutputOption = None,
    data: DataOption = None,
    text: TextOption = None,
    split: SplitOption = "validation",
    max_tokens: TokensOption = 16384,
    window: WindowOption = None,
    iterations: FollowedOption = None,
    epsilon: EpsilonOption = 0.1,
    sample_tokens: SampleOption = 256,
    device: DeviceOption = "auto",
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Report what each layer's states do on real text: tables, trajectories, figures and a verdict in words."""
    console = Console(json=json, quiet=quiet)
    check_source(data, text)
    if output:
        refuse_no_directory(output, "--output")
    check_checkpoint(checkpoint)
    from inl_core.analysis.convergence.report import (
        default_directory,
        report_convergence,
        require_dynamics,
        write_report,
    )
    from inl_core.analysis.convergence.stream_statistics import coefficient_table

    loaded = open_model(console, checkpoint, device)
    require_dynamics(loaded)
    source = open_source(console, loaded, data, text, split)
    with console.progress() as progress:
        progress.start("measuring", "passes")
        report, sample = report_convergence(
            loaded,
            source,
            max_tokens=max_tokens,
            num_iterations=iterations,
            window=window,
            epsilon=epsilon,
            sample_tokens=sample_tokens,
            progress=progress.update,
        )
    directory = output or default_directory(loaded.path)
    files, warning = write_report(report, sample, directory, coefficient_table(loaded.model))
    summary = {**report.summary(), "directory": directory, "files": files}
    show = _show_stream if report.terms else _show
    console.result(summary, lambda: show(console, summary))
    if warning:
        console.warn(warning)


def _show(console: Console, summary: dict[str, Any]) -> None:
    from inl_core.analysis.convergence.markdown import sentences

    own, followed = summary["num_iterations"], summary["iterations_followed"]
    title = f"{summary['checkpoint']} on {summary['tokens']:,} tokens of {summary['text']}"
    title += f"\nT = {own}, followed for {followed}; rms figures, medians over tokens, distances at T"
    console.table(title, _COLUMNS, [_cells(layer) for layer in summary["layers"]])
    console.write("\n" + "".join(f"{sentence}\n" for sentence in sentences(summary)) + "\n")
    bits = summary["bits_per_byte"]
    rows = [_bits_cells(row["iterations"], row) for row in bits["by_iterations"]]
    own_bits = _bits_cells(0, {"change": None, "standard_error": None, **bits})[1]
    title = f"Bits per byte with T iterations in every layer (0: skipped); the model as it is: {own_bits}"
    console.table(title, ("T", *_BITS_COLUMNS), rows)
    console.write("\n")
    rows = [_bits_cells(row["layer"], row) for row in bits["without_layer"]]
    console.table("Bits per byte with one layer's integrator skipped", ("layer", *_BITS_COLUMNS), rows)
    console.write("\n")
    rows = [_bits_cells(row["term"], row) for row in bits["without_term"]]
    console.table("Bits per byte with one term left out of every layer", ("term", *_BITS_COLUMNS), rows)
    console.write(f"\nwritten to {summary['directory']}: {', '.join(summary['files'])}\n")


def _show_stream(console: Console, summary: dict[str, Any]) -> None:
    from inl_core.analysis.convergence.markdown import sentences, shown
    from inl_core.analysis.convergence.stream_markdown import share_tables, without_tables
    from inl_core.training.depth import place_name

    rows = summary["layers"][0]["iterations"][1:]
    title = f"{summary['checkpoint']} on {summary['tokens']:,} tokens of {summary['text']}"
    title += f"\none system of {len(rows)} steps: {', '.join(summary['terms'])}"
    motion = ("state_rms", "velocity_rms", "residual", "distance_end")
    cells = [(place_name(row), *(row[name]["p50"] for name in motion)) for row in rows]
    console.table(f"{title}\nrms figures, medians over tokens", ("", "x", "v", "moves", "to its end"), cells)
    console.write("\n" + "".join(f"{sentence}\n" for sentence in sentences(summary)) + "\n")
    for title, columns, shares in share_tables(rows):
        cells = [(place_name(row), *own) for row, own in zip(rows, shares, strict=True)]
        console.table(title, ("", *columns), cells)
        console.write("\n")
    console.write(f"Bits per byte, the model as it is: {shown(summary['bits_per_byte']['bits_per_byte'])}\n")
    for title, columns, cells in without_tables(summary):
        console.write("\n")
        console.table(title, ("", *columns[1:]), cells)
    console.write(f"\nwritten to {summary['directory']}: {', '.join(summary['files'])}\n")


_COLUMNS = ("layer", "the states", "moves first", "at T", "last", "turns", "to mu", "to fixed point", "spectral radius")
_BITS_COLUMNS = ("bits per byte", "change", "standard error")


def _cells(layer: dict[str, Any]) -> tuple[Any, ...]:
    """Medians over tokens: movement at the first iteration, at T and at the last one followed; all else at T."""
    rows = layer["iterations"]
    used = rows[min(layer["used_iterations"], len(rows) - 1)]
    return (
        layer["layer"],
        layer["verdict"]["word"],
        *(row["residual"]["p50"] for row in (rows[1], used, rows[-1])),
        f"{layer['evidence']['num_turns']:.1f}",
        used["distance_mu"]["p50"],
        used["distance_fixed_point"]["p50"],
        used["stability"]["spectral_radius"]["p50"],
    )


def _bits_cells(key: int | str, row: dict[str, Any]) -> tuple[Any, ...]:
    from inl_core.analysis.convergence.markdown import signed

    error = None if row["standard_error"] is None else f"{row['standard_error']:.4f}"
    bits = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
    return (key, bits, signed(row["change"]), error)
