"""Norms over the model's width D.

- On a CPU the library's RMS norm is a row of operations whose tensors autograd keeps. `FusedRMS` is one pass in C++
  (native/rows.cpp); without a compiler it takes the library's layer norm backward and corrects it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from inl_core.model.derivatives import OwnOperation, is_plain
from inl_core.model.native import rows
from inl_core.recipe import ModelConfig


def build_norm(config: ModelConfig) -> nn.Module:
    """The configuration's norm over D."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean x^2 + eps) * weight (arXiv 1910.07467): the library's, with a faster way on a CPU."""

    def has_fast_form(self, x: Tensor) -> bool:
        """Whether `FusedRMS` computes this norm of x; the compiler fuses the library's itself."""
        one_precision = x.device.type == "cpu" and x.dtype == self.weight.dtype and x.dtype.itemsize >= 4
        return one_precision and self.eps is not None and not (torch.compiler.is_compiling() or is_plain())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        return FusedRMS.apply(x, self.weight, self.eps) if self.has_fast_form(x) else super().forward(x)


class FusedRMS(OwnOperation):
    """(x (..., D), weight (D,), eps) -> (..., D); keeps x, and without C++ one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The norm."""
        normed, scale = rms_forward(x, weight, eps)
        ctx.save_for_backward(x, scale, weight)
        ctx.eps = eps
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of x and of the weight."""
        x, scale, weight = ctx.saved_tensors
        return *rms_backward(grad, x, scale, weight, ctx.eps), None


def rms_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """x * scale * weight (..., D), and scale = 1 / sqrt(mean x^2 + eps), (..., 1), for a backward pass without C++."""
    if rows.supports(x, weight):
        return rows.norm(x, weight, eps), None
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight), scale


def rms_again(x: Tensor, scale: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """The norm once more."""
    return rows.norm(x, weight, eps) if scale is None else (x * scale).mul_(weight)


def rms_backward(grad: Tensor, x: Tensor, scale: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., D) and weight (D,).

    Without C++: the layer norm's at mean 0, less what its mean would take from x's, scale * mean(grad * weight).
    """
    if scale is None:
        return rows.norm_back(grad, x, weight, eps)
    dim = x.shape[-1]
    grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
        grad, x, [dim], torch.zeros_like(scale), scale, weight, None, [True, True, False]
    )
    return grad_x.add_((grad @ weight).unsqueeze(-1).mul_(scale).div_(dim)), grad_weight
