"""`inl train` and `inl resume`: one flow, from a recipe or from a run's newest intact checkpoint."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inl_cli.commands.data import prepare_with_progress
from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.early import check_training
from inl_cli.loading import tell_of_shipped
from inl_cli.memory import explains_memory
from inl_cli.options import JsonOption, QuietOption, RecipeArgument, SetOption, path_option, run_argument, run_option

if TYPE_CHECKING:
    from inl_core.recipe import Recipe
    from inl_core.training.interruption import StopSignal
    from inl_core.training.run_status import Ending
    from inl_core.training.session import Resumption

RunDirOption = Annotated[
    Path | None, path_option("--run-dir", help="Where the run goes; default runs/NAME, or NAME-2, ... if taken.")
]
BranchOption = Annotated[
    Path | None,
    run_option("--branch-from", help="Begin with this checkpoint, or this run's newest one, of the same model."),
]
ResumeOrStartOption = Annotated[
    bool,
    typer.Option(
        "--resume-or-start",
        help="For job scripts: start the run in --run-dir, or go on with it, or exit with 0 where it is done.",
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
    branch_from: BranchOption = None,
    resume_or_start: ResumeOrStartOption = False,
    allow_change: AllowOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a model: prepare missing data, plan, train, evaluate, save.

    Ctrl-C saves first; `inl resume RUN` goes on. For several processes:
    torchrun --nproc-per-node N -m inl_cli train RECIPE.
    """
    from inl_core.training.interruption import StopSignal

    console, allowed = Console(json=json, quiet=quiet), tuple(allow_change or ())
    _check_options(run_dir, allowed, resume_or_start=resume_or_start)
    with StopSignal(end=os._exit) as stop:  # before torch is imported, which takes seconds
        from inl_core.recipe.load import load_recipe

        given, resumption = load_recipe(recipe, overrides or ()), None
        tell_of_shipped(console, recipe)
        if not resume_or_start:
            check_training(given, branch_from)
        result = _find_ending(console, given, run_dir, allowed, branch_from) if resume_or_start and run_dir else None
        if result is None:
            if resume_or_start:
                from inl_core.training.session import Resumption

                resumption = Resumption(allowed, or_start=True)
            how = {"resumption": resumption, "branch_from": branch_from}
            result = run_training(console, given, run_dir, **how, stop=stop)
    _report(console, result)


@errors_to_exit_codes
def resume(
    run: Annotated[Path, run_argument("RUN", "The run's directory, e.g. runs/tiny.")],
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
        from inl_core.training.resuming import changed_recipe

        recipe = changed_recipe(
            run,
            given,
            allowed,
            show=lambda change: console.info(f"{change.kind}: {change}"),
            warn=console.warn,
        )

        from inl_core.training.session import Resumption

        resumption = Resumption(allowed, must_advance=steps is not None)
        result = run_training(console, recipe, run, resumption=resumption, stop=stop)
    _report(console, result)


def _check_options(run_dir: Path | None, allowed: tuple[str, ...], *, resume_or_start: bool) -> None:
    from inl_core.errors import RecipeError

    if resume_or_start and run_dir is None:
        raise RecipeError("--resume-or-start: needs --run-dir, the one directory that each start of the job looks at")
    if allowed and not resume_or_start:
        raise RecipeError("--allow-change: is for a run that is resumed; give --resume-or-start too, or `inl resume`")


def _find_ending(
    console: Console, recipe: "Recipe", run: Path, allowed: tuple[str, ...], branch_from: Path | None
) -> dict[str, Any] | None:
    """The outcome of a run that is done already, found without torch; None where there is something left to do.

    Several processes look later, together, since not each of their machines may see the directory.
    """
    from inl_core.launcher import place_or_alone
    from inl_core.recipe.differences import check_changes, recipe_differences
    from inl_core.training.run_status import read_status

    if place_or_alone().size > 1:
        return None
    status = read_status(run)
    if status.ending is None or status.recipe is None or status.ending.step != recipe.training.num_steps:
        return None
    changes = recipe_differences(status.recipe, recipe)
    for change in changes:
        console.info(f"{change.kind}: {change}")
    check_changes(run, changes, allowed)
    if branch_from is not None:
        from inl_core.training.resuming import check_origin

        check_origin(run, status.ending.checkpoint, branch_from, warn=console.warn)
    return _outcome_at_end(console, run, status.ending)


def _outcome_at_end(console: Console, run: Path, ending: "Ending") -> dict[str, Any]:
    console.info(f"{run}: done already; its last step is saved and evaluated")
    return {
        "run": str(run),
        "checkpoint": str(ending.checkpoint),
        "step": ending.step,
        "tokens": ending.tokens,
        "seconds": 0.0,
        "evaluation": ending.evaluation,
    }


@explains_memory
def run_training(
    console: Console,
    recipe: "Recipe",
    run_dir: Path | None,
    *,
    stop: "StopSignal",
    resumption: "Resumption | None" = None,
    branch_from: Path | None = None,
) -> dict[str, Any]:
    """Train as inl_core/training/session.py does, with views around it; the outcome as a JSON-able dictionary."""
    from inl_cli.training_view import TrainingView, show_plan
    from inl_core.training.session import open_session

    def prepare(settings, directory):
        return prepare_with_progress(settings, directory, console, wait=True)

    view = TrainingView(console, num_steps=recipe.training.num_steps)
    how = {"resumption": resumption, "branch_from": branch_from}
    with open_session(recipe, run_dir, **how, observer=view, stop=stop) as session:
        if ending := session.ending():
            return _outcome_at_end(console, session.directory, ending)
        data = session.open_data(prepare)
        trainer = session.build_trainer(data)
        view.first_step = trainer.state.step
        if trainer.state.step < recipe.training.num_steps:
            show_plan(console, trainer, data)
        else:
            path = trainer.run.path
            console.info(f"{path}: at its last step already; `inl resume {path} --steps N` trains up to step N")
        with view:
            evaluation = trainer.fit(stop)
    state = trainer.state
    saved = trainer.run.checkpoints / f"step-{state.step:08d}"
    return {
        "run": str(trainer.run.path),
        "checkpoint": str(saved) if saved.is_dir() else None,
        "step": state.step,
        "tokens": state.tokens,
        "seconds": round(state.seconds, 2),
        "evaluation": asdict(evaluation) if evaluation else None,
    }


def _report(console: Console, result: dict[str, Any]) -> None:
    score = result["evaluation"] or {}

    def render() -> None:
        shown = [name for name in score if name != "iterations" or score[name]]  # a model may have none
        rows = [(name.replace("_", " "), score[name]) for name in shown]
        console.table(f"{result['run']}: step {result['step']:,}", ("validation", ""), rows)

    console.result(result, render)
