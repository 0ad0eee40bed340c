"""The flow of a run, for `inl train` and `inl resume` alike; run by every process of a distributed run."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inl_cli.commands.data import prepare_with_progress
from inl_cli.console import Console
from inl_cli.memory import explains_memory
from inl_cli.progress import amount
from inl_cli.training_view import TrainingView, show_plan
from inl_core.analysis.planning import plan_recipe
from inl_core.analysis.planning.plan import describe_operations, plans_backend
from inl_core.corpus.loader import TokenDataset
from inl_core.errors import ArtefactError, RecipeError
from inl_core.inference.checkpoint_files import read_config
from inl_core.model.native.build import is_to_be_compiled
from inl_core.recipe import Recipe
from inl_core.recipe.differences import recipe_differences
from inl_core.recipe.load import load_recipe
from inl_core.training.checkpoint import newest_valid
from inl_core.training.distributed import World, start_world
from inl_core.training.dynamics import cut_records
from inl_core.training.launch import RunData, build_model, open_data
from inl_core.training.metrics import cut_metrics
from inl_core.training.mirrors import check_mirrors
from inl_core.training.run import RunFiles, is_taken, new_run_directory
from inl_core.training.trainer import Trainer


@explains_memory
def run_training(console: Console, recipe: Recipe, *, run_dir: Path | None, resume: bool = False) -> dict[str, Any]:
    """Prepare, plan, train, evaluate; the outcome as a JSON-able dictionary."""
    with start_world(recipe.training.device) as world:
        _check_batch(recipe, world)
        check_mirrors(recipe)
        data = open_data(recipe, world, lambda settings, path: prepare_with_progress(settings, path, console))
        if world.is_main and world.device.type == "cpu" and is_to_be_compiled():
            console.info("compiling the operations in C++ for this machine: some seconds, once")
        model = build_model(recipe, data.tokenizer, world)
        directory, checkpoint = _choose_run(console, recipe, run_dir, resume, world)
        provenance = tuple(read_config(checkpoint).provenance) if checkpoint else ()
        run = RunFiles(directory, recipe, data.tokenizer, data.directory, provenance)
        if world.is_main and not checkpoint:
            run.create()
        world.barrier()
        view = TrainingView(console, num_steps=recipe.training.num_steps)
        trainer = Trainer(recipe, model, data.train, data.validation, run, world, view)
        if checkpoint:
            _continue(trainer, checkpoint, data.train, world)
            view.first_step = trainer.state.step
        _show(console, recipe, data, trainer, directory, world)
        with view:
            evaluation = trainer.fit()
    saved = run.checkpoints / f"step-{trainer.state.step:08d}"
    return {
        "run": str(directory),
        "checkpoint": str(saved) if saved.is_dir() else None,
        "step": trainer.state.step,
        "tokens": trainer.state.tokens,
        "seconds": round(trainer.state.seconds, 2),
        "evaluation": asdict(evaluation) if evaluation else None,
    }


def changed_recipe(console: Console, run: Path, overrides: Sequence[str], allowed: Sequence[str]) -> Recipe:
    """The run's recipe with `overrides`; changes are listed by class, those that alter the experiment need leave."""
    if not (run / "recipe.yaml").is_file():
        raise ArtefactError(f"{run}: not a run (it has no recipe.yaml); `inl train RECIPE` starts one")
    old, new = load_recipe(run / "recipe.yaml"), load_recipe(run / "recipe.yaml", overrides)
    refused = []
    for change in recipe_differences(old, new):
        console.info(f"{change.kind}: {change.path} {change.old} -> {change.new}")
        if change.kind == "identity" and change.path not in allowed:
            refused.append(change.path)
    if refused:
        flags = " ".join(f"--allow-change {path}" for path in refused)
        raise RecipeError(f"{run}: {', '.join(refused)} would make this another experiment; if it is meant: {flags}")
    return new


def _check_batch(recipe: Recipe, world: World) -> None:
    try:
        recipe.training.micro_batch(world.size)
    except ValueError as error:
        raise RecipeError(f"training.batch_tokens: {error}") from error


def _choose_run(
    console: Console, recipe: Recipe, run_dir: Path | None, resume: bool, world: World
) -> tuple[Path, Path | None]:
    """The run's directory and, when resuming, the checkpoint to start from; the same on every rank."""
    chosen: Any = None
    if world.is_main:
        try:
            chosen = _choose(console, recipe, run_dir, resume)
        except ArtefactError as error:
            chosen = error
    chosen = world.broadcast(chosen)
    if isinstance(chosen, ArtefactError):
        raise chosen
    return chosen


def _choose(console: Console, recipe: Recipe, run_dir: Path | None, resume: bool) -> tuple[Path, Path | None]:
    if resume:
        assert run_dir is not None
        return run_dir, newest_valid(run_dir / "checkpoints", lambda text: console.warn(f"skipped: {text}"))
    if run_dir is None:
        return new_run_directory(Path("runs") / recipe.name), None
    if is_taken(run_dir):
        raise ArtefactError(f"{run_dir}: not empty; `inl resume {run_dir}` continues it, another --run-dir starts anew")
    return run_dir, None


def _continue(trainer: Trainer, checkpoint: Path, train: TokenDataset, world: World) -> None:
    """Load the checkpoint, check that the data is the same, and cut what was logged after it."""
    trainer.resume(checkpoint)
    before = trainer.state.data_fingerprint
    if before != train.fingerprint:
        raise ArtefactError(
            f"{checkpoint}: was trained on data with fingerprint {before[:12]}, this is {train.fingerprint[:12]}; "
            "put back the data set, or start a new run"
        )
    if world.is_main:
        trainer.run.create()  # not earlier: a resume that is refused changes nothing
        finished = trainer.state.step == trainer.settings.num_steps
        cut_metrics(trainer.run.path, trainer.state.step, keep_evaluation=not finished)
        cut_records(trainer.run.path, trainer.state.step)
    world.barrier()


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
