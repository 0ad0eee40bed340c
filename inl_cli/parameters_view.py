"""What `inl inspect-params` shows: a table for each kind of figure, with a histogram in each row.

A histogram is one character a bin, from ' ' for no value to '@' for the fullest bin, so that it is as readable in a
file as on a terminal.
"""

from collections.abc import Iterable
from math import isfinite
from typing import TYPE_CHECKING, Any

from inl_cli.console import Console

if TYPE_CHECKING:
    from inl_core.analysis.parameters import ParameterReport

_RAMP = " .:-=+*#%@"
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
_SPREAD = {"mean": "mean", "std": "std", "min": "min", "max": "max", "histogram": "histogram"}
_BESIDE = {"drift": "distance from start", "against": "distance from the other"}
_VARIANCE = {
    "variance_dimensions": "between channels",
    "variance_tokens": "between tokens",
    "variance_iterations": "between iterations",
}
_TIMES = {
    "period": "period of the excitation",
    "half_life": "half-life of alpha, as a decay",
    "mode_half_life": "half-life of the frozen step",
    "mode_period": "period of the frozen step",
}


def show_parameters(console: Console, report: "ParameterReport", name: str) -> None:
    """Everything on stdout, what it comes to first; `name` is the checkpoint's."""
    from inl_core.analysis.report.learned import parameter_findings

    console.write("".join(f"- {said}.\n" for said, _ in parameter_findings(report)) + "\n")
    total = sum(report.parameters.values())
    parts = [(part, number, f"{number / total:.1%}") for part, number in report.parameters.items()]
    console.table(f"{name}: parameters", ("part", "number", "share"), [*parts, ("total", total, "100%")])
    _show_changes(console, report)
    _show_ranks(console, report)
    if not report.layers:
        console.write("\nThis model has no integrator: no mu, gamma, phi, alpha, beta or gate to show.\n")
        return
    is_stream = "sub_layer" in report.layers[0]
    for quantity, title in (_OF_STREAM if is_stream else _OF_INTEGRATORS).items():
        if quantity == "gamma" and report.of(quantity):
            title += f" (A = {report.amplitude:.4g})"
        _show_quantity(console, report, quantity, title)
    console.write(f"\nMeasured on {report.tokens:,} tokens of {report.text}:\n\n")
    if is_stream:
        _show_depth(console, report)
    else:
        _show_measured(console, report)
    _show_variance(console, report)
    _show_times(console, report, "step" if is_stream else "iteration")


def bars(counts: list[int]) -> str:
    """A histogram as one character a bin; any value at all shows."""
    top = max(counts, default=0) or 1
    return "".join(_RAMP[-(-count * (len(_RAMP) - 1) // top)] for count in counts)


def _show_changes(console: Console, report: "ParameterReport") -> None:
    named = {"since the start": report.since_start, f"since {report.against}": report.since_other}
    if report.start_unknown:
        console.write(f"\nHow far the weights are from their start is not known: {report.start_unknown}\n")
    for title, changes in named.items():
        rows = [(one.part, _finite(one.size), _finite(one.distance), _text(one.relative, ".1%")) for one in changes]
        if rows:
            console.write("\n")
            console.table(f"change of the weights {title}", ("part", "|w|", "|w - w0|", "of |w0|"), rows)


def _show_ranks(console: Console, report: "ParameterReport") -> None:
    rows = [
        (one.part, one.name, f"{one.rows} x {one.columns}", _text(one.effective_rank, ".1f"), _text(one.share, ".1%"))
        for one in report.ranks
    ]
    console.write("\n")
    title = "effective rank: how many directions a matrix uses"
    console.table(title, ("part", "matrix", "shape", "effective rank", "of the possible"), rows)


def _show_quantity(console: Console, report: "ParameterReport", quantity: str, title: str) -> None:
    """A table of one learned quantity, where the model has it."""
    rows = report.of(quantity)
    columns = _SPREAD | {name: text for name, text in _BESIDE.items() if any(name in row for row in rows)}
    if rows:
        console.write("\n")
        console.table(title, ("layer", *columns.values()), [(_place(row), *_values(row, columns)) for row in rows])


def _show_measured(console: Console, report: "ParameterReport") -> None:
    columns = ("mean", "std", "p5", "p50", "p95", "saturated", "histogram")
    columns = (*columns, "against") if report.against else columns
    gains = [(row["layer"], row["quantity"], *_values(row, columns)) for row in report.layers if "saturated" in row]
    console.table("alpha, beta, gate", ("layer", "", *(_BESIDE.get(name, name) for name in columns)), gains)
    names = [row["quantity"] for row in report.layers if "residual" in row["quantity"]]
    names = ("velocity", *dict.fromkeys(names), "displacement")  # the layers may differ in their iterations
    titles = [name.replace("residual_", "step ").replace("displacement", "all, of |x|") for name in names]
    console.write("\n")
    title = "rms velocity, rms change of the state in each iteration, and how far all of them move it"
    console.table(title, ("layer", *titles), _means(report, names))


def _show_depth(console: Console, report: "ParameterReport") -> None:
    from inl_core.training.depth import share_groups

    motion = {"state": "rms x", "velocity": "rms v", "residual": "rms change of x"}
    console.table("x and v after each step, and how far it moved x", ("", *motion.values()), _means(report, motion))
    for title, names in share_groups({row["quantity"] for row in report.layers}).items():
        rows = [(place, *(_text(mean, ".1%") for mean in means)) for place, *means in _means(report, names)]
        console.write("\n")
        console.table(f"{title}: shares", ("", *names.values()), rows)


def _show_variance(console: Console, report: "ParameterReport") -> None:
    """What the variance of each coefficient that depends on the token is between."""
    rows = []
    for row in report.layers:
        if "variance_tokens" in row:
            total = sum(row[name] for name in _VARIANCE)
            shares = (_text(row[name] / total if total else None, ".1%") for name in _VARIANCE)
            rows.append((_place(row), row["quantity"], _finite(total), *shares))
    if rows:
        console.write("\n")
        title = "variance of the coefficients: one that hardly differs between tokens is a constant, not a control"
        console.table(title, ("layer", "", "variance", *_VARIANCE.values()), rows)


def _show_times(console: Console, report: "ParameterReport", unit: str) -> None:
    """Periods and half-lives, and for how many channels there is such a figure."""
    columns, rows = ("share", "p5", "p50", "p95"), []
    for quantity, title in _TIMES.items():
        rows += [(title, _place(row), *_values(row, columns)) for row in report.of(quantity)]
    if rows:
        console.write("\n")
        title = f"periods and half-lives in {unit}s, and the share of values that have one"
        console.table(title, ("", "layer", *columns), rows)


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


def _values(row: dict[str, Any], names: Iterable[str]) -> list[str | None]:
    """The cells of a row; a dash where it has no such figure."""
    forms = {"saturated": ".1%", "share": ".1%"}
    return [
        bars(row["histogram"]) if name == "histogram" else _text(row.get(name), forms.get(name, ".4f"))
        for name in names
        if name != "histogram" or name in row
    ]
