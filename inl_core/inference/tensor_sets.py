"""The tensors of a directory: each whole in one file, or in parts in a file of each process that wrote them.

    check_tensors(checkpoint, model.state_dict(), "config.json")    # the model may be on the meta device
    read_tensors(checkpoint, model.state_dict())                    # in place

- A checkpoint's own directory holds the weights, its `training_state` the tensors of the optimizer.
- Parts are written by torch.distributed.checkpoint: safetensors files whose metadata say where in the whole tensor each
  of their tensors begins. A tensor of which this process has a part (a DTensor) gets that part, however many processes
  wrote it; any other gets all of it.
- Importing torch.distributed.checkpoint takes a second, so whole tensors are read without it.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from inl_core.errors import ArtefactError
from inl_core.files import parse_json_object
from inl_core.inference.tensor_files import DTYPES, HALF, open_tensors, read_tensor

_PARTS, _BEGIN = "DCP_SHARDING_INFO", "saved_offsets"
"""What torch.distributed.checkpoint calls the entry in a file's metadata, and the place of a part in it."""


@dataclass
class Entry:
    """A tensor as its files describe it."""

    shape: tuple[int, ...]
    dtype: str
    size: int = 0
    """Numbers in all of its parts."""


def tensor_paths(directory: Path) -> list[Path]:
    """The files that hold a directory's tensors; where there are none, the one that should be there.

    A single file may be named in the place of a directory, here and below.
    """
    if directory.suffix == ".safetensors":
        return [directory]
    return sorted(directory.glob("*.safetensors")) or [directory / "model.safetensors"]


def read_entries(directory: Path) -> dict[str, Entry]:
    """The tensors of a directory by name.

    Raises:
        ArtefactError: a file is missing or damaged, or a part of a tensor is.
    """
    entries: dict[str, Entry] = {}
    for path in tensor_paths(directory):
        for name, begin, shape, dtype in _read_parts(path):
            end = tuple(map(sum, zip(begin, shape, strict=True)))
            entry = entries.setdefault(name, Entry(end, dtype))
            if len(entry.shape) != len(end) or entry.dtype != dtype:
                raise ArtefactError(f"{path}: {name} is another tensor than in the files beside it")
            entry.shape = tuple(map(max, zip(entry.shape, end, strict=True)))
            entry.size += math.prod(shape)
    for name, entry in entries.items():
        if entry.size != math.prod(entry.shape):
            raise ArtefactError(f"{directory}: a part of {name} is missing")
    return entries


def check_tensors(directory: Path, expected: Mapping[str, Tensor], other: str, *, may_be_half: bool = False) -> None:
    """Refuse a directory whose tensors do not have exactly the expected names, shapes and types.

    Args:
        expected: tensors by name, whose values are not used, so that they may be on the meta device.
        other: the file or object that asks for these tensors, for the message.
        may_be_half: take numbers of 16 bits where those of 32 are expected; `read_tensors` widens them.

    Raises:
        ArtefactError: names the first tensor that does not fit, or as `read_entries` does.
    """
    entries = read_entries(directory)
    for name in (*expected, *entries):
        if name not in entries:
            problem = f"{name} is missing"
        elif name not in expected:
            problem = f"{name} belongs to another model"
        elif (shape := entries[name].shape) != tuple(expected[name].shape):
            problem = f"size mismatch: {name} has the shape {list(shape)}, not {list(expected[name].shape)}"
        elif (kind := entries[name].dtype) != (wanted := DTYPES[expected[name].dtype]) and not (
            may_be_half and wanted == "F32" and kind in HALF
        ):
            problem = f"{name} is {kind}, not {wanted}"
        else:
            continue
        raise ArtefactError(f"{_place(directory)}: does not fit {other} ({problem})")


def read_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors, in place, from the directory's of the same names, which must have been checked.

    Raises:
        ArtefactError: a file was damaged since.
    """
    paths = tensor_paths(directory)
    if len(paths) > 1 or any(hasattr(tensor, "to_local") for tensor in tensors.values()):  # which a DTensor has
        _read_parts_into(directory, tensors)
        return
    with open_tensors(paths[0]) as file:
        for name, tensor in tensors.items():
            tensor.copy_(read_tensor(paths[0], name, file))


def _read_parts(path: Path) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], str]]:
    """Name, begin in the whole tensor, shape and type of each tensor in a file."""
    with open_tensors(path) as file:
        text = (file.metadata() or {}).get(_PARTS)
        parts = None if text is None else parse_json_object(text, f"{path}: damaged: {_PARTS}")
        for name in file.keys():  # noqa: SIM118  (not a mapping)
            part = file.get_slice(name)
            shape = tuple(part.get_shape())
            begin = (0,) * len(shape) if parts is None else _begin(parts.get(name))
            if begin is None or len(begin) != len(shape):
                raise ArtefactError(f"{path}: damaged: nothing says where its part of {name} belongs")
            yield name, begin, shape, part.get_dtype()


def _begin(part: Any) -> tuple[int, ...] | None:
    begin = part.get(_BEGIN) if isinstance(part, dict) else None
    if isinstance(begin, list) and all(type(number) is int and 0 <= number < 2**63 for number in begin):
        return tuple(begin)
    return None


def _read_parts_into(directory: Path, tensors: dict[str, Tensor]) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        with warnings.catch_warnings(action="ignore"):  # torch says that each process reads for itself
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise ArtefactError(f"{_place(directory)}: cannot be read ({reason})") from None


def _place(directory: Path) -> Path:
    """The file, where there is one alone."""
    paths = tensor_paths(directory)
    return paths[0] if len(paths) == 1 else directory
