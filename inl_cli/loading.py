"""Open the model and the text a command works on, and say which they are."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from inl_cli.console import Console
from inl_cli.early import check_checkpoint, check_data, check_text
from inl_core.errors import RecipeError

if TYPE_CHECKING:
    from inl_core.inference.loading import LoadedModel
    from inl_core.inference.texts import Text
    from inl_core.recipe.data import ColumnSettings


def open_model(
    console: Console, checkpoint: Path | None, device: str = "cpu", *, iterations: int | None = None
) -> "LoadedModel":
    """The checkpoint, verified and loaded; `iterations` is checked against what the model can do."""
    if iterations is not None and iterations < 1:
        raise RecipeError(f"iterations {iterations}: must be at least 1")
    check_checkpoint(checkpoint)
    from inl_core.inference.loading import open_checkpoint
    from inl_core.training.distributed import choose_device

    loaded = open_checkpoint(checkpoint, choose_device(device), note=noted(console))
    if iterations is not None and loaded.model.config.integrator is None:
        console.warn(f"{loaded.model.config.without_integrator}: --iterations has no effect")
    return loaded


def noted(console: Console) -> Callable[[str], None]:
    """What a search for a checkpoint tells the user: which one was chosen, and a warning for each passed over."""
    return lambda text: (console.warn if text.startswith("skipped") else console.info)(text)


def tell_of_shipped(console: Console, recipe: Path) -> None:
    """Say that a shipped recipe is run, where its name was given and not a file."""
    import warnings

    from inl_core.recipe.shipped import find_recipe

    with warnings.catch_warnings(action="ignore"):  # reading the recipe has told of other files of that name
        found = find_recipe(recipe)
    if found != recipe:
        console.info(f"{recipe}: the shipped recipe {found}")


def check_recipe_or_model(recipe: Path | None, preset: str | None, size: str | None) -> None:
    """Refuse a recipe together with a preset or a size, before anything is loaded."""
    if recipe is not None and (preset or size):
        raise RecipeError(
            f"{recipe} together with {'--preset' if preset else '--size'}: a recipe names its own model; "
            "change it with --set model.preset=... --set model.size=..., or leave the recipe out"
        )


def check_source(data: Path | None, text: str | None) -> None:
    """Refuse a data set and a text together, and one that is not there, before anything is loaded."""
    if data and text is not None:
        raise RecipeError("--data and --text: give one of them")
    check_data(data)
    check_text(text)


def open_default_or_text(console: Console, loaded: "LoadedModel", text: str | None) -> "Text":
    """The text named, else what a model is measured on where no text is named (inl_core/inference/texts.py)."""
    from inl_core.inference.texts import open_default, open_text

    return open_default(loaded) if text is None else open_text(loaded, text, note=console.info)


def open_source(
    console: Console,
    loaded: "LoadedModel",
    data: Path | None,
    text: str | None,
    split: Literal["validation", "train"],
    columns: "ColumnSettings | None" = None,
) -> "Text":
    """The text named, else a split of the data set named, else of the one the model was trained on."""
    from inl_core.inference.texts import open_split, open_text
    from inl_core.recipe.data import ColumnSettings

    if text is None:
        source = open_split(loaded, data, split)
    else:
        source = open_text(loaded, text, note=console.info, columns=columns or ColumnSettings())
    for warning in source.warnings:
        console.warn(warning)
    return source
