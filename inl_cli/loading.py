"""Open the model a command works on, and say which one it is."""

from pathlib import Path
from typing import TYPE_CHECKING

from inl_cli.console import Console
from inl_core.errors import RecipeError

if TYPE_CHECKING:
    from inl_core.inference.artefacts import LoadedModel


def open_model(
    console: Console, checkpoint: Path | None, device: str = "cpu", *, iterations: int | None = None
) -> "LoadedModel":
    """The checkpoint, verified and loaded; `iterations` is checked against what the model can do."""
    if iterations is not None and iterations < 1:
        raise RecipeError(f"iterations {iterations}: must be at least 1")
    from inl_core.inference.artefacts import find_checkpoint, load_model
    from inl_core.training.distributed import choose_device

    def note(text: str) -> None:
        (console.warn if text.startswith("skipped") else console.info)(text)

    loaded = load_model(find_checkpoint(checkpoint, note=note), choose_device(device))
    if iterations is not None and loaded.model.config.integrator is None:
        console.warn("this model has no integrator: --iterations has no effect")
    return loaded
