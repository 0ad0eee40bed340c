"""A matrix product over all tokens by a loop in C++ (projection.cpp), with the RMS norm before and the bias after it.

- oneDNN's kernel on tiles of tokens is faster than the library's product of all of them (docs/performance.md).
- Kept for the backward pass: x, and not its norm.
- Legend: N tokens, K inputs, O outputs.
"""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inl_core.model.derivatives import OwnOperation
from inl_core.model.native import calls
from inl_core.model.native.build import library

_TILE_ROWS = 256
_NUMBERS = ("threads", "rows", "inputs", "outputs", "tile")
_POINTERS = ("x", "norm", "weight", "bias", "out", "grad_out", "grad_x", "grad_norm", "grad_weight", "grad_bias")


class Call(ctypes.Structure):
    """The same fields in the same order as projection.cpp's Projection."""

    _fields_ = calls.fields(_NUMBERS, ("eps",), _POINTERS)


class Given(NamedTuple):
    """What one call is given."""

    x: Tensor
    """(N, K)"""
    norm: Tensor | None
    """The RMS norm's weight (K,), or None without a norm."""
    weight: Tensor
    """W, (O, K)"""
    bias: Tensor | None
    """(O,)"""
    eps: float = 0.0


def supports(given: Given) -> bool:
    """Whether the loop takes these tensors; the first call of a machine compiles it."""
    if torch.compiler.is_compiling() or given.x.shape[0] < calls.FEWEST_ROWS:
        return False
    has_room = calls.sums_bytes(given.weight) <= calls.MOST_SUMS_BYTES
    return has_room and calls.takes(*given[:4]) and (found := library()) is not None and found.has_brgemm(given.x.dtype)


def project(given: Given) -> Tensor:
    """norm(x) W^T + bias, (N, O)."""
    return Projected.apply(*given)


class Projected(OwnOperation):
    """(*Given) -> (N, O)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """The product."""
        given = Given(*arguments)
        given = given._replace(x=given.x.contiguous(), weight=given.weight.contiguous())
        out = given.x.new_empty(given.x.shape[0], given.weight.shape[0])
        _call("project", given, out=out)
        ctx.save_for_backward(*given[:4])
        ctx.eps = given.eps
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, of the norm's weight, of W and of the bias."""
        given = Given(*ctx.saved_tensors, eps=ctx.eps)
        make = torch.empty_like if given.x.shape[0] else torch.zeros_like
        found = [None if tensor is None else make(tensor) for tensor in given[:4]]
        names = ("grad_x", "grad_norm", "grad_weight", "grad_bias")
        _call("project_back", given, grad_out=grad.contiguous(), **dict(zip(names, found, strict=True)))
        return *found, None


def _call(name: str, given: Given, **others: Tensor | None) -> None:
    (rows, inputs), outputs = given.x.shape, given.weight.shape[0]
    wanted = {"norm": (inputs,), "weight": (outputs, inputs), "bias": (outputs,)}
    calls.check_shapes("a product", {name: getattr(given, name) for name in wanted}, wanted)
    if rows == 0:
        return
    call = Call(
        threads=calls.num_threads(rows), rows=rows, inputs=inputs, outputs=outputs, tile=_TILE_ROWS, eps=given.eps
    )
    tensors = zip(Given._fields[:4], given[:4], strict=True)
    calls.run(name, call, [*tensors, *others.items()], f"a product of {rows:,} x {inputs:,} by {outputs:,} numbers")
