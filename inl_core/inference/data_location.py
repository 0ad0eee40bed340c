"""Where the data set is that a run was trained on, also from another directory or after the project was moved."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from inl_core.corpus.manifest import MANIFEST, load_manifest
from inl_core.corpus.paths import local_path, portable, shown
from inl_core.errors import ArtefactError, RecipeError
from inl_core.inference.checkpoint_files import list_checkpoints, read_config


def record_location(directory: Path, run: Path) -> dict[str, str]:
    """What a checkpoint's config.json says of the data: its absolute path, and its path from the run's directory."""
    absolute = os.path.realpath(directory)
    return {
        "data_directory": portable(absolute),
        "data_directory_from_run": portable(os.path.relpath(absolute, os.path.realpath(run))),
    }


def find_data(checkpoint: Path, config: dict[str, Any], *, first: Path | None = None) -> Path:
    """The data set that a checkpoint was trained on; `first` is tried before the places that its config names.

    Of several places that hold a data set, the first with the content that the checkpoint saw, else the first.

    Raises:
        ArtefactError: none of them does; it names them all.
    """
    places = list(dict.fromkeys(_places(checkpoint, config, first)))
    # lexists raises nothing, whatever name config.json holds.
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
    """The directory that the recipe's relative path leads there from, which is all that is known of a run without
    checkpoints; None where a checkpoint saw this content."""


def find_data_of_run(run: Path, first: Path) -> DataOfRun | None:
    """The data set of a run, wherever it lies: the content that its newest readable checkpoint saw.

    None when there is none, and for a run without a checkpoint when `first`, the recipe's own place, holds a data set.
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
    # A relative path was meant from where the run was started, somewhere above the run's directory.
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
        # A relative one is from where training was started: here, or somewhere above the run.
        for base in [Path()] if recorded.is_absolute() else bases:
            yield Path(os.path.normpath(base / recorded))


def _fingerprint(place: Path) -> str | None:
    try:
        return load_manifest(place).fingerprint
    except ArtefactError:
        return None
