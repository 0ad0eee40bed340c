"""Causal attention inside documents by a loop in C++ (attention.cpp), rotary positions and grouped queries included.

- It reads queries, keys and values where the projection wrote them and computes only what a query can see. Kept for the
  backward pass: that product, the output, and one number a query and head.
- For CPUs, in single or double precision throughout; the library's attention is for anything else.
- Legend: B batch, S sequence, H query heads, K key-value heads, F head size.
"""

import ctypes
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inl_core.model.derivatives import OwnOperation
from inl_core.model.native import calls

_NUMBERS = ("threads", "batch", "length", "heads", "key_heads", "size", "tables")
_POINTERS = ("packed", "cosines", "sines", "first", "out", "log_sums", "grad_out", "grad_packed")


class Call(ctypes.Structure):
    """The same fields in the same order as attention.cpp's Attention."""

    _fields_ = calls.fields(_NUMBERS, ("scale",), _POINTERS)


class Given(NamedTuple):
    """What one call is given."""

    packed: Tensor
    """[queries | keys | values] (B, S, (H + 2K) F)"""
    cosines: Tensor | None
    """(1 or B, S, F/2), or None without rotation"""
    sines: Tensor | None
    first: Tensor | None
    """(B, S) int64: the first key a query sees; None is key 0"""
    heads: int
    key_heads: int


def attend(given: Given) -> Tensor:
    """The heads' outputs side by side, (B, S, H F)."""
    return PackedAttention.apply(*given)


class PackedAttention(OwnOperation):
    """(*Given) -> (B, S, H F)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """The output."""
        given = Given(*arguments)
        given = given._replace(packed=given.packed.contiguous())
        out, log_sums = forward(given)
        ctx.save_for_backward(*given[:4], out, log_sums)
        ctx.heads = given[4:]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the packed product."""
        *given, out, log_sums = ctx.saved_tensors
        return backward(Given(*given, *ctx.heads), out, log_sums, grad.contiguous()), *(None for _ in range(5))


def forward(given: Given) -> tuple[Tensor, Tensor]:
    """The output (B, S, H F), and log sum exp of each query's scores, (B, H, S)."""
    out, log_sums = results(given)
    _call("attend", given, out=out, log_sums=log_sums)
    return out, log_sums


def results(given: Given) -> tuple[Tensor, Tensor]:
    """Room for what `forward` gives."""
    (batch, length, width), heads = given.packed.shape, given.heads
    out = given.packed.new_empty(batch, length, heads * (width // (heads + 2 * given.key_heads)))
    return out, given.packed.new_empty(batch, heads, length)


def backward(given: Given, out: Tensor, log_sums: Tensor, grad: Tensor) -> Tensor:
    """The gradient of `packed`."""
    grad_packed = torch.empty_like(given.packed)
    _call("attend_back", given, out=out, log_sums=log_sums, grad_out=grad, grad_packed=grad_packed)
    return grad_packed


def _call(name: str, given: Given, **others: Tensor) -> None:
    _check(given)
    batch, length, width = given.packed.shape
    size = width // (given.heads + 2 * given.key_heads)
    if batch * length == 0:
        return
    call = Call(
        threads=torch.get_num_threads(),
        batch=batch,
        length=length,
        heads=given.heads,
        key_heads=given.key_heads,
        size=size,
        tables=0 if given.cosines is None else given.cosines.shape[0],
        scale=1 / math.sqrt(size),
    )
    tensors = zip(Given._fields[:4], given[:4], strict=True)
    calls.run(name, call, [*tensors, *others.items()], f"attention over {batch:,} x {length:,} tokens")


def _check(given: Given) -> None:
    """ValueError for what the loop, which trusts what it is told, would read beyond its end or misread."""
    (batch, length, width), heads = given.packed.shape, given.heads + 2 * given.key_heads
    if width % heads or given.heads % given.key_heads:
        raise ValueError(
            f"attention: {width} numbers a token are not {given.heads} queries and 2 x {given.key_heads} heads"
        )
    if given.cosines is not None and width // heads % 2:
        raise ValueError(f"attention: heads of {width // heads} numbers have no pairs to rotate")
    for name, tensor in (("cosines", given.cosines), ("sines", given.sines)):
        if tensor is None:
            continue
        shapes = [(rows, length, width // heads // 2) for rows in (1, batch)]
        if tuple(tensor.shape) not in shapes or tensor.dtype != given.packed.dtype:
            raise ValueError(f"attention: {name} is {tensor.dtype} {tuple(tensor.shape)}, and must be {shapes[0]}")
    first = given.first
    if first is not None and (first.dtype != torch.int64 or first.shape != (batch, length)):
        raise ValueError(f"attention: first is {first.dtype} {tuple(first.shape)}, and must be int64 {(batch, length)}")
