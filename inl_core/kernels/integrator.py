"""The T iterations of a layer in C++ (cpu/integrator.cpp): tiles of tokens through all of them, in each thread's cache.

- `inl::integrator` is one operation of torch. It keeps its inputs and u of the first iterations, nothing that grows
  with T, and computes the iterations again in the backward pass.
- `CppDynamics` takes the place of the model's `Dynamics`, whose results it has up to rounding.
- For CPUs, in single or double precision throughout; the plain loop does anything else: single states, early stopping,
  experts, bfloat16, a GPU.
- Legend: B batch, S sequence, N tokens, D d_model, C controller width, G output groups, T iterations.
"""

import ctypes
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from inl_core.kernels.cpu import calls
from inl_core.kernels.cpu.library import NAMES
from inl_core.kernels.cpu.structures import INPUTS, RESULTS, Integrator
from inl_core.model.derivatives import needs_plain_operations
from inl_core.model.dynamics import Drive, Dynamics, Iterated, speed_weights
from inl_core.recipe import IntegratorConfig

_ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
_KEPT_ITERATIONS = 2
_FEWEST_TOKENS = 16
"""The operation turns whole weights before it begins: for fewer tokens the plain loop is as fast."""
_TILE_BYTES = 128 * 1024
"""Of one (n, D) tensor of a tile; some ten of them, each thread's own, should fit its cache."""
_MOST_TILES = 4
"""From T = 4 on a tile shrinks, as the backward pass holds its iterations side by side: memory must not grow with T."""
_FEWEST_ROWS = 32


class CppDynamics(Dynamics):
    """The model's dynamics by the operation. `product` is the library whose matrix product it calls."""

    keeps_nothing = True

    def __init__(self, config: IntegratorConfig, product: str) -> None:
        super().__init__(config)
        self.product = product

    def forward(
        self,
        drive: Drive,
        x: Tensor,
        v: Tensor,
        forcing: Tensor,
        last_fraction: Tensor | None = None,
        energy_power: float | None = None,
        **observers: Any,
    ) -> Iterated:
        """T iterations from x_0, v_0 (B, S, D); the arguments are those of the model's own `Dynamics`."""
        is_observed = any(observer is not None for observer in observers.values())
        if is_observed or not _can_run(drive, x, forcing):
            return super().forward(drive, x, v, forcing, last_fraction, energy_power, **observers)
        tokens = [_of_tokens(tensor, x) for tensor in (x, v, drive.hoisted, drive.candidate)]
        fraction = None if last_fraction is None else last_fraction.to(x.dtype)
        # mu's moving average may move it in place before the backward pass, which needs the mu of this pass.
        weights = (drive.inner, drive.outer, drive.bias, drive.mu.clone(), forcing, fraction)
        given = [None if tensor is None else tensor.contiguous() for tensor in (*tokens, *weights)]
        numbers = (self.stride, self.kappa, self.beta_max, self.activation, energy_power, self.product)
        state, velocity, speed, energy, _ = torch.ops.inl.integrator(*given, *numbers, torch.is_grad_enabled())
        return Iterated(state, velocity) if energy_power is None else Iterated(state, velocity, speed, energy)


def _can_run(drive: Drive, x: Tensor, forcing: Tensor) -> bool:
    """Whether the operation can be used: enough tokens, in a CPU's memory, all tensors of one precision."""
    one_precision = all(
        tensor is None or tensor.dtype == x.dtype for tensor in (drive.mu, drive.hoisted, drive.inner, forcing)
    )
    is_large = x.numel() >= _FEWEST_TOKENS * x.shape[-1]
    return is_large and one_precision and x.dtype in NAMES and x.device.type == "cpu" and not needs_plain_operations()


def _of_tokens(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """The tensor (..., size) with one row for each token of x (B, S, D)."""
    return None if tensor is None else tensor.expand(*x.shape[:-1], -1)


class _Arguments(NamedTuple):
    """What the operation is given."""

    x: Tensor
    v: Tensor
    hoisted: Tensor
    candidate: Tensor | None
    inner: Tensor
    outer: Tensor
    bias: Tensor
    mu: Tensor
    forcing: Tensor
    fraction: Tensor | None
    stride: float
    kappa: float | None
    beta_max: float | None
    activation: str
    energy_power: float | None
    product: str

    @property
    def tensors(self) -> dict[str, Any]:
        """The inputs that may need a gradient, tensors or None, by the structure's names."""
        return dict(zip(INPUTS, self, strict=False))

    @property
    def groups(self) -> int:
        """G."""
        return self.bias.shape[0] // self.x.shape[-1]


_SCHEMA = (
    "Tensor x, Tensor v, Tensor hoisted, Tensor? candidate, Tensor inner, Tensor outer, Tensor bias, Tensor mu, "
    "Tensor forcing, Tensor? fraction, float stride, float? kappa, float? beta_max, str activation, "
    "float? energy_power, str product"
)


@torch.library.custom_op(
    "inl::integrator", mutates_args=(), schema=f"({_SCHEMA}, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def integrator(*arguments):
    """x_T and v_T (..., D), the speed and energy losses' terms (...), and u of the first iterations (0-2, ..., C)."""
    given = _Arguments(*arguments[:-1])
    *results, hidden = _results(*arguments)
    _run("iterate", given, hidden, zip(RESULTS, results, strict=True))
    return *results, hidden


@integrator.register_fake
def _results(*arguments):
    given, keep = _Arguments(*arguments[:-1]), arguments[-1]
    terms = [given.x.new_zeros(0 if given.energy_power is None else given.x.shape[:-1]) for _ in range(2)]
    kept = min(_KEPT_ITERATIONS, len(given.forcing)) if keep else 0
    return torch.empty_like(given.x), torch.empty_like(given.x), *terms, given.x.new_empty(kept, *given.hoisted.shape)


@torch.library.custom_op(
    "inl::integrator_backward",
    mutates_args=(),
    schema=f"({_SCHEMA}, Tensor hidden, Tensor?[] grads) -> Tensor[]",
)
def integrator_backward(*arguments):
    """The gradients of the ten tensors, (0,) for one that is not there; `grads` are those of the first four results."""
    *rest, hidden, grads = arguments
    given, found = _Arguments(*rest), _gradients(*arguments)
    # The operation writes W_out's gradient the faster way round, (C, GD).
    written = dict(zip((f"grad_{name}" for name in INPUTS), found, strict=True))
    written["grad_outer"] = found[5] = given.outer.new_zeros(given.outer.shape[::-1])
    of_results = [(f"grad_{name}", grad) for name, grad in zip(RESULTS, grads, strict=True)]
    tensors = ((name, tensor if tensor is not None and tensor.numel() else None) for name, tensor in written.items())
    _run("iterate_back", given, hidden, [*of_results, *tensors])
    found[5] = found[5].T.contiguous()
    return found


@integrator_backward.register_fake
def _gradients(*arguments):
    *tokens, inner, outer, bias, mu, forcing, fraction = _Arguments(*arguments[:-2]).tensors.values()
    summed = (inner, outer, bias, mu, forcing, fraction)
    of_tokens = [mu.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in tokens]
    return [*of_tokens, *(mu.new_empty(0) if tensor is None else torch.zeros_like(tensor) for tensor in summed)]


def _save(ctx, inputs, output) -> None:
    ctx.numbers = inputs[len(INPUTS) : -1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: len(INPUTS)], output[-1])


def _differentiate(ctx, *grads):
    *tensors, hidden = ctx.saved_tensors
    dense = [None if grad is None else grad.contiguous() for grad in grads[: len(RESULTS)]]
    found = torch.ops.inl.integrator_backward(*tensors, *ctx.numbers, hidden, dense)
    of_inputs = [None if tensor is None else grad for tensor, grad in zip(tensors, found, strict=True)]
    return *of_inputs, *(None for _ in ctx.numbers), None


integrator.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.inl.integrator)
def _flops(*shapes, **_kwargs) -> int:
    """[x; v] (2 D) to C, and C to G D, for each token and iteration."""
    (*tokens, dim), hoisted, outer, forcing = shapes[0], shapes[2], shapes[5], shapes[8]
    return 2 * math.prod(tokens) * hoisted[-1] * (2 * dim + outer[0]) * forcing[0]


@register_flop_formula(torch.ops.inl.integrator_backward)
def _(*shapes, **_kwargs) -> int:
    return 3 * _flops(*shapes)


def _run(name: str, given: _Arguments, hidden: Tensor, others: Any) -> None:
    """The C++ function on what was given, once it is checked."""
    _check(given)
    rows, dim, total = given.x.shape[:-1].numel(), given.x.shape[-1], len(given.forcing)
    if rows == 0:
        return
    shrink = min(1.0, _MOST_TILES / total)
    call = Integrator(
        threads=calls.num_threads(rows),
        rows=rows,
        dim=dim,
        width=given.inner.shape[0],
        groups=given.groups,
        iterations=total,
        kept=hidden.shape[0],
        activation=_ACTIVATIONS.index(given.activation),
        tile=max(_FEWEST_ROWS, int(_TILE_BYTES * shrink) // (dim * given.x.element_size())),
        stride=given.stride,
        kappa=-1.0 if given.kappa is None else given.kappa,
        beta_max=math.inf if given.beta_max is None else given.beta_max,
        power=given.energy_power or 0.0,
    )
    weights = (ctypes.c_double * total)(*speed_weights(total))
    call.speed_weights = ctypes.addressof(weights)
    there = ((field, tensor if tensor is not None and tensor.numel() else None) for field, tensor in others)
    tensors = [*given.tensors.items(), ("hidden", hidden), *there]
    what = f"the integrator ({name}) over {rows:,} tokens"
    calls.run(name, call, tensors, given.product, given.x.dtype, what)


def _check(given: _Arguments) -> None:
    """ValueError for what the loop, which trusts the sizes it is told, would read beyond its end or misread."""
    *rows, dim = token = tuple(given.x.shape)
    width, output = given.inner.shape[0], given.groups * dim
    wanted = {"x": token, "v": token, "candidate": token, "hoisted": (*rows, width), "mu": (dim,), "fraction": ()}
    wanted |= {
        "inner": (width, 2 * dim),
        "outer": (output, width),
        "bias": (output,),
        "forcing": (len(given.forcing), dim),
    }
    calls.check_shapes("integrator", given.tensors, wanted, given.x.dtype)
    if given.groups not in (3, 4) or (given.groups == 4 and given.candidate is not None):
        raise ValueError(f"integrator: {given.groups} output groups beside candidate {given.candidate is not None}")
