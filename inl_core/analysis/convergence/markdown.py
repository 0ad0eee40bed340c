"""report.md: the convergence report as prose, tables and figures, from its summary."""

from collections.abc import Sequence
from typing import Any

from inl_core.analysis.convergence.metrics import METRICS
from inl_core.analysis.convergence.stability import KINDS

Summary = dict[str, Any]

_WORDS = {"converge": "converge", "oscillate": "oscillate", "drift": "drift", "ignored": "are ignored"}
_CAPTIONS = {
    "residual.png": "Movement of the state in each iteration",
    "distance.png": "Distance to mu and to the fixed point",
    "gains.png": "alpha, beta and gate",
    "stability.png": "Stability of the frozen steps",
    "bits_per_byte.png": "Bits per byte by iterations, and without each layer's integrator",
    "iterations_used.png": "Iterations used under early stopping",
    "portrait.png": "Phase portrait",
}


def to_markdown(summary: Summary, figures: Sequence[str], warning: str | None = None) -> str:
    """The whole report; `figures` are the files beside it, `warning` says why there are none."""
    parts = [_head(summary), _verdicts(summary), _bits(summary), _stopping(summary)]
    parts += [_figures(figures, warning), *(_layer(summary, layer) for layer in summary["layers"]), _terms(summary)]
    return "\n\n".join(part for part in parts if part) + "\n"


def sentences(summary: Summary) -> list[str]:
    """One sentence for each layer."""
    return [
        f"layer {layer['layer']}: the states {_WORDS[layer['verdict']['word']]} ({layer['verdict']['reason']})"
        for layer in summary["layers"]
    ]


def shown(value: Any) -> str:
    """A number to four significant digits."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def signed(value: float | None) -> str:
    """A change, with its sign; a dash when nobody can tell."""
    return "-" if value is None else f"{value:+.4f}"


def _head(summary: Summary) -> str:
    own, followed = summary["num_iterations"], summary["iterations_followed"]
    return (
        f"# Convergence of {summary['checkpoint']}\n\n"
        f"Preset {summary['preset']}, step {summary['step']:,}. Measured on {summary['tokens']:,} tokens of "
        f"{summary['text']} in windows of {summary['window']:,}. The model runs T = {own} iterations a layer; each "
        f"layer's dynamics were followed for {followed} from the states that the model itself gives it. What lies "
        f"beyond T shows where the dynamics lead, not what the model does. A = {shown(summary['amplitude'])}. Every "
        "number is defined in docs/convergence-report.md."
    )


def _verdicts(summary: Summary) -> str:
    limits = summary["thresholds"]
    lines = [f"- {sentence[0].upper()}{sentence[1:]}." for sentence in sentences(summary)]
    return (
        "## What the states do\n\n" + "\n".join(lines) + "\n\n"
        "Thresholds, in this order: **ignored** when skipping the layer changes bits per byte by less than "
        f"{limits['ignored_change']:.2%} or the used iterations move the state by less than "
        f"{limits['ignored_displacement']:.0%} of its size; **converge** when the movement at the last iteration "
        f"followed is at most {limits['converged_movement']:.0%} of its peak; **oscillate** when it still moves and a "
        f"dimension turned back at least {limits['oscillating_turns']:g} times, weighted by motion; **drift** when it "
        "still moves in much the same direction, or stops being finite."
    )


def _bits(summary: Summary) -> str:
    found = summary["bits_per_byte"]
    columns = ("bits_per_byte", "change", "standard_error")
    curve = [(row["iterations"], *(row[name] for name in columns)) for row in found["by_iterations"]]
    layers = [(row["layer"], *(row[name] for name in columns)) for row in found["without_layer"]]
    return (
        f"## Bits per byte\n\nThe model as it is: {shown(found['bits_per_byte'])}. Changes are paired on the same "
        "text; the standard error is over batches.\n\n"
        + _table(("T in every layer (0: all skipped)", "bits per byte", "change", "standard error"), curve)
        + "\n\n"
        + _table(("layer skipped", "bits per byte", "change", "standard error"), layers)
    )


def _stopping(summary: Summary) -> str:
    stopping = summary["early_stopping"]
    if not stopping:
        return "## Early stopping\n\nOff in this checkpoint: every token runs all T iterations."
    rows = []
    for layer, counts in enumerate(stopping["tokens_by_iterations"]):
        total = max(1, sum(counts))
        mean = sum(t * count for t, count in enumerate(counts)) / total
        rows.append((layer, mean, *(f"{count / total:.1%}" for count in counts[1:])))
    most = max(len(counts) for counts in stopping["tokens_by_iterations"])
    return (
        f"## Early stopping\n\nThreshold {shown(stopping['convergence_threshold'])}: bits per byte "
        f"{shown(stopping['bits_per_byte'])}, {signed(stopping['change'])} against all iterations.\n\n"
        + _table(("layer", "mean iterations", *(f"used {t}" for t in range(1, most))), rows)
    )


def _figures(figures: Sequence[str], warning: str | None) -> str:
    lines = [f"![{_CAPTIONS[name]}]({name})" for name in figures]
    return "## Figures\n\n" + ("\n\n".join(lines) if lines else f"There are {warning}.")


def _layer(summary: Summary, layer: Summary) -> str:
    rows = layer["iterations"]
    marks = [str(row["iteration"]) + ("" if row["used"] else " *") for row in rows]
    metrics = [
        _table(
            ("t", *METRICS),
            [(mark, *(row[key][name] for name in METRICS)) for mark, row in zip(marks, rows, strict=True)],
        )
        for key in ("against_mu", "against_fixed_point")
    ]
    motion = [
        (mark, _spread(row["residual"]), row["energy"]["mean"], _spread(row["distance_mu"]), row["stability"])
        for mark, row in zip(marks[1:], rows[1:], strict=True)
    ]
    motion_table = _table(
        ("t", "residual p5 / p50 / p95", "energy", "distance to mu p5 / p50 / p95", *KINDS, "spectral radius p50"),
        [
            (
                *cells,
                *(f"{stability[kind]:.1%}" for kind in KINDS),
                stability["spectral_radius"]["p50"],
            )
            for *cells, stability in motion
        ],
    )
    gains = _table(
        ("t", *(f"{name} mean, p5 / p50 / p95" for name in ("alpha", "beta", "gate")), "no fixed point"),
        [
            (
                mark,
                *(f"{shown(row[name]['mean'])}, {_spread(row[name])}" for name in ("alpha", "beta", "gate")),
                f"{row['share_without_fixed_point']:.1%}",
            )
            for mark, row in zip(marks[1:], rows[1:], strict=True)
        ],
    )
    return "\n\n".join(
        (
            f"## Layer {layer['layer']}\n\n(*: beyond the model's own T = {layer['used_iterations']})",
            f"Against mu (tolerance {summary['epsilon']:g}):\n\n{metrics[0]}",
            f"Against the token's own fixed point:\n\n{metrics[1]}",
            f"Motion, and stability of the frozen steps:\n\n{motion_table}",
            gains,
        )
    )


def _terms(summary: Summary) -> str:
    return (
        "## Terms\n\nx state, v velocity, D dimensions. Residual: ||x_t - x_{t-1}|| / sqrt(D), over tokens. Energy: "
        "mean of v^2. Fixed point of a frozen step: mu + (1 - alpha) v_cand / beta; where beta is below "
        f"{summary['beta_floor']:g} it is far beyond reach ('no fixed point') and is computed with that beta. Steady, "
        "oscillatory, alternating, unstable: what the step, frozen, would do in one dimension of one token."
    )


def _spread(values: Summary) -> str:
    return " / ".join(shown(values[key]) for key in ("p5", "p50", "p95"))


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(shown(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)
