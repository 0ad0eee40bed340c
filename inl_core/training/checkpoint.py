"""Checkpoints: written aside, fsynced, checksummed, renamed; read only when every byte is what the manifest says.

    step-00000500/  config.json  tokenizer.json  model.safetensors  training_state/{*.safetensors, progress.json}
                    manifest.json, written last: a directory without one is no checkpoint

- Tensors go through torch.distributed.checkpoint's Hugging Face storage, so a checkpoint is safetensors and can be read
  by another world size; everything else is JSON. There is no pickle.
- Weights alone are all that evaluation, generation and inspection read (inference/loading.py).
"""

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from inl_core.errors import ArtefactError
from inl_core.files import named_errors, read_record
from inl_core.inference.checkpoint_files import (
    MANIFEST,
    OPTIMIZER,
    PROGRESS,
    TRAINING_STATE,
    WEIGHTS,
    Count,
    checkpoint_step,
    file_digest,
    list_checkpoints,
    read_manifest,
    verify_checkpoint,
)
from inl_core.inference.tensor_files import check_tensors, first_nonfinite
from inl_core.model import IntegratorLanguageModel
from inl_core.training.optimizers import Optimizers
from inl_core.training.retention import remove_checkpoint

START_ANEW = "start a new run with another --run-dir"
"""What is left to do with a directory that neither `inl resume` nor `inl train` can use."""
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


Byte = Annotated[int, Field(ge=0, le=255)]


class TrainState(BaseModel):
    """What a run must remember beyond its tensors. Data order, schedule and cycle are functions of `step`."""

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
    rng: dict[str, list[Byte]] = {}
    """States of torch's generators, as bytes. Nothing of ours draws from them, but a user's own code might."""


def read_progress(path: Path) -> TrainState:
    """The record in the progress.json of the checkpoint at `path`; ArtefactError when it is not a complete one."""
    state = read_record(path / PROGRESS, TrainState)
    missing = TrainState.model_fields.keys() - state.model_fields_set
    if missing:
        raise ArtefactError(f"{path / PROGRESS}: damaged: {min(missing)}: Field required")
    return state


def capture_rng() -> dict[str, list[int]]:
    """The global generators' states."""
    states = {"cpu": torch.get_rng_state().tolist()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().tolist()
    return states


def restore_rng(states: dict[str, list[int]]) -> None:
    """Set the global generators; ArtefactError when a state is none of this version of torch."""
    try:
        if "cpu" in states:
            torch.set_rng_state(torch.tensor(states["cpu"], dtype=torch.uint8))
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.tensor(states["cuda"], dtype=torch.uint8))
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ArtefactError(f"{PROGRESS}: damaged: rng: {reason}; use an earlier checkpoint") from None


def save_checkpoint(
    parent: Path,
    state: TrainState,
    model: IntegratorLanguageModel,
    optimizers: Optimizers,
    documents: dict[str, str],
) -> Path:
    """Write parent/step-N whole or not at all.

    Args:
        documents: the other files by name, config.json and tokenizer.json among them.

    Raises:
        OSError: it could not be written (a full disk, say); what was there before is untouched.
    """
    final = parent / f"step-{state.step:08d}"
    with _written_whole(final, parent / f"{final.name}.tmp", state.step) as aside:
        (aside / "training_state").mkdir()
        _write_weights(aside, model, documents)
        _write_tensors(aside / "training_state", _on_cpu(_tensors(_optimizer_state(model, optimizers))))
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
        _write_weights(aside, model, documents)


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
    _read_tensors(path, state_dict)
    model.load_state_dict(state_dict)
    # Asking for the state of a fresh optimizer makes it allocate its moments; they are then read in place.
    optimizer_state = _optimizer_state(model, optimizers)
    check_tensors(path / OPTIMIZER, _tensors(optimizer_state), "the recipe's optimizer")
    _read_tensors(path / TRAINING_STATE, _tensors(optimizer_state))
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
    """A new directory `aside` to fill, which is then sealed and renamed to `final`, or removed if anything fails."""
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


def _write_weights(directory: Path, model: IntegratorLanguageModel, documents: dict[str, str]) -> None:
    _write_tensors(directory, _on_cpu(model.state_dict()), name="model.safetensors")
    for name, text in documents.items():
        _write_text(directory / name, text)


def _optimizer_state(model: IntegratorLanguageModel, optimizers: Optimizers) -> dict[str, Any]:
    return get_optimizer_state_dict(model, optimizers.parts, options=_FLAT)  # type: ignore[return-value]


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The optimizer's tensors; learning rates and the like are the recipe's, not the checkpoint's."""
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and key.startswith("state.")}


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def _write_tensors(directory: Path, tensors: dict[str, Tensor], name: str = "optimizer.safetensors") -> None:
    writer = dcp.HuggingFaceStorageWriter(str(directory))
    with _alone(), _disk_errors(directory / name):
        dcp.save(tensors, storage_writer=writer, no_dist=True)
    (directory / "model-00001-of-00001.safetensors").replace(directory / name)
    (directory / "model.safetensors.index.json").unlink()  # one file needs no index
    with named_errors(directory / name):
        _sort_header(directory / name)


def _sort_header(path: Path) -> None:
    """Put the header's keys in order, so that the same tensors give the same bytes: the library's order is random."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


def _read_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    try:
        with _alone():
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(directory)), no_dist=True)
    except (CheckpointException, RuntimeError, ValueError) as error:
        raise ArtefactError(f"{directory}: does not fit this model or optimizer: {_reason(error)}") from error


@contextmanager
def _alone() -> Iterator[None]:
    """One process reads and writes whole tensors here, on purpose: the library need not warn of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in a single process.*")
        yield


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn what the libraries raise when they cannot write into the OSError underneath, which then names `path`."""
    with named_errors(path):
        try:
            yield
        except CheckpointException as error:
            raise _os_error(_root_cause(error)) from error
        except SafetensorError as error:
            raise _os_error(error) from error


def _root_cause(error: BaseException) -> BaseException:
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error


def _reason(error: BaseException) -> str:
    return " ".join(str(_root_cause(error)).split())


def _os_error(error: BaseException) -> OSError:
    """An error of the disk as the system numbers it; safetensors writes the number into its message."""
    if isinstance(error, OSError) and error.errno:
        return error
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(errno.EIO, str(error))


def _seal(directory: Path, step: int) -> None:
    """Write the manifest: the size and checksum of every file, all of them on disk before it."""
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
