"""How what a run learned came about: its dynamics/ records as heat maps of step and layer, and as fans.

The figures of a record are explained in docs/commands.md; they are taken on the first tokens of the step's own batch.
"""

from collections.abc import Iterator

from inl_core.analysis.report.charts import fan, heat_map
from inl_core.analysis.report.learned import (
    LEARNED,
    Rows,
    alarm_findings,
    coefficient_findings,
    distance_findings,
)
from inl_core.analysis.report.parts import Finding, Part, Section
from inl_core.analysis.report.runs import RunRecord
from inl_core.training.alarms import newest_record
from inl_core.training.depth import place_name, share_groups
from inl_core.training.records import list_records, read_record

MOST_RECORDS, MOST_ROWS = 60, 12_000
"""Of one run: recorded steps that are shown, and rows of all its figures, which bound the size of the page."""

_MOTION = {
    "state": "rms of the state",
    "velocity": "rms of the velocity",
    "residual": "rms of how far the step moves the state",
    "displacement": "how far all iterations move the state, as a share of its size",
}
_FIGURES = ("mean", "std", "p5", "p50", "p95", "drift")


def history_section(run: RunRecord) -> Section | None:
    """The section on one run; None where nothing was recorded."""
    rows = _read(run)
    if not rows:
        return None
    present = {row["quantity"] for row in rows}
    parts = [_selected(run, rows, name, title) for name, title in LEARNED.items() if name in present]
    parts += _shares(run, rows, present)
    motion = [_selected(run, rows, name, title) for name, title in _MOTION.items() if name in present]
    note = "Each record is taken on the first thousand or so tokens of its step's batch, so they differ in their text."
    return Section(f"{run.name}: what it learned, over training", parts + motion, note, list(_findings(run, rows)))


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
    if name in ("mu", "gamma", "phi"):  # whose means tell little: what counts is how far each channel went
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
    step = rows[-1]["step"]
    last = [row for row in rows if row["step"] == step]
    # The newest record may be of a much earlier step than the run has reached.
    is_recent = 2 * step >= (run.last or {}).get("step", 0)
    newest = newest_record(run.path, run.recipe.training.num_steps)
    for said, quantity in (
        *distance_findings(last, at=f" at step {step:,}", by=f" by step {step:,}", judge=is_recent),
        *coefficient_findings(last),
        *alarm_findings(newest[2] if newest and is_recent else ()),
    ):
        yield Finding(f"{run.name}: {said}.", f"{run.name}-{quantity}")
