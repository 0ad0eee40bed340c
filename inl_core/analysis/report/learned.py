"""What learned and measured quantities say in sentences: which are used, and which do nothing.

The rows are those of a record in a run's dynamics/ or of `inl inspect-params`, whose names are the same. A sentence
comes with the quantity that it is about.
"""

from collections.abc import Iterator, Sequence
from math import isfinite
from statistics import fmean
from typing import Any

from inl_core.analysis.parameters import ParameterReport
from inl_core.analysis.weight_changes import PartChange
from inl_core.training.alarms import Alarm, find_alarms
from inl_core.training.depth import share_groups

UNMOVED = 0.01
"""A learned vector this near its start, root mean square, has hardly learned."""
_LONG_ENOUGH = 0.5
"""The share of its run from which on a checkpoint's learned vectors are judged."""
_CONSTANT = 0.01
"""A coefficient that differs between tokens by less than this share of its mean is as good as constant."""
_IDLE = 0.01
"""A term with less than this share, the mean over the steps, does nothing."""
_ALWAYS = ("candidate", "velocity")
"""Terms without which there is no step."""

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

Rows = list[dict[str, Any]]
Said = tuple[str, str]
"""A sentence without its full stop, and a quantity."""


def parameter_findings(report: ParameterReport) -> Iterator[Said]:
    """What the report of `inl inspect-params` comes to, the uses of terms and coefficients first."""
    lost = list(dict.fromkeys(row["quantity"] for row in report.layers if not isfinite(row.get("mean", 0.0))))
    rows = [row for row in report.layers if row["quantity"] not in lost]
    if lost:
        yield f"not finite, so that nothing is said of them: {', '.join(lost)}", lost[0]
    yield from _share_findings(rows)
    yield from coefficient_findings(rows)
    yield from alarm_findings(find_alarms(rows, progress=report.progress))
    yield from distance_findings(rows, judge=report.progress >= _LONG_ENOUGH)
    yield from _change_findings("the start", report.since_start)
    yield from _change_findings(report.against, report.since_other)
    if report.start_unknown:
        yield f"how far all weights are from their start is not known: {report.start_unknown}", ""


def distance_findings(rows: Rows, *, at: str = "", by: str = "", judge: bool = True) -> Iterator[Said]:
    """How far learned vectors are from their start, and which have hardly left it.

    Args:
        at, by: when, as ` at step 5` and ` by step 5`.
        judge: whether training was long enough for that.
    """
    drifts = _means(rows, "drift")
    if drifts:
        told = ", ".join(f"{name} {drift:.3g}" for name, drift in sorted(drifts.items(), key=lambda item: -item[1]))
        yield f"distance from the start{at}, rms: {told}", next(iter(drifts))
        if judge and (still := [name for name, drift in drifts.items() if drift < UNMOVED]):
            whose = "its" if len(still) == 1 else "their"
            yield f"{', '.join(still)} hardly left {whose} start{by} (rms below {UNMOVED})", still[0]


def coefficient_findings(rows: Rows) -> Iterator[Said]:
    """Whether each coefficient that could depend on the token does."""
    means = _means(rows, "mean")
    for name, variance in _means(rows, "variance_tokens").items():
        if name not in means:
            continue
        spread, size = variance**0.5, abs(means[name])
        share = spread / size if size else 0.0
        is_constant = share < _CONSTANT
        use = ": it is as good as constant" if is_constant else f" ({share:.0%} of its size)"
        yield f"{name} is {means[name]:.3g} on average and differs by {spread:.2g} from token to token{use}", name


def alarm_findings(alarms: Sequence[Alarm]) -> Iterator[Said]:
    """What has collapsed."""
    for alarm in alarms:
        yield alarm.text, alarm.quantity


def _share_findings(rows: Rows) -> Iterator[Said]:
    """Which terms of a stream's steps are used, and which are dead."""
    for title, names in share_groups({row["quantity"] for row in rows}).items():
        shares = {
            share: means
            for share, term in names.items()
            if term not in _ALWAYS and (means := _finite(rows, share, "mean"))
        }
        used = {share: means for share, means in shares.items() if fmean(means) >= _IDLE}
        if used:
            *others, last = (f"{fmean(own):.0%} {names[share]}" for share, own in used.items())
            told = f"{', '.join(others)} and {last}" if others else last
            yield f"over all steps, {title} is {told}", next(iter(used))
        for share, own in shares.items():
            if share not in used:
                said = f"its share of {title} is {fmean(own):.1%} over all steps, and {max(own):.1%} in one at most"
                yield f"the {names[share]} does nothing: {said}", share


def _change_findings(since: str | None, changes: Sequence[PartChange]) -> Iterator[Said]:
    known = {one.part: one.relative for one in changes if one.relative is not None}
    whole = known.pop("all", None)
    # Of a part that began as zeros there is a distance alone.
    if lost := [one.part for one in changes if one.part != "all" and not isfinite(one.distance)]:
        said = f"how far weights have moved since {since} is not finite, so that nothing is said of it"
        yield f"{said}: {', '.join(lost)}", ""
    elif whole is not None and known:
        least, change = min(known.items(), key=lambda item: item[1])
        said = f"since {since} the weights have moved by {whole:.0%} of the size that they had then"
        yield f"{said}; {least} has moved least, by {change:.0%}", ""


def _means(rows: Rows, figure: str) -> dict[str, float]:
    """The mean over places of one figure, by quantity."""
    found = {name: _finite(rows, name, figure) for name in LEARNED}
    return {name: fmean(values) for name, values in found.items() if values}


def _finite(rows: Rows, quantity: str, figure: str) -> list[float]:
    """One figure of one quantity at each place that has it; none where it is not finite everywhere."""
    found = [row[figure] for row in rows if row["quantity"] == quantity and figure in row]
    return found if all(isfinite(value) for value in found) else []
