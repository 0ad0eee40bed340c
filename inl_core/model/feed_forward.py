"""The feed-forward network: SwiGLU (arXiv 2002.05202) or GELU."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inl_core.model.by_rows import add_product, matrix_dtype, row_chunks
from inl_core.model.derivatives import OwnOperation, is_plain
from inl_core.model.native.feed_forward import Given, feed_forward, supports
from inl_core.model.normed_linear import normed_linear
from inl_core.model.norms import RMSNorm
from inl_core.recipe import ModelConfig

_CHUNK_BYTES = 4 * 2**20
"""Of one (n, H) tensor on a CPU."""


class FeedForward(nn.Module):
    """(B, S, D) -> (B, S, D) through the configuration's hidden width; gate and up projection are one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.feed_forward == "swiglu"
        hidden = config.hidden_dim
        self.up = nn.Linear(config.d_model, 2 * hidden if self.gated else hidden, bias=config.bias)
        self.down = nn.Linear(hidden, config.d_model, bias=config.bias)

    def forward(
        self, x: Tensor, norm: nn.Module | None = None, *, wants_norm: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """down(silu(gate x) * up x), or down(gelu(up x)); of norm(x) with a norm, and norm(x) where it is wanted."""
        given = self._native_form(x, norm)
        if given is not None and supports(given):
            product, normed = feed_forward(given, wants_norm=wants_norm)
            return product.view_as(x), None if normed is None else normed.view_as(x)
        normed = norm(x) if norm is not None and wants_norm else None
        up = normed_linear(norm, self.up, x) if normed is None else normed_linear(None, self.up, normed)
        return gated_down(up, self.down) if self.gated else self.down(F.gelu(up)), normed

    def _native_form(self, x: Tensor, norm: nn.Module | None) -> Given | None:
        """What the loop in C++ is given if it has this: gated, without biases, an RMS norm before it at most."""
        if not self.gated or self.up.bias is not None or not isinstance(norm, RMSNorm | None):
            return None
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        return None if eps is None else Given(x.flatten(0, -2), weight, self.up.weight, self.down.weight, eps)


def gated_down(gate_up: Tensor, down: nn.Linear) -> Tensor:
    """down(silu(gate) * up) of [gate | up] (..., 2H): (..., D)."""
    # The compiler fuses the plain operations and chooses what to keep; the meta device has no autocast.
    if torch.compiler.is_compiling() or is_plain() or gate_up.is_meta:
        return plain_gated_down(gate_up, down)
    product = GatedDown.apply(gate_up.flatten(0, -2), down.weight, matrix_dtype(gate_up))
    product = product.view(*gate_up.shape[:-1], -1)
    return product if down.bias is None else product + down.bias.to(product.dtype)


def plain_gated_down(gate_up: Tensor, down: nn.Linear) -> Tensor:
    """`gated_down` as autograd differentiates it."""
    gate, up = gate_up.chunk(2, dim=-1)
    return down(F.silu(gate) * up)


class GatedDown(OwnOperation):
    """([gate | up] (N, 2H), weight (D, H), the product's precision) -> (silu(gate) * up) weight^T, (N, D).

    Keeps what it is given: half of what autograd keeps for the plain operations, at the price of computing the
    products again. Both passes go over the tokens a few rows at a time.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The product."""
        ctx.save_for_backward(gate_up, weight)
        ctx.dtype = dtype
        weight = weight.to(dtype)
        out = gate_up.new_empty(len(gate_up), len(weight), dtype=dtype)
        with torch.autocast(gate_up.device.type, enabled=False):
            for where in _chunks(gate_up):
                gate, up = gate_up[where].chunk(2, dim=-1)
                out[where] = (F.silu(gate) * up).to(dtype) @ weight.T
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of [gate | up] and of the weight, which is summed in its own precision."""
        gate_up, weight = ctx.saved_tensors
        low = weight.to(ctx.dtype)
        grad_gate_up, grad_weight = torch.empty_like(gate_up), torch.zeros_like(weight)
        with torch.autocast(gate_up.device.type, enabled=False):
            for where in _chunks(gate_up):
                gate, up = gate_up[where].chunk(2, dim=-1)
                grad_gate, grad_up = grad_gate_up[where].chunk(2, dim=-1)
                activated = F.silu(gate)
                grad_product = (grad[where] @ low).to(gate_up.dtype)
                torch.mul(grad_product, activated, out=grad_up)
                grad_gate.copy_(torch.ops.aten.silu_backward(grad_product.mul_(up), gate))
                add_product(grad_weight, grad[where].T, activated.mul_(up).to(ctx.dtype))
        return grad_gate_up, grad_weight, None


def _chunks(gate_up: Tensor) -> Iterator[slice]:
    return row_chunks(gate_up, gate_up.shape[1] // 2, _CHUNK_BYTES)
