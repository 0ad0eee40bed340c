"""What one or several runs reached, and at what price: a table, curves, and who leads at equal budgets.

Bits per byte are compared where two runs were scored on the same text; where they were not, a finding says so.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from inl_core.analysis.report.charts import curves
from inl_core.analysis.report.parts import Finding, Part, Section
from inl_core.analysis.report.runs import Row, RunRecord

MOST_POINTS = 240
"""Points of one run's curve: more rows are shown as the means of as many equal parts."""
BUDGETS = {"tokens": "tokens", "seconds": "seconds of training", "flops": "FLOPs"}
_ALONG = {"tokens": "tokens", "seconds": "seconds of training steps", "flops": "FLOPs", "step": "steps"}
_SCORE = "validation_bits_per_byte"


def training_section(runs: Sequence[RunRecord]) -> Section:
    """The table of the runs, their curves, and how they compare."""
    parts = (_runs_part(runs), _loss_part(runs), _score_part(runs), _budget_part(runs))
    note = "Bits per byte of held-out text are here those of each run's own evaluations while it trained."
    return Section("Training", [part for part in parts if part.rows], note, list(_findings(runs)))


def _findings(runs: Sequence[RunRecord]) -> Iterator[Finding]:
    """How far each run is and what it scores, which run is ahead, and what the comparison does not allow to say."""
    for run in runs:
        yield Finding(_standing(run), "runs")
        if run.not_finite:
            told = "1 step" if len(run.not_finite) == 1 else f"{len(run.not_finite)} steps"
            yield Finding(
                f"{run.name}: {told} had no finite loss, the last of them step {run.not_finite[-1]:,}.", "runs"
            )
    if len(runs) > 1:
        yield from _comparison(runs)


def _standing(run: RunRecord) -> str:
    last, planned = run.last, run.recipe.training.num_steps
    if not last:
        return f"{run.name} ({run.preset}) is {run.status.state} and has no metrics yet."
    step = f"step {last['step']:,}" if last["step"] == planned else f"step {last['step']:,} of {planned:,}"
    text = f"{run.name} ({run.preset}) is {run.status.state} at {step}, after {last['tokens']:,} tokens"
    scores = [(row[_SCORE], row["step"]) for row in run.evaluations if row.get(_SCORE)]
    if not scores:
        return f"{text}; bits per byte of held-out text were not measured."
    best, at = min(scores)
    text += f": {scores[-1][0]:.4f} bits per byte of held-out text"
    if best < scores[-1][0]:
        return f"{text}, which is {scores[-1][0] - best:.4f} worse than its best, at step {at:,}."
    if len(scores) < 4:
        return f"{text}, its best."
    quarter = scores[-max(2, len(scores) // 4)]
    return f"{text}, its best; {quarter[0] - scores[-1][0]:.4f} less than at step {quarter[1]:,}."


def _comparison(runs: Sequence[RunRecord]) -> Iterator[Finding]:
    alike, scored = _scored_alike(runs), [run for run in runs if run.evaluations]
    if len(alike) < len(scored):
        said = "The runs were scored on different texts, or in different windows"
        if len(alike) == 1:
            yield Finding(f"{said}: their bits per byte do not rank them.", "runs")
            return
        yield Finding(f"{said}: bits per byte rank only {', '.join(run.name for run in alike)}.", "runs")
    rows = _budget_part(runs).records()
    compared = {row["run"] for row in rows}
    if left_out := [run.name for run in runs if run.name not in compared and (run in alike or not run.evaluations)]:
        yield Finding(f"{', '.join(left_out)}: no evaluation that could be compared at equal budgets.", "runs")
    for budget, name in BUDGETS.items():
        found = sorted((row[_SCORE], row["run"]) for row in rows if row["budget"] == budget)
        if len(found) < 2:
            continue
        amount = next(row["amount"] for row in rows if row["budget"] == budget)
        (score, best), (second, next_best) = found[:2]
        begin, lead = f"At equal {name} ({_short(amount)})", f"{second - score:.4f}"
        if lead == "0.0000":
            text = f"{begin} {best} and {next_best} score the same: {score:.4f} bits per byte."
        else:
            text = f"{begin} {best} is ahead: {score:.4f} bits per byte, {next_best} {second:.4f} ({lead} more)."
        yield Finding(text, "equal-budgets")
    unfinished = [run.name for run in alike if run.last["step"] < run.recipe.training.num_steps]
    if rows and (unfinished or len({run.last["step"] for run in alike}) > 1):
        yield Finding(
            "A run that is read before its last step has not had the end of its learning-rate schedule: at equal "
            "budgets this favours the run that ends there.",
            "equal-budgets",
        )


def _runs_part(runs: Sequence[RunRecord]) -> Part:
    columns = ("run", "preset", "parameters", "state", "step", "steps_planned", *BUDGETS, "loss", _SCORE)
    columns += ("best_bits_per_byte", "best_step", "tokens_per_second", "memory_bytes")
    rows = []
    for run in runs:
        last = run.last
        scores = [(row[_SCORE], row["step"]) for row in run.evaluations if row.get(_SCORE)]
        best = min(scores, default=(None, None))
        speeds = [row["tokens_per_second"] for row in run.steps if row.get("tokens_per_second")]
        rows.append(
            (
                run.name,
                run.preset,
                run.num_parameters,
                run.status.state,
                last.get("step"),
                run.recipe.training.num_steps,
                *(last.get(name) for name in BUDGETS),
                run.steps[-1]["loss"] if run.steps else None,
                scores[-1][0] if scores else None,
                *best,
                median(speeds) if speeds else None,
                max((row.get("memory_bytes") or 0 for row in run.steps), default=0) or None,
            )
        )
    see = "Each run: how far it is, what it has spent, and what it scores on held-out text."
    return Part("runs", "The runs" if len(runs) > 1 else "The run", see, columns, rows)


def _loss_part(runs: Sequence[RunRecord]) -> Part:
    names = ("step", *BUDGETS, "loss", "bits_per_byte", "learning_rate", "gradient_norm")
    rows = [(run.name, *(row.get(name) for name in names)) for run in runs for row in _thinned(run.steps, names)]
    see = "The lower the better, and a jump upwards is worth a look. The line is rough, since a batch is little text."
    measures = {"loss": "loss, nats a token", "bits_per_byte": "bits per byte", "gradient_norm": "norm of the gradient"}
    measures["learning_rate"] = "learning rate"
    spec = curves(_ALONG, measures, group="run", group_title="run", shown=names)
    return Part("training-loss", "Training loss", see, ("run", *names), rows, (spec,))


def _score_part(runs: Sequence[RunRecord]) -> Part:
    names = ("step", *BUDGETS, _SCORE, "validation_loss", "validation_accuracy")
    rows = [(run.name, *(row.get(name) for name in names)) for run in runs for row in _every(run.evaluations)]
    see = "Held-out text, the same at every evaluation of a run: this is the curve to compare models by."
    measures = {_SCORE: "bits per byte", "validation_loss": "loss, nats a token"}
    measures["validation_accuracy"] = "share of next tokens that are right"
    if not any(row.get(_SCORE) for run in runs for row in run.evaluations):
        del measures[_SCORE]
    spec = curves(_ALONG, measures, group="run", group_title="run", shown=names, points=True)
    return Part("validation", "Held-out text", see, ("run", *names), rows, (spec,))


def _budget_part(runs: Sequence[RunRecord]) -> Part:
    """Each run's bits per byte where the first of them ends, by tokens, seconds and FLOPs; no rows for one run."""
    rows: list[tuple[Any, ...]] = []
    curves_of = {run.name: [row for row in run.evaluations if row.get(_SCORE)] for run in _scored_alike(runs)}
    for budget in BUDGETS if len(runs) > 1 else ():
        ends = [found[-1][budget] for found in curves_of.values() if found]
        scores = {name: _score_at(found, budget, min(ends)) for name, found in curves_of.items() if found}
        found = {name: score for name, score in scores.items() if score is not None}
        rows += [(budget, min(ends), name, score) for name, score in found.items() if len(found) > 1]
    see = (
        "Bits per byte of each run at the largest budget that all have reached, between two evaluations on a straight "
        "line; only of runs that were scored on the same text. Two seeds of one recipe differ, too: a small lead may "
        "be luck."
    )
    return Part("equal-budgets", "At equal budgets", see, ("budget", "amount", "run", _SCORE), rows)


def _scored_alike(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The most runs whose scores can be compared: those of the same text, seen in windows of the same length."""
    groups: dict[str | None, list[RunRecord]] = {}
    for run in runs:
        for row in run.evaluations[-1:]:
            groups.setdefault(row.get("scored_on"), []).append(run)
    return max(groups.values(), key=len, default=[])


def _score_at(rows: list[Row], budget: str, amount: float) -> float | None:
    """The score when so much was spent; None where the first evaluation came later."""
    for before, after in pairwise(rows):
        if before[budget] <= amount <= after[budget]:
            share = (amount - before[budget]) / ((after[budget] - before[budget]) or 1)
            return before[_SCORE] + share * (after[_SCORE] - before[_SCORE])
    return rows[-1][_SCORE] if math.isclose(rows[-1][budget], amount) else None


def _every(rows: list[Row]) -> list[Row]:
    """At most MOST_POINTS of the rows, evenly spaced, the last one among them."""
    return rows[:: -max(1, -(-len(rows) // MOST_POINTS))][::-1]


def _thinned(rows: list[Row], names: Sequence[str]) -> Iterator[Row]:
    """The means of at most MOST_POINTS equal parts of the rows."""
    size = max(1, -(-len(rows) // MOST_POINTS))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        values = {name: [row[name] for row in part if isinstance(row.get(name), int | float)] for name in names}
        yield {name: (found[0] if len(found) == 1 else fmean(found)) for name, found in values.items() if found}


def _short(amount: float) -> str:
    return f"{amount:,.0f}" if 100 <= amount < 1e7 else f"{amount:.3g}"
