"""What a resume starts from: the run's recipe, and the newest checkpoint that is intact and belongs to it.

Nothing is written here, so a resume that is refused leaves the run as it was.
"""

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from inl_core.errors import ArtefactError, InlError, RecipeError
from inl_core.inference.checkpoint_files import CONFIG, WEIGHTS, checkpoint_step, is_checkpoint, list_checkpoints
from inl_core.recipe import Recipe
from inl_core.recipe.differences import Difference, recipe_differences
from inl_core.recipe.load import load_recipe, problem_with_path
from inl_core.training.checkpoint import START_ANEW, newest_valid
from inl_core.training.metrics import read_metrics
from inl_core.training.run import is_taken

Say = Callable[[str], None]


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
    if fixed := [change.path for change in changes if change.is_fixed]:
        raise RecipeError(
            f"{run}: {', '.join(fixed)} cannot change in a run, whose weights, optimizer and data would not fit any "
            "more; `inl train` starts a new run"
        )
    if refused := _refused(changes, allowed):
        names = ", ".join(change.path for change in refused)
        raise RecipeError(f"{run}: {names} would make this another experiment; if it is meant: {_flags(refused)}")
    return new


def check_is_run_directory(path: Path) -> None:
    """Refuse a path that can never be a run's: a file, or a checkpoint, into which nothing may be written.

    Raises:
        RecipeError: it is a file.
        ArtefactError: it is a checkpoint.
    """
    if path.exists() and not path.is_dir():
        raise RecipeError(
            f"{path}: a file, not a run's directory; `inl train RECIPE` starts a run, `inl resume RUN` continues one"
        )
    real = path.resolve()
    has_files = any(os.path.lexists(real / name) for name in (CONFIG, WEIGHTS))
    if has_files or (is_checkpoint(real) and real.parent.name == "checkpoints"):
        run = Path(os.path.normpath(path / "../.."))
        advice = f"`inl resume {run}` continues its run" if (run / "recipe.yaml").is_file() else "name a run instead"
        raise ArtefactError(f"{path}: is a checkpoint; {advice}")


def choose_checkpoint(
    run: Path, recipe: Recipe, allowed: Collection[str], *, warn: Say, must_advance: bool = False
) -> Path | None:
    """The newest intact checkpoint, verified; None when the run stopped before it could save one.

    Args:
        must_advance: whether a run that has reached the recipe's last step already is refused too.

    Raises:
        ArtefactError: no checkpoint is intact, all are gone, or the newest was trained with another recipe.
        RecipeError: the run is beyond the recipe's last step.
    """
    parent = run / "checkpoints"
    if not list_checkpoints(parent):
        _check_none_was_saved(run, recipe)
        warn(f"{run}: it stopped before its first checkpoint; starting again from step 0")
        return None
    checkpoint = newest_valid(parent, lambda text: warn(f"skipped: {text}"))
    step, last = checkpoint_step(checkpoint), recipe.training.num_steps
    if last < step or (must_advance and last == step):
        raise RecipeError(f"{run}: has done {step:,} steps already, so {last:,} adds none; give more than {step:,}")
    _check_recipe(run, checkpoint, recipe, allowed, warn)
    return checkpoint


def _recipe_file(run: Path, warn: Say) -> Path:
    """recipe.yaml of the run, or of its newest intact checkpoint where that is damaged."""
    path = run / "recipe.yaml"
    if os.path.lexists(path) and not path.is_file():
        raise ArtefactError(
            f"{path}: not a regular file; put the recipe back, or remove what is there, and a checkpoint's copy is used"
        )
    try:
        if not path.is_file():
            advice = START_ANEW if is_taken(run) else "`inl train RECIPE` starts one"
            raise ArtefactError(f"{run}: not a run (it has no recipe.yaml); {advice}")
        load_recipe(path, allow_pipe=False)
    except InlError as error:
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
    """ArtefactError when the metrics go beyond a step at which a checkpoint was saved: that one was lost since."""
    every = recipe.training.checkpoint.every
    last = max((row["step"] for row in read_metrics(run)), default=0)
    if last > (every or recipe.training.num_steps - 1):
        raise ArtefactError(
            f"{run / 'checkpoints'}: holds no checkpoint, though the run went on to step {last:,}; put them back, or "
            f"{START_ANEW}"
        )


def _check_recipe(run: Path, checkpoint: Path, recipe: Recipe, allowed: Collection[str], warn: Say) -> None:
    """ArtefactError when the checkpoint was trained with another recipe: another run's, say."""
    try:
        trained = load_recipe(checkpoint / "recipe.yaml", allow_pipe=False)
    except InlError as error:
        warn(f"{str(error).splitlines()[0]}; so it is not known whether {checkpoint} belongs to this run")
        return
    changes = recipe_differences(trained, recipe)
    if other := [change for change in changes if change.is_fixed] + _refused(changes, allowed):
        keys = ", ".join(f"{change.path} ({change.old}, not {change.new})" for change in other)
        leave = "" if any(change.is_fixed for change in other) else f", or if it is meant: {_flags(other)}"
        raise ArtefactError(
            f"{checkpoint}: was trained with another recipe than {run / 'recipe.yaml'}: {keys}; put back the run's own "
            f"checkpoint or recipe{leave}"
        )


def _refused(changes: Sequence[Difference], allowed: Collection[str]) -> list[Difference]:
    """The changes that --allow-change would permit and does not; changes that nothing permits are not among them."""
    return [c for c in changes if c.kind == "identity" and not c.is_fixed and c.path not in allowed]


def _sets_another_preset(override: str, preset: str) -> bool:
    """Whether an override names another generation, with whose rules the run's own keys would be refused one by one."""
    key, _, value = override.partition("=")
    return key.strip() == "model.preset" and value.strip(" '\"") != preset


def _flags(changes: Sequence[Difference]) -> str:
    return " ".join(f"--allow-change {change.path}" for change in changes)
