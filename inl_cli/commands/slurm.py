"""`inl slurm`: job scripts that train on the nodes of a Slurm cluster, or prepare data there."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.groups import WholeSentences
from inl_cli.options import (
    AccountOption,
    ContainerOption,
    JsonOption,
    LeadOption,
    LogsOption,
    MountOption,
    PartitionOption,
    QuietOption,
    RecipeArgument,
    SbatchOption,
    SetOption,
    SetupOption,
    path_option,
)

TimeOption = Annotated[
    str, typer.Option("--time", metavar="TIME", help="The job's time limit, as 24:00:00 or 2-12 (days-hours).")
]
NodesOption = Annotated[int, typer.Option("--nodes", metavar="N", min=1, max=100_000, help="Machines.")]
GpusOption = Annotated[
    int,
    typer.Option("--gpus-per-node", metavar="N", min=0, max=1000, help="GPUs of each, with a process for each; or 0."),
]
ProcessesOption = Annotated[
    int | None,
    typer.Option("--processes-per-node", metavar="N", min=1, max=1000, help="Where that is not one for each GPU."),
]
CpusOption = Annotated[
    int,
    typer.Option("--cpus-per-process", metavar="N", min=1, max=10_000, help="Processors, and threads, of a process."),
]
LauncherOption = Annotated[
    Literal["torchrun", "srun"],
    typer.Option("--launcher", help="Start one torchrun on each node, or every process by srun."),
]
PartsOption = Annotated[
    int, typer.Option("--parts", metavar="N", min=1, max=10_000, help="Into how many parts the data is divided.")
]
JobCpusOption = Annotated[
    int, typer.Option("--cpus", metavar="N", min=1, max=10_000, help="Processors of each job of the array.")
]
RunDirOption = Annotated[Path | None, path_option("--run-dir", help="Where the run goes; default runs/NAME.")]
InterfaceOption = Annotated[
    str | None,
    typer.Option("--interface", metavar="NAME", help="The network interface that NCCL and gloo use, e.g. ib0."),
]
OutputOption = Annotated[Path | None, path_option("--output", help="Write the script here; default: print it.")]


class TrainsByDefault(WholeSentences):
    """`inl slurm RECIPE` is `inl slurm train RECIPE`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Put the name of the command first where it is left out."""
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = ["train", *args]
        return super().parse_args(ctx, args)


@errors_to_exit_codes
def train(
    recipe: RecipeArgument,
    time: TimeOption,
    nodes: NodesOption = 1,
    gpus_per_node: GpusOption = 8,
    processes_per_node: ProcessesOption = None,
    cpus_per_process: CpusOption = 8,
    launcher: LauncherOption = "torchrun",
    lead: LeadOption = 300,
    run_dir: RunDirOption = None,
    logs: LogsOption = None,
    overrides: SetOption = None,
    interface: InterfaceOption = None,
    partition: PartitionOption = None,
    account: AccountOption = None,
    sbatch: SbatchOption = None,
    setup: SetupOption = None,
    container: ContainerOption = None,
    mount: MountOption = None,
    output: OutputOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Print a job script that trains a recipe, saves in time and goes on in its next turn.

    `inl slurm RECIPE ...` means the same.
    """
    from inl_cli.job_scripts import Job, Processes, train_script
    from inl_core.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    per_node = processes_per_node or max(gpus_per_node, 1)
    script = train_script(
        Job(time, partition, account, sbatch or (), setup or (), container, mount or ()),
        Processes(nodes, gpus_per_node, per_node, cpus_per_process, launcher, lead, interface),
        loaded,
        command=["train", str(recipe), *(word for given in overrides or () for word in ("--set", given))],
        run=run_dir or Path("runs", loaded.name),
        logs=logs or Path("logs", loaded.name),
    )
    _deliver(script, "sbatch", output, Console(json=json, quiet=quiet))


@errors_to_exit_codes
def prepare(
    recipe: RecipeArgument,
    parts: PartsOption,
    time: TimeOption,
    cpus: JobCpusOption = 16,
    lead: LeadOption = 60,
    overrides: SetOption = None,
    partition: PartitionOption = None,
    account: AccountOption = None,
    sbatch: SbatchOption = None,
    setup: SetupOption = None,
    container: ContainerOption = None,
    mount: MountOption = None,
    output: OutputOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Print a script that prepares a recipe's data in parts: `bash SCRIPT` submits an array of jobs and one that joins.

    With data.tokenizer.file in the recipe the parts also tokenise; else the job that joins them does.
    """
    from inl_cli.job_scripts import Job, prepare_script
    from inl_core.recipe.load import load_recipe

    job = Job(time, partition, account, sbatch or (), setup or (), container, mount or ())
    script = prepare_script(job, load_recipe(recipe, overrides or ()), parts=parts, cpus=cpus, lead=lead)
    _deliver(script, "bash", output, Console(json=json, quiet=quiet))


def _deliver(script: str, submit: str, output: Path | None, console: Console) -> None:
    from inl_core.files import SCRIPT, output_file, write_whole

    if output is not None:
        write_whole(output_file(output, SCRIPT), script)
        console.info(f"{output}: `{submit} {output}` submits it, from the directory in which the recipe's paths hold")
    shown = {"output": str(output)} if output else {"script": script}
    console.result(shown, lambda: None if output else console.write(script))
