"""What a resume starts from: the run's recipe, and the newest checkpoint that is intact and belongs to it.

- Nothing is written here, so a resume that is refused leaves the run as it was.
- Torch is imported only where checkpoints are read, so that a mistyped path or key is told at once.
"""

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from inl_core.errors import ArtefactError, InlError, RecipeError
from inl_core.files import expand_home
from inl_core.inference.checkpoint_files import (
    MANIFEST,
    checkpoint_step,
    file_digest,
    is_checkpoint,
    list_checkpoints,
    nearest_run,
    read_config,
)
from inl_core.recipe import Recipe, TrainingSettings
from inl_core.recipe.differences import (
    Difference,
    allow_flags,
    check_changes,
    recipe_differences,
    refused_changes,
)
from inl_core.recipe.load import load_recipe, problem_with_path
from inl_core.training.metrics import stream_metrics
from inl_core.training.run_status import START_ANEW, check_is_run_directory, is_taken
from inl_core.training.schedules import learning_rate_factor

if TYPE_CHECKING:
    from inl_core.training.distributed import World

Say = Callable[[str], None]
_HIGHER_RATE = 1.1
"""A learning rate that is so many times the one before is worth a warning."""


def changed_recipe(
    run: Path, overrides: Sequence[str], allowed: Collection[str], *, show: Callable[[Difference], None], warn: Say
) -> Recipe:
    """The run's recipe with `overrides`; `show` hears of each change.

    Where recipe.yaml is missing or damaged, the newest intact checkpoint's copy is read instead, with a warning.

    Args:
        allowed: keys whose change is accepted although it makes another experiment.

    Raises:
        RecipeError: a change would make this another experiment and is not `allowed`, or no run can change that key;
            or `allowed` names a key that does not exist, or `run` is a file.
        ArtefactError: the directory is not a run.
    """
    check_is_run_directory(run)
    for key in allowed:
        if problem := problem_with_path(tuple(key.split("."))):
            raise RecipeError(f"--allow-change {key}: {problem}")
    path = _recipe_file(run, warn)
    old = load_recipe(path, allow_pipe=False)
    if any(_sets_another_preset(text, old.model.preset) for text in overrides):
        raise RecipeError(
            f"{run}: model.preset cannot change in a run, whose weights are those of a {old.model.preset} model; "
            "`inl train` starts a new run"
        )
    new = load_recipe(path, overrides, allow_pipe=False)
    changes = recipe_differences(old, new)
    for change in changes:
        show(change)
    check_changes(run, changes, allowed)
    return new


def check_given_recipe(
    run: Path, given: Recipe, allowed: Collection[str], *, show: Callable[[Difference], None], warn: Say
) -> bool:
    """Compare the recipe that a command was given with that of the run it goes on with; `show` hears of each change.

    Returns whether there is a run to go on with; False where nothing was started in the directory, or nothing that is
    worth keeping. Before the first checkpoint any change is accepted, since the run begins again.

    Raises:
        RecipeError: a change would make this another experiment and is not `allowed`, or no run can change that key.
    """
    if not is_taken(run):
        return False
    is_saved = bool(list_checkpoints(run / "checkpoints"))
    try:
        changes = recipe_differences(load_recipe(_recipe_file(run, warn), allow_pipe=False), given)
    except InlError as error:
        if is_saved:
            raise
        warn(f"{str(error).splitlines()[0]}; so it is not known whether this run began with another recipe")
        return True
    for change in changes:
        show(change)
    if is_saved:
        check_changes(run, changes, allowed)
    return True


def choose_checkpoint(
    run: Path,
    recipe: Recipe,
    allowed: Collection[str],
    *,
    warn: Say,
    must_advance: bool = False,
    readers: "World | None" = None,
) -> Path | None:
    """The newest intact checkpoint, verified; None when the run stopped before it could save one.

    Args:
        must_advance: whether a run that has reached the recipe's last step already is refused too.
        readers: the processes that share the reading of the files; all call this. By default this one does it alone.

    Raises:
        ArtefactError: no checkpoint is intact, all are gone, or the newest was trained with another recipe.
        RecipeError: the run is beyond the recipe's last step.
    """
    from inl_core.training.checkpoint import newest_valid
    from inl_core.training.distributed import ALONE

    readers = readers or ALONE
    parent = run / "checkpoints"
    if not readers.on_main(lambda: list_checkpoints(parent)):
        readers.on_main(lambda: _check_none_was_saved(run, recipe))
        warn(f"{run}: it stopped before its first checkpoint; starting again from step 0")
        return None
    checkpoint = newest_valid(parent, lambda text: warn(f"skipped: {text}"), readers)
    readers.on_main(lambda: _check_fits(run, checkpoint, recipe, allowed, warn, must_advance))
    return checkpoint


def check_origin(run: Path, checkpoint: Path, branch_from: str | Path, *, warn: Say) -> None:
    """Refuse to go on with a run that did not begin with the checkpoint, or the run, that `branch_from` names.

    Args:
        checkpoint: the one that the run goes on from, which knows where it branched off.
        warn: hears that the run began there, but that what it began with is gone.

    Raises:
        RecipeError: the run is no branch, or one of another checkpoint.
    """
    events = [event for event in read_config(checkpoint).provenance if event.get("event") != "train"]
    if not events or events[-1].get("event") != "branch":
        raise RecipeError(f"{run}: is no branch, so it does not go on from {branch_from}; leave out --branch-from")
    given, origin = expand_home(branch_from), Path(str(events[-1]["checkpoint"]))
    files = [path / MANIFEST for path in ([given] if is_checkpoint(given) else list_checkpoints(given / "checkpoints"))]
    if events[-1]["manifest_sha256"] in [file_digest(file) for file in files if file.is_file()]:
        return
    if os.path.lexists(origin) or Path(os.path.realpath(given)) not in (origin, origin.parent.parent):
        raise RecipeError(
            f"{run}: branched from {origin}, which {given} does not hold; leave out --branch-from, or start a new run"
        )
    warn(f"{origin}: is gone, from which {run} branched off; the run goes on without it")


def _check_fits(
    run: Path, checkpoint: Path, recipe: Recipe, allowed: Collection[str], warn: Say, must_advance: bool
) -> None:
    """Refuse a checkpoint that is beyond the recipe's last step, or was trained with another recipe."""
    step, last = checkpoint_step(checkpoint), recipe.training.num_steps
    if last < step or (must_advance and last == step):
        raise RecipeError(f"{run}: has done {step:,} steps already, so {last:,} adds none; give more than {step:,}")
    _check_recipe(run, checkpoint, recipe, allowed, warn)


def _recipe_file(run: Path, warn: Say) -> Path:
    """recipe.yaml of the run, or of its newest intact checkpoint where that is damaged."""
    path = run / "recipe.yaml"
    if os.path.lexists(path) and not path.is_file():
        raise ArtefactError(
            f"{path}: not a regular file; put the recipe back, or remove what is there, and a checkpoint's copy is used"
        )
    try:
        if not path.is_file():
            advice = START_ANEW if is_taken(run) else f"`inl train RECIPE` starts one{nearest_run(run)}"
            raise ArtefactError(f"{run}: not a run (it has no recipe.yaml); {advice}")
        load_recipe(path, allow_pipe=False)
    except InlError as error:
        if not list_checkpoints(run / "checkpoints"):
            raise
        from inl_core.training.checkpoint import newest_valid

        try:
            copy = newest_valid(run / "checkpoints", lambda text: None) / "recipe.yaml"
            load_recipe(copy, allow_pipe=False)
        except InlError:
            raise error from None
        reason = str(error).splitlines()[0] if path.is_file() else f"{path}: missing"
        warn(f"{reason}; the recipe is read from {copy} instead")
        return copy
    return path


def _check_none_was_saved(run: Path, recipe: Recipe) -> None:
    """ArtefactError when the metrics show that a checkpoint was saved, or the run at its end: that one was lost since.

    A checkpoint is written while the run goes on, and is whole at the latest when the next one is due.
    """
    with suppress(InlError):  # what was due in the run, even if this session's recipe says otherwise
        recipe = load_recipe(run / "recipe.yaml", allow_pipe=False)
    every, end = recipe.training.checkpoint.every, recipe.training.num_steps
    # The checkpoint of a step comes after its row, and before its evaluation when it is the last step.
    last = max(
        (row["step"] + (row["step"] == end and "validation_loss" in row) for row in stream_metrics(run)), default=0
    )
    if last > min(2 * every or end, end):
        raise ArtefactError(
            f"{run / 'checkpoints'}: holds no checkpoint, though the run went on to step {min(last, end):,}; put them "
            f"back, remove {run / 'metrics.jsonl'} to train from step 0 again, or {START_ANEW}"
        )


def _check_recipe(run: Path, checkpoint: Path, recipe: Recipe, allowed: Collection[str], warn: Say) -> None:
    """ArtefactError when the checkpoint was trained with another recipe: another run's, say."""
    try:
        trained = load_recipe(checkpoint / "recipe.yaml", allow_pipe=False)
    except InlError as error:
        warn(f"{str(error).splitlines()[0]}; so it is not known whether {checkpoint} belongs to this run")
        return
    _warn_of_higher_rate(run, checkpoint_step(checkpoint), trained.training, recipe.training, warn)
    changes = recipe_differences(trained, recipe)
    if other := [change for change in changes if change.is_fixed] + refused_changes(changes, allowed):
        keys = ", ".join(f"{change.path} ({change.old}, not {change.new})" for change in other)
        leave = "" if any(change.is_fixed for change in other) else f", or if it is meant: {allow_flags(other)}"
        raise ArtefactError(
            f"{checkpoint}: was trained with another recipe than {run / 'recipe.yaml'}: {keys}; put back the run's own "
            f"checkpoint or recipe{leave}"
        )


def _warn_of_higher_rate(run: Path, step: int, old: TrainingSettings, new: TrainingSettings, warn: Say) -> None:
    """Say that the learning rate rises again: a schedule that has decayed is stretched by more steps."""
    before, now = (
        settings.optimizer.learning_rate * learning_rate_factor(settings.schedule, at, settings.num_steps)
        for settings, at in ((old, min(step, old.num_steps - 1)), (new, step))
    )
    if step < new.num_steps and now > _HIGHER_RATE * before:
        longer = f", since the schedule ends at step {new.num_steps:,} and no longer at {old.num_steps:,}"
        why = longer if new.num_steps != old.num_steps else ""
        warn(
            f"{run}: the learning rate, {before:.2e} at step {step:,}, now rises to {now:.2e}{why}; the loss may rise "
            "for a while. training.optimizer.learning_rate sets the peak of the schedule"
        )


def _sets_another_preset(override: str, preset: str) -> bool:
    """Whether an override names another generation, with whose rules the run's own keys would be refused one by one."""
    key, _, value = override.partition("=")
    return key.strip() == "model.preset" and value.strip(" '\"") != preset
