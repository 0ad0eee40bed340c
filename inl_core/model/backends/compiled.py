"""The T iterations as one function for inductor: unrolled, differentiated and fused by the compiler.

- Compiling the whole loop measured faster than compiling one iteration's pointwise parts between products in eager mode
  (benchmarks/integrator.py), and needs no second set of formulas for the derivative.
- The loop is checkpointed inside what is compiled: the compiler keeps its inputs, and nothing of its iterations.
- The number of rows is a symbol from the first call; A and t come in as values of tensors. So there is one compilation
  for each rule and for each set of inputs that are there, whatever the step of a run or the length of a text.
- Legend: N tokens, D d_model, G output groups.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.decorators import maybe_mark_dynamic
from torch.utils.checkpoint import checkpoint

from inl_core.model.backends.rule import ACTIVATIONS, Inputs, Result, Rule, speed_weights
from inl_core.model.by_rows import matrix_dtype

_TOKEN_TENSORS = ("x", "v", "hoisted", "candidate")


def run(rule: Rule, inputs: Inputs) -> Result:
    """T iterations on N tokens, all tensors flat."""
    dtype = matrix_dtype(inputs.x)
    for name in _TOKEN_TENSORS:
        tensor = getattr(inputs, name)
        if tensor is not None:
            maybe_mark_dynamic(tensor, 0)
    with torch.autocast(inputs.x.device.type, enabled=False):
        x, v, speed, energy = _function(rule, dtype)(*inputs)
    assert x is not None
    assert v is not None
    return Result(x, v, speed, energy)


def iterate(rule: Rule, dtype: torch.dtype, *tensors: Any) -> tuple[Tensor | None, ...]:
    """The plain loop on flat tensors, as a compiler likes it; products in `dtype`. Returns a Result's parts."""
    inputs = Inputs(*tensors)
    x, v = inputs.x, inputs.v
    inner, outer, bias = (weight.to(dtype) for weight in (inputs.inner, inputs.outer, inputs.bias))
    hoisted = inputs.hoisted.to(dtype)
    candidate = None if inputs.candidate is None else inputs.candidate.to(x.dtype)
    speed = energy = None
    for t in range(rule.num_iterations):
        u = hoisted + F.linear(x.to(dtype), inner[:, : x.shape[1]])
        if v is not None:
            u = u + F.linear(v.to(dtype), inner[:, x.shape[1] :])
        outputs = F.linear(ACTIVATIONS[rule.activation][0](u), outer, bias).to(x.dtype)
        move, v_new = _move(rule, outputs, x, v, candidate, inputs.mu, inputs.forcing[t])
        if inputs.last_fraction is not None and t + 1 == rule.num_iterations:
            move = move * inputs.last_fraction
            v_new = torch.lerp(torch.zeros_like(x) if v is None else v, v_new, inputs.last_fraction)
        x, v = x + move, v_new
        if rule.energy_power is not None:
            slow = speed_weights(rule.num_iterations)[t] * (x - inputs.mu).abs().mean(1)
            work = v.abs().pow(rule.energy_power).mean(1) / rule.num_iterations
            speed, energy = (slow, work) if speed is None or energy is None else (speed + slow, energy + work)
    return x, v, speed, energy


def _move(
    rule: Rule, outputs: Tensor, x: Tensor, v: Tensor | None, candidate: Tensor | None, mu: Tensor, forcing: Tensor
) -> tuple[Tensor, Tensor]:
    """x_new - x and v_new."""
    parts = outputs.split(x.shape[1], dim=1)
    away = mu - x
    alpha = torch.sigmoid(parts[0])
    if rule.kappa is not None:
        squares = away.square().mean(1, keepdim=True)
        at_mu = squares == 0  # the gradient of rms at zero is zero
        size = torch.where(at_mu, 0.0, torch.where(at_mu, 1.0, squares).sqrt())
        alpha = alpha * -torch.expm1(-rule.kappa * size)
    beta = F.softplus(parts[1])
    if rule.beta_max is not None:
        beta = beta.clamp(max=rule.beta_max)
    candidate = parts[3] if len(parts) == 4 else candidate
    carried = torch.zeros_like(x) if v is None else alpha * v
    if candidate is not None:
        carried = carried + (1 - alpha) * candidate
    v_new = carried + beta * away + forcing
    return rule.stride * torch.sigmoid(parts[2]) * v_new, v_new


@lru_cache
def _function(rule: Rule, dtype: torch.dtype) -> Callable[..., tuple[Tensor | None, ...]]:
    def compiled(*tensors: Any) -> tuple[Tensor | None, ...]:
        return checkpoint(iterate, rule, dtype, *tensors, use_reentrant=False)  # type: ignore[return-value]

    return torch.compile(compiled, fullgraph=True, isolate_recompiles=True)  # pyright: ignore[reportCallIssue]
