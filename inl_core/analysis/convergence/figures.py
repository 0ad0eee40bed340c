"""The figures of a convergence report, drawn from its summary and its table of sampled trajectories.

- matplotlib is imported when a figure is drawn, and its global state is left alone.
- Iterations beyond the model's own T are shaded: they show where the dynamics lead, not what the model does.
- Of many layers a few are shown, evenly spaced; summary.json holds all.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from inl_core.analysis.convergence.markdown import system_name
from inl_core.analysis.convergence.sample import GAINS
from inl_core.analysis.convergence.stability import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LAYERS = 8
COLOURS = ("#3b6fb6", "#c8553d", "#3f8f5f", "#8a5fa8")
_KIND_COLOURS = ("#7fa6d6", "#e3b062", "#b08cc9", "#c8553d")
_DOTTED: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 1.2}
_PORTRAIT_TOKENS = 6
_SHADED = "\nshaded: beyond the model's own T"

Summary = dict[str, Any]


Drawing = Callable[[Summary, pa.Table], "Figure | None"]


def draw_figures(drawings: dict[str, Drawing], summary: Summary, sample: pa.Table, directory: Path) -> list[str]:
    """Draw every figure that the report has data for, and return their names; ImportError without matplotlib."""
    import matplotlib  # noqa: F401 - a missing matplotlib is found here, before anything is written

    names = []
    for name, draw in drawings.items():
        figure = draw(summary, sample)
        if figure is not None:
            figure.savefig(directory / name, dpi=130)
            names.append(name)
    return names


def shown_layers(layers: list[Any], most: int = MOST_LAYERS) -> list[Any]:
    """At most `most` of them, evenly spaced, first and last among them."""
    if len(layers) <= most:
        return layers
    return [layers[round(index * (len(layers) - 1) / (most - 1))] for index in range(most)]


def draw_residuals(summary: Summary, _: pa.Table) -> "Figure":
    """How far each iteration, or step, moves the state."""
    unit = "step" if summary["terms"] else "iteration"
    figure, panels = layer_panels(summary, f"Movement in each {unit}: median over tokens, 5th to 95th percentile")
    for axes, layer in panels:
        band(axes, layer, "residual", COLOURS[0], "||x_t - x_{t-1}|| / sqrt(D)")
    figure.axes[0].set_ylim(bottom=0)
    return finish(figure, f"{unit} t", "rms change of the state")


def _distances(summary: Summary, _: pa.Table) -> "Figure":
    figure, panels = layer_panels(summary, "How far the states are from mu and from their own fixed point")
    for axes, layer in panels:
        band(axes, layer, "distance_fixed_point", COLOURS[1], "to the fixed point of the frozen step")
        band(axes, layer, "distance_mu", COLOURS[0], "to mu")
        axes.set_yscale("log")
    return finish(figure, "iteration t", "rms distance (log scale)")


def _gains(summary: Summary, _: pa.Table) -> "Figure":
    from matplotlib.figure import Figure

    layers = shown_layers(summary["layers"], 6)
    figure = Figure(figsize=(9.5, 1.2 + 1.75 * len(layers)), layout="constrained")
    grid = figure.subplots(len(layers), 3, squeeze=False, sharex=True, sharey="col")
    for row, layer in zip(grid, layers, strict=True):
        for axes, name, colour in zip(row, GAINS, COLOURS, strict=False):
            band(axes, layer, name, colour, f"{name}: median, 5% - 95%")
            _mark_used(axes, summary, layer)
            tidy(axes)
            axes.set_title(f"layer {layer['layer']}: {name}", fontsize=9)
            axes.set_ylim(0, None if name == "beta" else 1.05)
    title = "alpha, beta and gate over tokens and dimensions: median, 5th to 95th percentile"
    figure.suptitle(title + _SHADED, fontsize=11)
    figure.supxlabel("iteration t", fontsize=10)
    return figure


def _stability(summary: Summary, _: pa.Table) -> "Figure":
    figure, panels = layer_panels(summary, "What the frozen steps would do: share of tokens x dimensions", mark=False)
    for axes, layer in panels:
        rows = layer["iterations"][1:]
        shares = [[row["stability"][kind] for row in rows] for kind in KINDS]
        axes.stackplot([row["iteration"] for row in rows], shares, labels=KINDS, colors=_KIND_COLOURS)
        axes.set(xlim=(1, len(rows)), ylim=(0, 1))
        axes.axvline(layer["used_iterations"], **_DOTTED)
    return finish(figure, "iteration t (dotted: own T)", "share")


def _bits(summary: Summary, _: pa.Table) -> "Figure":
    from matplotlib.figure import Figure

    def columns(rows: list[Summary], key: str) -> tuple[list[int], list[float], list[float]]:
        """Numbers, bits and their standard errors; what is not known is NaN, which is not drawn."""
        value = "bits_per_byte" if key == "iterations" else "change"
        values = [math.nan if row[value] is None else row[value] for row in rows]
        return [row[key] for row in rows], values, [row["standard_error"] or 0.0 for row in rows]

    figure, found, own = (
        Figure(figsize=(10, 4), layout="constrained"),
        summary["bits_per_byte"],
        summary["num_iterations"],
    )
    left, right = figure.subplots(1, 2)
    counts, values, errors = columns(found["by_iterations"], "iterations")
    left.errorbar(counts, values, yerr=errors, marker="o", markersize=4, capsize=3, color=COLOURS[0])
    for count, value in zip(counts, values, strict=True):
        if not math.isnan(value):
            left.annotate(f"{value:.3f}", (count, value), xytext=(4, 7), textcoords="offset points", fontsize=8)
    left.margins(x=0.08, y=0.12)
    left.axvline(own, **_DOTTED, label=f"the model's own T = {own}")
    left.set(xlabel="iterations T in every layer (0: integrators skipped)", ylabel="bits per byte")
    left.set_title("Bits per byte by iterations", fontsize=11)
    left.legend(fontsize=8)
    layers, values, errors = columns(found["without_layer"], "layer")
    right.bar(layers, values, yerr=errors, capsize=3, color=COLOURS[1], width=0.7)
    right.axhline(0, color="black", linewidth=0.8)
    right.set(xlabel="layer whose integrator is skipped", ylabel="bits per byte more")
    right.set_title("What each layer's integrator is worth", fontsize=11)
    for axes in (left, right):
        tidy(axes)
    return figure


def _iterations_used(summary: Summary, _: pa.Table) -> "Figure | None":
    stopping = summary["early_stopping"]
    if not stopping:
        return None
    figure, panels = layer_panels(
        summary, f"Iterations used under early stopping (threshold {stopping['convergence_threshold']:g})", mark=False
    )
    for axes, layer in panels:
        counts = stopping["tokens_by_iterations"][layer["layer"]]
        shares = [count / max(1, sum(counts)) for count in counts]
        axes.bar(range(len(counts)), shares, color=COLOURS[2], width=0.8)
        axes.set(xlim=(0.4, len(counts) - 0.4), ylim=(0, 1))
    return finish(figure, "iterations", "share of tokens")


def draw_portrait(summary: Summary, sample: pa.Table) -> "Figure":
    """Velocity over state, of a few tokens and dimensions."""
    figure, panels = layer_panels(
        summary, "Phase portrait of a few dimensions: one line a token, a dot where it starts", mark=False
    )
    layers, tokens = np.asarray(sample["layer"]), np.asarray(sample["token_index"])
    count = summary["iterations_followed"] + 1
    errors = np.stack(sample["portrait_error"].to_numpy())
    velocities = np.stack(sample["portrait_velocity"].to_numpy())
    chosen = np.isin(tokens, shown_layers(sorted(set(tokens.tolist())), _PORTRAIT_TOKENS))
    names = summary["portrait_dimensions"]
    for axes, layer in panels:
        rows = chosen & (layers == layer["layer"])
        x, v = (part[rows].reshape(-1, count, part.shape[1]) for part in (errors, velocities))
        used = layer["used_iterations"] + 1
        for dim in range(x.shape[2]):
            colour = COLOURS[dim % len(COLOURS)]
            axes.plot(x[:, :, dim].T, v[:, :, dim].T, color=colour, linewidth=0.5, alpha=0.45)
            axes.plot(x[:, :used, dim].T, v[:, :used, dim].T, color=colour, linewidth=1.4, alpha=0.9)
            axes.plot(x[:, 0, dim], v[:, 0, dim], ".", color=colour, markersize=5, label=f"dimension {names[dim]}")
        _clip(axes, x, v)
        axes.axhline(0, color="grey", linewidth=0.6)
        axes.axvline(0, color="grey", linewidth=0.6)
    return finish(figure, "x - mu (thick: own iterations)", "velocity v", whole_numbers=False)


DRAW: dict[str, Drawing] = {
    "residual.png": draw_residuals,
    "distance.png": _distances,
    "gains.png": _gains,
    "stability.png": _stability,
    "bits_per_byte.png": _bits,
    "iterations_used.png": _iterations_used,
    "portrait.png": draw_portrait,
}
FIGURES = tuple(DRAW)


def layer_panels(summary: Summary, title: str, *, mark: bool = True) -> "tuple[Figure, Iterator[tuple[Axes, Any]]]":
    """A figure of one panel a layer, and the panels with their layers."""
    from matplotlib.figure import Figure

    layers = shown_layers(summary["layers"])
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(max(6.0, 3.0 * columns), 1.6 + 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=mark, sharey=mark).flat
    for axes in list(grid)[len(layers) :]:
        axes.set_visible(False)
    of = f" ({len(layers)} of {len(summary['layers'])} layers)" if len(layers) < len(summary["layers"]) else ""
    figure.suptitle(title + of + (_SHADED if mark and not summary["terms"] else ""), fontsize=11)

    def pairs() -> Iterator[tuple[Any, Any]]:
        for axes, layer in zip(figure.axes, layers, strict=False):
            axes.set_title(f"{system_name(summary, layer)}: {layer['verdict']['word']}", fontsize=9)
            if mark:
                _mark_used(axes, summary, layer)
            yield axes, layer

    return figure, pairs()


def band(axes: "Axes", layer: Any, name: str, colour: str, label: str) -> None:
    """The median of one figure over iterations, and the band from its 5th to its 95th percentile."""
    rows = [row for row in layer["iterations"] if row.get(name) and row[name]["p50"] is not None]
    t = [row["iteration"] for row in rows]
    p5, p50, p95 = ([row[name][key] for row in rows] for key in ("p5", "p50", "p95"))
    axes.fill_between(t, p5, p95, color=colour, alpha=0.18, linewidth=0)
    axes.plot(t, p50, color=colour, marker="o", markersize=3, linewidth=1.6, label=label)


def _mark_used(axes: "Axes", summary: Summary, layer: Any) -> None:
    last, used = summary["iterations_followed"], layer["used_iterations"]
    if used < last:
        axes.axvspan(used, last, color="black", alpha=0.05, linewidth=0)
    axes.set_xlim(0, last)


def finish(figure: "Figure", xlabel: str, ylabel: str, *, whole_numbers: bool = True) -> "Figure":
    """Labels, a legend and the common looks of a figure of panels."""
    figure.supylabel(ylabel, fontsize=10)
    visible = [axes for axes in figure.axes if axes.get_visible()]
    columns = min(4, len(visible))
    for index, axes in enumerate(visible):
        tidy(axes, whole_numbers=whole_numbers)
        if index + columns >= len(visible):  # the lowest of its column; a figure's own label would meet the legend
            axes.set_xlabel(xlabel, fontsize=9)
            axes.tick_params(labelbottom=True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


def tidy(axes: "Axes", *, whole_numbers: bool = True) -> None:
    """The common looks; `whole_numbers` are those on the x-axis."""
    from matplotlib.ticker import MaxNLocator

    if whole_numbers:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(True, alpha=0.25, linewidth=0.6)


def _clip(axes: "Axes", x: np.ndarray, v: np.ndarray) -> None:
    """Leave the outermost percent of points out of view, so that a single token does not set the scale."""
    for values, limit in ((x, axes.set_xlim), (v, axes.set_ylim)):
        finite = values[np.isfinite(values)]
        if finite.size:
            low, high = np.percentile(finite, (1, 99))
            margin = 0.08 * (high - low) or 1.0
            limit(float(low - margin), float(high + margin))
