"""What the recipes of several runs differ in."""

import json
from collections.abc import Sequence
from typing import Any

from inl_core.analysis.report.parts import Finding, Part, Section
from inl_core.analysis.report.runs import RunRecord
from inl_core.files import shortened
from inl_core.recipe.differences import kind_of, recipe_differences

_TOLD = 8


def recipe_section(runs: Sequence[RunRecord]) -> Section:
    """A row for each key that is not the same in all runs."""
    paths = differing_keys(runs)
    dumps = [run.recipe.model_dump(mode="json") for run in runs]
    rows = [(path, kind_of(path), *(_shown(_value(dump, path)) for dump in dumps)) for path in paths]
    see = "Whatever else differs between the runs comes from these keys; operational ones leave the result as it is."
    part = Part("recipe-differences", "What the recipes differ in", see, ("key", "kind", *_names(runs)), rows)
    return Section("Recipes", [part], findings=[_finding(paths)])


def _finding(differing: Sequence[str]) -> Finding:
    """Which keys that matter differ, in one sentence."""
    paths = [path for path in differing if kind_of(path) != "operational"]
    if not paths:
        return Finding("The recipes are the same but for keys that do not change the result.", "recipe-differences")
    more = f" and {len(paths) - _TOLD} more" if len(paths) > _TOLD else ""
    keys = "1 key" if len(paths) == 1 else f"{len(paths)} keys"
    told = ", ".join(paths[:_TOLD])
    return Finding(f"The recipes differ in {keys} that may change the result: {told}{more}.", "recipe-differences")


def differing_keys(runs: Sequence[RunRecord]) -> list[str]:
    """The keys in which any run differs from the first, in the order of the recipe."""
    first, *others = [run.recipe for run in runs]
    return list(dict.fromkeys(change.path for other in others for change in recipe_differences(first, other)))


def _names(runs: Sequence[RunRecord]) -> list[str]:
    return [run.name for run in runs]


def _value(dump: Any, path: str) -> Any:
    for key in path.split("."):
        dump = dump.get(key) if isinstance(dump, dict) else None
    return dump


def _shown(value: Any) -> Any:
    """A value on one line: lists and sections as JSON."""
    return shortened(json.dumps(value), 80) if isinstance(value, dict | list) else value
