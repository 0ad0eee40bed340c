"""The T iterations by a loop in C++ (native/loop.cpp): tiles of tokens through all of them, in each thread's cache.

- The same results as fused.py up to rounding, and the same tensors kept: nothing that grows with T.
- For CPUs, in single or double precision throughout; anything else, autocast too, is fused.py's.
- Legend: N tokens, D d_model, C controller width, G output groups, T iterations.
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from inl_core.model.backends import fused
from inl_core.model.backends.rule import Inputs, Result, Rule, speed_weights
from inl_core.model.by_rows import matrix_dtype
from inl_core.model.native.build import NAMES, Blas, library

_ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
_TILE_BYTES = 128 * 1024
"""Of one (n, D) tensor of a tile; some ten of them, each thread's own, should fit its cache."""
_MOST_TILES = 4
"""From T = 4 on a tile shrinks, as the backward pass holds its iterations side by side: memory must not grow with T."""
_FEWEST_ROWS = 32
_NUMBERS = ("threads", "rows", "dim", "width", "groups", "iterations", "kept", "activation", "tile")
_POINTERS = (
    *("x", "v", "hoisted", "candidate", "inner", "outer", "bias", "mu", "forcing", "fraction", "hidden"),
    *("x_out", "v_out", "speed", "energy"),
    *("grad_x_out", "grad_v_out", "grad_speed", "grad_energy"),
    *("grad_x", "grad_v", "grad_hoisted", "grad_candidate", "grad_inner", "grad_outer", "grad_bias", "grad_mu"),
    *("grad_forcing", "grad_fraction"),
)


class Call(ctypes.Structure):
    """The same fields in the same order as loop.cpp's Call."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_double) for name in ("stride", "kappa", "beta_max", "power")),
        ("speed_weights", ctypes.c_void_p),
        ("blas", Blas),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


def is_available() -> bool:
    """Whether this machine can run the loop; the first call may compile it."""
    return library() is not None


def supports(inputs: Inputs) -> bool:
    """Whether the tensors can be handed over: real memory of a CPU, in single or double precision throughout."""
    dtype = inputs.x.dtype
    return (
        dtype in NAMES
        and all(
            type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.dtype == dtype
            for tensor in inputs
            if tensor is not None
        )
        and matrix_dtype(inputs.x) == dtype
    )


def run(rule: Rule, inputs: Inputs) -> Result:
    """T iterations on N tokens, all tensors flat."""
    if not supports(inputs):
        return fused.run(rule, inputs)
    return Result(*Loop.apply(rule, *(None if tensor is None else tensor.contiguous() for tensor in inputs)))


class Loop(torch.autograd.Function):
    """(rule, *Inputs) -> Result."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, *tensors: Any) -> tuple[Tensor | None, ...]:
        """Run the iterations; the inputs are kept, and u of the first ones."""
        inputs = Inputs(*tensors)
        ctx.set_materialize_grads(False)
        ctx.rule = rule
        result, hidden = forward(rule, inputs, keep=any(ctx.needs_input_grad))
        # mu's moving average may move it in place before the backward pass, which needs the mu of this pass.
        ctx.save_for_backward(*inputs._replace(mu=inputs.mu.clone()), hidden)
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of every input."""
        *inputs, hidden = ctx.saved_tensors
        return None, *backward(ctx.rule, Inputs(*inputs), hidden, Result(*grads))  # type: ignore[arg-type]


def forward(rule: Rule, inputs: Inputs, *, keep: bool) -> tuple[Result, Tensor]:
    """The iterations, and what the backward pass wants besides the inputs: u of the first ones, (0 to 2, N, C)."""
    result, hidden = results(rule, inputs), new_hidden(rule, inputs, keep=keep)
    _call("forward", rule, inputs, hidden, x_out=result.x, v_out=result.v, speed=result.speed, energy=result.energy)
    return result, hidden


def backward(rule: Rule, inputs: Inputs, hidden: Tensor, grads: Result) -> Inputs:
    """Gradients of the inputs from those of the results, any of which may be None."""
    dense = (None if grad is None else grad.contiguous() for grad in grads)
    given = dict(zip(("grad_x_out", "grad_v_out", "grad_speed", "grad_energy"), dense, strict=True))
    found = gradients(inputs)
    written = {f"grad_{_FIELDS.get(name, name)}": gradient for name, gradient in found._asdict().items()}
    _call("backward", rule, inputs, hidden, **given, **written)
    return found._replace(outer=found.outer.T)


def results(rule: Rule, inputs: Inputs) -> Result:
    """Room for x_T and v_T, and zeros for the terms of the losses where they are wanted."""
    speed, energy = (None if rule.energy_power is None else inputs.x.new_zeros(inputs.x.shape[0]) for _ in range(2))
    return Result(torch.empty_like(inputs.x), torch.empty_like(inputs.x), speed, energy)


def new_hidden(rule: Rule, inputs: Inputs, *, keep: bool) -> Tensor:
    """Room for u of the first iterations, (0 to 2, N, C)."""
    count = min(fused.KEPT_ITERATIONS, rule.num_iterations) if keep else 0
    return inputs.hoisted.new_empty(count, *inputs.hoisted.shape)


def gradients(inputs: Inputs) -> Inputs:
    """Room for the gradient of each token's inputs, and zeros to add to for the others; W_out's is (C, GD)."""
    return Inputs(
        torch.empty_like(inputs.x),
        None if inputs.v is None else torch.empty_like(inputs.v),
        torch.empty_like(inputs.hoisted),
        None if inputs.candidate is None else torch.zeros_like(inputs.candidate),
        torch.zeros_like(inputs.inner),
        inputs.outer.new_zeros(inputs.outer.shape[::-1]),  # the faster way round
        torch.zeros_like(inputs.bias),
        torch.zeros_like(inputs.mu),
        torch.zeros_like(inputs.forcing),
        None if inputs.last_fraction is None else torch.zeros_like(inputs.last_fraction),
    )


def _call(name: str, rule: Rule, inputs: Inputs, hidden: Tensor, **others: Tensor | None) -> None:
    found = library()
    assert found is not None
    _check(rule, inputs)
    if inputs.x.shape[0] == 0:
        return
    dtype = inputs.x.dtype
    call = _described(rule, inputs, hidden)
    call.blas = found.blas[dtype]
    weights = (ctypes.c_double * rule.num_iterations)(*speed_weights(rule.num_iterations))
    call.speed_weights = ctypes.addressof(weights)
    for field, tensor in (inputs._asdict() | {"hidden": hidden} | others).items():
        if tensor is not None:
            assert tensor.is_contiguous()
            setattr(call, _FIELDS.get(field, field), tensor.data_ptr())
    found.run(name, call, dtype, f"the integrator's {name} pass over {inputs.x.shape[0]:,} tokens")


_FIELDS = {"last_fraction": "fraction"}


def _check(rule: Rule, inputs: Inputs) -> None:
    """ValueError for what the loop, which trusts the sizes it is told, would read beyond its end or misread."""
    (rows, dim), width = inputs.x.shape, inputs.hoisted.shape[-1]
    groups = 4 if inputs.bias.shape == (4 * dim,) and inputs.candidate is None else 3
    token, output = (rows, dim), groups * dim
    wanted = {"x": token, "v": token, "candidate": token, "hoisted": (rows, width), "mu": (dim,), "last_fraction": ()}
    wanted |= {"inner": (width, 2 * dim), "outer": (output, width), "bias": (output,)}
    wanted |= {"forcing": (rule.num_iterations, dim)}
    for name, tensor in inputs._asdict().items():
        if tensor is None:
            continue
        shape = wanted[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"integrator: {name} is {tuple(tensor.shape)}, and must be {shape} beside x {(rows, dim)}")
        if tensor.dtype != inputs.x.dtype:
            raise ValueError(
                f"integrator: {name} is {tensor.dtype} and x {inputs.x.dtype}: they must be of one precision"
            )


def _described(rule: Rule, inputs: Inputs, hidden: Tensor) -> Call:
    """The numbers of one call."""
    rows, dim = inputs.x.shape
    shrink = min(1.0, _MOST_TILES / rule.num_iterations)
    return Call(
        threads=min(torch.get_num_threads(), max(1, rows // _FEWEST_ROWS)),
        rows=rows,
        dim=dim,
        width=inputs.hoisted.shape[1],
        groups=inputs.bias.shape[0] // dim,
        iterations=rule.num_iterations,
        kept=hidden.shape[0],
        activation=_ACTIVATIONS.index(rule.activation),
        tile=max(_FEWEST_ROWS, int(_TILE_BYTES * shrink) // (dim * inputs.x.element_size())),
        stride=rule.stride,
        kappa=-1.0 if rule.kappa is None else rule.kappa,
        beta_max=math.inf if rule.beta_max is None else rule.beta_max,
        power=rule.energy_power or 0.0,
    )
