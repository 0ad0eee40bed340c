"""`inl check checkpoint`: whether a checkpoint is whole, fits its own configuration, and holds finite numbers.

- Every file is read: sizes and checksums against the manifest, numbers for NaN and infinity, and what is impossible in
  the optimizer's state. `inl resume` checks the same; `inl eval` and others do not read the optimizer.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from inl_core.errors import ArtefactError, InlError
from inl_core.inference.checkpoint_files import (
    CONFIG,
    TOKENIZER,
    TRAINING_STATE,
    WEIGHTS,
    read_config,
    verify_checkpoint,
)
from inl_core.inference.loading import fitting_model, load_tokenizer, read_model_config
from inl_core.recipe.load import load_recipe
from inl_core.training.checkpoint import read_progress


@dataclass(frozen=True)
class CheckpointCheck:
    """What was found out about one checkpoint."""

    path: Path
    passed: tuple[tuple[str, str], ...]
    """(what, in which state) of each part that is right, up to the first that is not."""
    problem: str | None
    """What is wrong; None when nothing is."""


def check_checkpoint(path: Path) -> CheckpointCheck:
    """Check one checkpoint, file by file, until something is wrong."""
    passed: list[tuple[str, str]] = []
    problem = None
    try:
        for check in (_check_files, _check_weights, _load_tokenizer, _check_recipe):
            passed.append(check(path))
    except (InlError, OSError) as error:
        problem = str(error)
    return CheckpointCheck(path, tuple(passed), problem)


def _check_files(path: Path) -> tuple[str, str]:
    has_state = os.path.lexists(path / TRAINING_STATE)
    manifest = verify_checkpoint(path, purpose="resume" if has_state else "any")
    size = sum(entry.bytes for entry in manifest.files.values())
    kind = (
        f"of step {read_progress(path).step:,}" if has_state else "without training state: to evaluate, not to resume"
    )
    return "files", f"{len(manifest.files)} files, {size / 1e6:,.1f} MB, as in the manifest; all numbers finite; {kind}"


def _check_weights(path: Path) -> tuple[str, str]:
    model = fitting_model(path, read_model_config(path, read_config(path)))
    count = sum(parameter.numel() for parameter in model.parameters())
    return WEIGHTS, f"{len(model.state_dict())} tensors, {count:,} parameters, as {CONFIG} has them"


def _load_tokenizer(path: Path) -> tuple[str, str]:
    config = read_config(path)
    if config.tokenizer is None:
        return TOKENIZER, "none: the weights were imported without one"
    tokenizer = load_tokenizer(path, config, read_model_config(path, config))
    return TOKENIZER, f"{tokenizer.vocab_size:,} tokens, the one that {CONFIG} names"


def _check_recipe(path: Path) -> tuple[str, str]:
    file = path / "recipe.yaml"
    if not os.path.lexists(file):
        return "recipe.yaml", "none: the weights were imported"
    recipe, config = load_recipe(file, allow_pipe=False), read_model_config(path, read_config(path))
    if recipe.model.model_copy(update={"vocab_size": config.vocab_size}) != config:
        raise ArtefactError(f"{file}: describes another model than {CONFIG}; put back the one that was saved")
    return "recipe.yaml", f"describes the model of {CONFIG}"
