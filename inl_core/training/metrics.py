"""metrics.jsonl, the record of a run from which everything that shows it is made.

- One JSON object a line, with the wall clock (`time`, seconds since 1970) and a `kind`: train, or evaluation, which has
  `validation_loss`, and whose `scored_on` names the text. Rows of older runs have neither.
- A resumed run cuts the file to its checkpoint's step, so no step appears twice.
- A full disk must not end a run: a row that cannot be written whole is taken back, a warning says so once, and training
  goes on.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from inl_core.errors import ArtefactError
from inl_core.files import append_line, open_regular, write_whole
from inl_core.recipe import Recipe
from inl_core.training.mirrors import Mirror, one_line, open_mirrors

_LARGEST_FILE, _LONGEST_LINE, _MOST_SKIPPED = 1 << 30, 1 << 20, 100_000
"""Bounds of metrics.jsonl in bytes and lines; three million rows are within them."""


class MetricsWriter:
    """Appends rows to a run's metrics.jsonl and to the mirrors the recipe asks for."""

    def __init__(self, run: Path, recipe: Recipe, warn: Callable[[str], None]) -> None:
        self.path, self.recipe, self.warn, self.failed = run / "metrics.jsonl", recipe, warn, False
        self.mirrors: dict[str, Mirror] = {}

    def open_mirrors(self) -> None:
        """Open the mirrors that the recipe asks for, and give them the rows that there are.

        Raises:
            RecipeError: one cannot be opened.
        """
        self.mirrors = open_mirrors(self.path.parent, self.recipe)
        if self.mirrors:
            for row in stream_metrics(self.path.parent):
                self._mirror(row)

    def close_mirrors(self) -> None:
        """Bring everything to the mirrors; what fails there costs a warning."""
        self._with_each(lambda mirror: mirror.close())
        self.mirrors = {}

    def write(self, row: dict[str, Any]) -> dict[str, Any]:
        """Append one row and return it as it was written: with null for NaN and infinity, which JSON cannot express."""
        row = _finite({"kind": "evaluation" if "validation_loss" in row else "train", "time": time.time()} | row)
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
        self._mirror(row)
        return row

    def _mirror(self, row: dict[str, Any]) -> None:
        seconds = row.get("time")
        self._with_each(lambda mirror: mirror.write(row["step"], _numbers(row), seconds))

    def _with_each(self, work: Callable[[Mirror], None]) -> None:
        for name, mirror in list(self.mirrors.items()):
            try:
                work(mirror)
            except Exception as error:  # whatever another company's service raises, it must not end the run
                self.warn(f"training.logging.{name}: stopped, metrics.jsonl goes on: {one_line(error)}")
                del self.mirrors[name]


def read_metrics(run: Path, note: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """All whole rows of a run, in the file's order; none when there is no file.

    Lines that are not rows (one cut short by a crash, say) are left out, and `note` hears once how many there were.

    Raises:
        ArtefactError: metrics.jsonl is not a regular file, too large, or hardly holds a row.
    """
    return list(stream_metrics(run, note))


def stream_metrics(run: Path, note: Callable[[str], None] = lambda text: None) -> Iterator[dict[str, Any]]:
    """The rows of `read_metrics` one by one, so that memory does not grow with the file; raises as it does."""
    path, skipped = run / "metrics.jsonl", 0
    if not os.path.lexists(path):
        return
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > _LARGEST_FILE:
            raise ArtefactError(f"{path}: larger than {_LARGEST_FILE:,} bytes, as no run's metrics are; move it away")
        while line := file.readline(_LONGEST_LINE):
            row = parse_row(line)
            if row is not None:
                yield row
            elif line.strip():
                skipped += 1
            if skipped > _MOST_SKIPPED:
                raise ArtefactError(f"{path}: damaged: more than {_MOST_SKIPPED:,} lines are no rows; move it away")
    if skipped:
        note(not_rows(path, skipped))


def not_rows(path: Path, skipped: int) -> str:
    """What is said of a file of which `skipped` lines are no rows."""
    return f"{path}: left out what is no row of metrics: {skipped:,} line(s)"


def read_last_row(run: Path) -> dict[str, Any] | None:
    """The last row of a run, however long its file is; None when there is no file or its last line is no row.

    Raises:
        ArtefactError: metrics.jsonl is not a regular file.
    """
    path = run / "metrics.jsonl"
    if not os.path.lexists(path):
        return None
    with open_regular(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _LONGEST_LINE))
        lines = file.read(_LONGEST_LINE).splitlines()
    return parse_row(lines[-1]) if lines else None


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row, if it has a step, every figure read elsewhere is a number, and that of tokens finite; else None."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < 2**63:
        return None
    figures = (value for key, value in row.items() if key in ("tokens", "loss") or key.startswith("validation_"))
    is_whole = all(value is None or _is_number(value) for value in figures) and _is_shallow(row, depth=3)
    return row if is_whole and math.isfinite(row.get("tokens") or 0) else None


def _is_shallow(value: Any, *, depth: int) -> bool:
    """Whether lists and objects are nested at most `depth` deep; a list of lists has a value per layer and expert."""
    if not isinstance(value, list | dict):
        return True
    items = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_shallow(item, depth=depth - 1) for item in items)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def cut_metrics(
    run: Path, step: int, *, keep_evaluation: bool = True, note: Callable[[str], None] = lambda text: None
) -> None:
    """Drop the rows after `step`, and whatever is not a row.

    Args:
        keep_evaluation: False also drops the evaluation at `step`, because a finished run that is resumed repeats it.
        note: hears as in `read_metrics`.
    """
    path = run / "metrics.jsonl"
    if not os.path.lexists(path):
        return
    rows = (row for row in stream_metrics(run, note) if row["step"] <= step)
    kept = (row for row in rows if keep_evaluation or row["step"] < step or "validation_loss" not in row)
    write_whole(path, "".join(json.dumps(_finite(row)) + "\n" for row in kept))


def read_scores(run: Path, scored_on: str) -> dict[int, float]:
    """The scores (`score_of_row`) of a run's evaluations by step; raises as `read_metrics` does."""
    scores = ((row["step"], score_of_row(row, scored_on)) for row in stream_metrics(run))
    return {step: score for step, score in scores if score is not None}


def score_of_row(row: dict[str, Any], scored_on: str) -> float | None:
    """The validation bits per byte of an evaluation of the text `scored_on`; None for any other row.

    Where the tokenizer does not tell the bytes it is the loss, which puts scores of the same text in the same order.
    """
    if row.get("scored_on") != scored_on:
        return None
    score = row.get("validation_bits_per_byte") or row.get("validation_loss")
    return score if isinstance(score, int | float) and math.isfinite(score) else None


def _finite(value: Any) -> Any:
    """The value with None in the place of every NaN and infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The row's figures; the values of a list get the names name/0, name/1, of a list of lists name/0/0 and so on."""
    found: dict[str, float] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, list):
            for index, item in enumerate(value):
                add(f"{name}/{index}", item)
        elif isinstance(value, int | float):
            found[name] = value

    for key, value in row.items():
        if key not in ("step", "time"):
            add(key, value)
    return found
