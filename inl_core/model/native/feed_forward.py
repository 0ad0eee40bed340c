"""The gated feed-forward by a loop in C++ (feed_forward.cpp), with the RMS norm before it where there is one.

- Tiles of tokens go from one product to the other in each thread's cache; elementwise work is one pass between them.
- Kept for the backward pass: x and [gate | up].
- Every thread sums the weights' gradients for itself, which has to stay small: `supports` says where it does.
- Legend: N tokens, D d_model, H hidden width.
"""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inl_core.model.derivatives import OwnOperation, is_plain
from inl_core.model.native import calls
from inl_core.model.native.build import library

_TILE_BYTES = 640 * 1024
"""Of the four (n, H) tensors of a tile."""
_LEAST_TILE, _LARGEST_TILE = 128, 256
"""Sums of the weights' gradients are read and written once a tile: with fewer rows that takes longer than products."""
_NUMBERS = ("threads", "rows", "dim", "hidden", "tile")
_POINTERS = (
    *("x", "norm", "up", "down", "gate_up", "normed", "out", "grad_out", "grad_normed"),
    *("grad_x", "grad_norm", "grad_up", "grad_down"),
)


class Call(ctypes.Structure):
    """The same fields in the same order as feed_forward.cpp's FeedForward."""

    _fields_ = calls.fields(_NUMBERS, ("eps",), _POINTERS)


class Given(NamedTuple):
    """What one call is given."""

    x: Tensor
    """(N, D)"""
    norm: Tensor | None
    """The RMS norm's weight (D,), or None without a norm."""
    up: Tensor
    """W_up, (2 H, D): gate, then up."""
    down: Tensor
    """W_down, (D, H)"""
    eps: float = 0.0


def supports(given: Given) -> bool:
    """Whether the loop takes these tensors; the first call of a machine compiles it."""
    if torch.compiler.is_compiling() or is_plain() or given.x.shape[0] < calls.FEWEST_ROWS:
        return False
    has_room = calls.sums_bytes(given.up, given.down) <= calls.MOST_SUMS_BYTES
    return has_room and calls.takes(given.x, given.norm, given.up, given.down) and library() is not None


def feed_forward(given: Given, *, wants_norm: bool = False) -> tuple[Tensor, Tensor | None]:
    """(silu(gate) * up) W_down^T of [gate | up] = norm(x) W_up^T, (N, D), and norm(x) where it is wanted."""
    assert given.norm is not None or not wants_norm
    return GatedFeedForward.apply(wants_norm, torch.is_grad_enabled(), *given)


class GatedFeedForward(OwnOperation):
    """(whether the norm is wanted, whether to differentiate, *Given) -> (N, D), and norm(x) or None."""

    @staticmethod
    def forward(ctx: Any, wants_norm: bool, differentiate: bool, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        """The product, and the norm."""
        ctx.set_materialize_grads(False)
        given = Given(*arguments)
        given = given._replace(x=given.x.contiguous(), up=given.up.contiguous(), down=given.down.contiguous())
        rows, hidden = given.x.shape[0], given.down.shape[1]
        gate_up = given.x.new_empty(rows, 2 * hidden) if differentiate and any(ctx.needs_input_grad) else None
        out, normed = torch.empty_like(given.x), torch.empty_like(given.x) if wants_norm else None
        _call("feed_forward", given, gate_up=gate_up, normed=normed, out=out)
        ctx.save_for_backward(*given[:4], gate_up)
        ctx.eps = given.eps
        return out, normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the weights."""
        *saved, gate_up = ctx.saved_tensors
        given = Given(*saved, eps=ctx.eps)
        found = [None if tensor is None else torch.empty_like(tensor) for tensor in given[:4]]
        if given.x.shape[0] == 0:
            return None, None, *(None if tensor is None else tensor.zero_() for tensor in found), None
        grad = torch.zeros_like(given.x) if grad is None else grad.contiguous()
        of_normed = None if of_normed is None else of_normed.contiguous()
        written = dict(zip(("grad_x", "grad_norm", "grad_up", "grad_down"), found, strict=True))
        _call("feed_back", given, gate_up=gate_up, grad_out=grad, grad_normed=of_normed, **written)
        return None, None, *found, None


def _call(name: str, given: Given, **others: Tensor | None) -> None:
    (rows, dim), hidden = given.x.shape, given.down.shape[1]
    wanted = {"norm": (dim,), "up": (2 * hidden, dim), "down": (dim, hidden)}
    calls.check_shapes("a feed-forward", {name: getattr(given, name) for name in wanted}, wanted)
    if rows == 0:
        return
    tile = _TILE_BYTES // (4 * hidden * given.x.element_size())
    call = Call(
        threads=calls.num_threads(rows),
        rows=rows,
        dim=dim,
        hidden=hidden,
        tile=min(_LARGEST_TILE, max(_LEAST_TILE, tile)),
        eps=given.eps,
    )
    tensors = [(field, value) for field, value in given._asdict().items() if field != "eps"]
    calls.run(name, call, [*tensors, *others.items()], f"the feed-forward of {rows:,} tokens")
