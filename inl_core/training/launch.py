"""From a recipe to the objects of a run: data, tokenizer, model, trainer.

data = open_data(recipe, world)
model = build_model(recipe, data.tokenizer, world)
trainer = Trainer(recipe, model, data.train, data.validation, run, world, observer)
trainer.fit()
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from inl_core.corpus.loader import TokenDataset
from inl_core.corpus.manifest import Manifest
from inl_core.corpus.shards import default_directory, prepare, verify
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import ArtefactError
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import DataSettings, Recipe
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


def open_data(recipe: Recipe, world: World, prepare: Callable[[DataSettings, Path], Manifest] = prepare) -> RunData:
    """Prepare what is missing (rank 0 does, by `prepare`), refuse what is stale or damaged, and open both splits."""
    directory, failure = data_directory(recipe), None
    if world.is_main:
        # A failure must reach every rank, or the others would wait for ever.
        try:
            _ensure(recipe, directory, prepare)
        except Exception as error:
            failure = error
    failure = world.broadcast(failure)
    if failure is not None:
        raise failure
    manifest = verify(directory)
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


def _ensure(recipe: Recipe, directory: Path, prepare: Callable[[DataSettings, Path], Manifest]) -> None:
    if (directory / "manifest.json").is_file():
        verify(directory, settings=recipe.data)
    else:
        prepare(recipe.data, directory)


def build_model(recipe: Recipe, tokenizer: Tokenizer, world: World) -> IntegratorLanguageModel:
    """The recipe's model on the device, with its starting weights; no memory is touched before `to_empty`."""
    with torch.device("meta"):
        model = IntegratorLanguageModel(recipe.model.with_vocab_size(tokenizer.vocab_size))
    model.to_empty(device=world.device)
    model.initialise(recipe.training.seed)
    return model
