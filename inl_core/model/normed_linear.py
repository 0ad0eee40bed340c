"""A norm and the matrix product that reads it, keeping the norm's input and not its output.

The output is two elementwise passes to compute again; every block has one such norm, or two where the feed-forward does
not feed the integrator. Legend: N tokens, D model width, O outputs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from inl_core.model.by_rows import matrix_dtype
from inl_core.model.norms import RMSNorm, rms_backward, rms_forward


def normed_linear(norm: nn.Module, linear: nn.Linear, x: Tensor) -> Tensor:
    """linear(norm(x)) of x (..., D): (..., O)."""
    # Under autocast the output is half as large, and the weight would have to be converted again with it.
    if not isinstance(norm, RMSNorm) or not norm.has_fast_form(x) or matrix_dtype(x) != x.dtype:
        return linear(norm(x))
    product = NormedLinear.apply(x.flatten(0, -2), norm.weight, norm.eps, linear.weight)
    product = product.view(*x.shape[:-1], -1)
    return product if linear.bias is None else product + linear.bias


class NormedLinear(torch.autograd.Function):
    """(x (N, D), the RMS norm's weight (D,) and eps, W (O, D)) -> norm(x) W^T, (N, O); keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
        """The product."""
        normed, scale = rms_forward(x, scale_weight, eps)
        ctx.save_for_backward(x, scale, scale_weight, weight)
        return normed @ weight.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
        """Gradients of x and of both weights."""
        x, scale, scale_weight, weight = ctx.saved_tensors
        grad_weight = grad.T @ (x * scale).mul_(scale_weight)
        grad_x, grad_scale_weight = rms_backward(grad @ weight, x, scale, scale_weight)
        return grad_x, grad_scale_weight, None, grad_weight
