"""The `inl` command: which commands there are and where each one lives.

- Nothing here imports torch, pandas or pydantic: `inl --help` must be instant. A command imports the core in its body.
- Help and usage errors are plain text without rich's markup: it takes half the time, and can be piped and searched.
"""

import atexit
import os
import sys
from typing import Annotated, NoReturn

import typer

from inl_cli.commands import (
    bench,
    chat,
    check,
    convergence,
    data,
    evaluate,
    export,
    generate,
    import_reference,
    inspect,
    plan,
    recipe,
    replay,
    report,
    run_status,
    serve,
    slurm,
    sweep,
    train,
    watch,
)
from inl_cli.console import EXIT_FAILURE, show_error
from inl_cli.groups import WholeSentences
from inl_cli.streams import prepare_streams
from inl_core.files import describe_os_error
from inl_core.launcher import place_or_alone

app = typer.Typer(
    name="inl",
    cls=WholeSentences,
    help="Train, evaluate, generate with and inspect INL-LLM language models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("prepare-data")(data.prepare_data)
app.command("train")(train.train)
app.command("resume")(train.resume)
app.command("sweep", cls=sweep.SeveralSeeds)(sweep.sweep)
app.command("run-status")(run_status.run_status)
app.command("watch")(watch.watch)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("plan")(plan.plan)
app.command("bench")(bench.bench)
app.command("inspect")(inspect.inspect)
app.command("inspect-params")(inspect.inspect_params)
app.command("convergence-report")(convergence.convergence_report)
app.command("report")(report.report)
app.command("compare")(report.compare)
app.command("replay")(replay.replay)
app.command("export")(export.export)
app.command("serve")(serve.serve)
app.command("import-reference")(import_reference.import_reference)

check_app = typer.Typer(
    cls=WholeSentences,
    help="Prove things on one's own recipes and checkpoints.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
check_app.command("resume")(check.resume)
check_app.command("equivalence")(check.equivalence)
check_app.command("checkpoint")(check.checkpoint)
check_app.command("session", hidden=True)(check.session)
app.add_typer(check_app, name="check")

recipe_app = typer.Typer(
    cls=WholeSentences, help="List, copy and show recipes.", no_args_is_help=True, rich_markup_mode=None
)
recipe_app.command("list")(recipe.list_shipped)
recipe_app.command("copy")(recipe.copy)
recipe_app.command("show")(recipe.show)
recipe_app.command("schema")(recipe.schema)
app.add_typer(recipe_app, name="recipe")

slurm_app = typer.Typer(
    cls=slurm.TrainsByDefault,
    help="Print job scripts for Slurm: `inl slurm RECIPE --time ...`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
slurm_app.command("train")(slurm.train)
slurm_app.command("prepare")(slurm.prepare)
app.add_typer(slurm_app, name="slurm")


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"inl {version('inl')}")
        except PackageNotFoundError:
            typer.echo("inl (a checkout that is not installed)")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train, evaluate, generate with and inspect INL-LLM language models."""


def main() -> None:
    """Run the command that the arguments name; `inl_cli.__main__` is where both entry points begin."""
    prepare_streams()
    if place_or_alone().size > 1:
        _run_as_rank()
    try:
        app()
    except OSError as error:  # help or the version could not be written
        show_error(describe_os_error(error))
        sys.exit(EXIT_FAILURE)


def _run_as_rank() -> NoReturn:
    """Run the command as one process of several, and end without shutting the interpreter down.

    A shutdown frees the process group, and stops gloo's worker threads for good when they wait for Python's lock just
    then: a finished run would never end (pytorch issue 190489; inl_core/training/distributed.py keeps what must live
    until here). Everything of ours is written and closed before this point.
    """
    code: object = 0
    try:
        app()
    except SystemExit as leaving:
        code = leaving.code
    except BaseException as error:  # a bug: show its traceback, and end in the same way
        sys.excepthook(type(error), error, error.__traceback__)
        code = EXIT_FAILURE
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
