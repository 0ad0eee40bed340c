"""The C++ loop as one operation of a compiled graph: a compiler fuses what lies around it and calls it as it is.

- `inl::iterate` and `inl::iterate_backward` are native.py's two passes. A tensor that is not there is an empty one, for
  the results of an operation cannot be None.
- Both say their FLOPs: a compiler that weighs what to keep would otherwise take the iterations for free.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from inl_core.model.backends import native
from inl_core.model.backends.rule import Around, Inputs, Result, Rule


def run(rule: Rule, inputs: Inputs) -> Result:
    """T iterations on N tokens, all tensors flat; for a compiler that traces it."""
    # mu's moving average may move it in place before the backward pass, which needs the mu of this pass.
    dense = (None if tensor is None else tensor.contiguous() for tensor in inputs._replace(mu=inputs.mu.clone()))
    x, v, speed, energy, _ = iterate(*dense, *rule, torch.is_grad_enabled())
    return Result(x, v, *((None, None) if rule.energy_power is None else (speed, energy)))


_CALL = (
    "Tensor x, Tensor? v, Tensor hoisted, Tensor? candidate, Tensor inner, Tensor outer, Tensor bias, Tensor mu, "
    "Tensor forcing, Tensor? last_fraction, "
    "int num_iterations, float stride, float? kappa, float? beta_max, str activation, float? energy_power"
)
"""*Inputs, *Rule, as an operation declares them."""


@torch.library.custom_op("inl::iterate", mutates_args=(), schema=f"({_CALL}, bool keep) -> Tensor[]")
def iterate(*arguments) -> list[Tensor]:
    """(*Inputs, *Rule, keep) -> x_T, v_T, the terms of the speed and energy losses, u of the first iterations."""
    inputs, rule = _unpacked(arguments)
    result, hidden = native.forward(rule, inputs, keep=arguments[-1])
    return [*_there(result[:4], inputs.x), hidden]


@iterate.register_fake
def _(*arguments) -> list[Tensor]:
    inputs, rule = _unpacked(arguments)
    hidden = native.new_hidden(rule, inputs, keep=arguments[-1])
    return [*_there(native.results(rule, inputs)[:4], inputs.x), hidden]


@torch.library.custom_op(
    "inl::iterate_backward", mutates_args=(), schema=f"(Tensor[] grads, {_CALL}, Tensor hidden) -> Tensor[]"
)
def iterate_backward(grads, *arguments) -> list[Tensor]:
    """(gradients of x_T, v_T, speed, energy; *Inputs, *Rule, u) -> gradients of the inputs."""
    inputs, rule = _unpacked(arguments)
    given = Result(*(grad if grad.numel() else None for grad in grads))  # type: ignore[arg-type]
    found, _ = native.backward(rule, inputs, Around(), arguments[-1], given)
    return _there(found._replace(outer=found.outer.contiguous()), inputs.x)


@iterate_backward.register_fake
def _(grads, *arguments) -> list[Tensor]:
    inputs, _ = _unpacked(arguments)
    return _there(native.gradients(inputs)._replace(outer=torch.empty_like(inputs.outer)), inputs.x)


def _unpacked(arguments: tuple) -> tuple[Inputs, Rule]:
    """What stands before the last argument."""
    count = len(Inputs._fields)
    return Inputs(*arguments[:count]), Rule(*arguments[count:-1])


def _there(tensors: tuple[Tensor | None, ...], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]


def _keep_for_backward(ctx, inputs, output) -> None:
    given, rule = _unpacked(inputs)
    ctx.rule = rule
    ctx.save_for_backward(*given, output[-1])


def _differentiate(ctx, grads):
    *saved, hidden = ctx.saved_tensors
    inputs = Inputs(*saved)
    shaped = [inputs.x.new_empty(0) if grad is None else grad.contiguous() for grad in grads[:-1]]
    found = iterate_backward(shaped, *inputs, *ctx.rule, hidden)
    of_inputs = [None if tensor is None else grad for tensor, grad in zip(inputs, found, strict=True)]
    return *of_inputs, *(None for _ in ctx.rule), None


iterate.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _flops_of(x_shape, hoisted_shape, outer_shape, num_iterations: int) -> int:
    """Of one pass forward: [x; v] (2 D) to C, and C to G D, for each token and iteration."""
    (tokens, dim), width = x_shape, hoisted_shape[1]
    return 2 * tokens * width * (2 * dim + outer_shape[0]) * num_iterations


@register_flop_formula(torch.ops.inl.iterate)
def _(x_shape, v_shape, hoisted_shape, candidate_shape, inner_shape, outer_shape, *others, **_kwargs) -> int:
    return _flops_of(x_shape, hoisted_shape, outer_shape, others[4])


@register_flop_formula(torch.ops.inl.iterate_backward)
def _(grads, x_shape, v_shape, hoisted_shape, candidate_shape, inner_shape, outer_shape, *others, **_kwargs) -> int:
    return 3 * _flops_of(x_shape, hoisted_shape, outer_shape, others[4])
