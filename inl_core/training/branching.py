"""A run that branches off another one: it begins with a checkpoint of that run, and has a recipe and data of its own.

- It goes on counting where the checkpoint is: steps, samples and tokens, and with them the schedule and the order of
  the data. Where its recipe says nothing else up to there, it is bit for bit the run that had this recipe from the
  start.
- Its first act is to save the checkpoint under its own name. From then on it is a run like any other, and is resumed
  without the run that it came from.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import ArtefactError, RecipeError
from inl_core.files import expand_home
from inl_core.inference.checkpoint_files import (
    MANIFEST,
    TOKENIZER,
    file_digest,
    is_checkpoint,
    list_checkpoints,
    read_config,
    read_manifest,
    verify_checkpoint,
)
from inl_core.recipe import Recipe
from inl_core.recipe.differences import Difference, recipe_differences
from inl_core.recipe.load import load_recipe
from inl_core.training.checkpoint import newest_valid
from inl_core.training.run_data import RunData

Say = Callable[[str], None]


def choose_origin(path: str | Path, recipe: Recipe, *, tell: Say, warn: Say) -> Path:
    """The checkpoint that a branch begins with, verified.

    Args:
        path: a checkpoint, or a run, of which it is the newest intact checkpoint.
        recipe: the branch's own.
        tell: hears how `recipe` differs from the one that the checkpoint was trained with.
        warn: hears which checkpoints of a run were passed over.

    Raises:
        ArtefactError: there is no intact checkpoint, or it holds no state of an optimizer.
        RecipeError: weights or optimizer would not fit the recipe, its last step is not after the checkpoint's, or it
            names other weights to begin with.
    """
    given = expand_home(path)
    if recipe.model.init_from is not None:
        raise RecipeError(
            f"model.init_from {recipe.model.init_from}: a branch begins with {given} and with no other "
            "weights; give --set model.init_from=null"
        )
    if not is_checkpoint(given) and not list_checkpoints(given / "checkpoints"):
        raise ArtefactError(f"{given}: no checkpoint to branch from; name one, or a run that has saved one")
    if not is_checkpoint(given):
        checkpoint = newest_valid(given / "checkpoints", lambda text: warn(f"skipped: {text}"))
    else:
        verify_checkpoint(given, purpose="resume")
        checkpoint = given
    changes = recipe_differences(load_recipe(checkpoint / "recipe.yaml", allow_pipe=False), recipe)
    refuse_misfits(f"{checkpoint}: its weights or its optimizer do not", changes)
    step, last = read_manifest(checkpoint).step, recipe.training.num_steps
    if last <= step:
        raise RecipeError(
            f"{checkpoint}: has done {step:,} steps, from which a branch goes on counting, so training.steps {last:,} "
            f"adds none; give more than {step:,}"
        )
    for change in changes:
        tell(f"{change.kind}: {change}")
    return checkpoint


def refuse_misfits(problem: str, changes: Sequence[Difference]) -> None:
    """RecipeError when weights, or what an optimizer knows of them, cannot be used after one of the changes."""
    if misfits := [f"{change.path} ({change.old}, not {change.new})" for change in changes if _is_misfit(change)]:
        raise RecipeError(f"{problem} fit the recipe: {', '.join(misfits)}")


def check_tokenizer(origin: Path, data: RunData) -> None:
    """ArtefactError when the run's data is made of other tokens than those that the weights in `origin` know."""
    if not Tokenizer.load(origin / TOKENIZER).encodes_like(data.tokenizer):
        raise ArtefactError(
            f"{data.directory}: was prepared with another tokenizer than {origin} was trained with, so its tokens "
            f"mean something else; set data.tokenizer.file to {origin / TOKENIZER} and prepare it anew"
        )


def branch_provenance(checkpoint: Path) -> tuple[dict[str, Any], ...]:
    """What happened to the weights before the branch, oldest first, and where it branched off."""
    branched = {
        "event": "branch",
        "checkpoint": os.path.realpath(checkpoint),
        "step": read_manifest(checkpoint).step,
        "manifest_sha256": file_digest(checkpoint / MANIFEST),
    }
    return (*read_config(checkpoint).provenance, branched)


def _is_misfit(change: Difference) -> bool:
    """Whether weights or optimizer cannot be used after a change. The vocabulary is compared with the data's."""
    return change.is_fixed and not change.path.startswith("data.") and change.path != "model.vocab_size"
