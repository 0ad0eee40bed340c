"""The runs of `inl sweep`: each combination of a grid's values with each seed, how it stands, and what it came to.

- A value is what YAML makes of it, so 1e-3 and 0.001 are the same run, and the same command finds its runs again.
- The sessions that train are started by inl_cli/sweep_runs.py; nothing here imports torch.
"""

import itertools
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inl_core.analysis.report.parts import Part
from inl_core.errors import RecipeError
from inl_core.files import shortened
from inl_core.recipe import Recipe
from inl_core.recipe.differences import recipe_differences
from inl_core.recipe.load import load_recipe
from inl_core.recipe.yaml_text import parse_yaml
from inl_core.training.run_status import RunStatus, read_status

SEED = "training.seed"
_LONGEST_NAME = 200
_MOST_RUNS = 1000


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    path: Path
    values: dict[str, Any]
    """The values of its point of the grid, by key."""
    seed: int
    overrides: tuple[str, ...]
    """All changes to the recipe, as for `--set`."""
    recipe: Recipe
    """The recipe with these changes."""


@dataclass(frozen=True)
class Point:
    """What the runs of one point of the grid came to."""

    values: dict[str, Any]
    runs: int
    losses: tuple[float, ...]
    """The final validation losses of the runs that are done, in nats per token."""
    bits_per_byte: tuple[float, ...]
    """The same in bits per byte of text, by which models with other tokenizers can be compared, too."""
    is_best: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether all its runs are done and have a score."""
        return len(self.losses) == self.runs


def plan_runs(
    recipe: Path, grid: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], directory: Path | None
) -> list[PlannedRun]:
    """All runs of a sweep, with the seeds of a point one after another.

    Args:
        grid: such as `training.optimizer.learning_rate=1e-3,3e-3`, one for each key.
        seeds: of each point; empty for the recipe's own.
        overrides: changes that all runs share, as for `--set`.
        directory: where the runs go; None for `runs/NAME-sweep`, by the recipe's name.

    Raises:
        RecipeError: the grid cannot be read, a run's recipe is not valid, or two runs would have the same directory.
    """
    if recipe.is_fifo():
        raise RecipeError(f"{recipe}: a pipe can be read only once, and each run reads the recipe; write it to a file")
    axes = dict(_axis(text) for text in grid)
    if len(axes) < len(grid):
        raise RecipeError("--grid: the same key twice; give all its values at once, as KEY=1,2")
    if SEED in axes and seeds:
        raise RecipeError(f"--grid {SEED}: the seeds are given by --seeds already")
    if len(set(seeds)) < len(seeds):
        raise RecipeError("--seeds: the same seed twice")
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if len(points) * max(len(seeds), 1) > _MOST_RUNS:
        raise RecipeError(f"--grid: {len(points) * max(len(seeds), 1):,} runs; a sweep has at most {_MOST_RUNS:,}")
    planned: list[PlannedRun] = []
    for values, seed in itertools.product(points, seeds or [None]):
        changes = values if seed is None else values | {SEED: seed}
        given = (*overrides, *(f"{key}={_text(value)}" for key, value in changes.items()))
        try:
            loaded = load_recipe(recipe, given)
        except RecipeError as error:
            raise RecipeError(_by_option(str(error), values)) from None
        base = directory or Path("runs", f"{loaded.name}-sweep")
        seed = loaded.training.seed
        planned.append(PlannedRun(base / _name(values, seed), values, seed, given, loaded))
    _check_names(planned)
    return planned


def read_run(run: PlannedRun) -> RunStatus:
    """How a run of the sweep stands.

    Raises:
        RecipeError: its directory holds a run that would have learned something else.
        ArtefactError: its directory is something else than a run.
    """
    status = read_status(run.path)
    if status.recipe is not None:
        changes = [one for one in recipe_differences(status.recipe, run.recipe) if one.kind != "operational"]
        if changes:
            more = f", and {len(changes) - 1} more" if len(changes) > 1 else ""
            raise RecipeError(
                f"{run.path}: was begun with another recipe ({changes[0]}{more}); give a new --runs-dir, or this recipe"
            )
    return status


def summarise(runs: Sequence[tuple[PlannedRun, RunStatus]]) -> list[Point]:
    """The points of the grid; the best is the one with the lowest mean of those whose runs are all done."""
    points: list[Point] = []
    for _, group in itertools.groupby(runs, key=lambda run: run[0].values):
        members = list(group)
        scores = [status.ending.evaluation for _, status in members if status.ending and status.ending.evaluation]
        bits = tuple(score["bits_per_byte"] for score in scores if score.get("bits_per_byte") is not None)
        losses = tuple(score["loss"] for score in scores)
        points.append(Point(members[0][0].values, len(members), losses, bits))
    # Bits per byte are what two tokenizers can be compared by; not every text has them.
    complete = [point for point in points if point.is_complete]
    has_bits = all(len(point.bits_per_byte) == point.runs for point in complete)
    means = {
        index: statistics.fmean(point.bits_per_byte if has_bits else point.losses)
        for index, point in enumerate(points)
        if point.is_complete
    }
    if len(means) < 2:
        return points
    best = min(means, key=means.__getitem__)
    return [replace(point, is_best=index == best) for index, point in enumerate(points)]


def point_data(point: Point) -> dict[str, Any]:
    """What `inl sweep --json` says of a point: means and standard deviations over its runs that are done."""
    return {
        "values": point.values,
        "runs": point.runs,
        "done": len(point.losses),
        "loss": mean_of(point.losses),
        "loss_deviation": deviation_of(point.losses),
        "bits_per_byte": mean_of(point.bits_per_byte),
        "bits_per_byte_deviation": deviation_of(point.bits_per_byte),
        "best": point.is_best,
    }


def grid_part(points: Sequence[Point]) -> Part:
    """The points of the grid as a table of a report."""
    keys = list(points[0].values)
    columns = (*keys, "done", "loss", "loss s.d.", "bits per byte", "bits per byte s.d.", "")
    scores = ("loss", "loss_deviation", "bits_per_byte", "bits_per_byte_deviation")
    rows = [
        (
            *(str(data["values"][key]) for key in keys),
            f"{data['done']} of {data['runs']}",
            *(data[score] for score in scores),
            "best" if data["best"] else "",
        )
        for data in map(point_data, points)
    ]
    see = "Mean and standard deviation over the seeds; a difference below the standard deviation says little."
    return Part("grid", "The points of the grid", see, columns, rows)


def mean_of(values: Sequence[float]) -> float | None:
    """The mean; None without a value."""
    return statistics.fmean(values) if values else None


def deviation_of(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample, with n - 1; None where there are not two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def _by_option(message: str, values: Iterable[str]) -> str:
    """An error about the grid's keys with the option that gave them."""
    for key in values:
        message = message.replace(f"--set {key}=", f"--grid {key}=")
    return message


def _axis(text: str) -> tuple[str, list[Any]]:
    """A key and its values."""
    key, equals, given = text.partition("=")
    shown = f"--grid {shortened(text)}"
    if not equals or not key.strip() or not given.strip():
        raise RecipeError(f"{shown}: expected KEY=VALUE,VALUE, as training.optimizer.learning_rate=1e-3,3e-3")
    values = parse_yaml(f"[{given}]", shown).values
    texts = [_text(value) for value in values]
    if len(set(texts)) < len(texts):
        raise RecipeError(f"{shown}: the same value twice")
    return key.strip(), values


def _text(value: Any) -> str:
    """A value as YAML that is read back to the same value."""
    return json.dumps(value)


def _name(values: dict[str, Any], seed: int) -> str:
    """The directory of a run, as `learning_rate=0.001_seed=0`."""
    changes = {key: value for key, value in values.items() if key != SEED} | {SEED: seed}
    ends = [key.rpartition(".")[2] for key in changes]
    names = ends if len(set(ends)) == len(ends) else list(changes)
    parts = (
        f"{name}={value if isinstance(value, str) else _text(value)}"
        for name, value in zip(names, changes.values(), strict=True)
    )
    return re.sub(r"[^\w.=+-]+", "-", "_".join(parts), flags=re.ASCII)


def _check_names(runs: Sequence[PlannedRun]) -> None:
    seen: set[Path] = set()
    for run in runs:
        if run.path in seen:
            raise RecipeError(f"--grid: two runs would be {run.path}; sweep these values one by one with --runs-dir")
        if len(run.path.name) > _LONGEST_NAME:
            raise RecipeError(f"--grid: the name {shortened(run.path.name)} is too long for a directory")
        seen.add(run.path)
