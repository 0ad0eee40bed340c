"""`inl watch`: a run seen from outside, while it trains and after."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.early import check_file
from inl_cli.options import JsonOption, QuietOption, run_argument

if TYPE_CHECKING:
    from inl_core.analysis.watching import RunWatcher


@errors_to_exit_codes
def watch(
    run: Annotated[Path, run_argument("RUN", "The run's directory, e.g. runs/tiny.")],
    every: Annotated[float, typer.Option("--every", metavar="SECONDS", min=0.1, help="How often to look again.")] = 2.0,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show how a run is doing: curves, speed, time left, dynamics, warnings; on a terminal until Ctrl-C.

    It changes nothing in the run, and ends by itself when the run is done. Elsewhere than on a terminal it prints one
    summary.

    inl watch runs/tiny
    """
    from inl_core.inference.checkpoint_files import nearest_run

    check_file(run, f"no such run; `inl train RECIPE --run-dir {run}` would start it{nearest_run(run)}")
    from inl_cli.watch_view import lines_of
    from inl_core.analysis.watching import RunWatcher

    console, watcher = Console(json=json, quiet=quiet), RunWatcher(run)
    if console.rich_stdout.is_terminal and not json and not quiet:
        _watch(console, watcher, every)
        return
    look, width = watcher.look(), console.rich_stdout.width
    console.result(look.to_data(), lambda: console.write("\n".join(lines_of(look, width)) + "\n"))


def _watch(console: Console, watcher: "RunWatcher", every: float) -> None:
    """Look again and again until the run is done, or Ctrl-C."""
    from rich.live import Live

    from inl_cli.watch_view import live_view

    terminal, look = console.rich_stdout, watcher.look()
    with Live(live_view(look, terminal.width), console=terminal, auto_refresh=False) as live:
        try:
            while look.status.state != "done":
                time.sleep(every)
                look = watcher.look()
                live.update(live_view(look, terminal.width), refresh=True)
        except KeyboardInterrupt:
            pass
