"""`inl recipe`: what a recipe may hold, and what one holds once everything is filled in."""

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.options import JsonOption, QuietOption, RecipeArgument, SetOption


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
