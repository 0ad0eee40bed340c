"""`inl sweep`: a recipe with every combination of some values and seeds, one run after another, and a table of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.options import (
    AccountOption,
    ContainerOption,
    JsonOption,
    LogsOption,
    MountOption,
    PartitionOption,
    QuietOption,
    RecipeArgument,
    SbatchOption,
    SetOption,
    SetupOption,
    check_page,
    path_option,
)
from inl_core.errors import InlError, RecipeError
from inl_core.files import refuse_no_directory

if TYPE_CHECKING:
    from inl_core.analysis.sweep import PlannedRun
    from inl_core.training.run_status import RunStatus

    Found = list[tuple[PlannedRun, RunStatus]]


GridOption = Annotated[
    list[str] | None,
    typer.Option("--grid", metavar="KEY=VALUE,...", help="Values of a recipe's key; may be repeated."),
]
SeedsOption = Annotated[
    list[int] | None, typer.Option("--seeds", metavar="N ...", min=0, help="Train each point with these seeds.")
]
RunsDirOption = Annotated[Path | None, path_option("--runs-dir", help="Where the runs go; default runs/NAME-sweep.")]
OutputOption = Annotated[
    Path | None, path_option("--output", "-o", help="Also write the runs' `inl compare` to this HTML file.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="List the runs and how they stand; train none.")]
SlurmOption = Annotated[
    bool, typer.Option("--slurm", help="Print a job script that trains them as a Slurm array; train none here.")
]
TimeOption = Annotated[
    str | None, typer.Option("--time", metavar="TIME", help="With --slurm: the time limit of each job.")
]
GpusOption = Annotated[
    int | None,
    typer.Option("--gpus", metavar="N", min=0, max=1000, help="With --slurm: GPUs of each run, on a node; default 1."),
]
CpusOption = Annotated[
    int | None,
    typer.Option("--cpus", metavar="N", min=1, max=10_000, help="With --slurm: processors of each process; default 8."),
]
LeadOption = Annotated[
    int | None,
    typer.Option(
        "--lead", metavar="N", min=1, max=65_535, help="With --slurm: seconds left at which it stops; default 300."
    ),
]


class SeveralSeeds(TyperCommand):
    """Accepts `--seeds 0 1 2`, where Typer alone would want the option's name before each number."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Put the option's name before each further number."""
        given: list[str] = []
        is_list = False
        for place, word in enumerate(args):
            is_number = word.isascii() and word.isdecimal()
            if is_list and is_number and args[place - 1] != "--seeds":
                given.append("--seeds")
            is_list = word == "--seeds" or (is_list and is_number)
            given.append(word)
        return super().parse_args(ctx, given)


@errors_to_exit_codes
def sweep(
    recipe: RecipeArgument,
    grid: GridOption = None,
    seeds: SeedsOption = None,
    overrides: SetOption = None,
    runs_dir: RunsDirOption = None,
    output: OutputOption = None,
    dry_run: DryRunOption = False,
    slurm: SlurmOption = False,
    time: TimeOption = None,
    gpus: GpusOption = None,
    cpus: CpusOption = None,
    lead: LeadOption = None,
    logs: LogsOption = None,
    partition: PartitionOption = None,
    account: AccountOption = None,
    sbatch: SbatchOption = None,
    setup: SetupOption = None,
    container: ContainerOption = None,
    mount: MountOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a recipe with every combination of some values and seeds, and show which is best.

    inl sweep tiny --grid training.optimizer.learning_rate=1e-3,3e-3 --seeds 0 1 2

    The same command goes on after a stop: runs that are done are skipped.
    """
    from inl_core.analysis.sweep import plan_runs

    console = Console(json=json, quiet=quiet)
    if runs_dir:
        refuse_no_directory(runs_dir, "--runs-dir")
    of_slurm = {
        "--time": time,
        "--gpus": gpus,
        "--cpus": cpus,
        "--lead": lead,
        "--logs": logs,
        "--partition": partition,
        "--account": account,
        "--sbatch": sbatch,
        "--setup": setup,
        "--container": container,
        "--mount": mount,
    }
    _check_options(grid, seeds, output, slurm=slurm, dry_run=dry_run, of_slurm=of_slurm)
    runs = plan_runs(recipe, grid or (), seeds or (), overrides or (), runs_dir)
    if slurm:
        from inl_cli.job_scripts import Job, Processes, sweep_script

        job = Job(time or "", partition, account, sbatch or (), setup or (), container, mount or ())
        gpus = 1 if gpus is None else gpus
        processes = Processes(1, gpus, max(gpus, 1), cpus or 8, "srun", lead or 300, None)
        script = sweep_script(job, processes, _commands(recipe, runs), logs=logs)
        return console.result({"script": script}, lambda: console.write(script))
    if dry_run:
        return _list(console, runs)
    _train(console, recipe, runs)
    found = _read(runs)
    _hand_over(console, found, output)
    _refuse_unfinished(found)


def _refuse_unfinished(found: "Found") -> None:
    """InlError where a run failed, or is trained by another process."""
    running = [run.path.name for run, status in found if status.state == "running"]
    failed = [run.path.name for run, status in found if status.state not in ("running", "done")]
    problems = [f"{len(failed)} of {len(found)} runs failed: {', '.join(failed)}"] if failed else []
    problems += [f"{len(running)} in use by other processes: {', '.join(running)}"] if running else []
    if problems:
        raise InlError(f"{'; '.join(problems)}; the same command tries them again")


def _check_options(
    grid: Sequence[str] | None,
    seeds: Sequence[int] | None,
    output: Path | None,
    *,
    slurm: bool,
    dry_run: bool,
    of_slurm: dict[str, Any],
) -> None:
    if not grid and not seeds:
        raise RecipeError("inl sweep: nothing to sweep; give --grid KEY=VALUE,VALUE or --seeds 0 1 2")
    if slurm and of_slurm["--time"] is None:
        raise RecipeError("--slurm: needs --time, the time limit of each job, as 4:00:00")
    given = [name for name, value in of_slurm.items() if value not in (None, [], ())]
    if given and not slurm:
        raise RecipeError(f"{', '.join(given)}: only with --slurm")
    if output and (slurm or dry_run):
        raise RecipeError("--output: is written when the runs are done; leave out --slurm and --dry-run")
    check_page(output)


def _commands(recipe: Path, runs: "Sequence[PlannedRun]") -> "list[tuple[PlannedRun, list[str]]]":
    """What `inl` is given to train each run, or to go on with it."""
    return [
        (
            run,
            [
                *("train", str(recipe)),
                *(word for given in run.overrides for word in ("--set", given)),
                *("--run-dir", str(run.path), "--resume-or-start"),
            ],
        )
        for run in runs
    ]


def _read(runs: "Sequence[PlannedRun]") -> "Found":
    from inl_core.analysis.sweep import read_run

    return [(run, read_run(run)) for run in runs]


def _train(console: Console, recipe: Path, runs: "Sequence[PlannedRun]") -> None:
    """Train what is not done, once all directories are checked."""
    from inl_cli.sweep_runs import Sessions

    sessions = Sessions()
    done = {run.path for run, status in _read(runs) if status.state == "done"}
    with sessions.listening():
        for number, (run, command) in enumerate(_commands(recipe, runs), 1):
            what = f"run {number} of {len(runs)}, {run.path}"
            if run.path in done:
                console.info(f"{what}: done already")
                continue
            console.info(what)
            code = sessions.train([*command, *(["--quiet"] if console.quiet else [])])
            if code:
                [(_, status)] = _read([run])
                ending = {"running": "is in use by another process", "done": "is done, but its process failed"}
                console.warn(f"{run.path}: {ending.get(status.state, 'failed')} (exit code {code})")


def _list(console: Console, runs: "Sequence[PlannedRun]") -> None:
    found = _read(runs)
    data = {"runs": [_run_data(*one) for one in found]}
    rows = [(str(run.path), status.state, status.step, _loss(status)) for run, status in found]
    console.result(data, lambda: console.table(f"{len(runs)} runs", ("run", "state", "step", "loss"), rows))


def _run_data(run: "PlannedRun", status: "RunStatus") -> dict[str, Any]:
    return {
        "run": str(run.path),
        "values": run.values,
        "seed": run.seed,
        "state": status.state,
        "step": status.step,
        "evaluation": status.ending.evaluation if status.ending else None,
    }


def _loss(status: "RunStatus") -> float | None:
    return (status.ending.evaluation or {}).get("loss") if status.ending else None


def _hand_over(console: Console, found: "Found", output: Path | None) -> None:
    """The table, and the page of the runs that are done."""
    from inl_core.analysis.sweep import grid_part, point_data, summarise

    points = summarise(found)
    table = grid_part(points)
    done = [run.path for run, status in found if status.state == "done"]
    if output and len(done) > 1:
        from inl_core.analysis.report.build import compare_runs
        from inl_core.analysis.report.page import write_page
        from inl_core.analysis.report.parts import Section

        report = compare_runs(done, console.warn)
        report.sections.insert(0, Section("The sweep", [table]))
        write_page(report, output)
        console.info(f"written to {output}")
    elif output:
        console.warn(f"{output}: not written, as a comparison needs two runs that are done")
    data = {"points": [point_data(point) for point in points], "runs": [_run_data(*one) for one in found]}
    console.result(data, lambda: console.table(table.see, table.columns, table.rows))
