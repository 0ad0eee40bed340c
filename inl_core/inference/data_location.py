"""Where the data set is that a run was trained on, also from another directory or after the project was moved."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from inl_core.corpus.manifest import MANIFEST, load_manifest
from inl_core.corpus.reading.paths import local_path, portable, shown
from inl_core.errors import ArtefactError, RecipeError
from inl_core.inference.checkpoint_files import list_checkpoints, read_config


def record_location(directory: Path, run: Path) -> dict[str, str]:
    """What a checkpoint's config.json says about the data: its absolute path, and its path from the run's directory."""
    absolute = os.path.realpath(directory)
    return {
        "data_directory": portable(absolute),
        "data_directory_from_run": portable(os.path.relpath(absolute, os.path.realpath(run))),
    }


def find_data(checkpoint: Path, config: dict[str, Any], *, first: Path | None = None) -> Path:
    """The directory of the data set that a checkpoint was trained on.

    Several places may hold a data set. The first with the content that the checkpoint was trained on is taken, or the
    first of all where none has it.

    Args:
        config: the checkpoint's config.json.
        first: a place to look at before those that the config names.

    Raises:
        ArtefactError: no place holds a data set; it names them all.
    """
    places = list(dict.fromkeys(_places(checkpoint, config, first)))
    # Unlike Path.exists, lexists raises nothing, whatever name config.json holds.
    found = [place for place in places if os.path.lexists(place / MANIFEST)]
    if not places:
        raise ArtefactError(f"{checkpoint}: does not name its data; name a data set (--data) or a text file (--text)")
    if not found:
        tried = ", ".join(shown(place) for place in places)
        raise ArtefactError(
            f"{tried}: the data the model was trained on is not here; name a data set (--data) or a text file (--text)"
        )
    seen = {event.get("data") for event in config.get("provenance", [])}
    return next((place for place in found if _fingerprint(place) in seen), found[0])


class DataOfRun(NamedTuple):
    """The data set of a run."""

    directory: Path
    base: Path | None
    """Where a checkpoint confirms that it was trained on this content: None. Otherwise the directory from which the
    recipe's relative path leads to the data set, which is the only evidence."""


def find_data_of_run(run: Path, first: Path) -> DataOfRun | None:
    """The data set that the newest readable checkpoint of a run was trained on, wherever it lies now.

    Args:
        first: the directory that the run's recipe names.

    Returns:
        None where it was not found, and where `first` can be used because the run has no checkpoint yet.
    """
    for checkpoint in reversed(list_checkpoints(run / "checkpoints")):
        try:
            config = read_config(checkpoint).model_dump()
            place = find_data(checkpoint, config, first=first)
        except ArtefactError:
            continue
        seen = {event.get("data") for event in config["provenance"]}
        return DataOfRun(place, None) if _fingerprint(place) in seen else None
    if os.path.lexists(first / MANIFEST):
        return None
    # The run was probably started in a directory above its own, and the recipe's relative path begins there.
    above = Path(os.path.realpath(run)).parents
    return next((DataOfRun(base / first, base) for base in above if os.path.lexists(base / first / MANIFEST)), None)


def _places(checkpoint: Path, config: dict[str, Any], first: Path | None) -> Iterator[Path]:
    if first is not None:
        yield first
    real = Path(os.path.realpath(checkpoint))
    run = real.parent.parent if real.parent.name == "checkpoints" else real
    for name, bases in (("data_directory", [Path(), *run.parents]), ("data_directory_from_run", [run])):
        if config.get(name) is None:
            continue
        try:
            recorded = local_path(config[name])
        except RecipeError:
            continue
        # A relative path begins where training was started: here, or in a directory above the run's.
        for base in [Path()] if recorded.is_absolute() else bases:
            yield Path(os.path.normpath(base / recorded))


def _fingerprint(place: Path) -> str | None:
    try:
        return load_manifest(place).fingerprint
    except ArtefactError:
        return None
