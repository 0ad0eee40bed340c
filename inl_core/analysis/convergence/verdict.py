"""Whether a layer's states converge, oscillate, drift or are ignored, by stated thresholds.

The verdict is the first of these that holds:

    ignored     without the layer, bits per byte change by less than `ignored_change` of the model's, with a standard
                error below that; or the iterations that the model uses move the state by less than
                `ignored_displacement` of its size
    drift       a state stopped being finite
    converge    at the last iteration, the typical movement is at most `converged_movement` of its peak
    oscillate   it still moves, and a dimension turned back at least `oscillating_turns` times on the way (two turns are
                one full period), weighted by how much it moves
    drift       it still moves, and goes on in much the same direction

- Movement is the median over tokens of how far a step moves the state, not counting what the excitation adds in that
  step; early stopping looks at the same figure.
- A damped oscillation that comes to rest has converged; its reason says that it turned.
- The iterations are those that the model runs. Where more were followed, a second verdict is about all of them: what
  the states would do, not what the model does.
"""

from dataclasses import dataclass
from typing import Literal

from inl_core.analysis.convergence.layer_statistics import PathStatistics

Word = Literal["converge", "oscillate", "drift", "ignored"]


@dataclass(frozen=True)
class Thresholds:
    """Where one word ends and the next begins."""

    converged_movement: float = 0.1
    """Of the peak movement."""
    oscillating_turns: float = 2.0
    """Changes of direction within the iterations that are judged."""
    ignored_change: float = 0.001
    """Of the model's bits per byte."""
    ignored_displacement: float = 0.01
    """Of the rms of the starting state."""


@dataclass(frozen=True)
class Evidence:
    """What the verdict on one layer looks at."""

    movement: list[float]
    """Median unforced residual of iterations 1, 2, ... up to the last one that is judged."""
    num_turns: float
    """Changes of direction, weighted by motion."""
    displacement: float
    """Median |s_T - s_0| over median |s_0|, T the used iterations."""
    num_nonfinite: int = 0
    """Tokens whose state is not finite at the last iteration that is judged."""
    bits_per_byte: float | None = None
    """Of the whole model."""
    change_without: float | None = None
    """Bits per byte more without the layer; None when that was not measured."""
    error_without: float | None = None
    """Its standard error; None where too few windows were measured to know it."""


@dataclass(frozen=True)
class Verdict:
    """One word, and the figures it rests on as a sentence."""

    word: Word
    reason: str


def gather(
    statistics: PathStatistics,
    bits_per_byte: float | None,
    change_without: float | None,
    *,
    error_without: float | None = None,
    beyond: bool = False,
) -> Evidence:
    """The evidence in the statistics of a layer or stream.

    Args:
        beyond: look at all iterations that were followed, and not at those alone that the model runs.
    """
    found = statistics.distributions
    size = found["state_rms"][0].percentile(50)
    used = min(statistics.used_iterations, statistics.num_iterations)
    last = statistics.num_iterations if beyond else used
    moved = found["displacement"][used].percentile(50)
    return Evidence(
        movement=[found["unforced_residual"][t].percentile(50) for t in range(1, last + 1)],
        num_turns=statistics.num_turns(last),
        displacement=moved / size if size else 0.0,
        num_nonfinite=found["state_rms"][last].num_nonfinite,
        bits_per_byte=bits_per_byte,
        change_without=change_without,
        error_without=error_without,
    )


def judge(evidence: Evidence, thresholds: Thresholds = Thresholds(), *, unit: str = "iteration") -> Verdict:
    """The word for one layer, or for a stream, whose `unit` is a step."""
    ignored = _ignored(evidence, thresholds, unit)
    if ignored:
        return Verdict("ignored", ignored)
    if evidence.num_nonfinite:
        return Verdict("drift", f"{evidence.num_nonfinite:,} tokens leave the finite numbers")
    peak, last = max(evidence.movement, default=0.0), evidence.movement[-1] if evidence.movement else 0.0
    share = last / peak if peak else 0.0
    turns, count = evidence.num_turns, len(evidence.movement)
    article = "an" if unit == "iteration" else "a"
    still = (
        f"after {count} {unit}{'' if count == 1 else 's'} it moves {last:.3g} {article} {unit}, {share:.0%} of its peak"
    )
    if share <= thresholds.converged_movement:
        return Verdict("converge", f"{still}, having turned back {turns:.1f} times")
    if turns >= thresholds.oscillating_turns:
        return Verdict("oscillate", f"{still}, and it turned back {turns:.1f} times")
    return Verdict("drift", f"{still}, and it turned back only {turns:.1f} times")


def is_negligible(change: float | None, error: float | None, limit: float) -> bool:
    """Whether a change is below the limit, up or down, and its standard error, too; not where either is unknown."""
    return change is not None and error is not None and abs(change) < limit and error < limit


def _ignored(evidence: Evidence, thresholds: Thresholds, unit: str) -> str | None:
    if evidence.displacement < thresholds.ignored_displacement:
        return f"the used {unit}s move the state by {evidence.displacement:.2%} of its size"
    if evidence.change_without is None or not evidence.bits_per_byte:
        return None
    limit = thresholds.ignored_change * evidence.bits_per_byte
    if is_negligible(evidence.change_without, evidence.error_without, limit):
        return f"without it bits per byte change by {evidence.change_without / evidence.bits_per_byte:+.3%}"
    return None
