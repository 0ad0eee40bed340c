"""Paths that a user mistyped are refused before torch is imported, which takes seconds.

- What opens a path says the same again, since it may have gone meanwhile, and since a library has no command before it.
- Nothing here imports torch, numpy or the libraries of tokenizers and Parquet.
"""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from inl_core.errors import ArtefactError, RecipeError, naming_key
from inl_core.files import expand_home, is_directory
from inl_core.launcher import place_or_alone

if TYPE_CHECKING:
    from inl_core.recipe import Recipe


def check_recipe(path: Path | None) -> None:
    """Refuse a recipe that is not there."""
    from inl_core.recipe.load import load_recipe
    from inl_core.recipe.shipped import find_recipe

    if path is not None:
        with warnings.catch_warnings(action="ignore"):  # who reads the recipe tells of others of its name
            is_there = os.path.lexists(find_recipe(path))
        if not is_there:
            load_recipe(path)


def check_checkpoint(path: Path | None) -> None:
    """Refuse a run or a checkpoint that is not there."""
    from inl_core.inference.checkpoint_files import check_exists

    if path is not None:
        check_exists(expand_home(path))


def check_text(source: str | None) -> None:
    """Refuse a source of text that is a path at which there is nothing."""
    from inl_core.corpus.reading.paths import local_path, refuse_missing

    if source is not None and source != "-" and not source.startswith("builtin:"):
        try:
            path = local_path(source)
        except RecipeError:
            return  # no path at all: who reads it says so, and in which option
        refuse_missing(path)


def check_data(directory: Path | None) -> None:
    """Refuse a directory that holds no data set."""
    if directory is not None and not _holds_data(expand_home(directory)):
        from inl_core.corpus.manifest import load_manifest

        load_manifest(expand_home(directory))


def check_training(recipe: "Recipe", branch_from: Path | None) -> None:
    """Refuse a new run whose data, or whatever it begins with, is not there.

    Of several processes none is asked: the first one alone reads the sources, perhaps on another machine.
    """
    data, begins_with = recipe.data, recipe.model.init_from
    if place_or_alone().size > 1:
        return
    if branch_from is not None and not os.path.lexists(expand_home(branch_from)):
        from inl_core.inference.checkpoint_files import nearest_run

        advice = f"name one, or a run that has saved one{nearest_run(branch_from)}"
        raise ArtefactError(f"{branch_from}: no checkpoint to branch from; {advice}")
    if begins_with is not None and begins_with.suffix != ".safetensors":
        with naming_key("model.init_from"):
            check_checkpoint(begins_with)
    if data.is_directory_alone:
        check_data(data.directory)
    elif not (data.directory is not None and _holds_data(data.directory)) and _is_any_missing(data.sources):
        from inl_core.corpus.manifest import default_directory

        # A data set that is prepared already is complete without its sources.
        if not _holds_data(data.directory or default_directory(data)):
            for source in data.sources:
                check_text(source)


def check_runs(paths: list[Path]) -> None:
    """Refuse runs that are not there."""
    from inl_core.training.run_status import check_holds_run

    for path in paths:
        check_holds_run(path)


def check_file(path: Path | None, message: str) -> None:
    """Refuse a file that is not there; `message` is what its reader says then."""
    if path is not None and not os.path.lexists(path):
        raise ArtefactError(f"{path}: {message}")


def check_task_folder(path: Path | None) -> None:
    """Refuse a folder of lm-eval's task files that is not there."""
    if path is not None and not is_directory(expand_home(path)):
        raise RecipeError(f"--task-path {path}: no such directory")


def check_place(path: Path) -> None:
    """Refuse what is neither a file, a directory nor the name of a shipped recipe."""
    from inl_core.recipe.shipped import shipped_recipes

    is_recipe = path.suffix in (".yaml", ".yml")
    if is_recipe:
        check_recipe(path)
    elif not os.path.lexists(path) and str(path) not in shipped_recipes():
        near = [str(place) for place in (Path("runs") / path, Path("data") / path) if is_directory(place)]
        raise ArtefactError(f"{path}: no such file or directory" + (f"; did you mean {near[0]}?" if near else ""))


def _holds_data(directory: Path) -> bool:
    return os.path.lexists(directory / "manifest.json")


def _is_any_missing(sources: tuple[str, ...]) -> bool:
    try:
        for source in sources:
            check_text(source)
    except ValueError:
        return True
    return False
