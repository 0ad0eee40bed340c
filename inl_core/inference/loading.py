"""Find a run's checkpoint and load the model and the tokenizer inside it.

- Only the weights are read: evaluation, generation and inspection need no optimizer.
- Every file is verified before it is used, and its size is judged before memory is taken for it. What is refused is
  named, with the remedy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from inl_core.corpus.chat_template import read_chat_template
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import ArtefactError
from inl_core.files import expand_home, is_directory
from inl_core.inference.checkpoint_files import (
    CONFIG,
    MANIFEST,
    TOKENIZER,
    TOKENIZER_CONFIG,
    CheckpointConfig,
    check_exists,
    is_checkpoint,
    list_checkpoints,
    nearest_run,
    read_config,
    read_manifest,
    verify_checkpoint,
)
from inl_core.inference.tensor_sets import check_tensors, read_entries, read_tensors, tensor_paths
from inl_core.kernels import apply
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import ModelConfig
from inl_core.recipe.problems import find_problems

_LARGEST_TABLE = 1 << 30
"""Bytes that tables computed from the configuration may take, where the weights are smaller."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to evaluate, its tokenizer, and where it came from."""

    model: IntegratorLanguageModel
    tokenizer: Tokenizer
    path: Path
    config: dict[str, Any]
    """The checkpoint's config.json, validated."""
    step: int = 0
    """Optimizer steps it was trained for."""
    chat_template: str | None = None
    """How conversations are written, in jinja2; None where the model was not trained on any."""


def find_checkpoint(
    path: Path | None, runs: Path = Path("runs"), note: Callable[[str], None] = lambda text: None
) -> Path:
    """A verified checkpoint from what a user names.

    Args:
        path: a checkpoint, a run, or None for the run below `runs` that saved last. Of a run it is the newest
            checkpoint that is intact.
        note: is told which checkpoint was chosen, and which were passed over and why.

    Raises:
        ArtefactError: there is none, or the one that was named is damaged.
    """
    if path is None:
        found = next((chosen for run in _newest_runs(runs) if (chosen := _newest_intact(run, note))), None)
        if found is None:
            raise ArtefactError(f"{runs}/: no run with a checkpoint here; name one, or train with `inl train RECIPE`")
        return found
    path = expand_home(path)
    check_exists(path, runs)
    if is_checkpoint(path):
        verify_checkpoint(path, purpose="evaluate")
        return path
    found = _newest_intact(path, note)
    if found is None:
        advice = f"`inl train RECIPE` makes one{nearest_run(path, runs)}"
        raise ArtefactError(f"{path}: holds no intact checkpoint; {advice}")
    return found


def _newest_intact(run: Path, note: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a run, or of a directory of checkpoints, that can be evaluated."""
    parent = run / "checkpoints" if is_directory(run / "checkpoints") else run
    for candidate in reversed(list_checkpoints(parent)):
        try:
            verify_checkpoint(candidate, purpose="evaluate")
        except ArtefactError as error:
            note(f"skipped: {error}")
        else:
            note(f"using {candidate}")
            return candidate
    return None


def _newest_runs(runs: Path) -> list[Path]:
    """The runs below `runs` that have checkpoints, the one that saved last first."""
    try:
        checkpoints = {run: list_checkpoints(run / "checkpoints") for run in runs.iterdir()}
    except OSError:
        return []
    saved = {run: max(map(_saved_at, found)) for run, found in checkpoints.items() if found}
    return sorted(saved, key=saved.__getitem__, reverse=True)


def _saved_at(checkpoint: Path) -> float:
    """When a checkpoint was finished, or when it was begun if it never was."""
    for path in (checkpoint / MANIFEST, checkpoint):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return 0.0


def open_checkpoint(
    path: Path | None, device: torch.device | str = "cpu", *, note: Callable[[str], None] = lambda text: None
) -> LoadedModel:
    """Find a checkpoint as `find_checkpoint` does and load it as `load_model` does.

    Training may remove a checkpoint after it was found; the search then starts again.

    Raises:
        ArtefactError: as those two.
    """
    while True:
        found = find_checkpoint(path, note=note)
        try:
            return load_model(found, device)
        except ArtefactError:
            if found == path or is_directory(found):
                raise
            note(f"skipped: {found}: was removed while it was read")


def load_model(path: Path, device: torch.device | str = "cpu") -> LoadedModel:
    """The model and tokenizer of a verified checkpoint, in evaluation mode.

    Raises:
        ArtefactError: a file is missing or damaged, or one does not fit the others.
    """
    config = read_config(path)
    tokenizer = load_tokenizer(path, config, read_model_config(path, config))
    model = load_model_alone(path, device)
    template = read_chat_template(path / TOKENIZER_CONFIG)
    return LoadedModel(model, tokenizer, path, config.model_dump(), read_manifest(path).step, template)


def load_model_alone(path: Path, device: torch.device | str = "cpu") -> IntegratorLanguageModel:
    """The model of a verified checkpoint, which may have no tokenizer, in evaluation mode.

    Raises:
        ArtefactError: a file is missing or damaged, or one does not fit the others.
    """
    config = read_config(path)
    model = load_weights(path, read_model_config(path, config), device)
    trained = config.provenance[-1] if config.provenance else {}
    apply(model, operations="plain" if trained.get("operations") == "plain" else "auto")
    return model


def load_tokenizer(path: Path, config: CheckpointConfig, model_config: ModelConfig) -> Tokenizer:
    """The checkpoint's tokenizer, which must be the one its model was trained with."""
    if config.tokenizer is None:
        raise ArtefactError(
            f"{path}: was imported without a tokenizer, so it cannot read or write text; "
            "import it again with --tokenizer FILE"
        )
    tokenizer, file = Tokenizer.load(path / TOKENIZER), TOKENIZER
    if tokenizer.vocab_size != model_config.vocab_size:
        problem = f"has {tokenizer.vocab_size} tokens where the model has {model_config.vocab_size}"
    elif config.tokenizer != tokenizer.fingerprint:
        problem = "is not the tokenizer that config.json names, so its tokens mean something else"
    elif (config.bos_id, config.eos_id) != (tokenizer.bos_id, tokenizer.eos_id):
        ids = f"bos_id {config.bos_id} and eos_id {config.eos_id}"
        problem = f"{ids} are not the tokenizer's {tokenizer.bos_id} and {tokenizer.eos_id}"
        file = CONFIG
    else:
        return tokenizer
    remedy = "the config.json" if file == CONFIG else "the tokenizer"
    raise ArtefactError(f"{path / file}: {problem}; put back {remedy} the model was trained with")


def load_weights(path: Path, model_config: ModelConfig, device: torch.device | str = "cpu") -> IntegratorLanguageModel:
    """The model of a verified checkpoint without its tokenizer, in evaluation mode.

    Raises:
        ArtefactError: the weights are missing, damaged, or not those of `model_config`.
    """
    model = fitting_model(path, model_config)
    model.to_empty(device=device)
    model.reset_buffers()
    read_tensors(path, model.state_dict())
    return model.eval()


def fitting_model(path: Path, model_config: ModelConfig) -> IntegratorLanguageModel:
    """The model of a checkpoint on the meta device, after comparing it with the header of the weights.

    Raises:
        ArtefactError: names the first tensor that is missing, too many, or of another shape or type.
    """
    num_layers, integrator = model_config.num_layers, model_config.integrator
    num_controllers = 0
    if integrator:
        num_controllers = integrator.controller.experts * (1 if integrator.controller.shared else num_layers)
    file, num_tensors = tensor_paths(path)[0], len(read_entries(path))
    # Each layer and controller has a tensor at least, and a million of them take minutes to build, even without memory.
    if num_layers + num_controllers > num_tensors:
        counts = f"{num_tensors:,} tensors for {num_layers:,} layers and {num_controllers:,} controllers"
        raise ArtefactError(f"{file}: does not fit config.json ({counts})")
    try:
        with torch.device("meta"):
            model = IntegratorLanguageModel(model_config)
    except (RuntimeError, TypeError, OverflowError) as error:  # a tensor of more elements than torch can count
        raise ArtefactError(f"{file}: does not fit config.json ({str(error).splitlines()[0]})") from None
    check_tensors(path, model.state_dict(), CONFIG)
    check_tables(path / CONFIG, model)
    return model


def check_tables(source: Path, model: IntegratorLanguageModel) -> None:
    """Refuse a context so long that the tables of positions take more memory than the weights.

    Args:
        source: the file that says how long the context is, for the message.
    """
    weights = model.state_dict()
    tables = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in weights)
    if tables > max(_LARGEST_TABLE, sum(tensor.nbytes for tensor in weights.values())):
        raise ArtefactError(
            f"{source}: a context of {model.config.max_seq_len:,} tokens needs tables of {tables / 1e9:,.0f} GB, more "
            "than the weights; correct its max_seq_len"
        )


def read_model_config(path: Path, config: CheckpointConfig) -> ModelConfig:
    """The model section of a checkpoint's config.json, or an ArtefactError that names the first wrong key."""
    try:
        model = ModelConfig.model_validate(config.model)
    except ValidationError as error:
        key, message = next(iter(find_problems(error, ModelConfig).items()))
        problem = f"{'.'.join(('model', *map(str, key)))}: {message}"
    else:
        if model.vocab_size is not None:
            return model
        problem = "model.vocab_size: must be a number"
    raise ArtefactError(f"{path / CONFIG}: not a model configuration this version knows ({problem})")
