"""From a recipe to the objects of a run: data, tokenizer, model, trainer.

data = open_data(recipe, world)
model = build_model(recipe, data.tokenizer, world)
trainer = Trainer(recipe, model, data.train, data.validation, run, world, observer)
trainer.fit()
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inl_core.corpus.loader import TokenDataset
from inl_core.corpus.manifest import WORK, Manifest, settings_from
from inl_core.corpus.preparation import default_directory, prepare, verify
from inl_core.corpus.shard_check import believe, found_whole
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import ArtefactError, InlError
from inl_core.inference.data_location import find_data_of_run
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import DataSettings, Recipe
from inl_core.recipe.load import load_recipe
from inl_core.training.distributed import World


@dataclass(frozen=True)
class RunData:
    """A prepared data set, opened."""

    directory: Path
    manifest: Manifest
    tokenizer: Tokenizer
    train: TokenDataset
    validation: TokenDataset


def data_directory(recipe: Recipe) -> Path:
    """Where the recipe's prepared data is, or will be."""
    return recipe.data.directory or default_directory(recipe.data)


def open_data(
    recipe: Recipe,
    world: World,
    prepare: Callable[[DataSettings, Path], Manifest] = prepare,
    *,
    run: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> RunData:
    """Prepare what is missing (rank 0 does, by `prepare`), refuse what is stale or damaged, and open both splits.

    `run` is the run that is resumed: its data is found wherever it lies, since the recipe's relative paths are from
    the directory that it was started in. `note` hears when much is to be read.
    """
    found: Any = None
    if world.is_main:
        # A failure must reach every rank, or the others would wait for ever.
        try:
            directory = _ensure(recipe, prepare, run, note)
            found = directory, found_whole(directory)
        except Exception as error:
            found = error
    found = world.broadcast(found)
    if isinstance(found, Exception):
        raise found
    directory, whole = found
    believe(directory, whole)  # or each rank would read every shard again where nothing can be remembered
    manifest = verify(directory, note=note)
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    wanted = recipe.model.vocab_size
    if wanted and wanted != tokenizer.vocab_size:
        raise ArtefactError(
            f"model.vocab_size is {wanted}, but {directory / 'tokenizer.json'} has {tokenizer.vocab_size} tokens; "
            "leave model.vocab_size out, or prepare data with that vocabulary"
        )
    mask = recipe.data.document_mask
    train = TokenDataset.open(directory, "train", document_mask=mask)
    return RunData(
        directory, manifest, tokenizer, train, TokenDataset.open(directory, "validation", document_mask=mask)
    )


def _ensure(
    recipe: Recipe,
    prepare: Callable[[DataSettings, Path], Manifest],
    run: Path | None,
    note: Callable[[str], None],
) -> Path:
    directory = data_directory(recipe)
    of_run = find_data_of_run(run, directory) if run is not None else None
    if of_run is not None and _is_unchanged(recipe, run):
        # What no checkpoint saw must be what the recipe describes, read where the run was started.
        settings = settings_from(recipe.data, of_run.base) if of_run.base else None
        verify(of_run.directory, settings=settings, note=note)
        return of_run.directory
    is_cleared = not (directory / WORK).exists() or not os.access(directory, os.W_OK)
    if (directory / "manifest.json").is_file() and is_cleared:  # else a preparation was killed at its very end
        verify(directory, settings=recipe.data, note=note)
    else:
        prepare(recipe.data, directory)
    return directory


def _is_unchanged(recipe: Recipe, run: Path | None) -> bool:
    """Whether the data is described as in the run's own recipe; where it lies does not matter."""
    assert run is not None
    try:
        own = load_recipe(run / "recipe.yaml", allow_pipe=False).data
    except InlError:
        return True  # damaged: the checkpoint's recipe is gone on with
    return own.model_copy(update={"directory": recipe.data.directory}) == recipe.data


def build_model(recipe: Recipe, tokenizer: Tokenizer, world: World) -> IntegratorLanguageModel:
    """The recipe's model on the device, with its starting weights; no memory is touched before `to_empty`."""
    with torch.device("meta"):
        model = IntegratorLanguageModel(recipe.model.with_vocab_size(tokenizer.vocab_size))
    model.to_empty(device=world.device)
    model.initialise(recipe.training.seed)
    return model
