"""The cross-entropy over a vocabulary whose head is small, by a loop in C++ (head.cpp), with its gradients.

Legend: N tokens, R width of the head, V vocabulary size.
"""

import ctypes

import torch
from torch import Tensor

from inl_core.model.native import calls
from inl_core.model.native.build import library

_TILE_BYTES = 512 * 1024
"""Of a tile's logits, in each thread's cache."""
_LEAST_TILE = 64
_POINTERS = ("z", "weight", "losses", "grad_z", "grad_weight", "targets")


class Call(ctypes.Structure):
    """The same fields in the same order as head.cpp's Head."""

    _fields_ = calls.fields(("threads", "rows", "dim", "vocabulary", "tile"), (), _POINTERS)


def supports(z: Tensor, weight: Tensor) -> bool:
    """Whether the loop takes these tensors: a tile's logits and each thread's sums of the head's gradient are small."""
    if torch.compiler.is_compiling():
        return False
    is_small = _LEAST_TILE * weight.shape[0] * weight.element_size() <= 4 * _TILE_BYTES
    has_room = is_small and calls.sums_bytes(weight) <= calls.MOST_SUMS_BYTES
    return has_room and calls.takes(z, weight) and library() is not None


def losses(z: Tensor, weight: Tensor, targets: Tensor, grad_z: Tensor | None, grad_weight: Tensor | None) -> Tensor:
    """The cross-entropy in nats of each token, 0 where its target is negative.

    Args:
        z: (N, R).  weight: W (V, R).  targets: (N,).
        grad_z: room for the gradient of z by the sum of the losses, or None.
        grad_weight: room for that of W, or None.
    """
    z, weight, targets = z.contiguous(), weight.contiguous(), targets.contiguous()
    (rows, dim), vocabulary = z.shape, weight.shape[0]
    calls.check_shapes("the loss", {"weight": weight}, {"weight": (vocabulary, dim)})
    calls.check_targets(targets, rows, vocabulary)
    found = z.new_empty(rows)
    if rows == 0:
        return found
    call = Call(
        threads=calls.num_threads(rows),
        rows=rows,
        dim=dim,
        vocabulary=vocabulary,
        tile=max(_LEAST_TILE, _TILE_BYTES // (vocabulary * z.element_size())),
    )
    tensors = [("z", z), ("weight", weight), ("targets", targets), ("losses", found)]
    tensors += [("grad_z", grad_z), ("grad_weight", grad_weight)]
    calls.run("head", call, tensors, f"the cross-entropy of {rows:,} tokens")
    return found
