"""Spectral radii and Lyapunov exponents as parts: does a small change of a state grow, or is it forgotten?"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from inl_core.analysis.report.charts import category, chosen, number, tooltip
from inl_core.analysis.report.jacobians import CONTEXT, MOST_DIMENSIONS, NUM_TOKENS, Reaction
from inl_core.analysis.report.parts import Finding, Part

_MOST_EXPONENTS = 128


def reaction_parts(name: str, found: Sequence[Reaction]) -> list[Part]:
    """A part for the steps and one for the whole; none where nothing was measured."""
    return [_radius(name, found), _exponents(name, found)] if found else []


def reaction_findings(name: str, found: Sequence[Reaction]) -> Iterator[Finding]:
    """What becomes of a small change in the system, or in the layer, where it grows the most."""
    if not found:
        why = f"are measured up to d_model {MOST_DIMENSIONS} and where they are finite, and so not here"
        yield Finding(f"{name}: the Jacobians of its steps, and Lyapunov exponents, {why}.")
        return
    reaction = max(found, key=lambda reaction: reaction.exponents.mean(0)[0])
    mean = reaction.exponents.mean(0)
    factor, growing = math.exp(mean[0]), int((mean > 0).sum())
    if growing:
        fate = (
            f"small changes of a state grow in {growing} of {len(mean)} directions, at most {factor:.3g} times a step"
        )
    else:
        fate = f"every small change of a state shrinks, the slowest to {factor:.3f} of its size a step"
    where = reaction.system if len(found) == 1 else f"{reaction.system}, which has the largest Lyapunov exponent"
    yield Finding(f"{name}, {where}: {fate}.", f"{name}-lyapunov")


def _radius(name: str, found: Sequence[Reaction]) -> Part:
    rows = []
    for reaction in found:
        for step, (radius, period) in enumerate(zip(reaction.spectral_radius, reaction.period, strict=True), 1):
            middle = float(np.median(period))
            turns = middle if math.isfinite(middle) else None
            rows.append(
                (reaction.system, step, float(np.median(radius)), float(radius.min()), float(radius.max()), turns)
            )
    see = (
        f"The true Jacobian of each step for {NUM_TOKENS} tokens, each at the end of {CONTEXT} tokens: above 1 "
        "the step, repeated, enlarges some small change of the state, below 1 it shrinks all. Median and extremes."
    )
    columns = ("system", "step", "spectral_radius", "least", "largest", "period")
    base = {"x": {"field": "step", "type": "quantitative", "title": "step", "axis": {"tickMinStep": 1}}}
    color = category("system", "")
    shown = tooltip("system", *columns[1:])
    spec = {
        "height": 220,
        "layer": [
            {"mark": {"type": "rule", "strokeDash": [4, 4]}, "encoding": {"y": {"datum": 1}}},
            {
                "mark": {"type": "errorbar", "ticks": True},
                "encoding": {
                    **base,
                    "y": number("least", "spectral radius"),
                    "y2": {"field": "largest"},
                    "color": color,
                },
            },
            {
                "mark": {"type": "line", "point": {"filled": True, "size": 45}},
                "encoding": {
                    **base,
                    "y": number("spectral_radius", "spectral radius"),
                    "color": color,
                    "strokeDash": color,
                    "shape": color,
                    "tooltip": shown,
                },
            },
        ],
    }
    return Part(f"{name}-jacobians", "Spectral radius of the true Jacobian", see, columns, rows, (spec,))


def _exponents(name: str, found: Sequence[Reaction]) -> Part:
    rows = []
    for reaction in found:
        mean, spread = reaction.exponents.mean(0), reaction.exponents.std(0)
        every = max(1, -(-len(mean) // _MOST_EXPONENTS))
        kept = [*range(0, len(mean) - 1, every), len(mean) - 1]
        rows += [(reaction.system, index + 1, float(mean[index]), float(spread[index])) for index in kept]
    see = (
        "Every direction in which a token's state and velocity can change, from the fastest growing to the fastest "
        "forgotten, over the steps that the model runs: above 0 a change grows, at -0.69 a step halves it."
    )
    columns = ("system", "direction", "exponent", "std_over_tokens")
    systems = [reaction.system for reaction in found]
    spec = {
        "height": 220,
        "params": [chosen("shown", "of ", systems)],
        "transform": [{"filter": "datum.system === shown"}],
        "layer": [
            {"mark": {"type": "rule", "strokeDash": [4, 4]}, "encoding": {"y": {"datum": 0}}},
            {
                "mark": {"type": "line", "color": "var(--c0)", "point": {"opacity": 0, "size": 60}},
                "encoding": {
                    "x": number("direction", "direction, largest first"),
                    "y": number("exponent", "exponent, 1 / step"),
                    "tooltip": tooltip(*columns),
                },
            },
        ],
    }
    return Part(f"{name}-lyapunov", "Finite-time Lyapunov exponents", see, columns, rows, (spec,))
