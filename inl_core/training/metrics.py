"""metrics.jsonl, the truth about a run, and its mirrors (TensorBoard, Weights & Biases).

- One JSON object a line; a row with `validation_loss` is an evaluation. On resume the file is cut to the checkpoint's
  step, so no step appears twice.
- A full disk must not end a run: a row that cannot be written is reported once and training goes on.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inl_core.errors import RecipeError
from inl_core.recipe import Recipe


class MetricsWriter:
    """Appends rows to a run's metrics.jsonl and to the mirrors the recipe asks for."""

    def __init__(self, run: Path, recipe: Recipe, warn: Callable[[str], None]) -> None:
        self.path, self.warn, self.failed = run / "metrics.jsonl", warn, False
        logging = recipe.training.logging
        self.mirrors: list[Callable[[dict[str, Any]], None]] = []
        if logging.tensorboard:
            self.mirrors.append(_tensorboard(run))
        if logging.wandb:
            self.mirrors.append(_wandb(run, recipe))

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.failed = False
        except OSError as error:
            if not self.failed:
                self.warn(f"{self.path}: cannot be written ({error.strerror or error}); metrics are lost until it can")
            self.failed = True
        for mirror in self.mirrors:
            mirror(row)


class Interval:
    """Tokens and seconds of the steps since the last log row."""

    def __init__(self) -> None:
        self.tokens = self.seconds = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        """One step more."""
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds

    def restart(self) -> float:
        """Tokens a second since the last call."""
        speed = self.tokens / self.seconds
        self.tokens = self.seconds = 0.0
        return speed


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All whole rows; a last line cut short by a crash is left out."""
    path = run / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def cut_metrics(run: Path, step: int, *, keep_evaluation: bool = True) -> None:
    """Drop the rows after `step`, by rewriting the file aside.

    `keep_evaluation` False also drops the evaluation at `step`: a finished run that is resumed makes it again.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        return
    rows = [row for row in read_metrics(run) if row["step"] <= step]
    kept = [row for row in rows if keep_evaluation or row["step"] < step or "validation_loss" not in row]
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(row) + "\n" for row in kept))
    aside.replace(path)


def best_step(run: Path) -> int | None:
    """The evaluated step with the lowest validation bits per byte."""
    rows = [row for row in read_metrics(run) if "validation_bits_per_byte" in row]
    return min(rows, key=lambda row: row["validation_bits_per_byte"])["step"] if rows else None


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The row's figures; lists (a value a layer, an expert) become name/0, name/0/1 and so on."""
    found: dict[str, float] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, list):
            for index, item in enumerate(value):
                add(f"{name}/{index}", item)
        elif isinstance(value, int | float):
            found[name] = value

    for key, value in row.items():
        if key != "step":
            add(key, value)
    return found


def _tensorboard(run: Path) -> Callable[[dict[str, Any]], None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RecipeError('training.logging.tensorboard: not installed; pip install "inl[logging]"') from error
    writer = SummaryWriter(str(run / "tensorboard"))

    def mirror(row: dict[str, Any]) -> None:
        for key, value in _numbers(row).items():
            writer.add_scalar(key, value, row["step"])

    return mirror


def _wandb(run: Path, recipe: Recipe) -> Callable[[dict[str, Any]], None]:
    try:
        import wandb  # type: ignore[import-not-found]
    except ImportError as error:
        raise RecipeError('training.logging.wandb: not installed; pip install "inl[logging]"') from error
    session = wandb.init(
        project="inl", name=run.name, dir=str(run), config=recipe.model_dump(mode="json"), resume="allow"
    )
    return lambda row: session.log(_numbers(row), step=row["step"])
