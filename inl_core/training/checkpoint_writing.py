"""Writing a checkpoint: copied to the host's memory, written aside, flushed, checksummed, sealed, renamed.

    snapshot = take_snapshot(state, model, optimizers, run.documents(state))    # training may go on from here
    write_snapshot(run.checkpoints, snapshot)                                   # in another thread, say

- What a process has whole, rank 0 writes into one file. Of a divided model every process writes its own parts, through
  torch.distributed.checkpoint, and takes the checksums of what it wrote; then all processes call these functions.
- Rank 0 writes the manifest last. Whatever fails on any process before that, no process has written a checkpoint.
"""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from inl_core.errors import ArtefactError
from inl_core.files import named_errors
from inl_core.inference.checkpoint_files import (
    MANIFEST,
    OPTIMIZER,
    PROGRESS,
    TRAINING_STATE,
    WEIGHTS,
    checkpoint_step,
    file_digest,
)
from inl_core.inference.tensor_files import first_nonfinite
from inl_core.model import IntegratorLanguageModel
from inl_core.training.checkpoint import TrainState, optimizer_state, state_tensors
from inl_core.training.distributed import ALONE, World
from inl_core.training.optimizers import Optimizers
from inl_core.training.retention import remove_checkpoint

_SYSTEM_ERROR = re.compile(r"os error (\d+)")


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold, as it was at one moment."""

    step: int
    weights: dict[str, Tensor]
    texts: dict[str, str]
    """The other files by name, which rank 0 writes."""
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    """The optimizer's tensors; none in a checkpoint that is not to be resumed."""

    @property
    def is_divided(self) -> bool:
        """Whether each process has only a part of the matrices."""
        return any(isinstance(tensor, DTensor) for tensor in self.weights.values())


def take_snapshot(
    state: TrainState,
    model: IntegratorLanguageModel,
    optimizers: Optimizers,
    documents: dict[str, str],
    stager: StateDictStager | None = None,
) -> Snapshot:
    """A copy of all that is to be saved, in the host's memory.

    Args:
        documents: the other files by name, config.json and tokenizer.json among them.
        stager: keeps the memory of its copies for the next snapshot; by default it is freed with this one.
    """
    tensors = {"weights": model.state_dict(), "optimizer": state_tensors(optimizer_state(model, optimizers))}
    return Snapshot(
        state.step,
        texts=documents | {PROGRESS: state.model_dump_json()},
        **(stager or StateDictStager()).stage(tensors),
    )


def write_snapshot(parent: Path, snapshot: Snapshot, writers: World = ALONE) -> Path:
    """Write parent/step-N whole or not at all.

    Args:
        writers: the processes that write together; of a model that is not divided, one.

    Raises:
        OSError: it could not be written by one of them (a full disk, say); what was there before is untouched.
    """
    final = parent / f"step-{snapshot.step:08d}"
    _write_whole(final, parent / f"{final.name}.tmp", snapshot, writers)
    return final


def save_weights(final: Path, model: IntegratorLanguageModel, documents: dict[str, str]) -> None:
    """Write a checkpoint without training state at `final`, whole or not at all: to evaluate, not to resume.

    Args:
        documents: as in `take_snapshot`.

    Raises:
        ArtefactError: a weight is NaN or infinite.
        OSError: it could not be written; what was there before is untouched.
    """
    if name := first_nonfinite(model.state_dict()):
        raise ArtefactError(f"{final}: not written, because {name} holds NaN or infinity")
    snapshot = Snapshot(checkpoint_step(final), model.state_dict(), documents)
    _write_whole(final, final.parent / f".{final.name}.tmp", snapshot, ALONE)


def _write_whole(final: Path, aside: Path, snapshot: Snapshot, writers: World) -> None:
    """Fill the directory `aside`, seal it and rename it to `final`; if anything fails, remove it."""
    try:
        writers.on_main(lambda: _make_empty(aside, snapshot))
        if snapshot.is_divided:
            _write_parts(aside, snapshot.weights, writers)
            _write_parts(aside / TRAINING_STATE, snapshot.optimizer, writers)
            own = f"shard-{writers.rank + 1:05d}-*.safetensors"
            written = writers.on_each(lambda: dict(_flushed(aside, path) for path in aside.rglob(own)))
        else:
            written = writers.on_each(lambda: _write_tensors(aside, snapshot))
        writers.on_main(
            lambda: _seal(aside, snapshot, {name: entry for part in written for name, entry in part.items()})
        )
        writers.on_main(lambda: _rename(aside, final))
    except BaseException:
        if writers.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _make_empty(aside: Path, snapshot: Snapshot) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if snapshot.optimizer:
        (aside / TRAINING_STATE).mkdir()


def _write_tensors(directory: Path, snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    """Write one file for the weights and one for the optimizer, side by side; their entries in the manifest.

    The same tensors give the same bytes. A checksum takes as long as writing what it is of, so the two overlap.
    """
    tensors = {WEIGHTS: snapshot.weights} | ({OPTIMIZER: snapshot.optimizer} if snapshot.optimizer else {})
    with ThreadPoolExecutor() as threads:
        return dict(threads.map(lambda name: _write_file(directory, name, tensors[name]), tensors))


def _write_file(directory: Path, name: str, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    path = directory / name
    with named_errors(path):
        path.touch()
        mode = path.stat().st_mode
        try:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
        except SafetensorError as error:
            if number := _SYSTEM_ERROR.search(str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
            raise
        path.chmod(mode)  # safetensors gives its file to the owner alone
    return _flushed(directory, path)


def _write_parts(directory: Path, tensors: dict[str, Tensor], writers: World) -> None:
    """Write this process's parts of the tensors, and its share of what every process has whole.

    Raises:
        OSError: one of the processes could not write its file; every process raises it.
    """
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=writers.control)
    except CheckpointException as error:
        reasons = [reason for reason, _ in error.failures.values()]
        raise next((reason for reason in reasons if isinstance(reason, OSError)), reasons[0]) from None


def _flushed(directory: Path, path: Path) -> tuple[str, dict[str, Any]]:
    """The manifest's entry, with size and checksum, of a file that has been written, once it is on the disk."""
    _sync(path)
    return path.relative_to(directory).as_posix(), {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _seal(directory: Path, snapshot: Snapshot, entries: dict[str, dict[str, Any]]) -> None:
    """Write the texts, and last the manifest, when all else is on the disk."""
    for name, text in snapshot.texts.items():
        _write_text(directory / name, text)
        entries |= [_flushed(directory, directory / name)]
    for path in filter(Path.is_dir, directory.iterdir()):
        _sync(path)
    files = dict(sorted(entries.items()))
    _write_text(directory / MANIFEST, json.dumps({"format": 1, "step": snapshot.step, "files": files}, indent=1))
    _sync(directory / MANIFEST)
    _sync(directory)


def _rename(aside: Path, final: Path) -> None:
    if final.exists():  # the same step saved again, say by a resumed run
        remove_checkpoint(final)
    aside.replace(final)
    _sync(final.parent)


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
