"""Attention in C++ as one operation of a compiled graph: a compiler fuses what lies around it and calls it as it is.

`inl::attend` and `inl::attend_backward` are attention.py's two passes; both say their FLOPs, or a compiler that weighs
what to keep would take attention for free.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from inl_core.model.native import attention
from inl_core.model.native.attention import Given

_CALL = "Tensor packed, Tensor? cosines, Tensor? sines, Tensor? first, int heads, int key_heads"
"""*Given, as an operation declares it."""


def attend(given: Given) -> Tensor:
    """The heads' outputs side by side, (B, S, H F); for a compiler that traces it."""
    return attend_forward(*given._replace(packed=given.packed.contiguous()))[0]


@torch.library.custom_op("inl::attend", mutates_args=(), schema=f"({_CALL}) -> Tensor[]")
def attend_forward(*given) -> list[Tensor]:
    """(*Given) -> the output, and log sum exp of the scores."""
    return list(attention.forward(Given(*given)))


@attend_forward.register_fake
def _(*given) -> list[Tensor]:
    return list(attention.results(Given(*given)))


@torch.library.custom_op(
    "inl::attend_backward",
    mutates_args=(),
    schema=f"({_CALL}, Tensor out, Tensor log_sums, Tensor grad) -> Tensor",
)
def attend_backward(*arguments) -> Tensor:
    """(*Given, output, log sum exp, gradient of the output) -> the gradient of `packed`."""
    *given, out, log_sums, grad = arguments
    return attention.backward(Given(*given), out, log_sums, grad)


@attend_backward.register_fake
def _(*arguments) -> Tensor:
    return torch.empty_like(arguments[0])


def _keep_for_backward(ctx, inputs, output) -> None:
    ctx.heads = inputs[4:]
    ctx.save_for_backward(*inputs[:4], *output)


def _differentiate(ctx, grads):
    *given, out, log_sums = ctx.saved_tensors
    return attend_backward(*given, *ctx.heads, out, log_sums, grads[0].contiguous()), *(None for _ in range(5))


attend_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _flops_of(packed_shape, heads: int, key_heads: int) -> int:
    """Of one pass forward over all keys that a query may see: scores and mixtures."""
    batch, length, width = packed_shape
    return 2 * batch * length * length * heads * (width // (heads + 2 * key_heads))


@register_flop_formula(torch.ops.inl.attend)
def _(packed_shape, cosines_shape, sines_shape, first_shape, heads, key_heads, **_kwargs) -> int:
    return _flops_of(packed_shape, heads, key_heads)


@register_flop_formula(torch.ops.inl.attend_backward)
def _(packed_shape, cosines_shape, sines_shape, first_shape, heads, key_heads, *_others, **_kwargs) -> int:
    return 5 * _flops_of(packed_shape, heads, key_heads) // 2
