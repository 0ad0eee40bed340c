"""`inl recipe`: the shipped recipes, what a recipe may hold, and what one holds once everything is filled in."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from inl_cli.completion import complete_recipe
from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.options import JsonOption, QuietOption, RecipeArgument, SetOption, path_argument

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="A shipped recipe, as tiny.", autocompletion=complete_recipe)
]
TargetArgument = Annotated[
    Path | None, path_argument("[PATH]", "The new file, or a directory for it; default NAME.yaml here.")
]


@errors_to_exit_codes
def list_shipped(json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the shipped recipes, which `inl train NAME` runs in any directory."""
    from inl_core.recipe.shipped import describe_shipped

    console, recipes = Console(json=json, quiet=quiet), describe_shipped()
    rows = [(recipe.name, recipe.size, recipe.preset, recipe.about) for recipe in recipes]
    columns = ("name", "d_model x layers", "preset", "")
    console.result({"recipes": [asdict(recipe) for recipe in recipes]}, lambda: console.table("", columns, rows))


@errors_to_exit_codes
def copy(name: NameArgument, path: TargetArgument = None, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Copy a shipped recipe to a new file, to be changed there; no file is ever overwritten."""
    from inl_core.recipe.shipped import copy_shipped

    console, written = Console(json=json, quiet=quiet), copy_shipped(name, path)
    console.result({"name": name, "path": written}, lambda: console.write(f"{written}\n"))


@errors_to_exit_codes
def show(
    recipe: RecipeArgument, overrides: SetOption = None, json: JsonOption = False, quiet: QuietOption = False
) -> None:
    """Print the recipe with presets, defaults and overrides filled in, as YAML."""
    from inl_core.recipe.load import dump_recipe, load_recipe

    console = Console(json=json, quiet=quiet)
    resolved = load_recipe(recipe, overrides or ())
    console.result(resolved, lambda: console.write(dump_recipe(resolved)))


@errors_to_exit_codes
def schema(json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Print the JSON schema of recipes, for editors and other tools."""
    from inl_core.recipe.schema import recipe_schema, schema_text

    console = Console(json=json, quiet=quiet)
    console.result(recipe_schema(), lambda: console.write(schema_text()))
