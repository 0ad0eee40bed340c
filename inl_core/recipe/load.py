"""A YAML file and overrides -> one validated Recipe, and a Recipe -> YAML.

- Values are not converted: the text "2" is not a number and true is not 1, but 3 is accepted for 3.0.
- All problems are reported at once, each with its line or its override.
- An override of `training.steps` replaces `training.tokens` of the file, and the other way round: they are two ways to
  say one thing, and a recipe must give exactly one.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from inl_core.errors import ArtefactError, RecipeError, RecipeWarning
from inl_core.files import expand_home, read_bytes, shortened
from inl_core.recipe.problems import MOST_PROBLEMS, dotted, find_problems, section_at, shown, unknown_key
from inl_core.recipe.recipe import Recipe
from inl_core.recipe.shipped import find_recipe, shipped_recipes
from inl_core.recipe.yaml_text import Document, KeyPath, dump_yaml, parse_yaml

_ALTERNATIVES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("training", "steps"): ("training", "tokens"),
    ("training", "tokens"): ("training", "steps"),
}
_RETIRED = ("model", "integrator", "backend")
"""A key of earlier versions, which changes nothing."""
_LONGEST_RECIPE = 1 << 20


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, allow_pipe: bool = True) -> Recipe:
    """Read a recipe, change what the overrides say, and validate; RecipeError lists all problems.

    A key that is not used any more gives a RecipeWarning, unless it stands in the recipe of a run or checkpoint.

    Args:
        path: a YAML file, or the name of a shipped recipe (shipped.py).
        overrides: such as `training.steps=100`; the values are YAML.
        allow_pipe: whether the path may be a FIFO, as for a shell's `<(...)`. The recipe of a run or checkpoint must be
            a file: reading a FIFO in its place would wait for someone to write to it.
    """
    path = find_recipe(path) if allow_pipe else expand_home(path)
    source = str(path)
    document = parse_yaml(_read_text(path, allow_pipe=allow_pipe), source)
    if document.values is None:
        raise RecipeError(f"{source}: the recipe is empty; it needs at least name and training")
    if not isinstance(document.values, dict):
        raise RecipeError(f"{source}:1: a recipe is a mapping of keys, got {shown(document.values)}")
    return _validated(document, overrides, source, is_record=not allow_pipe)


def recipe_from_mapping(values: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "recipe") -> Recipe:
    """Validate plain values; errors name `source` as the place they came from."""
    plain = json.loads(json.dumps(dict(values), default=str))
    return _validated(Document(plain), overrides, source)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with all its keys as YAML, which `load_recipe` reads back to an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _validated(document: Document, overrides: Sequence[str], source: str, *, is_record: bool = False) -> Recipe:
    values, placed = _with_overrides(document.values, overrides)
    places = _Places(document, placed, source)
    try:
        recipe = Recipe.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        problems = sorted(find_problems(error, Recipe).items(), key=lambda problem: places.line(problem[0]))
        lines = [f"{places.head(path)}: {message}" for path, message in problems]
        if len(lines) < error.error_count() > MOST_PROBLEMS:
            lines.append(f"{source}: {error.error_count():,} problems in all")
        raise RecipeError("\n".join(lines)) from None
    integrator = values.get("model", {}).get("integrator") or {}
    if integrator.get("backend", "auto") != "auto" and (_RETIRED in placed or not is_record):
        text = f"{places.head(_RETIRED)}: this key is not used any more: training.operations chooses"
        warnings.warn(text, RecipeWarning, stacklevel=3)
    return recipe


def _read_text(path: Path, *, allow_pipe: bool) -> str:
    source = str(path)
    if path.is_dir():
        names = ", ".join(sorted(item.name for item in path.glob("*.yaml"))) or "no .yaml file"
        raise RecipeError(f"{path}: is a directory, not a recipe; it holds {names}")
    try:
        if not path.exists():
            raise RecipeError(f"{shortened(source)}: no such file{_nearest_file(path)}")
        return read_bytes(path, limit=_LONGEST_RECIPE, allow_pipe=allow_pipe).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason})") from None
    except ArtefactError as error:
        raise RecipeError(str(error)) from None
    except OSError as error:
        raise RecipeError(f"{shortened(source)}: cannot be read: {error.strerror}") from None


def _nearest_file(path: Path) -> str:
    """A hint: a recipe of nearly this name in the same directory, or else a shipped one, which its name stands for."""
    beside = {item.stem: item for item in path.parent.glob("*.yaml")} if path.parent.is_dir() else {}
    near = get_close_matches(path.stem, beside, n=1)
    found = beside[near[0]] if near else next(iter(get_close_matches(path.stem, shipped_recipes(), n=1)), None)
    return f"; did you mean '{found}'?" if found else "; `inl recipe list` names the shipped ones"


def _with_overrides(values: Any, overrides: Sequence[str]) -> tuple[Any, dict[KeyPath, str]]:
    """A copy of `values` with the overrides put in, and for each path that was overridden the text of its override."""
    values = deepcopy(values)
    parsed = [_parse_override(text) for text in overrides]
    paths = {path for path, _, _ in parsed}
    problems: list[str] = []
    placed: dict[KeyPath, str] = {}
    for path, value, text in parsed:
        if problem := problem_with_path(path):
            problems.append(f"{text}: {problem}")
            continue
        _put(values, path, value)
        other = _ALTERNATIVES.get(path)
        if other and value is not None and other not in paths:
            _drop(values, other)
        placed[path] = text
    if problems:
        raise RecipeError("\n".join(problems))
    return values, placed


def _parse_override(text: str) -> tuple[tuple[str, ...], Any, str]:
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    shown_as = f"--set {shortened(text)}"
    if not equals or not all(path):
        raise RecipeError(f"{shown_as}: expected KEY=VALUE, for example --set training.steps=100")
    if not value.strip():
        raise RecipeError(f"{shown_as}: no value (a shell variable that is not set?); write {key}=null for none")
    return path, parse_yaml(value, shown_as).values, shown_as


def problem_with_path(path: tuple[str, ...]) -> str | None:
    """What is wrong with a key's path, or None; an override of a wrong one could replace a value by a section."""
    if path == _RETIRED:
        return None
    for depth in range(1, len(path) + 1):
        above = section_at(Recipe, path[: depth - 1])
        if above is None:
            return f"{dotted(path[: depth - 1])} is a value, not a section, so it has no '{path[depth - 1]}'"
        if path[depth - 1] not in above.model_fields:
            return unknown_key(path[:depth], Recipe)
    return None


def _put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        below = values.get(part)
        values[part] = below if isinstance(below, dict) else {}
        values = values[part]
    values[path[-1]] = value


def _drop(values: dict[str, Any], path: tuple[str, ...]) -> None:
    for part in path[:-1]:
        values = values.get(part, {})
    values.pop(path[-1], None)


class _Places:
    """Tells where a key was written: in an override, in a line of the file, or else in the line of its section."""

    def __init__(self, document: Document, placed: dict[KeyPath, str], source: str) -> None:
        self.document = document
        self.placed = placed
        self.source = source

    def head(self, path: KeyPath) -> str:
        """`a.yaml:14 model.d_model`, `--set model.d_model=abc` or `a.yaml:3 (with --set training.seed=1) training`."""
        for length in range(len(path), 0, -1):
            if override := self.placed.get(path[:length]):
                return override if length == len(path) else f"{override} {dotted(path)}"
            if path[:length] in self.document.lines:
                break
        below = ", ".join(text for other, text in self.placed.items() if other[: len(path)] == path)
        line = self.line(path)
        place = f"{self.source}:{line}" if line else self.source
        return f"{place}{f' (with {below})' if below else ''} {dotted(path)}".strip()

    def line(self, path: KeyPath) -> int:
        """The line of the path or of the section it lies in; 0 when the values come from no file."""
        known = (self.document.lines.get(path[:length]) for length in range(len(path), -1, -1))
        return next((line for line in known if line), 0)
