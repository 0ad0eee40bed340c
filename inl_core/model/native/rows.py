"""What happens to each token by itself, in C++ (rows.cpp): RMS norm and cross-entropy, one pass over memory each.

Legend: N tokens, D d_model, V vocabulary size. All tensors are contiguous, and as `calls.takes` wants them.
"""

import ctypes

import torch
from torch import Tensor

from inl_core.model.native import calls
from inl_core.model.native.build import library

_POINTERS = ("x", "weight", "grad", "out", "grad_x", "grad_weight", "targets")


class Call(ctypes.Structure):
    """The same fields in the same order as rows.cpp's Rows."""

    _fields_ = calls.fields(("threads", "rows", "dim"), ("eps",), _POINTERS)


def supports(*tensors: Tensor | None) -> bool:
    """Whether the operations take these tensors; a compiler fuses such work itself."""
    return not torch.compiler.is_compiling() and calls.takes(*tensors) and library() is not None


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight, x (..., D)."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _call("norm", x, eps, weight=weight, out=out)
    return out


def norm_back(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    x, grad_weight = x.contiguous(), torch.zeros_like(weight)
    grad_x = torch.empty_like(x)
    _call("norm_back", x, eps, weight=weight, grad=grad.contiguous(), grad_x=grad_x, grad_weight=grad_weight)
    return grad_x, grad_weight


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy in nats of each target (N,), 0 where that is negative; logits (N, V) become its gradient."""
    calls.check_targets(targets, *logits.shape)
    losses = logits.new_empty(len(logits))
    _call("entropy", logits, grad_x=logits, out=losses, targets=targets)
    return losses


def _call(name: str, x: Tensor, eps: float = 0.0, **others: Tensor) -> None:
    rows = x.numel() // x.shape[-1]
    if rows == 0:
        return
    call = Call(threads=calls.num_threads(rows), rows=rows, dim=x.shape[-1], eps=eps)
    calls.run(name, call, [("x", x), *others.items()], f"{name} of {rows:,} tokens")
