"""What every backend of the dynamics is given: the constants of one layer, and the tensors of one call.

- Legend: N tokens, D d_model, C controller width, G output groups (4 when the controller gives v_cand, else 3).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """The constants of one layer's dynamics, all Python numbers."""

    num_iterations: int
    stride: float
    """dt velocity_scale"""
    kappa: float | None
    """None without the dynamic alpha."""
    beta_max: float | None
    activation: str
    energy_power: float | None = None
    """p, when the terms of the speed and energy losses are wanted."""


class Inputs(NamedTuple):
    """The tensors of one call; every one may need a gradient."""

    x: Tensor
    """x_0 (N, D)"""
    v: Tensor | None
    """v_0 (N, D); None is zeros."""
    hoisted: Tensor
    """h W_h + b_h, (N, C); (0, C) where a backend is given the context itself."""
    candidate: Tensor | None
    """v_cand (N, D); None when the controller gives it, or there is none."""
    inner: Tensor
    """[W_x; W_v] transposed, (C, 2D)"""
    outer: Tensor
    """W_out with the layer's scale, transposed, (GD, C)"""
    bias: Tensor
    """(GD,)"""
    mu: Tensor
    """(D,)"""
    forcing: Tensor
    """A sin(gamma t + phi), (T, D)"""
    last_fraction: Tensor | None
    """How much of the last step counts, 0-dim; None is all of it."""


class Around(NamedTuple):
    """What lies around the iterations and a backend may do with them, token by token; none of it, for most."""

    context: Tensor | None = None
    """h (N, K), in the place of `Inputs.hoisted`: what the context adds to u is h W_h^T + b_h."""
    context_weight: Tensor | None = None
    """W_h, (C, K)"""
    context_bias: Tensor | None = None
    """b_h, (C,)"""
    stream: Tensor | None = None
    """(N, D), to which stream + gain (x_T - x_0) is read out."""
    gain: Tensor | None = None
    """(D,)"""


class Result(NamedTuple):
    """x_T, v_T (N, D), the terms of the speed and energy losses (N,) where they are wanted, and the stream (N, D)."""

    x: Tensor
    v: Tensor
    speed: Tensor | None
    energy: Tensor | None
    stream: Tensor | None = None


def speed_weights(num_iterations: int) -> list[float]:
    """w_t proportional to exp(-t / tau), tau = T/3, t = 1..T, summing to 1 (doc 002, speed loss)."""
    tau = num_iterations / 3
    weights = [math.exp(-t / tau) for t in range(1, num_iterations + 1)]
    return [weight / sum(weights) for weight in weights]


ACTIVATIONS = {
    "relu": (torch.relu, lambda grad, u: torch.ops.aten.threshold_backward(grad, u, 0)),
    "gelu": (torch.nn.functional.gelu, torch.ops.aten.gelu_backward),
    "silu": (torch.nn.functional.silu, torch.ops.aten.silu_backward),
    "tanh": (torch.tanh, lambda grad, u: torch.ops.aten.tanh_backward(grad, torch.tanh(u))),
}
"""name -> (activation of u, (gradient, u) -> gradient of u); u is what the activation is applied to."""
