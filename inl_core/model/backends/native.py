"""The T iterations by a loop in C++ (native/loop.cpp): tiles of tokens through all of them, in each thread's cache.

- The same results as fused.py up to rounding, and the same tensors kept: nothing that grows with T.
- For CPUs, in single or double precision throughout; anything else, autocast too, is fused.py's.
- Legend: N tokens, D d_model, C controller width, G output groups, T iterations.
"""

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inl_core.model.backends import fused
from inl_core.model.backends.rule import Around, Inputs, Result, Rule, speed_weights
from inl_core.model.derivatives import OwnOperation
from inl_core.model.native import calls
from inl_core.model.native.build import Blas, library

_ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
_TILE_BYTES = 128 * 1024
"""Of one (n, D) tensor of a tile; some ten of them, each thread's own, should fit its cache."""
_MOST_TILES = 4
"""From T = 4 on a tile shrinks, as the backward pass holds its iterations side by side: memory must not grow with T."""
_FEWEST_ROWS = 32
_NUMBERS = ("threads", "rows", "dim", "width", "groups", "iterations", "kept", "activation", "tile", "context_dim")
_POINTERS = (
    *("x", "v", "hoisted", "candidate", "inner", "outer", "bias", "mu", "forcing", "fraction"),
    *("context", "context_weight", "context_bias", "stream", "gain", "hidden"),
    *("x_out", "v_out", "speed", "energy", "stream_out"),
    *("grad_x_out", "grad_v_out", "grad_speed", "grad_energy", "grad_stream_out"),
    *("grad_x", "grad_v", "grad_hoisted", "grad_candidate", "grad_inner", "grad_outer", "grad_bias", "grad_mu"),
    *("grad_forcing", "grad_fraction", "grad_context", "grad_context_weight", "grad_context_bias", "grad_gain"),
)


class Call(ctypes.Structure):
    """The same fields in the same order as layer.h's Call."""

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


def supports(inputs: Inputs, around: Around = Around()) -> bool:
    """Whether the tensors can be handed over: real memory of a CPU, in single or double precision throughout."""
    return calls.takes(*inputs, *around)


def run(rule: Rule, inputs: Inputs) -> Result:
    """T iterations on N tokens, all tensors flat."""
    if not supports(inputs):
        return fused.run(rule, inputs)
    return run_around(rule, inputs, Around())


def run_around(rule: Rule, inputs: Inputs, around: Around) -> Result:
    """T iterations on N tokens, all tensors flat, and what lies around them; of what `supports` says yes to."""
    given = (None if tensor is None else tensor.contiguous() for tensor in (*inputs, *around))
    return Result(*Loop.apply(rule, torch.is_grad_enabled(), *given))


class Loop(OwnOperation):
    """(rule, whether to differentiate, *Inputs, *Around) -> Result."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, differentiate: bool, *tensors: Any) -> tuple[Tensor | None, ...]:
        """Run the iterations; the inputs are kept, and u of the first ones."""
        inputs, around = _divided(tensors)
        ctx.set_materialize_grads(False)
        ctx.rule = rule
        result, hidden = forward(rule, inputs, around, keep=differentiate and any(ctx.needs_input_grad))
        # mu's moving average may move it in place before the backward pass, which needs the mu of this pass.
        inputs = inputs._replace(mu=inputs.mu.clone())
        # Of the stream itself the backward pass needs nothing but that it was there: x_T stands for it.
        around = around._replace(stream=None if around.stream is None else result.x)
        ctx.save_for_backward(*inputs, *around, hidden)
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of every input."""
        *tensors, hidden = ctx.saved_tensors
        found, of_around = backward(ctx.rule, *_divided(tensors), hidden, Result(*grads))  # type: ignore[arg-type]
        return None, None, *found, *of_around


def _divided(tensors: Sequence[Any]) -> tuple[Inputs, Around]:
    count = len(Inputs._fields)
    return Inputs(*tensors[:count]), Around(*tensors[count:])


def forward(rule: Rule, inputs: Inputs, around: Around = Around(), *, keep: bool) -> tuple[Result, Tensor]:
    """The iterations, and what the backward pass wants besides the inputs: u of the first ones, (0 to 2, N, C)."""
    result, hidden = results(rule, inputs), new_hidden(rule, inputs, keep=keep)
    if around.stream is not None:
        result = result._replace(stream=torch.empty_like(inputs.x))
    written = {"x_out": result.x, "v_out": result.v, "stream_out": result.stream}
    _call("iterate", rule, inputs, around, hidden, **written, speed=result.speed, energy=result.energy)
    return result, hidden


def backward(rule: Rule, inputs: Inputs, around: Around, hidden: Tensor, grads: Result) -> tuple[Inputs, Around]:
    """Gradients of the inputs from those of the results, any of which may be None.

    Args:
        around: as it was, but with x_T for the stream.
    """
    state = around.stream
    if grads.stream is None:  # nobody reads it
        around = around._replace(stream=None, gain=None)
    dense = (None if grad is None else grad.contiguous() for grad in grads)
    names = ("grad_x_out", "grad_v_out", "grad_speed", "grad_energy", "grad_stream_out")
    given = dict(zip(names, dense, strict=True))
    make = torch.empty_like if inputs.x.shape[0] else torch.zeros_like
    of_around = Around(*(None if tensor is None else make(tensor) for tensor in around._replace(stream=None)))
    found = gradients(inputs)
    written = {f"grad_{_FIELDS.get(name, name)}": gradient for name, gradient in found._asdict().items()}
    written |= {f"grad_{name}": gradient for name, gradient in of_around._asdict().items() if name != "stream"}
    _call("iterate_back", rule, inputs, around, hidden, x_out=state, **given, **written)
    return found._replace(outer=found.outer.T), of_around._replace(stream=grads.stream)


def results(rule: Rule, inputs: Inputs) -> Result:
    """Room for x_T and v_T, and zeros for the terms of the losses where they are wanted."""
    speed, energy = (None if rule.energy_power is None else inputs.x.new_zeros(inputs.x.shape[0]) for _ in range(2))
    return Result(torch.empty_like(inputs.x), torch.empty_like(inputs.x), speed, energy)


def new_hidden(rule: Rule, inputs: Inputs, *, keep: bool) -> Tensor:
    """Room for u of the first iterations, (0 to 2, N, C)."""
    count = min(fused.KEPT_ITERATIONS, rule.num_iterations) if keep else 0
    return inputs.x.new_empty(count, inputs.x.shape[0], inputs.inner.shape[0])


def gradients(inputs: Inputs) -> Inputs:
    """Room for the gradient of each token's inputs, and zeros to add to for the others; W_out's is (C, GD)."""
    return Inputs(
        torch.empty_like(inputs.x),
        None if inputs.v is None else torch.empty_like(inputs.v),
        torch.empty_like(inputs.hoisted),
        None if inputs.candidate is None else torch.empty_like(inputs.candidate),
        torch.zeros_like(inputs.inner),
        inputs.outer.new_zeros(inputs.outer.shape[::-1]),  # the faster way round
        torch.zeros_like(inputs.bias),
        torch.zeros_like(inputs.mu),
        torch.zeros_like(inputs.forcing),
        None if inputs.last_fraction is None else torch.zeros_like(inputs.last_fraction),
    )


def _call(name: str, rule: Rule, inputs: Inputs, around: Around, hidden: Tensor, **others: Tensor | None) -> None:
    _check(rule, inputs, around)
    if inputs.x.shape[0] == 0:
        return
    call = _described(rule, inputs, hidden)
    call.context_dim = 0 if around.context is None else around.context.shape[1]
    weights = (ctypes.c_double * rule.num_iterations)(*speed_weights(rule.num_iterations))
    call.speed_weights = ctypes.addressof(weights)
    tensors = ((_FIELDS.get(field, field), tensor) for field, tensor in inputs._asdict().items())
    what = f"the integrator ({name}) over {inputs.x.shape[0]:,} tokens"
    calls.run(name, call, [*tensors, *around._asdict().items(), ("hidden", hidden), *others.items()], what)


_FIELDS = {"last_fraction": "fraction"}


def _check(rule: Rule, inputs: Inputs, around: Around) -> None:
    """ValueError for what the loop, which trusts the sizes it is told, would read beyond its end or misread."""
    (rows, dim), width = inputs.x.shape, inputs.inner.shape[0]
    groups = 4 if inputs.bias.shape == (4 * dim,) and inputs.candidate is None else 3
    token, output = (rows, dim), groups * dim
    wanted = {
        "x": token,
        "v": token,
        "candidate": token,
        "hoisted": (rows if around.context is None else 0, width),
        "mu": (dim,),
        "last_fraction": (),
    }
    wanted |= {"inner": (width, 2 * dim), "outer": (output, width), "bias": (output,)}
    wanted |= {"forcing": (rule.num_iterations, dim), "stream": token, "gain": (dim,)}
    if around.context is not None:
        inputs_of_context = around.context.shape[-1]
        wanted |= {"context": (rows, inputs_of_context), "context_weight": (width, inputs_of_context)}
        wanted |= {"context_bias": (width,)}
    for name, tensor in (inputs._asdict() | around._asdict()).items():
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
        threads=calls.num_threads(rows),
        rows=rows,
        dim=dim,
        width=inputs.inner.shape[0],
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
