"""`inl train` and `inl resume`: one flow, from a recipe or from a run's newest intact checkpoint."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.options import JsonOption, QuietOption, RecipeArgument, SetOption, given_path

RunDirOption = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        help="Where the run goes; default runs/NAME, or NAME-2, ... if taken.",
        parser=given_path,
        metavar="PATH",
    ),
]
AllowOption = Annotated[
    list[str] | None,
    typer.Option("--allow-change", metavar="KEY", help="Accept a change of this key that alters the experiment."),
]


@errors_to_exit_codes
def train(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a model: prepare missing data, plan, train, evaluate, save.

    Ctrl-C saves first; `inl resume RUN` goes on. For several processes:
    torchrun --nproc-per-node N -m inl_cli train RECIPE.
    """
    from inl_core.training.interruption import StopSignal

    console = Console(json=json, quiet=quiet)
    with StopSignal(end=os._exit) as stop:  # before torch is imported, which takes seconds
        from inl_cli.training_flow import run_training
        from inl_core.recipe.load import load_recipe

        result = run_training(console, load_recipe(recipe, overrides or ()), run_dir=run_dir, stop=stop)
    _report(console, result)


@errors_to_exit_codes
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory, e.g. runs/tiny.", parser=given_path)],
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Train up to this step instead.")] = None,
    overrides: SetOption = None,
    allow_change: AllowOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Continue a run exactly from its newest intact checkpoint, and say how its recipe differs, if it does."""
    from inl_core.training.interruption import StopSignal

    console, allowed = Console(json=json, quiet=quiet), tuple(allow_change or ())
    given = [*(overrides or ()), *([f"training.steps={steps}", "training.tokens=null"] if steps else ())]
    with StopSignal(end=os._exit) as stop:  # before torch is imported, which takes seconds
        from inl_cli.training_flow import Resumption, run_training
        from inl_core.training.resuming import changed_recipe

        recipe = changed_recipe(
            run,
            given,
            allowed,
            show=lambda change: console.info(f"{change.kind}: {change}"),
            warn=console.warn,
        )
        resumption = Resumption(allowed, must_advance=steps is not None)
        result = run_training(console, recipe, run_dir=run, resumption=resumption, stop=stop)
    _report(console, result)


def _report(console: Console, result: dict[str, Any]) -> None:
    score = result["evaluation"] or {}

    def render() -> None:
        rows = [(name.replace("_", " "), score[name]) for name in score]
        console.table(f"{result['run']}: step {result['step']:,}", ("validation", ""), rows)

    console.result(result, render)
