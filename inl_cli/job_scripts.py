"""The job scripts for Slurm of `inl slurm` and `inl sweep`: checked against the recipe, and written by a template.

The templates are in templates/. What the user gave is quoted for the shell, but for lines of setup and options of
sbatch, which are put in as they are.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from inl_core.analysis.sweep import PlannedRun
from inl_core.errors import RecipeError
from inl_core.recipe import DataSettings, Recipe

_TEMPLATES = Path(__file__).parent / "templates"
_TIME = re.compile(r"(?:(\d{1,5})-)?(\d{1,7})(?::(\d{1,7}))?(?::(\d{1,7}))?", re.ASCII)
_WORD = re.compile(r"[\w.,:@+/%-]+", re.ASCII)


@dataclass(frozen=True)
class Job:
    """What a job of any kind asks of Slurm."""

    time: str
    """The time limit, in any of Slurm's forms."""
    partition: str | None = None
    account: str | None = None
    sbatch: Sequence[str] = ()
    """Further options of sbatch, each as it stands after `#SBATCH`."""
    setup: Sequence[str] = ()
    """Lines of shell that come before all others."""
    container: str | None = None
    """The image in which the commands run, by Slurm's plugin pyxis."""
    mounts: Sequence[str] = ()
    """What the container sees of the machine, each as SOURCE:TARGET."""


@dataclass(frozen=True)
class Processes:
    """The processes of a training job."""

    nodes: int
    gpus: int
    """GPUs of each node; 0 trains on processors."""
    per_node: int
    """Processes on each node."""
    cpus: int
    """Processors, and threads, of each process."""
    launcher: Literal["torchrun", "srun"]
    """Who starts them: a torchrun on each node, or Slurm itself."""
    lead: int
    """Seconds before the end of the job at which they are told to save."""
    interface: str | None
    """The network interface by which they talk; None leaves the choice to NCCL and gloo."""


def train_script(
    job: Job, processes: Processes, recipe: Recipe, *, command: Sequence[str], run: Path, logs: Path
) -> str:
    """The script of a job that trains, or goes on, and puts itself back into the queue when its time is over.

    Args:
        recipe: the recipe with all changes that `command` makes to it.
        command: what `inl` is given to train it, without what this function adds.
        run: the run's directory.
        logs: where the output of each process goes.

    Raises:
        RecipeError: the recipe cannot be trained by so many processes, or a value cannot be used.
    """
    words = [*command, "--run-dir", str(run), "--resume-or-start"]
    options = [*_training_options(job, processes, recipe), "--output=%x-%j.out"]
    values = {field.name: getattr(processes, field.name) for field in fields(processes)}
    return _script("train", job, recipe.name, options, **values, run=run, logs=logs, command=shlex.join(words))


def sweep_script(
    job: Job, processes: Processes, runs: Sequence[tuple[PlannedRun, Sequence[str]]], *, logs: Path | None = None
) -> str:
    """The script of an array of jobs, each of which trains one run of a sweep as the script of `train_script` does.

    Args:
        processes: of each run.
        runs: each with what `inl` is given to train it or to go on with it.
        logs: where the output of each process goes; None for logs/NAME, by the job's name.

    Raises:
        RecipeError: a recipe cannot be trained by so many processes, or a value cannot be used.
    """
    of_runs = [_training_options(job, processes, run.recipe) for run, _ in runs]  # checks each; they are all alike
    options = [*of_runs[0], f"--array=1-{len(runs)}", "--output=%x-%A-%a.out"]
    name = f"sweep-{runs[0][0].recipe.name}"
    values = {field.name: getattr(processes, field.name) for field in fields(processes)}
    commands = [(run.path, shlex.join(words)) for run, words in runs]
    # The template calls `inl` with the words that `set --` has put there.
    return _script(
        "sweep", job, name, options, **values, runs=commands, logs=logs or Path("logs", name), command='"$@"'
    )


def _training_options(job: Job, processes: Processes, recipe: Recipe) -> list[str]:
    """The options of sbatch for a job that trains; RecipeError where so many processes cannot train the recipe."""
    size = processes.nodes * processes.per_node
    try:
        recipe.training.micro_batch(size)
    except ValueError as error:
        raise RecipeError(f"training.batch_tokens: {error}; change the recipe, the nodes or what each has") from None
    _check_lead(job, processes.lead)
    is_direct = processes.launcher == "srun"
    return [
        f"--nodes={processes.nodes}",
        f"--ntasks-per-node={processes.per_node if is_direct else 1}",
        f"--cpus-per-task={processes.cpus * (1 if is_direct else processes.per_node)}",
        *([f"--gpus-per-node={processes.gpus}"] if processes.gpus else []),
        # Slurm sends this signal to the processes that srun started, and not to the script, which waits for them.
        f"--signal=TERM@{processes.lead}",
        "--requeue",
        "--open-mode=append",
    ]


def prepare_script(job: Job, recipe: Recipe, *, parts: int, cpus: int, lead: int) -> str:
    """The script of an array of jobs, each of which prepares a part of a recipe's data, and of the job that joins them.

    Args:
        cpus: processors of each job.
        lead: seconds before the end of a job at which it is told to stop.

    Raises:
        RecipeError: the data cannot be prepared so, or a value cannot be used.
    """
    _check_lead(job, lead)
    options = [f"--array=1-{parts}", "--ntasks=1", f"--cpus-per-task={cpus}"]
    options += [f"--signal=INT@{lead}", "--requeue", "--output=%x-%A-%a.out", "--open-mode=append"]
    name, command = f"prepare-{recipe.name}", shlex.join(["prepare-data", *_data_arguments(recipe.data)])
    return _script("prepare", job, name, options, parts=parts, cpus=cpus, command=command)


def _data_arguments(data: DataSettings) -> list[str]:
    """What `inl prepare-data` is given to make the data that a recipe describes."""
    tokenizer, plain = data.tokenizer, DataSettings()
    if tokenizer.sample_bytes != plain.tokenizer.sample_bytes:
        raise RecipeError("data.tokenizer.sample_bytes: not an option of `inl prepare-data`; remove it from the recipe")
    if data.is_directory_alone:
        raise RecipeError(f"data.directory {data.directory}: is prepared already, as the recipe names no data.sources")
    for source in data.sources:
        if source.startswith("-"):
            raise RecipeError(f"data.sources: {source!r} cannot be read by a job; name files or directories")
    given = {
        "output": data.directory,
        "tokenizer": tokenizer.file,
        "vocab-size": None if tokenizer.file else tokenizer.vocab_size,
        **{
            name.replace("_", "-"): getattr(data, name)
            for name in ("validation_fraction", "num_shards", "max_bad_ratio")
        },
        **{f"{name}-column": column for name, column in data.columns.model_dump().items()},
    }
    return [
        *data.sources,
        *(word for weight in data.weights for word in ("--weight", str(weight))),
        *(word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))),
    ]


def _check_lead(job: Job, lead: int) -> None:
    if lead >= seconds_of(job.time):
        raise RecipeError(f"--lead {lead}: seconds before the end, so --time {job.time} must be longer")


def seconds_of(time: str) -> int:
    """A time limit of Slurm in seconds.

    The forms are minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes and
    days-hours:minutes:seconds.

    Raises:
        RecipeError: it has none of these forms, or is 0, by which Slurm means no limit.
    """
    found = _TIME.fullmatch(time)
    days, first, second, third = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    begins_with_hours = found is not None and (found[1] or found[4])
    seconds = (86_400 * days + 3600 * first + 60 * second + third) if begins_with_hours else 60 * first + second
    if not seconds:
        raise RecipeError(
            f"--time {time!r}: not a time limit; write hours:minutes:seconds, as 24:00:00, or days-hours, as 2-12"
        )
    return seconds


def _script(kind: str, job: Job, name: str, options: Sequence[str], **values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    sbatch = [f"--job-name={name}", f"--time={job.time}", *options, *_options_of(job)]
    for line in (*sbatch, *job.setup):
        if not line.isprintable():
            raise RecipeError(f"{line!r}: holds a line end or a control character; give one option for each line")
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES, encoding="utf-8"),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    template = environment.get_template(f"{kind}.sh.jinja")
    return template.render(sbatch=sbatch, setup=job.setup, container=_container(job), **values)


def _options_of(job: Job) -> Iterator[str]:
    """The options of sbatch that come from the user."""
    for key in ("partition", "account"):
        if (value := getattr(job, key)) is not None:
            if not _WORD.fullmatch(value):
                raise RecipeError(f"--{key} {value!r}: not a name")
            yield f"--{key}={value}"
    for option in job.sbatch:
        if not option.startswith("-"):
            raise RecipeError(f"--sbatch {option!r}: not an option of sbatch, such as --sbatch=--qos=high")
        yield option


def _container(job: Job) -> str:
    """The options by which srun starts a command in the container; empty without one."""
    if job.container is None:
        if job.mounts:
            raise RecipeError("--mount: is for a container; name its image with --container")
        return ""
    mounts = f" --container-mounts={shlex.quote(','.join(job.mounts))}" if job.mounts else ""
    return f'--container-image={shlex.quote(job.container)}{mounts} --container-workdir="$PWD"'
