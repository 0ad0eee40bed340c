"""A linear layer, and the norm that it reads through where there is one, keeping the norm's input and not its output.

- The norm's output is one pass to compute again; every block has one such norm, or two where the feed-forward does not
  feed the integrator.
- On a CPU both are one loop in C++ (native/projection.cpp); without it, `NormedLinear`.
- Legend: N tokens, D model width, O outputs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from inl_core.model.by_rows import matrix_dtype
from inl_core.model.derivatives import OwnOperation, is_plain
from inl_core.model.native.projection import Given, project, supports
from inl_core.model.norms import RMSNorm, rms_again, rms_backward, rms_forward


def normed_linear(norm: nn.Module | None, linear: nn.Linear, x: Tensor) -> Tensor:
    """linear(norm(x)) of x (..., D): (..., O)."""
    # Under autocast the output is half as large, and the weight would have to be converted again with it.
    if torch.compiler.is_compiling() or is_plain() or matrix_dtype(x) != x.dtype:
        return linear(x if norm is None else norm(x))
    weight, eps = None, 0.0
    if isinstance(norm, RMSNorm) and norm.has_fast_form(x):
        weight, eps = norm.weight, norm.eps or 0.0
    elif norm is not None:
        x = norm(x)
    flat = x.flatten(0, -2)
    given = Given(flat, weight, linear.weight, linear.bias, eps)
    if supports(given):
        product = project(given)
    elif weight is None:
        return linear(x)
    else:
        product = NormedLinear.apply(flat, weight, eps, linear.weight)
        product = product if linear.bias is None else product + linear.bias
    return product.view(*x.shape[:-1], linear.out_features)


class NormedLinear(OwnOperation):
    """(x (N, D), the RMS norm's weight (D,) and eps, W (O, D)) -> norm(x) W^T, (N, O); keeps x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
        """The product."""
        normed, scale = rms_forward(x, scale_weight, eps)
        ctx.save_for_backward(x, scale, scale_weight, weight)
        ctx.eps = eps
        return normed @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
        """Gradients of x and of both weights."""
        x, scale, scale_weight, weight = ctx.saved_tensors
        grad_weight = grad.T @ rms_again(x, scale, scale_weight, ctx.eps)
        grad_x, grad_scale_weight = rms_backward(grad @ weight, x, scale, scale_weight, ctx.eps)
        return grad_x, grad_scale_weight, None, grad_weight
