"""The flow of a run, for `inl train` and `inl resume` alike; run by every process of a distributed run."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from inl_cli.commands.data import prepare_with_progress
from inl_cli.console import Console
from inl_cli.memory import explains_memory
from inl_cli.progress import amount
from inl_cli.training_view import TrainingView, show_plan
from inl_core.analysis.planning import plan_recipe
from inl_core.analysis.planning.plan import describe_operations, plans_backend
from inl_core.errors import ArtefactError, InlError, RecipeError
from inl_core.inference.checkpoint_files import checkpoint_step, list_checkpoints, read_config
from inl_core.model.native.build import is_to_be_compiled
from inl_core.recipe import Recipe
from inl_core.training.checkpoint import START_ANEW
from inl_core.training.claim import claim, claim_new, join
from inl_core.training.distributed import World, start_world
from inl_core.training.dynamics import cut_records
from inl_core.training.interruption import StopSignal
from inl_core.training.launch import RunData, build_model, open_data
from inl_core.training.metrics import cut_metrics
from inl_core.training.mirrors import check_mirrors
from inl_core.training.resuming import choose_checkpoint
from inl_core.training.run import PREEMPTED, RunFiles, is_taken, write_preempted
from inl_core.training.trainer import Trainer

Result = TypeVar("Result")


@dataclass(frozen=True)
class Resumption:
    """How `inl resume` was asked to go on."""

    allowed: tuple[str, ...] = ()
    """Keys whose change is accepted though it makes another experiment."""
    must_advance: bool = False
    """Whether a run that has reached the last step already is refused."""


@explains_memory
def run_training(
    console: Console,
    recipe: Recipe,
    *,
    stop: StopSignal,
    run_dir: Path | None,
    resumption: Resumption | None = None,
) -> dict[str, Any]:
    """Claim the run's directory, prepare, plan, train, evaluate; the outcome as a JSON-able dictionary.

    Args:
        run_dir: where the run is or goes; None takes runs/NAME, or NAME-2, ... if that is taken.
        resumption: goes on with the run in `run_dir` instead of starting one.
        stop: who listens for signals.

    Raises:
        RecipeError: the recipe does not fit the number of processes, the machine or the run.
        ArtefactError: data or run are damaged, do not fit, or another process is at work on them.
        NonFiniteError: as Trainer.fit.
        Interrupted: a signal stopped the run; it can be resumed.
    """
    with start_world(recipe.training.device) as world, ExitStack() as held:
        _check_batch(recipe, world)
        check_mirrors(recipe)
        directory = _on_main(world, lambda: _claim(console, recipe, run_dir, held, is_new=resumption is None))
        with _word_of_stop(directory, stop) if world.is_main else join(directory):
            return _Session(console, recipe, world, directory, resumption, stop).run()


def _claim(console: Console, recipe: Recipe, run_dir: Path | None, held: ExitStack, *, is_new: bool) -> Path:
    """The run's directory, ours for as long as `held` lasts."""
    if run_dir is None:
        new = claim_new(Path("runs") / recipe.name, lambda path: not is_taken(path), console.warn)
        path = held.enter_context(new)
        (path / PREEMPTED).unlink(missing_ok=True)
        return path
    held.enter_context(claim(run_dir, console.warn))
    (run_dir / PREEMPTED).unlink(missing_ok=True)  # before anything is refused: a scheduler would try it for ever
    if is_new and is_taken(run_dir):
        is_run = (run_dir / "recipe.yaml").is_file() or list_checkpoints(run_dir / "checkpoints")
        go_on = f"`inl resume {run_dir}` continues it, another --run-dir starts anew" if is_run else START_ANEW
        raise ArtefactError(f"{run_dir}: not empty; {go_on}")
    return run_dir


@contextmanager
def _word_of_stop(directory: Path, stop: StopSignal) -> Iterator[None]:
    """Leave preempted.json when a signal comes where there is nothing to save, as the trainer does where there is."""

    def leave_word() -> None:
        newest = list_checkpoints(directory / "checkpoints")[-1:]
        with suppress(OSError):
            write_preempted(directory, max(map(checkpoint_step, newest), default=0), stop.name)

    stop.leave_word = leave_word
    try:
        yield
    except KeyboardInterrupt:
        leave_word()
        raise
    finally:
        stop.leave_word = None


def _check_batch(recipe: Recipe, world: World) -> None:
    try:
        recipe.training.micro_batch(world.size)
    except ValueError as error:
        raise RecipeError(f"training.batch_tokens: {error}") from error


def _on_main(world: World, work: Callable[[], Result]) -> Result:
    """What rank 0 finds, on every rank; an error of its too, or the others would wait for ever."""
    found: Any = None
    if world.is_main:
        try:
            found = work()
        except (InlError, OSError) as error:
            found = error
    found = world.broadcast(found)
    if isinstance(found, Exception):
        raise found
    return found


def _refuse(problem: str) -> None:
    if problem:
        raise ArtefactError(problem)


@dataclass
class _Session:
    """From a claimed directory to the end of training."""

    console: Console
    recipe: Recipe
    world: World
    directory: Path
    resumption: Resumption | None
    stop: StopSignal

    def run(self) -> dict[str, Any]:
        """Do all of it."""
        console, recipe, world = self.console, self.recipe, self.world
        checkpoint = _on_main(world, self._choose)  # first: what is refused should not wait for the data
        data = open_data(
            recipe,
            world,
            lambda settings, path: prepare_with_progress(settings, path, console, wait=True),
            run=self.directory if self.resumption else None,
            note=console.info,
        )
        if world.is_main and world.device.type == "cpu" and is_to_be_compiled():
            console.info("compiling the operations in C++ for this machine: some seconds, once")
        view = TrainingView(console, num_steps=recipe.training.num_steps)
        trainer = self._open(data, view, checkpoint)
        view.first_step = trainer.state.step
        _show(console, recipe, data, trainer, self.directory, world)
        with view:
            evaluation = trainer.fit(self.stop)
        saved = trainer.run.checkpoints / f"step-{trainer.state.step:08d}"
        return {
            "run": str(self.directory),
            "checkpoint": str(saved) if saved.is_dir() else None,
            "step": trainer.state.step,
            "tokens": trainer.state.tokens,
            "seconds": round(trainer.state.seconds, 2),
            "evaluation": asdict(evaluation) if evaluation else None,
        }

    def _choose(self) -> Path | None:
        if self.resumption is None:
            return None
        allowed, must_advance = self.resumption.allowed, self.resumption.must_advance
        return choose_checkpoint(
            self.directory, self.recipe, allowed, must_advance=must_advance, warn=self.console.warn
        )

    def _open(self, data: RunData, view: TrainingView, checkpoint: Path | None) -> Trainer:
        """A trainer at the checkpoint's step; one that was damaged since it was verified is skipped too."""
        while checkpoint is not None:
            trainer, problem = None, ""
            try:
                trainer = self._load(data, view, checkpoint)
            except (OSError, ValueError) as error:
                problem = str(error)
            if not self.world.sum_numbers(float(trainer is None))[0]:
                assert trainer is not None
                self._accept(trainer)
                return trainer
            before, checkpoint = checkpoint, _on_main(self.world, self._choose)
            if checkpoint in (before, None):
                _on_main(self.world, partial(_refuse, problem))  # once, where all ranks met the same
                raise ArtefactError(problem or f"{before}: could not be read by another process")
            self.console.warn(f"skipped: {before} changed while it was opened: {problem}")
        trainer = self._build(data, view, ())
        self._accept(trainer)
        return trainer

    def _build(self, data: RunData, view: TrainingView, provenance: tuple[dict[str, Any], ...]) -> Trainer:
        model = build_model(self.recipe, data.tokenizer, self.world)
        run = RunFiles(self.directory, self.recipe, data.tokenizer, data.directory, provenance)
        return Trainer(self.recipe, model, data.train, data.validation, run, self.world, view)

    def _load(self, data: RunData, view: TrainingView, checkpoint: Path) -> Trainer:
        """ArtefactError when the data is not that of the checkpoint."""
        provenance = _on_main(self.world, lambda: tuple(read_config(checkpoint).provenance))
        trainer = self._build(data, view, provenance)
        trainer.resume(checkpoint)
        before = trainer.state.data_fingerprint
        if before != data.train.fingerprint:
            raise ArtefactError(
                f"{checkpoint}: was trained on data with fingerprint {before[:12]}, this is "
                f"{data.train.fingerprint[:12]}; put back the data set, or start a new run"
            )
        return trainer

    def _accept(self, trainer: Trainer) -> None:
        """Write what a new session changes in the run; not earlier, since a resume that is refused changes nothing."""

        def write() -> None:
            finished = trainer.state.step == trainer.settings.num_steps
            # First, because it refuses a file that is none.
            cut_metrics(trainer.run.path, trainer.state.step, keep_evaluation=not finished, note=self.console.warn)
            trainer.run.create()
            cut_records(trainer.run.path, trainer.state.step)

        _on_main(self.world, write)


def _show(console: Console, recipe: Recipe, data: RunData, trainer: Trainer, directory: Path, world: World) -> None:
    """The plan, with an ETA from a timed pass over the first batch."""
    left = recipe.training.num_steps - trainer.state.step
    seconds = trainer.time_step() if left else 0.0
    plan = plan_recipe(
        recipe,
        vocab_size=data.tokenizer.vocab_size,
        num_windows=trainer.loader.num_windows,
        world_size=world.size,
    )
    threads = f", OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}" if "OMP_NUM_THREADS" in os.environ else ""
    backend = plans_backend(recipe, world.device)
    facts = {
        "data": f"{data.directory}: {data.train.num_tokens:,} tokens, vocabulary {data.tokenizer.vocab_size:,}",
        "processes": f"{world.size} on {world.device.type}{threads}",
        "run": str(directory) if not trainer.state.step else f"{directory}, from step {trainer.state.step:,}",
        "eta": f"{left * seconds / 60:.1f} minutes at {seconds:.3f} s a step, evaluations not counted",
    }
    if backend:
        facts["integrator"] = backend
    if operations := describe_operations(recipe, world.device):
        facts["operations"] = operations
    show_plan(console, plan, trainer.optimizers.assignments, facts)
    free = shutil.disk_usage(directory).free
    if free < plan.disk_bytes:
        console.warn(
            f"{directory}: the plan keeps up to {amount(plan.disk_bytes, 'B')} of checkpoints, {amount(free, 'B')} are "
            "free; lower training.checkpoint.keep_last or keep_every, or make room"
        )
