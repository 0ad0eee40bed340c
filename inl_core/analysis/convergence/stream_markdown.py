"""report.md of a stream: one system over all sub-layers, as prose, tables and figures, from its summary."""

from collections.abc import Iterator, Sequence
from typing import Any

from inl_core.analysis.convergence.markdown import markdown_table, sentences, show_figures, shown, signed, spread
from inl_core.analysis.convergence.stream_statistics import COEFFICIENTS
from inl_core.documents.convergence import METRICS
from inl_core.training.depth import place_name, share_groups

Summary = dict[str, Any]

_CAPTIONS = {
    "residual.png": "Movement of the state in each step",
    "distance.png": "Distance to mu and to where the state ends",
    "coefficients.png": "The learned coefficients of each step, over channels",
    "shares.png": "What makes the velocity, and what moves the state",
    "transport.png": "The transport b of each step and channel",
    "bits_per_byte.png": "Bits per byte without each step, and without each term",
    "portrait.png": "Phase portrait",
}


def stream_to_markdown(summary: Summary, figures: Sequence[str], warning: str | None = None) -> str:
    """The whole report; `figures` are the files beside it, `warning` says why there are none."""
    parts = [_head(summary), _verdict(summary), _bits(summary), show_figures(figures, warning, _CAPTIONS)]
    return "\n\n".join([*parts, *_tables(summary), _TERMS]) + "\n"


def share_tables(rows: Sequence[Summary]) -> Iterator[tuple[str, list[str], list[list[str | None]]]]:
    """Title, columns and a row for each of `rows`: the mean shares of a group's terms, None where there is no term."""
    for title, names in share_groups({name for row in rows for name in row}).items():
        means = [[row[name]["mean"] for name in names] for row in rows]
        cells = [[None if mean is None else f"{mean:.1%}" for mean in own] for own in means]
        yield f"{title}: shares of the terms, means over tokens", list(names.values()), cells


def without_tables(summary: Summary) -> Iterator[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]:
    """Title, columns and rows: bits per byte without each step, and without each term."""
    found = summary["bits_per_byte"]
    columns = ("bits per byte", "change", "standard error")
    for title, key in (("step passed over", "without_step"), ("term left out", "without_term")):
        rows = found[key]
        names = [place_name(row) if "step" in row else row["term"] for row in rows]
        cells = [
            (name, shown(row["bits_per_byte"]), signed(row["change"]), shown(row["standard_error"]))
            for name, row in zip(names, rows, strict=True)
        ]
        yield title, (title, *columns), cells


def _head(summary: Summary) -> str:
    return (
        f"# Convergence of {summary['checkpoint']}\n\n"
        f"Preset {summary['preset']}, step {summary['step']:,}. Measured on {summary['tokens']:,} tokens of "
        f"{summary['text']} in windows of {summary['window']:,}. Depth is the time of one system: each of its "
        f"{summary['num_iterations']} steps is one sub-layer, and it is followed from the embedding to the end. Terms "
        f"of its equation: {', '.join(summary['terms'])}. A = {shown(summary['amplitude'])}. Every number is defined "
        "in docs/convergence-report.md."
    )


def _verdict(summary: Summary) -> str:
    limits, [sentence] = summary["thresholds"], sentences(summary)
    return (
        f"## What the states do\n\n{sentence[0].upper()}{sentence[1:]}.\n\n"
        "Thresholds, in this order: **ignored** when all steps together move the state by less than "
        f"{limits['ignored_displacement']:.0%} of its size; **converge** when the movement in the last step is at most "
        f"{limits['converged_movement']:.0%} of its peak; **oscillate** when it still moves and a dimension turned "
        f"back at least {limits['oscillating_turns']:g} times, weighted by motion; **drift** when it still moves in "
        "much the same direction, or stops being finite."
    )


def _bits(summary: Summary) -> str:
    tables = [markdown_table(columns, rows) for _, columns, rows in without_tables(summary)]
    return (
        f"## Bits per byte\n\nThe model as it is: {shown(summary['bits_per_byte']['bits_per_byte'])}. Changes are "
        "paired on the same text; the standard error is over batches. A step that is passed over hands on the state "
        "and the velocity it was given; a term that is left out is 0 in every step.\n\n" + "\n\n".join(tables)
    )


def _tables(summary: Summary) -> Iterator[str]:
    """A section for each group of figures, with a row for each step."""
    rows = summary["layers"][0]["iterations"]
    names = [(row["iteration"], place_name(row)) for row in rows]

    def section(title: str, columns: Sequence[str], cells: list[list[Any]]) -> str:
        first = len(names) - len(cells)
        lines = [(*name, *cell) for name, cell in zip(names[first:], cells, strict=True)]
        return f"## {title}\n\n" + markdown_table(("t", "", *columns), lines)

    motion = ("state_rms", "velocity_rms", "residual", "distance_mu", "distance_end")
    motion = [name for name in motion if name in rows[0]]
    columns = [f"{name.replace('_', ' ')} p5 / p50 / p95" for name in motion]
    yield section("Motion", columns, [[spread(row[name]) for name in motion] for row in rows])
    for title, columns, cells in share_tables(rows[1:]):
        yield section(title[0].upper() + title[1:], columns, cells)
    own = [name for name in COEFFICIENTS if any(name in row for row in rows)]
    cells = [[spread(row[name]) if name in row else None for name in own] for row in rows]
    yield section("Coefficients, p5 / p50 / p95 over channels", own, cells)
    for key, title in (("against_mu", "Against mu"), ("against_end", "Against the state's own end")):
        if key in rows[0]:
            cells = [[row[key][name] for name in METRICS] for row in rows]
            yield section(f"{title} (tolerance {summary['epsilon']:g})", METRICS, cells)


_TERMS = (
    "## Terms\n\nx state, v velocity, D dimensions. Residual: ||x_t - x_{t-1}|| / sqrt(D), over tokens. The "
    "terms whose sum is the new velocity: momentum alpha v, candidate c, pull beta (mu - x) and excitation. The terms "
    "that move the state: velocity v, transport b shift(v) and anchor r x_0. A share is the length of one "
    "term over the sum of the lengths of all, for one token. end: where the token's own state is after the last step."
)
