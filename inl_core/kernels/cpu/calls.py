"""Calling an operation in C++: one structure of numbers and addresses, filled in from tensors.

An operation trusts the sizes it is told, so its caller checks shapes and precisions before it comes here.
"""

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from inl_core.kernels.cpu.library import NAMES, library

_FEW_ROWS = 32


def run(
    name: str, call: Any, tensors: Iterable[tuple[str, Tensor | None]], product: str, dtype: torch.dtype, what: str
) -> None:
    """Fill in the tensors' addresses and the product's, and run the operation.

    Args:
        name: the function in the library, without its precision.
        call: the operation's structure (structures.py).
        tensors: each field's tensor, or None for no address.
        what: for the error message.

    Raises:
        MemoryError: there was not the memory for it.
    """
    found = library()
    assert found is not None, "operations in C++ are chosen only where the library is there"
    for field, tensor in tensors:
        if tensor is not None:
            assert tensor.is_contiguous()
            setattr(call, field, tensor.data_ptr())
    call.blas = found.blas(dtype, product)
    if not getattr(found.code, f"{name}_{NAMES[dtype]}")(ctypes.byref(call)):
        raise MemoryError(f"not enough memory, or no matrix product of the library's, for {what}")


def num_threads(rows: int) -> int:
    """One for few rows of work, else torch's: a team of another size ends threads, and the kernels made for them."""
    return torch.get_num_threads() if rows >= _FEW_ROWS else 1


def check_shapes(
    what: str, tensors: dict[str, Tensor | None], wanted: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> None:
    """ValueError for a tensor that the operation would read beyond its end or misread."""
    for name, tensor in tensors.items():
        if tensor is not None and (tuple(tensor.shape) != wanted[name] or tensor.dtype != dtype):
            raise ValueError(
                f"{what}: {name} is {tensor.dtype} {tuple(tensor.shape)}, and must be {dtype} {wanted[name]}"
            )
