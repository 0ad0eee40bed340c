"""`inl check`: proofs on one's own recipe or checkpoint, each with an exit code other than 0 when it fails."""

import math
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from inl_cli.commands.data import prepare_with_progress
from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.loading import open_default_or_text, open_model
from inl_cli.memory import explains_memory
from inl_cli.options import (
    CheckpointArgument,
    DeviceOption,
    JsonOption,
    QuietOption,
    RecipeArgument,
    SetOption,
    given_path,
    path_option,
    run_argument,
)
from inl_core.errors import ArtefactError, InlError, RecipeError

if TYPE_CHECKING:
    from inl_core.analysis.checks.equivalence import WayCheck
    from inl_core.analysis.checks.resume import ResumeCheck
    from inl_core.inference.loading import LoadedModel

WorkOption = Annotated[
    Path | None,
    path_option(
        "--work-dir", help="Keep what is made here, in a directory that does not exist yet; default removes it."
    ),
]
StepsOption = Annotated[int, typer.Option("--steps", help="N, the optimizer steps of each run.")]
ProcessesOption = Annotated[int, typer.Option("--processes", min=1, help="Processes of each run, under torchrun.")]
CheckedTextOption = Annotated[
    str | None,
    typer.Option("--text", metavar="SOURCE", help="The text; default the run's validation split where it is at hand."),
]
TokensOption = Annotated[int, typer.Option("--tokens", help="Tokens of each of the three texts.")]
ToleranceOption = Annotated[
    float | None, typer.Option(min=0, help="Largest difference; default 1e-4 in single precision, 1e-9 in double.")
]
NoCompileOption = Annotated[bool, typer.Option("--no-compile", help="Leave out the compiled ways: tens of seconds.")]
CheckedPath = Annotated[Path, run_argument("PATH", "A checkpoint, or a run, of which all checkpoints are checked.")]


@errors_to_exit_codes
def resume(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    steps: StepsOption = 12,
    processes: ProcessesOption = 1,
    work_dir: WorkOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train N steps straight, and once stopped, resumed, killed and resumed: both must be the same to the last bit."""
    from inl_core.recipe.load import load_recipe

    console, given = Console(json=json, quiet=quiet), overrides or []
    wanted = load_recipe(recipe, given)  # before torch is imported, which takes seconds

    from inl_core.analysis.checks.resume import FEWEST_STEPS, check_resume, overrides_for_check
    from inl_core.training.distributed import ALONE
    from inl_core.training.run_data import open_data

    if steps < FEWEST_STEPS:
        raise RecipeError(f"--steps {steps}: must be at least {FEWEST_STEPS}, to be stopped and killed in between")
    changed = load_recipe(recipe, [*given, *overrides_for_check(wanted, steps)])
    with _work_directory(work_dir) as work:
        open_data(changed, ALONE, partial(prepare_with_progress, console=console, wait=True), note=console.info)
        found = check_resume(changed, work, processes=processes, tell=console.info)
    console.result({**asdict(found), "passed": found.problem is None}, lambda: _show_resume(console, recipe, found))
    if found.problem:
        raise InlError(f"{recipe}: a resumed run is not the run that never stopped: {found.problem}")


@errors_to_exit_codes
def equivalence(
    checkpoint: CheckpointArgument = None,
    text: CheckedTextOption = None,
    tokens: TokensOption = 64,
    tolerance: ToleranceOption = None,
    no_compile: NoCompileOption = False,
    device: DeviceOption = "auto",
    work_dir: WorkOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compute the logits of a text in every way there is, and compare each with one plain forward pass."""
    console = Console(json=json, quiet=quiet)
    loaded = open_model(console, checkpoint, device)

    from inl_core.analysis.checks.equivalence import check_equivalence

    source = open_default_or_text(console, loaded, text)
    with _work_directory(work_dir) as work:
        found = check_equivalence(
            loaded,
            source,
            work,
            num_tokens=min(tokens, loaded.model.config.max_seq_len),
            tolerance=tolerance,
            compiled=not no_compile,
            tell=lambda name: console.info(f"computing: {name}"),
        )
        console.info("computing: exported")
        found.append(_check_export(loaded, work, found[0].tolerance))
    failed = [way.name for way in found if not way.passed]
    ways = [{**asdict(way), "passed": way.passed} for way in found]
    result = {"checkpoint": loaded.path, "step": loaded.step, "text": source.name, "passed": not failed, "ways": ways}
    rows = [
        (
            way.name,
            way.difference,
            way.tolerance,
            (way.left_out and f"left out: {way.left_out}") or _word(way.passed),
            way.what,
        )
        for way in found
    ]
    columns = ("", "largest difference", "tolerance", "", "")
    console.result(result, lambda: console.table(f"{loaded.path} on {source.name}", columns, rows))
    if failed:
        raise InlError(f"{loaded.path}: other logits, beyond rounding: {', '.join(failed)}")


@errors_to_exit_codes
def checkpoint(path: CheckedPath, json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Read every file of a checkpoint: manifest, checksums, tensors against the configuration, finite numbers."""
    from inl_core.inference.checkpoint_files import find_checkpoints

    checkpoints = find_checkpoints(path)  # before torch is imported, which takes seconds

    from inl_core.analysis.checks.checkpoint import check_checkpoint

    console, found = Console(json=json, quiet=quiet), []
    for one in checkpoints:
        console.info(f"reading {one}")
        found.append(check_checkpoint(one))

    def render() -> None:
        for one in found:
            rows = [(what, "right", state) for what, state in one.passed]
            console.table(str(one.path), ("", "", ""), [*rows, *([("", "WRONG", one.problem)] if one.problem else [])])

    problems = [one.problem for one in found if one.problem]
    console.result({"path": path, "passed": not problems, "checkpoints": [asdict(one) for one in found]}, render)
    if problems:
        raise ArtefactError("\n".join(problems))


@errors_to_exit_codes
@explains_memory
def session(
    recipe: RecipeArgument,
    run: Annotated[Path, run_argument("RUN", "The run's directory.", given_path)],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run.")] = False,
    stop_after: Annotated[
        int | None, typer.Option(help="Send itself a signal when this step's row is written.")
    ] = None,
    end_by: Annotated[Literal["TERM", "KILL"], typer.Option(help="Which signal.")] = "TERM",
    json: JsonOption = False,
    quiet: QuietOption = True,
) -> None:
    """Run one session of `inl check resume`."""
    from inl_core.training.interruption import StopSignal

    with StopSignal(end=os._exit) as stop:
        import torch

        from inl_core.analysis.checks.resume import SignalsItself
        from inl_core.recipe.load import load_recipe
        from inl_core.training.session import Resumption, open_session

        observer = SignalsItself(stop_after, signal.Signals[f"SIG{end_by}"], Console(json=json, quiet=quiet).warn)
        how = Resumption() if resume else None
        if not resume:  # else torch seeds each process otherwise; a resumed one must find its state in the checkpoint
            torch.manual_seed(0)
        with open_session(load_recipe(recipe), run, resumption=how, observer=observer, stop=stop) as opened:
            opened.build_trainer(opened.open_data()).fit(stop)


@contextmanager
def _work_directory(given: Path | None) -> Iterator[Path]:
    """A directory of one's own: the one given, which is kept, or one beside the current files that is removed."""
    if given is None:
        with tempfile.TemporaryDirectory(prefix=".inl-check-", dir=Path.cwd(), ignore_cleanup_errors=True) as path:
            yield Path(path)
        return
    if given.exists() and not (given.is_dir() and not any(given.iterdir())):
        raise RecipeError(f"--work-dir {given}: is there already; name a directory that is empty or does not exist")
    given.mkdir(parents=True, exist_ok=True)
    yield given


def _check_export(loaded: "LoadedModel", work: Path, tolerance: float) -> "WayCheck":
    """The proof of `inl export` as one more way; it belongs to interop, which only commands may import."""
    from importlib.util import find_spec

    import torch

    from inl_core.analysis.checks.equivalence import WayCheck

    name, what = "exported", "as `inl export` writes it, by transformers: in one pass, with a cache, with padding"
    if find_spec("transformers") is None:
        return WayCheck(name, what, None, tolerance, left_out="transformers is not installed")
    if loaded.model.embedding.table.weight.dtype != torch.float32:
        return WayCheck(name, what, None, tolerance, left_out="exports are compared in single precision")

    from inl_core.interop.huggingface.export import export

    start = time.perf_counter()
    differences = export(loaded.path, work / name, tolerance=math.inf).differences  # judged as all ways are
    return WayCheck(name, what, differences.relative, tolerance, time.perf_counter() - start)


def _show_resume(console: Console, recipe: Path, found: "ResumeCheck") -> None:
    console.write(f"{recipe}: {found.steps} steps straight, and in parts ({'; '.join(found.sessions)})\n\n")
    rows = [(one.what, one.compared, one.difference or "the same to the last bit") for one in found.comparisons]
    console.table("", ("", "compared", ""), rows)


def _word(passed: bool) -> str:
    return "the same" if passed else "DIFFERS"
