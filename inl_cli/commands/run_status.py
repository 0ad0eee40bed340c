"""`inl run-status`: how a run stands, as a word and as an exit code that a job script can test."""

from pathlib import Path
from typing import Annotated

import typer

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.options import JsonOption, QuietOption, given_path, run_argument

EXIT_CODES = {"done": 0, "preempted": 75, "resumable": 10, "running": 11, "empty": 12, "failed": 13}


@errors_to_exit_codes
def run_status(
    # A path and no name: a script asks about the directory that its `inl train --run-dir` was given, and no other.
    run: Annotated[Path, run_argument("RUN", "The run's directory, e.g. runs/tiny.", given_path)],
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say how a run stands. Exit code: 0 done, 75 preempted, 10 resumable, 11 running, 12 empty, 13 failed."""
    from inl_core.training.run_status import read_status

    console, status = Console(json=json, quiet=quiet), read_status(run)
    code, num_steps = EXIT_CODES[status.state], status.recipe.training.num_steps if status.recipe else None
    data = {
        "run": str(run),
        "state": status.state,
        "exit_code": code,
        "reason": status.reason or None,
        "step": status.step,
        "num_steps": num_steps,
        "checkpoint": str(status.checkpoint) if status.checkpoint else None,
    }
    of = f" of {num_steps:,}" if num_steps else ""
    saved = f"step {status.step:,}{of} is saved" if status.checkpoint else "no checkpoint"
    reason = f"; {status.reason}" if status.reason else ""
    console.result(data, lambda: console.write(f"{status.state}: {run}: {saved}{reason}\n"))
    raise typer.Exit(code)
