"""What a run tells whoever shows it. The training itself prints nothing."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inl_core.inference.evaluate import Evaluation


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
        """Log the row."""
        self.logger.info("%s", row)

    def on_message(self, text: str) -> None:
        """Log the line."""
        self.logger.info("%s", text)

    def on_warning(self, text: str) -> None:
        """Log the warning."""
        self.logger.warning("%s", text)
