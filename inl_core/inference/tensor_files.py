"""Safetensors files, whose header is checked before a tensor is read or memory is taken for one.

with open_tensors(path) as tensors:                       # safetensors' own handle
    ...
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from inl_core.errors import ArtefactError
from inl_core.files import open_regular, parse_json_object

HEADER_LIMIT = 16 << 20
"""Bytes that a header may have. Ten thousand tensors need a header of one megabyte."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls each type."""
HALF = {"BF16": "bfloat16", "F16": "float16"}
"""Types of 16 bits, as safetensors calls them, and as torch does."""


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """The tensors of a safetensors file, mapped into memory: a tensor is read when it is asked for.

    Raises:
        ArtefactError: it is missing, not a regular file, or not a whole safetensors file.
    """
    try:
        _check_header(path)
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ArtefactError(
            f"{path}: not a whole safetensors file ({error}); fetch it again, or convert it from another format"
        ) from None
    with opened as tensors:
        yield tensors


def read_shapes(tensors: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of an open file, by name."""
    return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def read_tensor(path: Path, name: str, tensors: Any) -> Tensor:
    """One tensor of an open file; ArtefactError where torch lacks its type."""
    try:
        return tensors.get_tensor(name)
    except (SafetensorError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ArtefactError(f"{path}: {name} cannot be read ({error})") from None


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, or None."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            extremes = torch.stack(tensor.detach().aminmax())  # NaN if any number is; isfinite takes 80 times as long
            if not bool(extremes.isfinite().all()):
                return name
    return None


def _check_header(path: Path) -> None:
    """Bound the header before safetensors takes memory for it, and refuse names that stand there twice."""
    with open_regular(path) as file:
        length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
        if length > min(HEADER_LIMIT, size):
            raise SafetensorError(f"a header of {length:,} bytes in a file of {size:,}")
        header = file.read(length)
    try:
        parse_json_object(header.decode("utf-8"), f"{path}: not a whole safetensors file: its header")
    except UnicodeDecodeError:
        raise ArtefactError(f"{path}: not a whole safetensors file: its header is not UTF-8 text") from None
