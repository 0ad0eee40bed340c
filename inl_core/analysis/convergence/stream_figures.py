"""The figures of a stream's convergence report; iterations are its steps, and its only panel is the whole depth."""

import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from inl_core.analysis.convergence.figures import (
    COLOURS,
    Drawing,
    Summary,
    band,
    draw_portrait,
    draw_residuals,
    finish,
    layer_panels,
    tidy,
)
from inl_core.training.depth import share_groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STREAM_FIGURES = ("coefficients.png", "shares.png", "transport.png")
"""Those that other reports do not have."""
_SHOWN = ("alpha", "transport", "anchor", "beta")
_STEP = "step t"


def stream_drawings(coefficients: pa.Table) -> dict[str, Drawing]:
    """What draws each figure; `coefficients` are those of `coefficient_table`."""
    return {
        "residual.png": draw_residuals,
        "distance.png": _distances,
        "coefficients.png": _coefficients,
        "shares.png": _shares,
        "transport.png": partial(_transport, coefficients),
        "bits_per_byte.png": _bits,
        "portrait.png": draw_portrait,
    }


def _distances(summary: Summary, _: pa.Table) -> "Figure":
    figure, found = layer_panels(summary, "How far the states are from mu and from where they end")
    for axes, layer in found:
        band(axes, layer, "distance_end", COLOURS[1], "to the token's own last state")
        if "distance_mu" in layer["iterations"][0]:
            band(axes, layer, "distance_mu", COLOURS[0], "to mu")
    return finish(figure, _STEP, "rms distance")


def _coefficients(summary: Summary, _: pa.Table) -> "Figure":
    from matplotlib.figure import Figure

    [layer] = summary["layers"]
    names = [name for name in _SHOWN if any(name in row for row in layer["iterations"])]
    figure = Figure(figsize=(3.2 * len(names) + 1.0, 3.2), layout="constrained")
    for axes, name, colour in zip(figure.subplots(1, len(names), squeeze=False)[0], names, COLOURS, strict=False):
        band(axes, layer, name, colour, name)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(name, fontsize=10)
        _by_step(axes)
    figure.suptitle("The learned coefficients: median and 5th to 95th percentile over channels", fontsize=11)
    return figure


def _shares(summary: Summary, _: pa.Table) -> "Figure | None":
    from matplotlib.figure import Figure

    rows = summary["layers"][0]["iterations"][1:]
    groups = share_groups({name for row in rows for name in row})
    if not groups:
        return None
    figure = Figure(figsize=(5.2 * len(groups) + 0.5, 3.8), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        below = np.zeros(len(rows))
        for (name, label), colour in zip(names.items(), COLOURS, strict=False):
            heights = np.array([row[name]["mean"] or 0.0 for row in rows])
            axes.bar([row["iteration"] for row in rows], heights, bottom=below, color=colour, label=label)
            below += heights
        axes.set_title(title[0].upper() + title[1:], fontsize=10)
        axes.legend(fontsize=8, loc="lower right")
        _by_step(axes)
    figure.supylabel("share, mean over tokens", fontsize=10)
    return figure


def _transport(coefficients: pa.Table, summary: Summary, _: pa.Table) -> "Figure | None":
    """b, one row a step (0 is the embedding), with channels sorted by their mean so that a pattern can be seen."""
    from matplotlib.figure import Figure

    if "transport" not in summary["terms"]:
        return None
    values = np.array(coefficients["transport"].to_pylist(), dtype=float)  # what is off is NaN and stays white
    values = values.reshape(-1, max(coefficients["channel"].to_pylist()) + 1)
    values = values[:, np.argsort(np.nanmean(values, axis=0))]
    limit = np.nanmax(np.abs(values)) or 1.0
    figure = Figure(figsize=(9.5, 1.6 + 0.25 * len(values)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="b")
    axes.set(xlabel="channels, sorted by their mean b", ylabel="step (0: the embedding)")
    axes.set_title("The transport b of each step and channel", fontsize=11)
    return figure


def _bits(summary: Summary, _: pa.Table) -> "Figure":
    from matplotlib.figure import Figure

    figure, found = Figure(figsize=(10, 4), layout="constrained"), summary["bits_per_byte"]
    left, right = figure.subplots(1, 2)
    for axes, rows, key in ((left, found["without_step"], "step"), (right, found["without_term"], "term")):
        changes = [math.nan if row["change"] is None else row["change"] for row in rows]
        errors = [row["standard_error"] or 0.0 for row in rows]
        axes.bar([row[key] for row in rows], changes, yerr=errors, capsize=3, color=COLOURS[1], width=0.7)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylabel("bits per byte more")
    _by_step(left)
    left.set_title("Without one step", fontsize=11)
    tidy(right, whole_numbers=False)
    right.set_title("Without one term in all steps", fontsize=11)
    return figure


def _by_step(axes: "Axes") -> None:
    tidy(axes)
    axes.set_xlabel(_STEP, fontsize=9)
