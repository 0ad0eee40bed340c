"""A run's figures as short texts, and its bar: what `inl train` shows while it trains and `inl watch` from outside.

It imports no torch.
"""

from typing import Any

_OF_STREAM = {"momentum share": "force_momentum", "transport share": "movement_transport"}


def row_figures(row: dict[str, Any], num_steps: int | None, eta: str) -> dict[str, str]:
    """A row of metrics.jsonl of a training step, figure by figure."""
    figures = {
        "step": str(row["step"]) if num_steps is None else f"{row['step']}/{num_steps}",
        "loss": _text(row.get("loss"), ".4f"),
        "bits/byte": _text(row.get("bits_per_byte"), ".3f"),
        "tokens/s": _text(row.get("tokens_per_second"), ",.0f"),
        **({"mfu": f"{row['mfu']:.1%}"} if row.get("mfu") is not None else {}),
        "eta": eta,
        "lr": _text(row.get("learning_rate"), ".2e"),
        "norm": _text(row.get("gradient_norm"), ".2f"),
    }
    if "phase" in row and "A" in row:
        cycle = {} if row["phase"] == "constant" else {"cycle": row["phase"]}  # constant: there is no cycle
        figures |= cycle | {"A": f"{row['A']:.3g}"}
    if "iterations" in row:
        figures["T"] = f"{row['iterations']:.2g}"
    return figures


def measured_figures(row: dict[str, Any]) -> dict[str, str]:
    """What a row says of the dynamics, which are measured at some steps only.

    Of a stream, whose alpha and b have both signs, the shares are shown.
    """
    figures, form = (_OF_STREAM, ".1%") if "state_rms" in row else ({"alpha": "alpha_mean"}, ".3f")
    found = {title: row[name] for title, name in figures.items() if row.get(name) is not None}
    return {title: f"{value:{form}} at step {row['step']}" for title, value in found.items()}


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def panel(step: int, num_steps: int, figures: dict[str, str]) -> Any:
    """A bar, and the figures below it."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    # One column: a bar by itself would not end its line. Texts wrap where the terminal is narrow.
    grid = Table.grid()
    grid.add_row(ProgressBar(num_steps, step, width=60))
    grid.add_row("   ".join(f"{name} {value}" for name, value in figures.items()))
    return grid


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
