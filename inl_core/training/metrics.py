"""metrics.jsonl, the truth about a run.

- One JSON object a line; a row with `validation_loss` is an evaluation, and its `scored_on` says on what. On resume
  the file is cut to the checkpoint's step, so no step appears twice.
- A full disk must not end a run: a row that cannot be written whole is taken back and reported once, and training goes
  on.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inl_core.files import append_line, write_whole
from inl_core.recipe import Recipe
from inl_core.training.mirrors import one_line, open_mirrors


class MetricsWriter:
    """Appends rows to a run's metrics.jsonl and to the mirrors the recipe asks for."""

    def __init__(self, run: Path, recipe: Recipe, warn: Callable[[str], None]) -> None:
        self.path, self.warn, self.failed = run / "metrics.jsonl", warn, False
        self.mirrors = open_mirrors(run, recipe)

    def write(self, row: dict[str, Any]) -> dict[str, Any]:
        """Append one row; it comes back as it was written: NaN and infinity are null, as JSON has no word for them."""
        row = _finite(row)
        try:
            append_line(self.path, json.dumps(row))
            self.failed = False
        except OSError as error:
            if not self.failed:
                self.warn(
                    f"{self.path}: cannot be written ({error.strerror or error}); rows of metrics are lost until there "
                    "is room on this disk"
                )
            self.failed = True
        for name, mirror in list(self.mirrors.items()):
            try:
                mirror(row["step"], _numbers(row))
            except Exception as error:  # whatever somebody else's service raises, it must not end the run
                self.warn(f"training.logging.{name}: stopped, metrics.jsonl goes on: {one_line(error)}")
                del self.mirrors[name]
        return row


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
    """Drop the rows after `step`, and what is left of a torn one.

    `keep_evaluation` False also drops the evaluation at `step`: a finished run that is resumed makes it again.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        return
    rows = [row for row in read_metrics(run) if row["step"] <= step]
    kept = [row for row in rows if keep_evaluation or row["step"] < step or "validation_loss" not in row]
    write_whole(path, "".join(json.dumps(_finite(row)) + "\n" for row in kept))


def read_scores(run: Path, scored_on: str) -> dict[int, float]:
    """Validation bits per byte by step, of the evaluations whose rows say `scored_on`."""
    rows = [row for row in read_metrics(run) if row.get("scored_on") == scored_on]
    scores = {row["step"]: row.get("validation_bits_per_byte") for row in rows}
    return {step: score for step, score in scores.items() if isinstance(score, int | float) and math.isfinite(score)}


def _finite(value: Any) -> Any:
    """The value with null for every NaN and infinity in it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
