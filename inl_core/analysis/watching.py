"""What `inl watch` shows of a run, from the files in its directory; it imports no torch and never writes.

Of metrics.jsonl only what was added since the last look is read. A resumed run cuts that file, which is then read anew.
"""

import math
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inl_core.errors import ArtefactError
from inl_core.files import open_regular
from inl_core.inference.checkpoint_files import MANIFEST
from inl_core.training.alarms import newest_record
from inl_core.training.metrics import not_rows, parse_row
from inl_core.training.run_status import RunStatus, read_status
from inl_core.training.spikes import SpikeWatch

_LONGEST_CURVE, _MOST_WARNINGS, _LONGEST_LINE = 4096, 20, 1 << 20

Point = tuple[int, float | None, float | None]
"""step, loss, bits per byte."""


@dataclass(frozen=True)
class Look:
    """A run as it stands now."""

    status: RunStatus
    num_steps: int | None
    """Of the whole run, as its recipe has it."""
    row: dict[str, Any]
    """The newest row of a training step; empty before the first."""
    evaluation: dict[str, Any]
    """The newest row of an evaluation; empty before the first."""
    training: list[Point]
    """The curve over all steps, thinned evenly where it is long."""
    validation: list[Point]
    dynamics: dict[str, Any]
    """step and quantities of the newest record: quantity -> mean, min and max of its means over layers."""
    warnings: list[str]
    """Of jumps of the loss, skipped steps and collapsed dynamics, by the rules of the run itself; the last twenty.

    Before them, how many lines of metrics.jsonl are no rows.
    """
    eta_seconds: float | None
    """Until the last step at the newest row's speed; None where nothing runs."""
    seconds_since_row: float | None
    """How long ago metrics.jsonl was written."""
    seconds_since_checkpoint: float | None

    def to_data(self) -> dict[str, Any]:
        """The same as one JSON object; of the curves at most 200 points each."""
        status, row = self.status, self.row
        named = lambda point: dict(zip(("step", "loss", "bits_per_byte"), point, strict=True))  # noqa: E731
        names = ("loss", "bits_per_byte", "tokens", "tokens_per_second", "mfu", "learning_rate", "gradient_norm")
        return {
            "run": str(status.run),
            "state": status.state,
            "reason": status.reason or None,
            "step": row.get("step"),
            "num_steps": self.num_steps,
            **{name: row.get(name) for name in names},
            "eta_seconds": self.eta_seconds,
            "seconds_since_row": self.seconds_since_row,
            "checkpoint": str(status.checkpoint) if status.checkpoint else None,
            "checkpoint_step": status.step if status.checkpoint else None,
            "seconds_since_checkpoint": self.seconds_since_checkpoint,
            "evaluation": self.evaluation or None,
            "dynamics": self.dynamics or None,
            "warnings": self.warnings,
            "curve": [named(point) for point in thinned(self.training)],
            "validation_curve": [named(point) for point in thinned(self.validation)],
        }


def thinned(points: list[Point], most: int = 200) -> list[Point]:
    """At most about `most` points, evenly chosen, the last one among them."""
    stride = -(-len(points) // most) if points else 1
    return points[::-1][::stride][::-1]


@dataclass
class _Curves:
    """What is kept of the rows read so far."""

    training: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    row: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    skipped: int = 0
    """Whole lines that are no rows."""
    is_torn: bool = False
    """Whether the file ends within a line."""

    def __post_init__(self) -> None:
        self.spikes = SpikeWatch(self.warnings.append)

    def add(self, row: dict[str, Any]) -> None:
        """Take note of one row."""
        step = row["step"]
        if "validation_loss" in row:
            self.evaluation = {key: value for key, value in row.items() if number(value) is not None}
            loss, bits = (self.evaluation.get(f"validation_{name}") for name in ("loss", "bits_per_byte"))
            self.validation.append((step, loss, bits))
            return
        self.row = {key: value for key, value in row.items() if key == "phase" or number(value) is not None}
        loss = self.row.get("loss")
        self.training.append((step, loss, self.row.get("bits_per_byte")))
        if len(self.training) > 2 * _LONGEST_CURVE:
            self.training = thinned(self.training, _LONGEST_CURVE)
        if loss is not None:
            self.spikes.hear(step, loss)
        if row.get("skipped"):
            self.warnings.append(f"step {step}: skipped, as it was not finite; {row['skipped']} tells more")
        del self.warnings[:-_MOST_WARNINGS]


class RunWatcher:
    """Looks at a run again and again."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._curves, self._file, self._offset = _Curves(), (0, 0), 0

    def look(self) -> Look:
        """How the run stands now.

        Raises:
            ArtefactError: there is no such run, or what is there is none.
            RecipeError: the path is a file.
        """
        if not os.path.lexists(self.run):
            raise ArtefactError(f"{self.run}: no such run; `inl train RECIPE --run-dir {self.run}` would start it")
        status = read_status(self.run)
        num_steps = status.recipe.training.num_steps if status.recipe else None
        since_row = self._read_rows()
        curves, newest = self._curves, newest_record(self.run, num_steps) if num_steps else None
        step, rows, alarms = newest or (0, [], [])
        manifest = status.checkpoint / MANIFEST if status.checkpoint else None
        return Look(
            status,
            num_steps,
            curves.row,
            curves.evaluation,
            thinned(curves.training, _LONGEST_CURVE),
            curves.validation,
            {"step": step, "quantities": over_depth(rows)} if rows else {},
            [*self._left_out(status), *curves.warnings, *(f"step {step}: {alarm.text}" for alarm in alarms)],
            _eta(curves.row, num_steps) if status.state == "running" else None,
            since_row,
            _age(manifest) if manifest else None,
        )

    def _left_out(self, status: RunStatus) -> list[str]:
        skipped = self._curves.skipped + (self._curves.is_torn and status.state != "running")
        return [not_rows(self.run / "metrics.jsonl", skipped)] if skipped else []

    def _read_rows(self) -> float | None:
        """Take in what was added to metrics.jsonl; the seconds since it was written, None where there is no file."""
        path = self.run / "metrics.jsonl"
        if not os.path.lexists(path):
            self._curves, self._file, self._offset = _Curves(), (0, 0), 0
            return None
        with open_regular(path) as file:
            found = os.fstat(file.fileno())
            identity = (found.st_dev, found.st_ino)
            if identity != self._file or found.st_size < self._offset:
                self._curves, self._file, self._offset = _Curves(), identity, 0
            file.seek(self._offset)
            while (line := file.readline(_LONGEST_LINE)).endswith(b"\n") or len(line) == _LONGEST_LINE:
                self._offset += len(line)
                if row := parse_row(line):
                    self._curves.add(row)
                elif line.strip():
                    self._curves.skipped += 1
            self._curves.is_torn = bool(line.strip())  # the last line may be still being written
        return max(0.0, time.time() - found.st_mtime)


def over_depth(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """quantity -> mean, min and max over layers, or sub-layers, of the means of a record."""
    means: dict[str, list[float]] = {}
    for row in rows:
        if "mean" in row:
            means.setdefault(row["quantity"], []).append(row["mean"])
    return {
        name: {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}
        for name, values in means.items()
    }


def number(value: Any) -> float | None:
    """The value where it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _eta(row: dict[str, Any], num_steps: int | None) -> float | None:
    """Seconds for the steps that are left, at the newest row's tokens a second."""
    speed, tokens, step = number(row.get("tokens_per_second")), number(row.get("tokens")), row.get("step")
    if not speed or not tokens or not step or not num_steps:
        return None
    return max(0, num_steps - step) * tokens / step / speed


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None
