"""Alarms of dynamics that have collapsed, by plain rules over the records of a run; it imports no torch.

    state ignored         a layer's iterations together move the state by less than 1% of its size, or a step of a
                          stream by less than 0.1%: the median of the tokens
    controller constant   beta and gate of a layer both differ between tokens by less than 1% of their means
    velocity over depth   the last place's velocity is over 10 times the median of all places
    velocity in training  the mean velocity is over 10 times what it was a tenth into the run
    momentum unused       alpha is below 0.01 (rms) in every step of a stream; so for the transport b

- They speak from a quarter of the run on, those of what is unused from half of it: at the start all of this is normal.
- A session says each of them once. They need nothing but the rows that a record has anyway.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inl_core.training.records import list_records, read_record

_REFERENCE, _EARLIEST, _EARLIEST_UNUSED = 0.1, 0.25, 0.5
_LEAST_DISPLACEMENT, _LEAST_RESIDUAL = 0.01, 0.001
_LEAST_VARIATION, _MOST_GROWTH, _LEAST_COEFFICIENT = 0.01, 10.0, 0.01
_FEWEST_PLACES = 4  # over which growth can be told from a difference
_MOST_NAMED = 4

Row = dict[str, Any]
Figures = dict[str, dict[str, Row]]
"""place -> quantity -> row, in the order of the depth."""


@dataclass(frozen=True)
class Alarm:
    """One alarm."""

    kind: str
    text: str
    """What holds, with its figures, and what to look at."""
    quantity: str
    """What it judges, as the records name it."""


def find_alarms(rows: list[Row], *, progress: float, reference: list[Row] | None = None) -> list[Alarm]:
    """The alarms of one record.

    Args:
        progress: the recorded step's share of the whole run.
        reference: the rows of the record a tenth into the run; None leaves out growth in training.
    """
    if progress < _EARLIEST:
        return []
    figures = _by_place(rows)
    found = [_state_ignored(figures), _controller_constant(figures), _grows_over_depth(figures)]
    if reference:
        found.append(_grows_in_training(figures, _by_place(reference)))
    if progress >= _EARLIEST_UNUSED:
        found += [_unused(figures, "alpha", "momentum"), _unused(figures, "transport", "transport")]
    return [alarm for alarm in found if alarm]


def newest_record(run: Path, num_steps: int) -> tuple[int, list[Row], list[Alarm]] | None:
    """The step of a run's newest readable record, its rows and its alarms; None where there is no record."""
    for step, path in reversed(list_records(run).items()):
        if rows := read_record(path):
            reference = _reference(run, step, num_steps)
            return step, rows, find_alarms(rows, progress=step / num_steps, reference=reference)
    return None


class AlarmWatch:
    """Hears the records of a run as they are made, and warns."""

    def __init__(self, run: Path, num_steps: int, warn: Callable[[str], None]) -> None:
        self.run, self.num_steps, self.warn = run, num_steps, warn
        self._said: set[str] = set()
        self._reference: list[Row] | None = None

    def hear(self, step: int, rows: list[Row]) -> None:
        """Judge the record of `step`, of all steps so far the last."""
        if self._reference is None and step >= _REFERENCE * self.num_steps:
            self._reference = _reference(self.run, step, self.num_steps) or rows
        for alarm in find_alarms(rows, progress=step / self.num_steps, reference=self._reference):
            if alarm.kind not in self._said:
                self._said.add(alarm.kind)
                self.warn(f"step {step}: {alarm.text} (`inl inspect-params {self.run}` shows all of it)")


def _reference(run: Path, step: int, num_steps: int) -> list[Row] | None:
    """The rows of the first record a tenth into the run, if it is one before `step`."""
    found = ((at, path) for at, path in list_records(run).items() if _REFERENCE * num_steps <= at < step)
    first = next(found, None)
    return read_record(first[1]) or None if first else None


def _by_place(rows: list[Row]) -> Figures:
    found: Figures = {}
    for row in rows:
        layer, part = row.get("layer"), row.get("sub_layer")
        place = " ".join(word for word in ("" if layer is None else f"layer {layer}", part) if word)
        found.setdefault(place, {})[row["quantity"]] = row
    return found


def _named(places: dict[str, str]) -> str:
    """`layer 0 (0.2%), layer 1 (0.3%) and 5 more`."""
    texts = [f"{place} ({figure})" for place, figure in places.items()]
    more = f" and {len(texts) - _MOST_NAMED} more" if len(texts) > _MOST_NAMED else ""
    return ", ".join(texts[:_MOST_NAMED]) + more


def _state_ignored(figures: Figures) -> Alarm | None:
    still = {}
    for place, own in figures.items():
        if "displacement" in own:
            share, least = own["displacement"]["p50"], _LEAST_DISPLACEMENT
        elif "residual" in own and "state" in own and own["state"]["p50"]:
            share, least = own["residual"]["p50"] / own["state"]["p50"], _LEAST_RESIDUAL
        else:
            continue
        if share < least:
            still[place] = f"{share:.2%}"
    if not still:
        return None
    return Alarm(
        "state ignored",
        f"the state is ignored: it is moved by a tiny share of its size by {_named(still)}; look whether the gate is "
        "shut or nothing is learned there, and what `inl convergence-report` says the layer is worth",
        "displacement" if any("displacement" in own for own in figures.values()) else "residual",
    )


def _controller_constant(figures: Figures) -> Alarm | None:
    """Of beta and gate: a dynamic alpha also follows the distance from mu, and so is never a constant."""
    constant = {}
    for place, own in figures.items():
        gains = [own[name] for name in ("beta", "gate", "alpha") if "variance_tokens" in own.get(name, ())]
        if len(gains) < 3:
            continue
        *controlled, alpha = (math.sqrt(row["variance_tokens"]) / abs(row["mean"] or math.inf) for row in gains)
        if max(controlled) < _LEAST_VARIATION:
            constant[place] = f"{max(controlled):.2%}, alpha {alpha:.2%}"
    if not constant:
        return None
    return Alarm(
        "controller constant",
        f"the controller is constant: from token to token beta and gate differ by next to nothing, as a share of their "
        f"means, in {_named(constant)}; look at gradient_norm and at the variance between tokens",
        "beta",
    )


def _velocities(figures: Figures) -> dict[str, float]:
    return {place: own["velocity"]["p50"] for place, own in figures.items() if "velocity" in own}


def _grows_over_depth(figures: Figures) -> Alarm | None:
    speeds = _velocities(figures)
    if len(speeds) < _FEWEST_PLACES:
        return None
    last, typical = list(speeds)[-1], statistics.median(speeds.values())
    if not speeds[last] > _MOST_GROWTH * typical > 0:
        return None
    return Alarm(
        "velocity grows over depth",
        f"the velocity grows over depth: {speeds[last]:.3g} at {last}, {speeds[last] / typical:.0f} times the median "
        f"of all places, {typical:.3g}; look for an alpha above 1 or a beta below 0, and at the learning rate",
        "velocity",
    )


def _grows_in_training(figures: Figures, reference: Figures) -> Alarm | None:
    now, before = _velocities(figures), _velocities(reference)
    if not now or not before:
        return None
    mean, mean_before = statistics.fmean(now.values()), statistics.fmean(before.values())
    if not mean > _MOST_GROWTH * mean_before > 0:
        return None
    return Alarm(
        "velocity grows in training",
        f"the velocity grows in training: {mean:.3g}, {mean / mean_before:.0f} times the {mean_before:.3g} a tenth "
        "into the run; look at gradient_norm and the loss since then: a lower learning rate holds it",
        "velocity",
    )


def _unused(figures: Figures, name: str, title: str) -> Alarm | None:
    """Only of a stream, which has a sub-layer and learns this vector."""
    rows = [own[name] for own in figures.values() if name in own and "sub_layer" in own[name]]
    sizes = [math.hypot(row["mean"], row["std"]) for row in rows]
    if not sizes or not max(sizes) < _LEAST_COEFFICIENT:
        return None
    return Alarm(
        f"{title} unused",
        f"{title} is unused: its coefficient is at most {max(sizes):.2g} (rms) in any step; look at the learning rate "
        "and training.optimizer.stream_rate_factor, or switch the term off and compare",
        name,
    )
