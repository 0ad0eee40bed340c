"""The steps in C++ (native_steps.cpp): one pass over memory for an iteration where steps.py makes some thirty.

- The same functions as steps.py, with the same results up to rounding; fused.py takes either.
- Legend: n rows, D d_model, G output groups.
"""

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inl_core.model.backends.native_build import library
from inl_core.model.backends.rule import Inputs, Rule, Step, Sums

_NAMES = {torch.float32: "float32", torch.float64: "float64"}
CHUNK_BYTES = 512 * 1024
"""Of one (n, D) tensor: the rows that are worked on together."""


class Tape(NamedTuple):
    """What the backward pass of one iteration reads: all of it again from the controller's output."""

    step: Step
    v: Tensor | None
    v_new: Tensor | None


def is_available() -> bool:
    """Whether this machine can run the steps; the first call may compile them."""
    return library() is not None


def supports(inputs: Inputs) -> bool:
    """Whether the tensors can be handed over: real memory of a CPU, in single or double precision throughout."""
    dtype = inputs.x.dtype
    tensors = (inputs.x, inputs.v, inputs.candidate, inputs.bias, inputs.mu, inputs.forcing)
    return dtype in _NAMES and all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.dtype == dtype
        for tensor in tensors
        if tensor is not None
    )


def forward(rule: Rule, step: Step, results: tuple[Tensor, Tensor] | None) -> Tape:
    """Write x_new and v_new into `results` (they may be the step's own x and v); without, nothing is computed."""
    if results is not None:
        _call("forward", rule, step, *results)
    return Tape(step, step.v, results[1] if results else None)


def backward(
    rule: Rule, tape: Tape, grad_x: Tensor, grad_v: Tensor, grad_candidate: Tensor | None, sums: Sums
) -> Tensor:
    """Gradient of the controller's output, in its place; grad_x, grad_v, grad_candidate and the sums are updated."""
    _call("backward", rule, tape.step, grad_x, grad_v, grad_candidate, *sums)
    return tape.step.outputs


def _call(name: str, rule: Rule, step: Step, *written: Tensor | None) -> None:
    found = library()
    assert found is not None
    (rows, dim), groups = step.x.shape, step.outputs.shape[1] // step.x.shape[1]
    numbers = (
        rule.stride,
        -1.0 if rule.kappa is None else rule.kappa,
        math.inf if rule.beta_max is None else rule.beta_max,
    )
    getattr(found, f"{name}_{_NAMES[step.x.dtype]}")(
        torch.get_num_threads(),
        *(ctypes.c_int64(number) for number in (rows, dim, groups)),
        *(ctypes.c_double(number) for number in numbers),
        *(_address(tensor) for tensor in (*step, *written)),
    )


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    if tensor is None:
        return ctypes.c_void_p(None)
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())
