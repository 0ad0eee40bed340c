"""Launching the Triton kernels: inputs to tiles, and the gradients of the weights from what the kernel leaves behind.

- The backward pass keeps the inputs alone. It computes the iterations again into a scratch of a few thousand tokens;
  gradients of the weights are ordinary products over that scratch.
- Legend: N tokens, D d_model, C controller width, G output groups, T iterations.
"""

# pyright: reportCallIssue=false

from typing import Any

import torch
import triton
from torch import Tensor

from inl_core.model.backends import fused
from inl_core.model.backends import triton_kernel as kernel
from inl_core.model.backends.rule import ACTIVATIONS, Inputs, Result, Rule
from inl_core.model.by_rows import matrix_dtype
from inl_core.model.derivatives import OwnOperation

_ACTIVATIONS = {"relu": 0, "silu": 1, "tanh": 2}
_TOKENS_AT_ONCE = 16_384
"""Of one launch of the backward kernel: bounds its scratch."""
BLOCK_N, BLOCK_D = 32, 32
LAUNCH = {"num_warps": 8, "num_stages": 1}
"""With these blocks the compiler for compute capability 9.0 spills least: under 0.3 KB a thread, backward."""
_WIDEST = 256
"""C up to which a tile's hidden units fit the registers."""


def supports(rule: Rule, inputs: Inputs) -> bool:
    """Whether the kernel computes this; otherwise eager does."""
    return (
        rule.activation in _ACTIVATIONS
        and rule.energy_power is None
        and inputs.last_fraction is None
        and inputs.x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and inputs.hoisted.shape[1] <= _WIDEST
    )


def run(rule: Rule, inputs: Inputs) -> Result:
    """T iterations on N tokens, all tensors flat."""
    if not supports(rule, inputs):
        return fused.run(rule, inputs)
    x, v = Tiles.apply(rule, matrix_dtype(inputs.x), *inputs)
    return Result(x, v, None, None)


class Tiles(OwnOperation):
    """(rule, dtype of the matrix products, *Inputs) -> x_T, v_T."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, dtype: torch.dtype, *tensors: Any) -> tuple[Tensor, Tensor]:
        """Keeps the inputs only."""
        inputs = Inputs(*tensors)
        ctx.rule, ctx.dtype = rule, dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        x = inputs.x.contiguous().clone()
        v = torch.zeros_like(x) if inputs.v is None else inputs.v.contiguous().clone()
        arguments = _Arguments(rule, inputs, dtype)
        kernel.forward[arguments.grid(x.shape[0])](
            x, v, *arguments.tensors(slice(None)), x.shape[0], *arguments.numbers, **arguments.constants, **LAUNCH
        )
        return x, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of every input."""
        inputs = Inputs(*ctx.saved_tensors)
        parts = [
            _backward_rows(ctx.rule, inputs, ctx.dtype, grads, slice(start, start + _TOKENS_AT_ONCE))
            for start in range(0, inputs.x.shape[0], _TOKENS_AT_ONCE)
        ]
        joined = [torch.cat([part[i] for part in parts]) for i in range(4)]
        summed = [torch.stack([part[i] for part in parts]).sum(0) for i in range(4, 9)]
        x, v, hoisted, candidate = joined
        own_v, own_candidate = inputs.v is not None, inputs.candidate is not None
        found = (x, v if own_v else None, hoisted, candidate if own_candidate else None, *summed, None)
        return None, None, *found


class _Arguments:
    """What both kernels are called with."""

    def __init__(self, rule: Rule, inputs: Inputs, dtype: torch.dtype) -> None:
        self.inputs = inputs
        self.weights = [weight.to(dtype).contiguous() for weight in (inputs.inner, inputs.outer, inputs.bias)]
        self.weights += [inputs.mu.contiguous(), inputs.forcing.contiguous()]
        width, dim = inputs.hoisted.shape[1], inputs.x.shape[1]
        self.groups = inputs.outer.shape[0] // dim
        given = 1 if inputs.candidate is not None else 0
        self.numbers = (rule.stride, rule.kappa or 0.0, rule.beta_max or 0.0, rule.num_iterations)
        allows_tf32 = torch.get_float32_matmul_precision() != "highest"
        self.constants = {
            "D": dim,
            "C": width,
            "BLOCK_N": BLOCK_N,
            "BLOCK_D": BLOCK_D,
            "BLOCK_C": max(16, triton.next_power_of_2(width)),
            "CANDIDATE": 2 if self.groups == 4 else given,
            "DYNAMIC": rule.kappa is not None,
            "BOUNDED": rule.beta_max is not None,
            "KIND": _ACTIVATIONS[rule.activation],
            "PRECISION": "tf32" if allows_tf32 else "ieee",
        }

    def grid(self, count: int) -> tuple[int]:
        """One program a tile."""
        return (triton.cdiv(count, BLOCK_N),)

    def tensors(self, where: slice) -> tuple[Tensor, ...]:
        """hoisted, candidate and the weights; a candidate that is not there is any tensor, never read."""
        hoisted = self.inputs.hoisted[where].contiguous()
        candidate = self.inputs.candidate
        return hoisted, hoisted if candidate is None else candidate[where].contiguous(), *self.weights


def _backward_rows(
    rule: Rule, inputs: Inputs, dtype: torch.dtype, grads: tuple[Tensor | None, ...], where: slice
) -> tuple[Tensor, ...]:
    """Gradients of x, v, hoisted, candidate of these tokens, and their part of those of the weights, mu, forcing."""
    arguments, times = _Arguments(rule, inputs, dtype), rule.num_iterations
    x = inputs.x[where]
    count, dim = x.shape
    width, groups = inputs.hoisted.shape[1], arguments.groups
    grid = arguments.grid(count)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=x.device, dtype=dtype)

    xs, vs = scratch(times, count, dim), scratch(times, count, dim)
    xs[0] = x
    vs[0] = 0.0 if inputs.v is None else inputs.v[where]
    grad_x, grad_v = (
        torch.zeros_like(xs[0]) if grad is None else grad[where].to(torch.float32, copy=True).contiguous()
        for grad in grads
    )
    grad_candidate = torch.zeros_like(grad_x) if inputs.candidate is not None else grad_x.new_zeros(count, 0)
    hidden, grad_hidden = scratch(times, count, width), scratch(times, count, width)
    outputs = scratch(times, count, groups * dim, dtype=dtype)
    mu_sums, forcing_sums, bias_sums = (
        grad_x.new_zeros(grid[0], *shape) for shape in ((dim,), (times, dim), (groups * dim,))
    )
    kernel.backward[grid](
        xs, vs, *arguments.tensors(where), grad_x, grad_v, grad_candidate, hidden, grad_hidden, outputs,
        mu_sums, forcing_sums, bias_sums, count, *arguments.numbers, G=groups, **arguments.constants, **LAUNCH,
    )  # fmt: skip
    activated = ACTIVATIONS[rule.activation][0](hidden).to(dtype).view(-1, width)
    left = grad_hidden.to(dtype).view(-1, width).T
    inner = torch.cat([left @ states.to(dtype).view(-1, dim) for states in (xs, vs)], dim=1)
    outer = outputs.view(-1, groups * dim).T @ activated
    per_token = (grad_x, grad_v, grad_hidden.sum(0), grad_candidate)
    return *per_token, inner, outer, bias_sums.sum(0), mu_sums.sum(0), forcing_sums.sum(0)
