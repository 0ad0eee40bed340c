"""Arguments and options that several commands share, so that they are spelt and explained once."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from inl_cli.completion import complete_preset, complete_recipe, complete_run, complete_set, complete_size
from inl_core.errors import RecipeError
from inl_core.files import HTML, expand_home, is_directory, output_file, refuse_remote, shortened

RUNS = Path("runs")
"""Where a run is looked for that is named without a path."""


def given_path(text: str) -> Path:
    """The parser of every option and argument that is a path.

    It refuses '', which mostly is a shell variable that is not set: Path('') would be the current directory. It also
    refuses URLs.
    """
    if not text:
        raise typer.BadParameter("'' names no file; write . if the current directory is meant")
    try:
        refuse_remote(text)
    except RecipeError as error:
        raise typer.BadParameter(str(error)) from None
    return Path(text)


def given_recipe(text: str) -> Path:
    """The parser of arguments that are recipes: `tiny` may name a shipped recipe, `./tiny` is a file or a mistake."""
    path = given_path(text)
    if os.sep in text and len(path.parts) == 1 and not path.exists():
        raise typer.BadParameter(f"{shortened(text)}: no such file; a shipped recipe is named without ./")
    return path


def given_run(text: str) -> Path:
    """The parser of runs and checkpoints: `tiny` is the run runs/tiny, where nothing here is called `tiny`."""
    path = given_path(text)
    named = RUNS / path
    return named if text == path.name and not os.path.lexists(path) and is_directory(named) else path


def given_place(text: str) -> Path:
    """The parser of what may be a run, a checkpoint, a data set or a recipe; the name of a shipped recipe is one."""
    from inl_core.recipe.shipped import shipped_recipes

    return Path(text) if text in shipped_recipes() else given_run(text)


def path_option(*names: str, help: str) -> Any:
    """An option whose value is a path."""
    return typer.Option(*names, metavar="PATH", help=help, parser=given_path)


def run_option(*names: str, help: str) -> Any:
    """An option whose value is a run or a checkpoint."""
    return typer.Option(*names, metavar="PATH", help=help, parser=given_run, autocompletion=complete_run)


def check_page(output: Path | None) -> None:
    """Refuse what is no page where a page is to be written, before the work is done."""
    if output:
        output_file(expand_home(output), HTML)


def path_argument(metavar: str, help: str) -> Any:
    """An argument that is a path."""
    return typer.Argument(metavar=metavar, help=help, parser=given_path)


def run_argument(metavar: str, help: str, parser: Callable[[str], Path] = given_run) -> Any:
    """An argument that is a run or a checkpoint, or whatever else the `parser` takes."""
    return typer.Argument(metavar=metavar, help=help, parser=parser, autocompletion=complete_run)


RecipeArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or a shipped recipe's name, as tiny.",
        parser=given_recipe,
        autocompletion=complete_recipe,
    ),
]

RecipeOrModelArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[RECIPE]",
        help="A YAML file, or a shipped recipe's name; or give --preset or --size instead.",
        parser=given_recipe,
        autocompletion=complete_recipe,
    ),
]

PresetOption = Annotated[
    str | None,
    typer.Option("--preset", help="A generation: v1, v2, v3, v4, v5, transformer.", autocompletion=complete_preset),
]

SizeOption = Annotated[
    str | None,
    typer.Option(
        "--size",
        help="A size of the documents: small, medium, large, xlarge, 3B, 7B, 13B, ...",
        autocompletion=complete_size,
    ),
]

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key, e.g. training.steps=100; may be repeated.",
        autocompletion=complete_set,
    ),
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]

QuietOption = Annotated[bool, typer.Option("--quiet", help="No information or progress, only results and warnings.")]

CheckpointArgument = Annotated[
    Path | None,
    run_argument("[CHECKPOINT]", "A checkpoint or a run; default the newest run's newest intact checkpoint."),
]

DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option("--device", help="auto takes a GPU when there is one.")
]

PrecisionOption = Annotated[
    Literal["auto", "fp32", "bf16"],
    typer.Option("--precision", help="Of matrix products: auto is bf16 on GPUs that have it, else fp32."),
]

IterationsOption = Annotated[
    int | None,
    typer.Option("--iterations", metavar="T", max=10_000, help="Integrator iterations instead of the model's own."),
]

NoEarlyStoppingOption = Annotated[
    bool, typer.Option("--no-early-stopping", help="Run all T iterations for every token.")
]

DataOption = Annotated[
    Path | None, path_option("--data", help="A prepared data set; default the one the model was trained on.")
]

TextOption = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="SOURCE",
        help="Text in any form that prepare-data reads, or - for stdin. A text file is one document; of prompts and "
        "chats only the completions are scored.",
    ),
]

TextColumnOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="The column of plain text in .jsonl, .json and .parquet.")
]

PromptColumnOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="The column of prompts, beside that of completions.")
]

CompletionColumnOption = Annotated[str | None, typer.Option(metavar="NAME", help="The column of completions.")]

MessagesColumnOption = Annotated[str | None, typer.Option(metavar="NAME", help="The column of conversations.")]

SplitOption = Annotated[Literal["validation", "train"], typer.Option("--split", help="Which split of the data set.")]

MaxNewTokensOption = Annotated[int, typer.Option(help="Tokens to generate, at most.")]

TemperatureOption = Annotated[float, typer.Option(help="Divides the logits; 0 is greedy.")]

TopKOption = Annotated[int | None, typer.Option("--top-k", help="Only the k most probable tokens.")]

TopPOption = Annotated[
    float | None, typer.Option("--top-p", help="Only the most probable tokens that together reach this probability.")
]

MinPOption = Annotated[
    float | None, typer.Option("--min-p", help="Only tokens at least this fraction as probable as the most probable.")
]

PenaltyOption = Annotated[float, typer.Option(help="Makes tokens that have occurred less likely; 1 is off.")]

SeedOption = Annotated[int, typer.Option(help="Seed of the draws.")]

PartitionOption = Annotated[str | None, typer.Option("--partition", metavar="NAME", help="The partition.")]

AccountOption = Annotated[str | None, typer.Option("--account", metavar="NAME", help="Who is charged.")]

SbatchOption = Annotated[
    list[str] | None,
    typer.Option("--sbatch", metavar="OPTION", help="One more option of sbatch, as --sbatch=--mem=0; may be repeated."),
]

SetupOption = Annotated[
    list[str] | None,
    typer.Option(
        "--setup", metavar="COMMAND", help="A line of shell to begin with, as 'module load cuda'; may be repeated."
    ),
]

ContainerOption = Annotated[
    str | None,
    typer.Option("--container", metavar="IMAGE", help="Run in this image, by Slurm's plugin pyxis."),
]

MountOption = Annotated[
    list[str] | None,
    typer.Option("--mount", metavar="SOURCE:TARGET", help="A directory for the container; may be repeated."),
]

LeadOption = Annotated[
    int,
    typer.Option("--lead", metavar="N", min=1, max=65_535, help="Seconds before the time limit at which it stops."),
]

LogsOption = Annotated[
    Path | None, path_option("--logs", help="Where the output of every process goes; default logs/NAME.")
]
