"""Checkpoints as a run knows them: the record beside the tensors, and how a run goes on from one.

    step-00000500/  config.json  tokenizer.json  tokenizer_config.json  recipe.yaml  model.safetensors
                    training_state/{optimizer.safetensors, progress.json}
                    manifest.json, written last: a directory without one is no checkpoint

- They are written by checkpoint_writing.py, and read only when every byte is what the manifest says.
- Whether tensors lie whole in one file or in parts in several, they can be read by any number of processes
  (inference/tensor_sets.py). Everything else is JSON or YAML; there is no pickle.
- Evaluation, generation and inspection read the weights alone (inference/loading.py).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from inl_core.errors import ArtefactError
from inl_core.files import read_record
from inl_core.inference.checkpoint_files import (
    PROGRESS,
    TRAINING_STATE,
    Count,
    list_checkpoints,
    read_manifest,
    verify_checkpoint,
)
from inl_core.inference.tensor_sets import check_tensors, read_tensors
from inl_core.model import IntegratorLanguageModel
from inl_core.training.distributed import ALONE, World
from inl_core.training.optimizers import Optimizers
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
    save_seconds: Annotated[float, Field(ge=0)] = 0.0
    """What the save before this one took, of whichever session: a session that has not saved yet must know how long
    before its time limit to begin. 0 where nobody knows."""
    rng: dict[str, list[Byte]] = {}
    """States of torch's generators, as bytes: `cpu` and `cuda` of rank 0, and `cpu/3` of rank 3 where that differs.
    None of our code draws from them, but a user's own code might."""


def read_progress(path: Path) -> TrainState:
    """The record in the progress.json of the checkpoint at `path`; ArtefactError when it is not a complete one."""
    state = read_record(path / PROGRESS, TrainState)
    later = {"skipped", "save_seconds"}  # which older versions did not write
    missing = TrainState.model_fields.keys() - state.model_fields_set - later
    if missing:
        raise ArtefactError(f"{path / PROGRESS}: damaged: {min(missing)}: Field required")
    return state


def rng_states() -> dict[str, Tensor]:
    """The states of this process's global generators, by device."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def capture_rng(world: World) -> dict[str, list[int]]:
    """The states of every rank's global generators; every rank calls this, and every rank gets them."""
    first, *others = world.gather({device: state.tolist() for device, state in rng_states().items()})
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


def load_checkpoint(path: Path, model: IntegratorLanguageModel, optimizers: Optimizers) -> TrainState:
    """Restore weights and optimizer in place, and return the record; `path` must have been verified.

    Raises:
        ArtefactError: a file is damaged, or does not fit the model or the optimizer.
    """
    state, step = read_progress(path), read_manifest(path).step
    if state.step != step:
        raise ArtefactError(f"{path / PROGRESS}: is of step {state.step:,}, the checkpoint of step {step:,}")
    load_weights(path, model)
    # Asking for the state of a fresh optimizer makes it allocate its moments; they are then read in place.
    moments = optimizer_state(model, optimizers)
    tensors = state_tensors(moments)
    check_tensors(path / TRAINING_STATE, tensors, "the recipe's optimizer")
    read_tensors(path / TRAINING_STATE, tensors)
    set_optimizer_state_dict(model, optimizers.parts, optim_state_dict=moments, options=_FLAT)
    return state


def load_weights(
    directory: Path, model: IntegratorLanguageModel, prefix: str = "", *, may_be_half: bool = False
) -> None:
    """Fill the model, or this process's part of it, with a directory's weights, whose names begin with `prefix` there.

    Args:
        may_be_half: take weights in bfloat16 or float16, too, and widen them.

    Raises:
        ArtefactError: a file is missing or damaged, or does not fit the model.
    """
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    check_tensors(directory, weights, "the recipe's model", may_be_half=may_be_half)
    read_tensors(directory, weights)


def newest_valid(parent: Path, skipped: Callable[[str], None], readers: World = ALONE) -> Path:
    """The newest checkpoint whose every file is intact; `skipped` hears about each one passed over.

    Args:
        readers: the processes that share the reading; all call this, and all get the same path.

    Raises:
        ArtefactError: there is none.
    """
    candidates = readers.on_main(lambda: list_checkpoints(parent))
    share = readers.rank, readers.size
    for path in reversed(candidates):
        try:
            readers.on_each(partial(verify_checkpoint, path, purpose="resume", share=share))
        except ArtefactError as error:
            skipped(str(error))
        else:
            return path
    if candidates:
        raise ArtefactError(f"{parent}: none of its {len(candidates)} checkpoints is intact; {START_ANEW}")
    raise ArtefactError(f"{parent}: holds no checkpoint; {START_ANEW}")


def optimizer_state(model: IntegratorLanguageModel, optimizers: Optimizers) -> dict[str, Any]:
    """All that the optimizers remember, by flat names; a fresh one allocates its moments for it."""
    return get_optimizer_state_dict(model, optimizers.parts, options=_FLAT)  # type: ignore[return-value]


def state_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among it; learning rates and the like come from the recipe, not from the checkpoint."""
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and key.startswith("state.")}
