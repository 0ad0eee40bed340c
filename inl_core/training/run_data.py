"""The prepared data of a run: where it is, whether it is what the recipe describes, and its tokenizer and splits."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from inl_core.corpus.dataset import TokenDataset
from inl_core.corpus.manifest import WORK, Manifest, default_directory, settings_from, verify
from inl_core.corpus.preparation import prepare
from inl_core.corpus.reading.paths import shown
from inl_core.corpus.shard_check import believe, found_whole
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import ArtefactError, InlError
from inl_core.inference.data_location import find_data_of_run
from inl_core.recipe import DataSettings, Recipe
from inl_core.recipe.load import load_recipe
from inl_core.training.distributed import World

Prepare = Callable[[DataSettings, Path], Manifest]
Note = Callable[[str], None]


def prepare_or_wait(settings: DataSettings, directory: Path) -> Manifest:
    """Prepare the data set; where another process is preparing the same one, wait for it."""
    return prepare(settings, directory, wait=True)


@dataclass(frozen=True)
class RunData:
    """A prepared data set, opened."""

    directory: Path
    tokenizer: Tokenizer
    train: TokenDataset
    validation: TokenDataset

    @classmethod
    def load(cls, directory: Path, recipe: Recipe) -> Self:
        """Open a verified data set; ArtefactError when the recipe wants another size of vocabulary."""
        tokenizer = Tokenizer.load(directory / "tokenizer.json")
        wanted = recipe.model.vocab_size
        if wanted and wanted != tokenizer.vocab_size:
            raise ArtefactError(
                f"model.vocab_size is {wanted}, but {directory / 'tokenizer.json'} has {tokenizer.vocab_size} tokens; "
                "leave model.vocab_size out, or prepare data with that vocabulary"
            )
        how: dict[str, Any] = recipe.data.model_dump(include={"document_mask", "loss_on"})
        splits = (TokenDataset.open(directory, split, **how) for split in ("train", "validation"))
        return cls(directory, tokenizer, *splits)


def data_directory(recipe: Recipe) -> Path:
    """Where the recipe's prepared data is, or will be."""
    return recipe.data.directory or default_directory(recipe.data)


def open_data(
    recipe: Recipe,
    world: World,
    prepare: Prepare = prepare_or_wait,
    *,
    run: Path | None = None,
    note: Note = lambda text: None,
) -> RunData:
    """The recipe's data, which rank 0 prepares if it is not there.

    Args:
        prepare: prepares the data set of some settings in a directory.
        run: the run that is resumed. Its data is found wherever it lies now, because the recipe's relative paths start
            at the directory that the run was started in.
        note: hears when much has to be read.

    Raises:
        ArtefactError: the data is damaged, or was prepared with other settings.
    """

    directory = world.on_main(lambda: _find_or_prepare(recipe, prepare, run, note))
    # The other ranks take rank 0's word for it: where nothing can be remembered, each would read every shard again.
    believe(directory, world.on_main(lambda: found_whole(directory)))
    verify(directory, settings=recipe.data if recipe.data.is_directory_alone else None, note=note)
    return RunData.load(directory, recipe)


def _find_or_prepare(recipe: Recipe, prepare: Prepare, run: Path | None, note: Note) -> Path:
    directory = data_directory(recipe)
    of_run = find_data_of_run(run, directory) if run is not None else None
    if run is not None and of_run is not None and _describes_same_data(recipe, run):
        # Where no checkpoint tells what the data was, it must be what the recipe describes.
        is_described = of_run.base is not None or recipe.data.is_directory_alone
        settings = settings_from(recipe.data, of_run.base or Path()) if is_described else None
        verify(of_run.directory, settings=settings, note=note)
        return of_run.directory
    # A preparation that was killed at its very end leaves a manifest beside its working files.
    is_finished = not (directory / WORK).exists() or not os.access(directory, os.W_OK)
    if recipe.data.is_directory_alone or ((directory / "manifest.json").is_file() and is_finished):
        manifest = verify(directory, settings=recipe.data, note=note)
        if recipe.data.is_directory_alone:
            made_of = ", ".join(manifest.settings["sources"])
            note(f"{directory}: taken as it was prepared, from {shown(made_of)}, vocabulary {manifest.vocab_size:,}")
    else:
        prepare(recipe.data, directory)
    return directory


def _describes_same_data(recipe: Recipe, run: Path) -> bool:
    """Whether the run's own recipe describes the same data; where the data lies does not matter."""
    try:
        own = load_recipe(run / "recipe.yaml", allow_pipe=False).data
    except InlError:
        return True  # it is damaged, and the run goes on with the recipe of a checkpoint
    return own.model_copy(update={"directory": recipe.data.directory}) == recipe.data
