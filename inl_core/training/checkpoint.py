"""Checkpoints: written aside, fsynced, checksummed, renamed; read only when every byte is what the manifest says.

    step-00000500/  config.json  tokenizer.json  recipe.yaml  model.safetensors
                    training_state/{optimizer.safetensors, progress.json}
                    manifest.json, written last: a directory without one is no checkpoint

- Tensors are whole, in safetensors, so a checkpoint can be read by any number of processes; everything else is JSON.
  There is no pickle.
- Evaluation, generation and inspection read the weights alone (inference/loading.py).
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication

from inl_core.errors import ArtefactError
from inl_core.files import named_errors, read_record
from inl_core.inference.checkpoint_files import (
    MANIFEST,
    OPTIMIZER,
    PROGRESS,
    WEIGHTS,
    Count,
    checkpoint_step,
    file_digest,
    list_checkpoints,
    read_manifest,
    verify_checkpoint,
)
from inl_core.inference.tensor_files import check_tensors, first_nonfinite, open_tensors, read_tensor
from inl_core.model import IntegratorLanguageModel
from inl_core.training.distributed import World
from inl_core.training.optimizers import Optimizers
from inl_core.training.retention import remove_checkpoint
from inl_core.training.run_status import START_ANEW

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


Byte = Annotated[int, Field(ge=0, le=255)]


class TrainState(BaseModel):
    """What a run must remember besides its tensors. Data order, schedule and cycle are functions of `step`."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    step: Count = 0
    """Optimizer steps done."""
    samples: Count = 0
    """Sequences consumed, all ranks together."""
    tokens: Count = 0
    """Target tokens trained on."""
    seconds: Annotated[float, Field(ge=0)] = 0.0
    """Time spent in training steps, over all sessions of the run."""
    data_fingerprint: str = ""
    """The data set's fingerprint; a resumed run refuses another."""
    world_size: Annotated[int, Field(gt=0, lt=2**31)] = 1
    skipped: Count = 0
    """Steps that were skipped because their loss or gradient was not finite."""
    rng: dict[str, list[Byte]] = {}
    """States of torch's generators, as bytes: `cpu` and `cuda` of rank 0, and `cpu/3` of rank 3 where that differs.
    None of our code draws from them, but a user's own code might."""


def read_progress(path: Path) -> TrainState:
    """The record in the progress.json of the checkpoint at `path`; ArtefactError when it is not a complete one."""
    state = read_record(path / PROGRESS, TrainState)
    later = {"skipped"}  # which older versions did not write
    missing = TrainState.model_fields.keys() - state.model_fields_set - later
    if missing:
        raise ArtefactError(f"{path / PROGRESS}: damaged: {min(missing)}: Field required")
    return state


def capture_rng(world: World) -> dict[str, list[int]]:
    """The states of every rank's global generators; every rank calls this, and every rank gets them."""
    own = {"cpu": torch.get_rng_state().tolist()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state().tolist()
    first, *others = world.gather(own)
    differing = {
        f"{device}/{rank}": state
        for rank, states in enumerate(others, start=1)
        for device, state in states.items()
        if state != first.get(device)
    }
    return first | differing


def restore_rng(states: dict[str, list[int]], rank: int = 0) -> None:
    """Set this rank's global generators; ArtefactError when this version of torch cannot use such a state."""
    own = {device: states.get(f"{device}/{rank}", states.get(device)) for device in ("cpu", "cuda")}
    try:
        if own["cpu"] is not None:
            torch.set_rng_state(torch.tensor(own["cpu"], dtype=torch.uint8))
        if own["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.tensor(own["cuda"], dtype=torch.uint8))
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ArtefactError(f"{PROGRESS}: damaged: rng: {reason}; use an earlier checkpoint") from None


class Tensors(NamedTuple):
    """The tensors of a checkpoint, each whole."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def gather_tensors(model: IntegratorLanguageModel, optimizers: Optimizers) -> Tensors:
    """The tensors of a checkpoint. If the model is divided, each rank must call this, and rank 0 alone gets them."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return Tensors(model.state_dict(), _tensors(_optimizer_state(model, optimizers)))
    options = StateDictOptions(flatten_optimizer_state_dict=True, full_state_dict=True, cpu_offload=True)
    optimizer: Any = get_optimizer_state_dict(model, optimizers.parts, options=options)
    weights: Any = get_model_state_dict(model, options=options)
    return Tensors(weights, _tensors(optimizer))


def save_checkpoint(
    parent: Path,
    state: TrainState,
    model: IntegratorLanguageModel,
    optimizers: Optimizers,
    documents: dict[str, str],
    *,
    tensors: "Tensors | None" = None,
) -> Path:
    """Write parent/step-N whole or not at all.

    Args:
        tensors: what `gather_tensors` found in a model that several processes share.
        documents: the other files by name, config.json and tokenizer.json among them.

    Raises:
        OSError: it could not be written (a full disk, say); what was there before is untouched.
    """
    tensors = tensors or gather_tensors(model, optimizers)
    final = parent / f"step-{state.step:08d}"
    with _written_whole(final, parent / f"{final.name}.tmp", state.step) as aside:
        (aside / OPTIMIZER).parent.mkdir()
        _write_weights(aside, tensors.weights, documents)
        _write_tensors(aside / OPTIMIZER, tensors.optimizer)
        _write_text(aside / PROGRESS, state.model_dump_json())
    return final


def save_weights(final: Path, model: IntegratorLanguageModel, documents: dict[str, str]) -> None:
    """Write a checkpoint without training state at `final`, whole or not at all: to evaluate, not to resume.

    Args:
        documents: as in `save_checkpoint`.

    Raises:
        ArtefactError: a weight is NaN or infinite.
        OSError: it could not be written; what was there before is untouched.
    """
    if name := first_nonfinite(model.state_dict()):
        raise ArtefactError(f"{final}: not written, because {name} holds NaN or infinity")
    with _written_whole(final, final.parent / f".{final.name}.tmp", checkpoint_step(final)) as aside:
        _write_weights(aside, model.state_dict(), documents)


def load_checkpoint(path: Path, model: IntegratorLanguageModel, optimizers: Optimizers) -> TrainState:
    """Restore weights and optimizer in place, and return the record; `path` must have been verified.

    Raises:
        ArtefactError: a file is damaged, or does not fit the model or the optimizer.
    """
    state, step = read_progress(path), read_manifest(path).step
    if state.step != step:
        raise ArtefactError(f"{path / PROGRESS}: is of step {state.step:,}, the checkpoint of step {step:,}")
    state_dict = model.state_dict()
    check_tensors(path / WEIGHTS, state_dict, "the recipe's model")
    _read_into(state_dict, path / WEIGHTS)
    model.load_state_dict(state_dict)
    # Asking for the state of a fresh optimizer makes it allocate its moments; they are then read in place.
    optimizer_state = _optimizer_state(model, optimizers)
    check_tensors(path / OPTIMIZER, _tensors(optimizer_state), "the recipe's optimizer")
    _read_into(_tensors(optimizer_state), path / OPTIMIZER)
    set_optimizer_state_dict(model, optimizers.parts, optim_state_dict=optimizer_state, options=_FLAT)
    return state


def newest_valid(parent: Path, skipped: Callable[[str], None]) -> Path:
    """The newest checkpoint whose every file is intact; `skipped` hears about each one passed over.

    Raises:
        ArtefactError: there is none.
    """
    candidates = list_checkpoints(parent)
    for path in reversed(candidates):
        try:
            verify_checkpoint(path, purpose="resume")
        except ArtefactError as error:
            skipped(str(error))
        else:
            return path
    if candidates:
        raise ArtefactError(f"{parent}: none of its {len(candidates)} checkpoints is intact; {START_ANEW}")
    raise ArtefactError(f"{parent}: holds no checkpoint; {START_ANEW}")


def training_bytes(model: IntegratorLanguageModel) -> int:
    """Size of one checkpoint: weights and AdamW's two moments, in float32."""
    return sum(parameter.numel() * 4 * 3 for parameter in model.parameters())


@contextmanager
def _written_whole(final: Path, aside: Path, step: int) -> Iterator[Path]:
    """Make the directory `aside`, to be filled; then seal it and rename it to `final`. If anything fails, remove it."""
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        _seal(aside, step)
        if final.exists():  # the same step saved again, say by a resumed run
            remove_checkpoint(final)
        aside.replace(final)
        _sync(final.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _write_weights(directory: Path, weights: dict[str, Tensor], documents: dict[str, str]) -> None:
    _write_tensors(directory / WEIGHTS, weights)
    for name, text in documents.items():
        _write_text(directory / name, text)


def _optimizer_state(model: IntegratorLanguageModel, optimizers: Optimizers) -> dict[str, Any]:
    return get_optimizer_state_dict(model, optimizers.parts, options=_FLAT)  # type: ignore[return-value]


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The optimizer's tensors; learning rates and the like come from the recipe, not from the checkpoint."""
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and key.startswith("state.")}


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file; the same tensors give the same bytes."""
    with named_errors(path):
        path.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def _read_into(tensors: dict[str, Tensor], path: Path) -> None:
    """Fill the tensors, in place, from the file's tensors of the same names."""
    with open_tensors(path) as file, implicit_replication():  # of a divided tensor, each rank takes its part
        for name, tensor in tensors.items():
            tensor.copy_(read_tensor(path, name, file))


def _seal(directory: Path, step: int) -> None:
    """Write the manifest, with the size and checksum of every file, once all of these files are on the disk."""
    entries = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            entries[path.relative_to(directory).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": file_digest(path),
            }
            _sync(path)
    for path in filter(Path.is_dir, directory.iterdir()):
        _sync(path)
    _write_text(directory / MANIFEST, json.dumps({"format": 1, "step": step, "files": entries}, indent=1))
    _sync(directory / MANIFEST)
    _sync(directory)


def _write_text(path: Path, text: str) -> None:
    with named_errors(path):
        path.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with named_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
