"""Arguments and options that several commands share, so that they are spelt and explained once."""

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. training.steps=100; may be repeated."),
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]

QuietOption = Annotated[bool, typer.Option("--quiet", help="No information or progress, only results and warnings.")]
