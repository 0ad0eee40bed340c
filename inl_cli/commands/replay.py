"""`inl replay`: a step that was not finite once more, on a CPU, to see where it goes wrong."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.options import JsonOption, QuietOption, path_argument

if TYPE_CHECKING:
    from inl_core.analysis.replay import Replay

RecordArgument = Annotated[
    Path, path_argument("RECORD", "The flight record of any rank, RUN/reports/nonfinite-step-N-rank-R.json.")
]


@errors_to_exit_codes
def replay(record: RecordArgument, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Take a step that was not finite again, exactly, on a CPU, and name the first tensor that goes bad."""
    from inl_core.files import open_regular

    open_regular(record).close()  # a mistyped path is told before torch is imported, which takes seconds

    from inl_core.analysis.replay import replay as take_again

    console = Console(json=json, quiet=quiet)
    taken = take_again(record, note=console.info, warn=console.warn)
    console.result(_plain(record, taken), lambda: _show(console, taken))


def _plain(path: Path, taken: "Replay") -> dict[str, Any]:
    from inl_core.training.flight_record import describe_examination

    return {
        "record": path,
        "step": taken.record.step,
        "is_finite": taken.is_finite,
        "is_bitwise_as_recorded": not taken.differing,
        "differing": taken.differing,
        "recorded_first_bad": taken.record.first_bad,
        **describe_examination(taken.found),
    }


def _show(console: Console, taken: "Replay") -> None:
    found, record = taken.found, taken.record
    rows = [(name, record.losses.get(name), repr(value)) for name, value in found.losses.items()]
    rows.append(("gradient norm", record.gradient_norm, repr(found.gradient_norm)))
    console.table(f"step {record.step:,}", ("", "recorded", "now"), rows)
    console.write("\n")
    layers = [[row[key] for key in ("layer", "weights", "gradient", "output")] for row in found.layers]
    columns = ("", "norm of weights", "norm of gradient", "rms of output")
    console.table("Layer by layer", columns, layers)
    console.write("\n")
    if found.first_bad is not None:
        console.write(f"First of all, NaN or infinity is in the {found.first_bad}\n")
    else:
        console.write(
            "Here the step is finite. It was computed elsewhere, or otherwise, or the machine was at fault.\n"
        )
    for name, counts in list(found.not_finite.items())[:12]:
        bad = f"{counts['bad_values']:,} values and {counts['bad_gradients']:,} gradients of {counts['elements']:,}"
        console.write(f"  {name}: {bad} are not finite\n")
