"""What `inl watch` prints of a run: how it stands, its figures, its curves, its warnings."""

from typing import TYPE_CHECKING, Any

from inl_cli.plotting import beside, plot
from inl_cli.run_figures import clock, measured_figures, panel, row_figures

if TYPE_CHECKING:
    from inl_core.analysis.watching import Look

_NARROW, _WIDEST, _HEIGHT = 96, 160, 9
_CURVES = ("loss", "bits per byte")
_DEPTH = ("alpha", "beta", "gate", "transport", "anchor", "velocity", "displacement")


def lines_of(look: "Look", width: int) -> list[str]:
    """Everything as plain lines, at most `width` wide but for warnings and paths."""
    status = look.status
    reason = f": {status.reason}" if status.reason else ""
    figures = "  ".join(f"{name} {value}" for name, value in figures_of(look).items())
    return [f"{status.run}: {status.state}{reason}", figures, *_below(look, width)]


def live_view(look: "Look", width: int) -> Any:
    """The same for rich, with a bar, and in colours."""
    from rich.console import Group
    from rich.text import Text

    status = look.status
    reason = f": {status.reason}" if status.reason else ""
    colours = {"running": "green", "done": "bold", "failed": "red", "preempted": "yellow", "resumable": "yellow"}
    head = Text.assemble(f"{status.run}: ", (status.state, colours.get(status.state, "")), reason)
    warned = {f"warning: {text}" for text in look.warnings}
    below = (Text(line, style="yellow" if line in warned else "") for line in _below(look, width))
    return Group(head, panel(look.row.get("step", 0), look.num_steps or 1, figures_of(look)), *below)


def figures_of(look: "Look") -> dict[str, str]:
    """The newest row, and what else is known of the run, figure by figure."""
    row = look.row
    if row:
        figures = row_figures(row, look.num_steps, "-" if look.eta_seconds is None else clock(look.eta_seconds))
        figures |= measured_figures(row)
    else:
        figures = {"step": f"0/{look.num_steps}" if look.num_steps else "-"}
    if look.evaluation:
        names = {"validation_bits_per_byte": "bits/byte", "validation_loss": "loss"}
        shown = [f"{look.evaluation[name]:.4f} {unit}" for name, unit in names.items() if name in look.evaluation]
        figures["validation"] = f"{shown[0] if shown else 'nothing to score'} at step {look.evaluation['step']}"
    if look.status.checkpoint:
        ago = "" if look.seconds_since_checkpoint is None else f", {clock(look.seconds_since_checkpoint)} ago"
        figures["saved"] = f"step {look.status.step}{ago}"
    if look.status.state == "running" and look.seconds_since_row is not None:
        figures["last row"] = f"{clock(look.seconds_since_row)} ago"
    return figures


def _below(look: "Look", width: int) -> list[str]:
    """Curves, the newest record of the dynamics, warnings."""
    width = min(width, _WIDEST)
    columns = 2 if width >= _NARROW else 1
    plots = []
    for index, name in enumerate(_CURVES, 1):
        series = {"*": look.training, "o": look.validation}
        of_index = {mark: [(point[0], point[index]) for point in points] for mark, points in series.items()}
        title = f"{name} (* training, o validation)"
        plots.append(plot(title, of_index, width=width // columns - 2, height=_HEIGHT))
    found = [block for block in plots if block]
    lines = (
        ["", *beside(found, width=width // 2)] if columns == 2 else [line for block in found for line in ("", *block)]
    )
    if quantities := look.dynamics.get("quantities"):
        lines += ["", f"dynamics at step {look.dynamics['step']}: mean over the layers, and their range"]
        for name in (name for name in _DEPTH if name in quantities):
            own = quantities[name]
            lines.append(f"  {name:<12} {own['mean']:9.4f}  ({own['min']:.4f} to {own['max']:.4f})")
    if look.warnings:
        lines += ["", *(f"warning: {text}" for text in look.warnings)]
    return lines
