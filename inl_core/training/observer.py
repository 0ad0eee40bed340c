"""What a run tells whoever shows it (inl_cli/training_view.py): the training itself prints nothing."""

from pathlib import Path
from typing import Any, Protocol

from inl_core.inference.evaluate import Evaluation


class Observer(Protocol):
    """Hears what a run does, on rank 0."""

    def on_metrics(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl was written."""

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """The validation split was scored."""

    def on_checkpoint(self, path: Path, seconds: float) -> None:
        """A checkpoint was saved."""

    def on_message(self, text: str, warning: bool = False) -> None:
        """Anything else worth a line."""
