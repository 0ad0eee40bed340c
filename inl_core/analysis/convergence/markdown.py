"""report.md: the convergence report as prose, tables and figures, from its summary."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from inl_core.analysis.convergence.sample import GAINS
from inl_core.analysis.convergence.stability import KINDS
from inl_core.documents.convergence import METRICS

Summary = dict[str, Any]

WORDS = {"converge": "converge", "oscillate": "oscillate", "drift": "drift", "ignored": "are ignored"}
BEYOND = WORDS | {"ignored": "hardly move"}
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
    layers = (_layer(summary, layer) for layer in summary["layers"])
    parts += [show_figures(figures, warning, _CAPTIONS), *layers, _terms(summary)]
    return "\n\n".join(part for part in parts if part) + "\n"


def system_name(summary: Summary, layer: Summary) -> str:
    """What the report calls a layer, or the whole of a stream."""
    return "all steps" if summary["terms"] else f"layer {layer['layer']}"


def sentences(summary: Summary) -> list[str]:
    """One sentence for each layer, or for the stream."""
    return [_sentence(system_name(summary, layer), layer) for layer in summary["layers"]]


def _sentence(name: str, layer: Summary) -> str:
    """What the states do in the iterations that the model runs, and what they would do beyond these."""
    verdict, beyond = layer["verdict"], layer["beyond"]
    text = f"{name}: the states {WORDS[verdict['word']]} ({verdict['reason']})"
    if beyond is None:
        return text
    return f"{text}; beyond T, which the model does not run, they would {BEYOND[beyond['word']]} ({beyond['reason']})"


def shown(value: Any) -> str:
    """A number to four significant digits."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def signed(value: float | None) -> str:
    """A change, with its sign; a dash when it is not known."""
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
        f"that the model runs is at most {limits['converged_movement']:.0%} of its peak; **oscillate** when it still "
        f"moves and a dimension turned back at least {limits['oscillating_turns']:g} times, weighted by motion; "
        "**drift** when it still moves in much the same direction, or stops being finite."
    )


def _bits(summary: Summary) -> str:
    found, columns = summary["bits_per_byte"], ("bits_per_byte", "change", "standard_error")
    curve, layers, terms = (
        markdown_table(
            (title, *(name.replace("_", " ") for name in columns)),
            [(row[key], *(row[name] for name in columns)) for row in found[rows]],
        )
        for title, key, rows in (
            ("T in every layer (0: all skipped)", "iterations", "by_iterations"),
            ("layer skipped", "layer", "without_layer"),
            ("term left out", "term", "without_term"),
        )
    )
    return (
        f"## Bits per byte\n\nThe model as it is: {shown(found['bits_per_byte'])}. Changes are paired on the same "
        f"text; the standard error is over batches.\n\n{curve}\n\n{layers}\n\n{terms}\n\n"
        "A term that is left out is 0 in every layer: without momentum alpha is 0, without equilibrium beta, without "
        "excitation A."
    )


def _stopping(summary: Summary) -> str:
    stopping = summary["early_stopping"]
    if not stopping:
        return "## Early stopping\n\nOff in this checkpoint: every token runs all T iterations."
    rows, most = [], 0
    for layer, counts in enumerate(stopping["tokens_by_iterations"]):
        total, most = max(1, sum(counts)), max(most, len(counts))
        mean = sum(t * count for t, count in enumerate(counts)) / total
        rows.append((layer, mean, *(f"{count / total:.1%}" for count in counts[1:])))
    return (
        f"## Early stopping\n\nThreshold {shown(stopping['convergence_threshold'])}: bits per byte "
        f"{shown(stopping['bits_per_byte'])}, {signed(stopping['change'])} against all iterations.\n\n"
        + markdown_table(("layer", "mean iterations", *(f"used {t}" for t in range(1, most))), rows)
    )


def show_figures(figures: Sequence[str], warning: str | None, captions: dict[str, str]) -> str:
    """The section of the figures, or why there are none."""
    lines = [f"![{captions[name]}]({name})" for name in figures]
    return "## Figures\n\n" + ("\n\n".join(lines) if lines else f"There are {warning}.")


def _layer(summary: Summary, layer: Summary) -> str:
    def by_iteration(columns: Sequence[str], cells: Callable[[Summary], Iterable[Any]], *, first: int = 0) -> str:
        """A row for each iteration from `first` on."""
        rows = layer["iterations"][first:]
        marks = (f"{row['iteration']}{'' if row['used'] else ' *'}" for row in rows)
        return markdown_table(("t", *columns), [(mark, *cells(row)) for mark, row in zip(marks, rows, strict=True)])

    motion = ("residual p5 / p50 / p95", "energy", "distance to mu p5 / p50 / p95", *KINDS, "spectral radius p50")
    gains = (*(f"{name} mean, p5 / p50 / p95" for name in GAINS), "no fixed point")
    return "\n\n".join(
        (
            f"## Layer {layer['layer']}\n\n(*: beyond the model's own T = {layer['used_iterations']})",
            f"Against mu (tolerance {summary['epsilon']:g}):",
            by_iteration(METRICS, lambda row: (row["against_mu"][name] for name in METRICS)),
            "Against the token's own fixed point:",
            by_iteration(METRICS, lambda row: (row["against_fixed_point"][name] for name in METRICS)),
            "Motion, and stability of the frozen steps:",
            by_iteration(motion, _motion, first=1),
            by_iteration(gains, _gains, first=1),
        )
    )


def _motion(row: Summary) -> tuple[Any, ...]:
    stability = row["stability"]
    spreads = (spread(row["residual"]), row["energy"]["mean"], spread(row["distance_mu"]))
    return (*spreads, *(f"{stability[kind]:.1%}" for kind in KINDS), stability["spectral_radius"]["p50"])


def _gains(row: Summary) -> tuple[str, ...]:
    means = (f"{shown(row[name]['mean'])}, {spread(row[name])}" for name in GAINS)
    return (*means, f"{row['share_without_fixed_point']:.1%}")


def _terms(summary: Summary) -> str:
    return (
        "## Terms\n\nx state, v velocity, D dimensions. Residual: ||x_t - x_{t-1}|| / sqrt(D), over tokens. Energy: "
        "mean of v^2. Fixed point of a frozen step: mu + (1 - alpha) v_cand / beta; where beta is below "
        f"{summary['beta_floor']:g} it is far beyond reach ('no fixed point') and is computed with that beta. Steady, "
        "oscillatory, alternating, unstable: what the step, frozen, would do in one dimension of one token."
    )


def spread(values: Summary) -> str:
    """p5 / p50 / p95."""
    return " / ".join(shown(values[key]) for key in ("p5", "p50", "p95"))


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(shown(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)
