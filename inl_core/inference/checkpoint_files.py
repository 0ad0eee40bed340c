"""The files of a checkpoint: what its records must hold, and whether each file is the one that was saved.

    step-00000500/  config.json  tokenizer.json  recipe.yaml  model.safetensors  training_state/  manifest.json

- Several processes that divided a model write shard-00001-... and so on in the place of model.safetensors, and of
  training_state/optimizer.safetensors (tensor_sets.py).
- The manifest names every file with its size and SHA-256; no other file is read. `training/checkpoint.py` writes it
  last, which seals the checkpoint.
- Evaluation does not read the optimizer. To be quick, it checks only the sizes of the files in `training_state`.
- A checkpoint may be copied to any name, but one called step-N must be of step N.
- Torch is imported only where the numbers in a file are looked at, so that `inl run-status` is quick.
"""

import hashlib
import os
import re
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from inl_core.errors import ArtefactError
from inl_core.files import entry_path, is_directory, open_regular, read_record

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST, CONFIG, WEIGHTS, TOKENIZER = "manifest.json", "config.json", "model.safetensors", "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TRAINING_STATE = "training_state"
OPTIMIZER, PROGRESS = f"{TRAINING_STATE}/optimizer.safetensors", f"{TRAINING_STATE}/progress.json"

Purpose = Literal["any", "evaluate", "resume"]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Format = Annotated[int, Field(ge=1, le=1)]
Scalar = str | int | float | bool | None

_STEP_NAME = re.compile("step-([0-9]+)")
_MOST_NAMED = 8
"""Runs that a message names, at most."""


class Record(BaseModel):
    """A JSON record of a checkpoint. No value is converted to another type; keys of later versions are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class FileEntry(Record):
    """One file of a manifest."""

    bytes: Count
    sha256: Digest


class CheckpointManifest(Record):
    """manifest.json, which is written last: a directory without it is not a checkpoint."""

    format: Format
    step: Count
    files: Annotated[dict[str, FileEntry], Field(max_length=10_000)]


class CheckpointConfig(Record):
    """config.json: what the weights are and where they come from."""

    format: Format
    model: dict[str, Any]
    """The model section of a recipe, complete; `read_model_config` validates it."""
    special_tokens: dict[str, Count] = {}
    bos_id: Count | None = None
    eos_id: Count | None = None
    tokenizer: str | None
    """The tokenizer's fingerprint; null where the weights came without a tokenizer."""
    sequence_length: Annotated[int, Field(gt=0, lt=2**31)] | None = None
    """Tokens of a training row."""
    data_directory: Annotated[str, StringConstraints(pattern=r"^[^\x00]+$")] | None = None
    """Where the data was, as an absolute path (relative to the working directory in older checkpoints)."""
    data_directory_from_run: Annotated[str, StringConstraints(pattern=r"^[^\x00]+$")] | None = None
    """The same from the run's directory, for projects that were moved."""
    provenance: list[dict[str, Scalar | list[Scalar]]] = []
    """The trainings and imports that made the weights, oldest first."""


def file_digest(path: Path) -> str:
    """SHA-256 of a regular file, as hex; ArtefactError when it cannot be read."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's name; 0 where it has another name."""
    found = _STEP_NAME.fullmatch(path.name)
    return int(found[1]) if found else 0


def list_checkpoints(parent: Path) -> list[Path]:
    """The directories named step-N below `parent`, by step, valid or not."""
    found = [path for path in parent.glob("step-*") if _STEP_NAME.fullmatch(path.name) and is_directory(path)]
    return sorted(found, key=checkpoint_step)


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is meant to be a checkpoint, intact or not."""
    return bool(_STEP_NAME.fullmatch(path.name)) or any(os.path.lexists(path / name) for name in (WEIGHTS, CONFIG))


def check_exists(path: Path, runs: Path = Path("runs")) -> None:
    """Refuse what a user named as a run or a checkpoint, where there is no directory; ArtefactError."""
    if not os.path.lexists(path):
        raise ArtefactError(f"{path}: no such run or checkpoint{nearest_run(path, runs)}")
    if not is_directory(path):
        what = "a file" if path.exists() else "a link that leads nowhere"
        raise ArtefactError(f"{path}: is {what}, not a run or a checkpoint{nearest_run(path, runs)}")


def nearest_run(path: Path, runs: Path = Path("runs")) -> str:
    """The end of a message about a path that is no run: which one may be meant, or which ones there are."""
    try:
        names = sorted(entry.name for entry in runs.iterdir() if is_directory(entry) and entry != path)
    except OSError:
        return ""
    lower = {name.lower(): name for name in names}
    if near := get_close_matches(path.name.lower(), lower, n=1):
        return f"; did you mean {runs / lower[near[0]]}?"
    more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
    return f"; {runs}/ holds {', '.join(names[:_MOST_NAMED])}{more}" if names else ""


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoint at `path`, or all those of the run at `path`; ArtefactError when there is none."""
    check_exists(path)
    if is_checkpoint(path):
        return [path]
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not found:
        raise ArtefactError(f"{path}: holds no checkpoint")
    return found


def read_config(path: Path) -> CheckpointConfig:
    """The config.json of the checkpoint at `path`; ArtefactError names what is wrong with it."""
    return read_record(path / CONFIG, CheckpointConfig)


def read_manifest(path: Path) -> CheckpointManifest:
    """The manifest.json of the checkpoint at `path`; ArtefactError when it is damaged."""
    file = path / MANIFEST
    try:
        return read_record(file, CheckpointManifest)
    except ArtefactError as error:
        reason = str(error).removeprefix(f"{file}: ").removeprefix("damaged: ")
        raise ArtefactError(f"{file}: damaged: {reason}") from None


def verify_checkpoint(
    path: Path, *, purpose: Purpose = "any", contents: bool = True, share: tuple[int, int] = (0, 1)
) -> CheckpointManifest:
    """Check that a checkpoint is as it was saved, and return its manifest.

    Args:
        purpose: "evaluate" does not read the contents of `training_state`; "resume" demands that it is there.
        contents: False checks only that the files are there and have their sizes, not checksums or NaN.
        share: (i, n) reads the contents of one file in n, from the i-th largest on, so that n processes, with i from 0
            to n - 1, read every file once. The checkpoint is intact if none of them raises.

    Raises:
        ArtefactError: names the first thing that is wrong.
    """
    if not is_directory(path):
        raise ArtefactError(f"{path}: no such checkpoint")
    if not os.path.lexists(path / MANIFEST):
        if _STEP_NAME.fullmatch(path.name):
            raise ArtefactError(f"{path}: has no {MANIFEST}, so the save never finished; use an earlier checkpoint")
        raise ArtefactError(
            f"{path}: has no {MANIFEST}, so it is no whole checkpoint; name a run, or a checkpoint in it"
        )
    try:
        manifest = read_manifest(path)
        if _STEP_NAME.fullmatch(path.name) and checkpoint_step(path) != manifest.step:
            raise ArtefactError(
                f"{path}: its {MANIFEST} says step {manifest.step}, so the directory was renamed; call it "
                f"step-{manifest.step:08d}, or anything that does not begin with step-"
            )
        first, processes = share
        by_size = sorted(manifest.files, key=lambda name: manifest.files[name].bytes, reverse=True)
        own = set(by_size[first::processes]) if contents else set()
        for name, entry in manifest.files.items():
            if PurePosixPath(name).as_posix() != name:
                raise ArtefactError(f"{path / MANIFEST}: damaged: {name!r} is not a plain name of a file")
            with_digest = name in own and (purpose != "evaluate" or not _is_training_state(name))
            _check_file(entry_path(path, name), entry, with_digest=with_digest)
        _check_complete(path, manifest, purpose)
        for name in filter(_holds_tensors, manifest.files):
            if name in own and (purpose == "resume" or not _is_training_state(name)):
                _check_numbers(path / name, manifest.step)
    except ArtefactError as error:
        raise ArtefactError(f"{error}; use an earlier checkpoint") from None
    return manifest


def _holds_tensors(name: str) -> bool:
    """Whether a file of a manifest is one that is read for tensors: of the checkpoint itself or of `training_state`."""
    return name.endswith(".safetensors") and str(PurePosixPath(name).parent) in (".", TRAINING_STATE)


def _is_training_state(name: str) -> bool:
    return name.startswith(f"{TRAINING_STATE}/")


def _check_file(path: Path, entry: FileEntry, *, with_digest: bool) -> None:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.bytes:
                raise ArtefactError(f"{path}: {size} bytes where the manifest says {entry.bytes}, truncated or changed")
            if with_digest and hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                raise ArtefactError(f"{path}: its checksum is wrong, the file is damaged")
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read: {error.strerror or error}") from None


def _check_numbers(path: Path, step: int) -> None:
    """Refuse NaN, infinity and what is impossible after `step` steps; one tensor at a time is in memory."""
    from inl_core.inference.tensor_files import first_nonfinite, open_tensors, read_tensor

    with open_tensors(path) as tensors:
        for name in tensors.keys():  # noqa: SIM118  (not a mapping)
            tensor = read_tensor(path, name, tensors)
            if first_nonfinite({name: tensor}):
                raise ArtefactError(f"{path}: {name} holds NaN or infinity, the training had failed")
            if path.parent.name == TRAINING_STATE and (problem := _impossible(name, tensor, step)):
                raise ArtefactError(f"{path}: {name} {problem}, the file is damaged")


def _impossible(name: str, tensor: "Tensor", step: int) -> str | None:
    """Why a tensor of the optimizer's state cannot be right after `step` steps; None if it can be."""
    if name.endswith(".exp_avg_sq") and bool((tensor.float() < 0).any()):
        return "is a mean of squares and holds negative numbers"
    # Updates that were skipped make the count smaller than the run's. A new optimizer has a count of 1, because torch
    # makes its moments by a step that changes nothing.
    if name.endswith(".step"):
        for count in tensor.double().flatten().tolist():
            if not (0 <= count <= max(step, 1) and count.is_integer()):
                return f"counts {count:,g} updates where the checkpoint is of step {step:,}"
    return None


def _check_complete(path: Path, manifest: CheckpointManifest, purpose: Purpose) -> None:
    """Refuse a checkpoint with a file that somebody reads, but that the manifest does not name."""
    stored = [_is_training_state(name) for name in manifest.files if _holds_tensors(name)]
    needed = {CONFIG} | ({PROGRESS} if purpose == "resume" else set())
    needed |= set() if False in stored else {WEIGHTS}
    needed |= {OPTIMIZER} if purpose == "resume" and True not in stored else set()
    needed |= {
        name
        for name in (TOKENIZER, TOKENIZER_CONFIG, "recipe.yaml", OPTIMIZER, PROGRESS)
        if os.path.lexists(path / name)
    }
    for pattern in ("*.safetensors", f"{TRAINING_STATE}/*.safetensors"):
        needed |= {file.relative_to(path).as_posix() for file in path.glob(pattern)}
    if CONFIG in manifest.files and read_config(path).tokenizer is not None:
        needed.add(TOKENIZER)
    missing = sorted(needed - manifest.files.keys())
    if missing and purpose == "resume" and not os.path.lexists(path / TRAINING_STATE):
        raise ArtefactError(f"{path}: holds no training state, so it can be evaluated but not resumed")
    if missing:
        raise ArtefactError(
            f"{path / MANIFEST}: does not name {missing[0]}, so nothing says whether that file is whole"
        )
