"""A run as its files tell it: the recipe, and the rows of metrics with what the run had spent until then.

- `seconds` is time in training steps: the tokens since the row before at that row's speed. Evaluations, saves and the
  time between two sessions do not count.
- `flops` counts the model's work for the tokens so far (inl_core/model/flops.py), whatever the machine did besides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inl_core.analysis.planning import count_parameters, meta_model
from inl_core.analysis.planning.plan import find_vocabulary
from inl_core.errors import ArtefactError, RecipeError
from inl_core.inference.checkpoint_files import list_checkpoints, read_config
from inl_core.inference.loading import read_model_config
from inl_core.model.flops import training_flops
from inl_core.recipe import ModelConfig, Recipe
from inl_core.recipe.load import load_recipe
from inl_core.training.metrics import read_metrics
from inl_core.training.run_status import RunStatus, check_holds_run, read_status

Row = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """One run."""

    path: Path
    name: str
    """How reports call it; no two runs of a report have the same name."""
    recipe: Recipe
    config: ModelConfig
    """The model, with its vocabulary."""
    status: RunStatus
    steps: list[Row]
    """The rows of steps that have a loss; each also has `seconds` and `flops`."""
    evaluations: list[Row]
    """The rows of evaluations that have a score; the same."""
    not_finite: list[int]
    """Steps among the rows that were skipped, because their loss or gradient was not finite."""

    @property
    def preset(self) -> str:
        """The generation of its model."""
        return self.config.preset

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(count_parameters(meta_model(self.config)).values())

    @property
    def last(self) -> Row:
        """The last row of any kind; empty where there is none."""
        rows = [*self.steps[-1:], *self.evaluations[-1:]]
        return max(rows, key=lambda row: row["step"], default={})


def open_runs(paths: Sequence[Path], note: Callable[[str], None] = lambda text: None) -> list[RunRecord]:
    """Read runs, each under a name of its own: that of its directory, or the whole path where that is not enough.

    Args:
        note: hears of lines in metrics.jsonl that are no rows.

    Raises:
        RecipeError: a run is named twice.
        ArtefactError: a path holds no run, or a file of it is damaged.
    """
    places = [path.resolve() for path in paths]
    if twice := next((path for path, place in zip(paths, places, strict=True) if places.count(place) > 1), None):
        raise RecipeError(f"{twice}: is named twice")
    found = [open_run(path, note) for path in paths]
    names = [run.name for run in found]
    return [run if names.count(run.name) == 1 else replace(run, name=str(run.path)) for run in found]


def open_run(path: Path, note: Callable[[str], None] = lambda text: None) -> RunRecord:
    """Read one run; `note` and what is raised are those of `open_runs`."""
    check_holds_run(path)
    status = read_status(path)
    recipe = status.recipe or load_recipe(path / "recipe.yaml", allow_pipe=False)  # which says what is wrong with it
    config = _model_of(path, recipe)
    cost = training_flops(config, recipe.training.sequence_length)
    rows = read_metrics(path, note)
    steps, evaluations = _with_spending(rows, cost)
    # A row without a loss may also be of a step without a target token; training goes on after none but skipped ones.
    not_finite = [row["step"] for row in rows if "skipped" in row]
    return RunRecord(path, path.resolve().name, recipe, config, status, steps, evaluations, not_finite)


def _model_of(path: Path, recipe: Recipe) -> ModelConfig:
    """The configuration in the newest checkpoint, which knows the vocabulary; else the recipe's."""
    for checkpoint in reversed(list_checkpoints(path / "checkpoints")):
        try:
            return read_model_config(checkpoint, read_config(checkpoint))
        except ArtefactError:
            continue
    return recipe.model.with_vocab_size(find_vocabulary(recipe).size)


def _with_spending(rows: list[Row], flops_per_token: int) -> tuple[list[Row], list[Row]]:
    """The rows of steps and those of evaluations, with the seconds and FLOPs that were spent until then."""
    steps, evaluations, seconds, before = [], [], 0.0, 0
    for row in rows:
        tokens = row.get("tokens") or before
        speed = row.get("tokens_per_second")
        if isinstance(speed, int | float) and speed > 0:
            seconds += (tokens - before) / speed
            before = tokens
        whole = row | {"tokens": tokens, "seconds": seconds, "flops": float(tokens) * flops_per_token}
        if row.get("validation_loss") is not None:
            evaluations.append(whole)
        elif row.get("loss") is not None:
            steps.append(whole)
    return steps, evaluations
