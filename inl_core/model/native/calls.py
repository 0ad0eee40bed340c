"""Handing tensors to the operations in C++: which ones they take, and their addresses."""

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inl_core.model.by_rows import matrix_dtype
from inl_core.model.native.build import NAMES, Blas, failure, library

MOST_SUMS_BYTES = 64 * 2**20
"""At most this for all threads' own sums of weights' gradients; beyond it one product over all tokens is as fast."""

FEWEST_ROWS = 64
"""Fewer are for the library: an operation turns whole weights before it begins."""
_FEW_ROWS = 32


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


def fields(numbers: Sequence[str], doubles: Sequence[str], pointers: Sequence[str]) -> tuple[tuple[str, Any], ...]:
    """The fields of a call's structure: numbers, doubles, what the products are made with, addresses."""
    of_type = ((numbers, ctypes.c_int64), (doubles, ctypes.c_double), (("blas",), Blas), (pointers, ctypes.c_void_p))
    return tuple((name, kind) for names, kind in of_type for name in names)


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
        raise MemoryError(f"no memory, or no kernel of the library's, for {what}")


def sums_bytes(*weights: Tensor) -> int:
    """What all threads' own sums of the gradients of these weights take."""
    return torch.get_num_threads() * sum(weight.numel() * weight.element_size() for weight in weights)


def check_shapes(what: str, found: dict[str, Tensor | None], wanted: dict[str, tuple[int, ...]]) -> None:
    """ValueError for what an operation, which trusts the sizes it is told, would read beyond its end."""
    for name, tensor in found.items():
        if tensor is not None and tuple(tensor.shape) != wanted[name]:
            raise ValueError(f"{what}: {name} is {tuple(tensor.shape)}, and must be {wanted[name]}")


def check_targets(targets: Tensor, rows: int, vocabulary: int) -> None:
    """ValueError or IndexError for targets that are not a token of the vocabulary, or negative, for each row."""
    if targets.dtype != torch.int64 or targets.device.type != "cpu" or tuple(targets.shape) != (rows,):
        found = f"{targets.dtype} {tuple(targets.shape)} on {targets.device}"
        raise ValueError(f"targets are {found}, and must be torch.int64 {(rows,)} on a CPU")
    if rows and int(targets.max()) >= vocabulary:
        raise IndexError(f"target {int(targets.max())} is out of bounds for a vocabulary of {vocabulary}")


def describe(*, is_compiled: bool) -> str:
    """What a plan says of this machine's operations.

    Args:
        is_compiled: blocks are compiled; of theirs, attention alone is in C++ then, and the integrator.
    """
    found = library()
    if found is None:
        return f"torch's; those in C++ need a compiler, and a torch with MKL and GNU's OpenMP{failure()}"
    has_brgemm = found.has_brgemm(torch.float32)
    products = "products, " if has_brgemm else ""
    which = "attention and loss" if is_compiled else f"attention, {products}feed-forward, norms and loss"
    return f"{which} in C++, by {'oneDNN' if has_brgemm else 'MKL'}'s product"


def num_threads(rows: int) -> int:
    """One for few rows of work, else torch's: a team of another size ends threads, and the kernels made for them."""
    return torch.get_num_threads() if rows >= _FEW_ROWS else 1
