"""The arithmetic of the stream's step in fewer passes over memory, by torch's own operations.

The plain step makes a tensor for each term, and autograd another for each gradient of a term. Here the terms are added
in place, forward and backward.
Legend: B batch, S sequence, D d_model.
"""

from typing import Any

import torch
from torch import Tensor

from inl_core.model.derivatives import needs_plain_operations
from inl_core.model.stream import Coefficients, Motion, Shared


class MotionInPlace(Motion):
    """The same step; a pass with a cache of velocities takes the plain one."""

    def forward(
        self, own: Coefficients, x: Tensor, v: Tensor, candidate: Tensor, shared: Shared, previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `Motion.forward`."""
        has_terms = any(value is not None for value in own)
        if not has_terms or previous is not None or needs_plain_operations():
            return super().forward(own, x, v, candidate, shared, previous)
        new_x, new_v = _Move.apply(x, v, candidate, shared.start, shared.has_previous, *own)
        return new_x, new_v.detach() if own.alpha is None else new_v


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v: Tensor,
        candidate: Tensor,
        start: Tensor,
        has_previous: Tensor | None,
        alpha: Tensor | None,
        beta: Tensor | None,
        constant: Tensor | None,
        transport: Tensor | None,
        anchor: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        new_v = candidate.clone() if alpha is None else torch.addcmul(candidate, alpha, v)
        if constant is not None:
            new_v.add_(constant)
        if beta is not None:
            new_v.addcmul_(beta, x, value=-1.0)
        new_x = x + new_v
        if transport is not None:
            new_x[:, 1:].addcmul_(transport, _predecessors(new_v, has_previous))
        if anchor is not None:
            new_x.addcmul_(anchor, start)
        ctx.save_for_backward(x, v, start, new_v, has_previous, alpha, beta, transport, anchor)
        ctx.has_constant = constant is not None
        ctx.set_materialize_grads(False)
        return new_x, new_v

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dv: Tensor | None) -> tuple[Tensor | None, ...]:
        x, v, start, new_v, has_previous, alpha, beta, transport, anchor = ctx.saved_tensors
        dx = torch.zeros_like(x) if dx is None else dx
        total = dx.clone() if dv is None else dx + dv  # of the loss with respect to the new velocity, by all paths
        d_alpha = d_beta = d_constant = d_transport = d_anchor = d_v = d_start = None
        if transport is not None:
            later = dx[:, 1:] if has_previous is None else dx[:, 1:] * has_previous[:, 1:]
            total[:, :-1].addcmul_(transport, later)
            d_transport = _over_tokens(later, new_v[:, :-1])
        if anchor is not None:
            d_anchor, d_start = _over_tokens(dx, start), dx * anchor
        if alpha is not None:
            d_alpha, d_v = _over_tokens(total, v), total * alpha
        if ctx.has_constant:
            d_constant = total.sum((0, 1))
        if beta is not None:
            d_beta, dx = _over_tokens(total, x).neg(), torch.addcmul(dx, beta, total, value=-1.0)
        return dx, d_v, total, d_start, None, d_alpha, d_beta, d_constant, d_transport, d_anchor


def _predecessors(v: Tensor, has_previous: Tensor | None) -> Tensor:
    """Of all tokens but the first: (B, S - 1, D)."""
    return v[:, :-1] if has_previous is None else v[:, :-1] * has_previous[:, 1:]


def _over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """The sum over tokens of a b: (B, S, D) twice -> (D,)."""
    return (a * b).sum((0, 1))
