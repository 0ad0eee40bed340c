"""The weights that a run begins with in the place of drawn ones: what `model.init_from` in its recipe names.

- It is the weights alone: the optimizer is new, and steps, schedule and data begin at 0. A run that goes on with
  everything is a branch (branching.py).
- They are a checkpoint's or a run's, imported ones included, or those of a directory that transformers wrote around our
  model (`inl export`, `save_pretrained`).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from inl_core.errors import ArtefactError, RecipeError, naming_key
from inl_core.files import is_directory, read_json
from inl_core.inference.checkpoint_files import CONFIG, MANIFEST, TOKENIZER, file_digest, read_config, read_manifest
from inl_core.inference.loading import find_checkpoint, read_model_config
from inl_core.inference.tensor_files import HALF
from inl_core.inference.tensor_sets import read_entries, tensor_paths
from inl_core.recipe import ModelConfig
from inl_core.recipe.differences import model_differences
from inl_core.training.branching import check_tokenizer, refuse_misfits
from inl_core.training.run_data import RunData

_EXPORTED_AS = "inl"
"""The model_type of an exported model that has our names and shapes, and the key of its configuration."""


@dataclass(frozen=True)
class StartingWeights:
    """Where weights lie, and what is known of them."""

    path: Path
    model: ModelConfig
    has_tokenizer: bool
    provenance: tuple[dict[str, Any], ...]
    """What happened to them until now, oldest first, this beginning included."""
    prefix: str = ""
    """What the name of each tensor begins with there."""

    def check_tokenizer(self, data: RunData) -> None:
        """ArtefactError when the run's data is made of other tokens than those that the weights know."""
        if self.has_tokenizer:
            check_tokenizer(self.path, data)
        elif self.model.vocab_size != data.tokenizer.vocab_size:
            raise ArtefactError(
                f"{data.directory}: its tokenizer has {data.tokenizer.vocab_size:,} tokens, and {self.path} a "
                f"vocabulary of {self.model.vocab_size:,}; set data.tokenizer.file to the tokenizer it was trained with"
            )


def find_weights(model: ModelConfig, *, tell: Callable[[str], None]) -> StartingWeights | None:
    """The weights that a recipe's model begins with, verified; None where they are to be drawn.

    Args:
        tell: hears which checkpoint of a run it is, and in what else the two models differ.

    Raises:
        ArtefactError: there are none at that path, or they are damaged.
        RecipeError: they do not fit the model.
    """
    if model.init_from is None:
        return None
    path = model.init_from
    if path.suffix == ".safetensors":
        raise RecipeError(
            f"model.init_from {path}: a single file; name its directory, or if it holds weights of the reference, the "
            f"directory that `inl import-reference {path} --output DIR` makes"
        )
    if (path / "adapter_config.json").is_file() and not (path / CONFIG).is_file():
        raise RecipeError(
            f"model.init_from {path}: holds an adapter of peft, not a whole model; merge it into its model "
            "(merge_and_unload), save that with save_pretrained, and name its directory"
        )
    with naming_key("model.init_from"):
        found = _exported(path, tell) if _is_exported(path) else _checkpoint(path, tell)
    changes = model_differences(found.model, model.with_vocab_size(found.model.vocab_size or 0))
    refuse_misfits(f"model.init_from {found.path}: its weights do not", changes)
    for change in changes:
        tell(f"not as {found.path} was trained: {change}")
    if not found.has_tokenizer:
        tell(f"{found.path}: has no tokenizer, so nothing can tell whether the data is made of the tokens it knows")
    return found


def _checkpoint(path: Path, tell: Callable[[str], None]) -> StartingWeights:
    checkpoint = find_checkpoint(path, note=tell)
    config = read_config(checkpoint)
    begun = _event(checkpoint, step=read_manifest(checkpoint).step, manifest_sha256=file_digest(checkpoint / MANIFEST))
    model = read_model_config(checkpoint, config)
    return StartingWeights(checkpoint, model, config.tokenizer is not None, (*config.provenance, begun))


def _is_exported(path: Path) -> bool:
    """Whether transformers wrote a directory, rather than this project."""
    return is_directory(path) and (path / CONFIG).is_file() and "model_type" in read_json(path / CONFIG)


def _exported(path: Path, tell: Callable[[str], None]) -> StartingWeights:
    config = read_json(path / CONFIG)
    kind, given = config["model_type"], config.get(_EXPORTED_AS)
    if kind != _EXPORTED_AS or not isinstance(given, dict):
        raise RecipeError(
            f"model.init_from {path}: holds a model of the type {kind!r}, whose weights are laid out in another way; "
            "name the checkpoint that it was exported from, or export that with --format inl"
        )
    try:
        model = ModelConfig.model_validate(given | {"vocab_size": config.get("vocab_size")})
    except ValidationError as error:
        raise ArtefactError(
            f"{path / CONFIG}: not a model that this version knows ({error.errors()[0]['msg']})"
        ) from None
    if model.vocab_size is None:
        raise ArtefactError(f"{path / CONFIG}: names no vocab_size; export the checkpoint again")
    if half := sorted({HALF[entry.dtype] for entry in read_entries(path).values() if entry.dtype in HALF}):
        tell(f"{path}: its weights are in {' and '.join(half)}; the run begins with them widened to float32")
    files = [file for file in tensor_paths(path) if file.is_file()]
    begun = _event(path, weights_sha256=[file_digest(file) for file in files])
    return StartingWeights(path, model, (path / TOKENIZER).is_file(), (begun,), prefix="model.")


def _event(path: Path, **known: Any) -> dict[str, Any]:
    return {"event": "init", "from": os.path.realpath(path), **known}
