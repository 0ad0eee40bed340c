"""Handing tensors to the operations in C++: which ones they take, and their addresses."""

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from inl_core.model.by_rows import matrix_dtype
from inl_core.model.native.build import NAMES, library

MOST_SUMS_BYTES = 64 * 2**20
"""At most this for all threads' own sums of weights' gradients; beyond it one product over all tokens is as fast."""


def takes(*tensors: Tensor | None) -> bool:
    """Whether all are real memory of a CPU, in one of the library's precisions and not under autocast; None counts not.

    It does not ask whether there is a library.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    dtype = given[0].dtype
    are_real = all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.dtype == dtype
        for tensor in given
    )
    return are_real and dtype in NAMES and matrix_dtype(given[0]) == dtype


def run(name: str, call: ctypes.Structure, tensors: Iterable[tuple[str, Tensor | None]], what: str) -> None:
    """Fill in the tensors' addresses and the BLAS library's, and run the operation in the first one's precision.

    Raises:
        MemoryError: it had not the memory for `what`.
    """
    found, dtype = library(), None
    assert found is not None
    for field, tensor in tensors:
        if tensor is not None:
            assert tensor.is_contiguous()
            dtype = dtype or tensor.dtype
            setattr(call, field, tensor.data_ptr())
    assert dtype is not None
    call.blas = found.blas(dtype)  # type: ignore[attr-defined]
    if not getattr(found.code, f"{name}_{NAMES[dtype]}")(ctypes.byref(call)):
        raise MemoryError(f"no memory for {what}")


def sums_bytes(*weights: Tensor) -> int:
    """What all threads' own sums of the gradients of these weights take."""
    return torch.get_num_threads() * sum(weight.numel() * weight.element_size() for weight in weights)


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """IndexError for a token that the operations, which trust what they are told, would read beyond the logits for."""
    if targets.numel() and int(targets.max()) >= vocabulary:
        raise IndexError(f"target {int(targets.max())} is out of bounds for a vocabulary of {vocabulary}")


def num_threads(rows: int, fewest: int = 32) -> int:
    """Threads for so many rows of work: torch's, but each with something to do."""
    return min(torch.get_num_threads(), max(1, rows // fewest))
