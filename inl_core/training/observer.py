"""What a run tells whoever shows it. The training itself prints nothing."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inl_core.inference.evaluate import Evaluation


_LOGGED = {
    "loss": ("loss", ".4f"),
    "bits per byte": ("bits_per_byte", ".3f"),
    "tokens per second": ("tokens_per_second", ",.0f"),
    "learning rate": ("learning_rate", ".2e"),
    "gradient norm": ("gradient_norm", ".2f"),
}
"""What is logged of a row of metrics.jsonl: its name for people, its key, and how it is written."""


class Observer:
    """Hears what a run does, on rank 0, and ignores it; a subclass shows what it wants to show.

    Evaluations and checkpoints are told as messages too.
    """

    def on_metrics(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl was written."""

    def on_evaluation(self, step: int, evaluation: "Evaluation") -> None:
        """The validation split was scored."""
        self.on_message(
            f"step {step}: validation loss {evaluation.loss:.4f}, {evaluation.bits_per_byte_text} bits per byte, "
            f"accuracy {evaluation.accuracy:.1%} on {evaluation.tokens:,} tokens in {evaluation.seconds:.1f} s"
        )

    def on_checkpoint(self, path: Path, seconds: float) -> None:
        """A checkpoint was saved."""
        self.on_message(f"saved {path} in {seconds:.2f} s")

    def on_message(self, text: str) -> None:
        """Something happened that is worth a line."""

    def on_warning(self, text: str) -> None:
        """Something went wrong, and the run goes on."""


class LogObserver(Observer):
    """Passes everything on to Python's `logging`, under the name "inl": warnings as such, the rest as information."""

    def __init__(self) -> None:
        self.logger = logging.getLogger("inl")

    def on_metrics(self, row: dict[str, Any]) -> None:
        """Log the figures that people follow."""
        told = [f"{name} {row[key]:{form}}" for name, (key, form) in _LOGGED.items() if row.get(key) is not None]
        self.logger.info("step %d: %s", row["step"], ", ".join(told))

    def on_message(self, text: str) -> None:
        """Log the line."""
        self.logger.info("%s", text)

    def on_warning(self, text: str) -> None:
        """Log the warning."""
        self.logger.warning("%s", text)
