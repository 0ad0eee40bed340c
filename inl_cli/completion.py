"""What the shell offers when a user presses tab: recipes, runs, presets, sizes and the keys of --set; without torch."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes by name, and the YAML files and directories that begin so."""
    from inl_core.recipe.shipped import shipped_recipes

    names = [name for name in shipped_recipes() if name.startswith(incomplete)]
    return names + [path for path in _paths(incomplete) if path.endswith(("/", ".yaml", ".yml"))]


def complete_run(incomplete: str) -> list[str]:
    """The runs below runs/, by path or by the name alone, and the directories that begin so."""
    below = sorted(Path("runs").glob("*/"))
    runs = [str(path) for path in below if str(path).startswith(incomplete)]
    names = [path.name for path in below if incomplete and path.name.startswith(incomplete)]
    runs += [name for name in names if not os.path.lexists(name)]  # a directory of that name here goes before it
    return runs + [path for path in _paths(incomplete) if path.endswith("/") and path.rstrip("/") not in runs]


def complete_preset(incomplete: str) -> list[str]:
    """The generations."""
    from inl_core.recipe.presets import PRESETS

    return [name for name in PRESETS if name.startswith(incomplete)]


def complete_size(incomplete: str) -> list[str]:
    """The sizes of the documents."""
    from inl_core.recipe.sizes import SIZES

    return [name for name in SIZES if name.startswith(incomplete)]


def complete_set(incomplete: str) -> list[str]:
    """The keys of a recipe, each with its `=`; after that the values of a key that has a few fixed ones."""
    from inl_core.recipe import Recipe

    key, equals, value = incomplete.partition("=")
    keys = dict(_keys(Recipe, ""))
    if not equals:
        return [f"{name}=" for name in keys if name.startswith(incomplete)]
    return [f"{key}={choice}" for choice in _choices(keys.get(key)) if choice.startswith(value)]


def _paths(incomplete: str) -> list[str]:
    found = sorted(glob.glob(glob.escape(incomplete) + "*"))  # noqa: PTH207  what was typed stays as it is
    return [f"{path}/" if os.path.isdir(path) else path for path in found]  # noqa: PTH112


def _keys(section: Any, above: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, its type) for every value below a section of the recipe."""
    for name, field in section.model_fields.items():
        below = [kind for kind in _parts(field.annotation) if hasattr(kind, "model_fields")]
        for kind in below:
            yield from _keys(kind, f"{above}{name}.")
        if not below:
            yield f"{above}{name}", field.annotation


def _parts(kind: Any) -> list[Any]:
    """The members of a union, Annotated ones bare; the type itself where it is none."""
    if hasattr(kind, "__metadata__"):
        return _parts(get_args(kind)[0])
    if get_origin(kind) is Literal or not get_args(kind):
        return [kind]
    return [part for member in get_args(kind) for part in _parts(member)]


def _choices(kind: Any) -> list[str]:
    found = []
    for part in _parts(kind):
        if get_origin(part) is Literal:
            found += [str(value).lower() if isinstance(value, bool) else str(value) for value in get_args(part)]
        elif part is bool:
            found += ["true", "false"]
        elif part is type(None):
            found.append("null")
    return found
