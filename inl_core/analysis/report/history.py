"""How what a run learned came about: its dynamics/ records as heat maps of step and layer, and as fans.

The figures of a record are explained in docs/commands.md; they are taken on the first tokens of the step's own batch.
"""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from inl_core.analysis.report.charts import fan, heat_map
from inl_core.analysis.report.parts import Finding, Part, Section
from inl_core.analysis.report.runs import RunRecord
from inl_core.training.depth import place_name, share_groups
from inl_core.training.records import list_records, read_record

MOST_RECORDS, MOST_ROWS = 60, 12_000
"""Of one run: recorded steps that are shown, and rows of all its figures, which bound the size of the page."""
UNMOVED = 0.01
"""A learned vector this near its start, root mean square, has hardly learned."""

LEARNED = {
    "mu": "mu, the learned equilibrium",
    "gamma": "gamma, the excitation's radians a step",
    "phi": "phi, the excitation's phase in radians",
    "alpha": "alpha, the share of its velocity that a channel keeps",
    "beta": "beta, the pull towards mu",
    "gate": "gate, the share of the velocity that moves the state",
    "transport": "transport, the share of the token before's velocity that moves this token, too",
    "anchor": "anchor, the share of its own embedding that a token gets back",
}
_MOTION = {
    "state": "rms of the state",
    "velocity": "rms of the velocity",
    "residual": "rms of how far the step moves the state",
    "displacement": "how far all iterations move the state, as a share of its size",
}
_FIGURES = ("mean", "std", "p5", "p50", "p95", "drift")

Rows = list[dict[str, Any]]


def history_section(run: RunRecord) -> tuple[Section, list[Finding]] | None:
    """The section on one run, and its findings; None where nothing was recorded."""
    rows = _read(run)
    if not rows:
        return None
    present = {row["quantity"] for row in rows}
    parts = [_selected(run, rows, name, title) for name, title in LEARNED.items() if name in present]
    parts += _shares(run, rows, present)
    motion = [_selected(run, rows, name, title) for name, title in _MOTION.items() if name in present]
    note = "Each record is taken on the first thousand or so tokens of its step's batch, so they differ in their text."
    return Section(f"{run.name}: what it learned, over training", parts + motion, note), list(_findings(run, rows))


def _read(run: RunRecord) -> Rows:
    """The rows of evenly spaced records, the last one among them, each with `step` and `place`."""
    files = list(list_records(run.path).items())
    found: Rows = []
    if not files:
        return found
    size = max(1, len(read_record(files[-1][1])))
    most = max(2, min(MOST_RECORDS, MOST_ROWS // size))
    for step, file in files[:: -max(1, -(-len(files) // most))][::-1]:
        for row in read_record(file):
            place = place_name({"layer": None, **row}) if "sub_layer" in row else f"layer {row.get('layer')}"
            found.append(row | {"step": step, "place": place})
    return found


def _selected(run: RunRecord, rows: Rows, name: str, title: str) -> Part:
    """One quantity by step and place, as a heat map and a fan."""
    chosen = [row for row in rows if row["quantity"] == name]
    figures = [figure for figure in _FIGURES if any(figure in row for row in chosen)]
    if name in ("gamma", "phi"):  # which start spread out, and of which only the distance from there tells anything
        figures.sort(key=lambda figure: figure != "drift")
    cells = [(row["step"], row["place"], *(row.get(figure) for figure in figures)) for row in chosen]
    places = list(dict.fromkeys(row["place"] for row in chosen))
    see = "Left to right is training, top to bottom is depth: look where the colour still changes at the end. "
    see += "Below, the spread at one place: half lies on each side of the line, nine tenths in the band."
    specs = (heat_map(figures, places), fan(places, name))
    return Part(f"{run.name}-{name}", title[0].upper() + title[1:], see, ("step", "place", *figures), cells, specs)


def _shares(run: RunRecord, rows: Rows, present: set[str]) -> list[Part]:
    """The shares of the terms of a stream's steps."""
    parts = []
    for title, names in share_groups(present).items():
        kept = [row for row in rows if row["quantity"] in names]
        places = list(dict.fromkeys(row["place"] for row in kept))
        steps = list(dict.fromkeys(row["step"] for row in kept))
        means = {(row["step"], row["place"], row["quantity"]): row.get("mean") for row in kept}
        cells = [
            (step, place, *(means.get((step, place, name)) for name in names)) for step in steps for place in places
        ]
        see = (
            "The share of each term, the mean over tokens: a term near 0 does nothing there, whatever its coefficient."
        )
        columns = ("step", "place", *names.values())
        key = f"{run.name}-{next(iter(names)).split('_')[0]}-shares"
        parts.append(Part(key, f"Shares: {title}", see, columns, cells, (heat_map(columns[2:], places),)))
    return parts


def _findings(run: RunRecord, rows: Rows) -> Iterator[Finding]:
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    step, drifts = rows[-1]["step"], _means(last, "drift")
    if drifts:
        told = ", ".join(f"{name} {drift:.3g}" for name, drift in sorted(drifts.items(), key=lambda item: -item[1]))
        yield Finding(f"{run.name}: distance from the start at step {step:,}, rms: {told}.", _key(run, drifts))
        # The newest record may be of a much earlier step than the run has reached.
        is_recent = 2 * step >= (run.last or {}).get("step", 0)
        if is_recent and (still := [name for name, drift in drifts.items() if drift < UNMOVED]):
            sentence = f"{run.name}: {', '.join(still)} hardly left its start by step {step:,} (rms below {UNMOVED})."
            yield Finding(sentence, f"{run.name}-{still[0]}")
    between = {name: value**0.5 for name, value in _means(last, "variance_tokens").items()}
    for name, spread in between.items():
        yield Finding(
            _use(run, name, spread, fmean(row["mean"] for row in last if row["quantity"] == name)), _key(run, [name])
        )


def _use(run: RunRecord, name: str, spread: float, mean: float) -> str:
    """Whether a coefficient that could depend on the token does."""
    share = spread / abs(mean) if mean else 0.0
    said = f"{run.name}: {name} is {mean:.3g} on average and differs by {spread:.2g} from token to token"
    return (
        f"{said}: the controller is as good as constant." if share < UNMOVED else f"{said} ({share:.0%} of its size)."
    )


def _means(rows: Rows, figure: str) -> dict[str, float]:
    """The mean over places of one figure, by quantity."""
    names = [name for name in LEARNED if any(row["quantity"] == name and figure in row for row in rows)]
    return {name: fmean(row[figure] for row in rows if row["quantity"] == name and figure in row) for name in names}


def _key(run: RunRecord, names: Sequence[str] | dict[str, float]) -> str:
    return f"{run.name}-{next(iter(names))}"
