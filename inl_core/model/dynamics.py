"""The dynamics of one layer: the equation of one step, and the loop over T steps.

    u       = act(h W_h + b_h + x_t W_x + v_t W_v)
    a,b,g,c = (u W_out) * scale_l + bias_l
    alpha_base = sigmoid(a)    beta = min(softplus(b), beta_max)    gate = sigmoid(g)    v_cand = c or given
    error   = x_t - mu
    alpha   = alpha_base (1 - exp(-kappa rms(error)))
    v_{t+1} = alpha v_t + (1 - alpha) v_cand - beta error + A sin(gamma t + phi)
    x_{t+1} = x_t + dt velocity_scale gate v_{t+1}

- Source: docs/model.md, "One step".
- This is the reference. `inl_core.kernels.apply` may put a faster `Dynamics` with the same results in its place.
- Legend: B batch, S sequence, D d_model, C controller width, G output groups, T iterations.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inl_core.recipe import IntegratorConfig

if TYPE_CHECKING:
    from inl_core.model.early_stopping import EarlyStopping
    from inl_core.model.trajectory import Recorder

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class Gains(NamedTuple):
    """One step's coefficients, each (B, S, D); `candidate` is None where there is no such term."""

    alpha: Tensor
    beta: Tensor
    gate: Tensor
    candidate: Tensor | None


class Drive(NamedTuple):
    """All that a layer's steps need and that is the same for each of them."""

    hoisted: Tensor
    """h W_h + b_h, (B, S, C)"""
    inner: Tensor
    """[W_x; W_v] transposed, (C, 2D)"""
    outer: Tensor
    """W_out with the layer's scale, transposed, (GD, C)"""
    bias: Tensor
    """(GD,)"""
    candidate: Tensor | None
    """v_cand (B, S, D) where the block's feed-forward gives it"""
    mu: Tensor
    """(D,)"""


class Iterated(NamedTuple):
    """x_T and v_T, (B, S, D), and the terms of the speed and energy losses, (B, S), where they were asked for."""

    state: Tensor
    velocity: Tensor
    speed: Tensor | None = None
    energy: Tensor | None = None


def rms(x: Tensor) -> Tensor:
    """Root mean square over the last dimension, kept: (..., D) -> (..., 1). Its gradient at zero is zero, not NaN."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])


def step_velocity(gains: Gains, v: Tensor, error: Tensor, forcing: Tensor) -> Tensor:
    """v_{t+1} = alpha v + (1 - alpha) v_cand - beta error + forcing."""
    mixed = gains.alpha * v if gains.candidate is None else torch.lerp(gains.candidate, v, gains.alpha)
    return torch.addcmul(mixed + forcing, gains.beta, error, value=-1.0)


def speed_weights(num_iterations: int) -> list[float]:
    """w_t proportional to exp(-t / tau), tau = T/3, t = 1..T, summing to 1 (docs/model.md, "Losses")."""
    tau = num_iterations / 3
    weights = [math.exp(-t / tau) for t in range(1, num_iterations + 1)]
    return [weight / sum(weights) for weight in weights]


class Dynamics(nn.Module):
    """The step and the loop. It has no parameters: a `Drive` brings them."""

    branches_on_values = False
    """Whether a step does different things for different numbers, which no compiler can take."""
    keeps_nothing = False
    """Whether autograd keeps nothing of the single iterations for the backward pass."""

    def __init__(self, config: IntegratorConfig) -> None:
        super().__init__()
        self.activation = config.controller.activation
        self.kappa = config.kappa if config.dynamic_alpha else None
        self.beta_max = config.beta_max
        self.stride = config.dt * config.velocity_scale

    def gains(self, drive: Drive, x: Tensor, v: Tensor) -> Gains:
        """alpha, beta, gate and v_cand at one step, in the state's precision (under autocast the products are not)."""
        dim = x.shape[-1]
        u = drive.hoisted + F.linear(x, drive.inner[:, :dim]) + F.linear(v, drive.inner[:, dim:])
        outputs = F.linear(ACTIVATIONS[self.activation](u), drive.outer, drive.bias).to(x.dtype)
        a, b, g, *c = outputs.split(dim, dim=-1)
        alpha = torch.sigmoid(a)
        if self.kappa is not None:
            alpha = alpha * -torch.expm1(-self.kappa * rms(x - drive.mu))
        beta = F.softplus(b)
        if self.beta_max is not None:
            beta = beta.clamp(max=self.beta_max)
        return Gains(alpha, beta, torch.sigmoid(g), c[0] if c else drive.candidate)

    def step_with_gains(self, drive: Drive, x: Tensor, v: Tensor, forcing: Tensor) -> tuple[Tensor, Tensor, Gains]:
        """One iteration: x_{t+1} and v_{t+1} (B, S, D), and what led there. `forcing` (D,) is the step's excitation."""
        gains = self.gains(drive, x, v)
        new_v = step_velocity(gains, v, x - drive.mu, forcing)
        return torch.addcmul(x, gains.gate, new_v, value=self.stride), new_v, gains

    def step(self, drive: Drive, x: Tensor, v: Tensor, forcing: Tensor) -> tuple[Tensor, Tensor]:
        """One iteration without its gains, which a compiler then need not write to memory."""
        return self.step_with_gains(drive, x, v, forcing)[:2]

    def forward(
        self,
        drive: Drive,
        x: Tensor,
        v: Tensor,
        forcing: Tensor,
        last_fraction: Tensor | None = None,
        energy_power: float | None = None,
        stopping: "EarlyStopping | None" = None,
        recorder: "Recorder | None" = None,
    ) -> Iterated:
        """T iterations from x_0, v_0 (B, S, D), where `forcing` (T, D) has one row for each.

        Args:
            last_fraction: how much of the last step counts, a 0-dim tensor; None is all of it.
            energy_power: p, where the terms of the speed and energy losses are wanted.
            stopping: freezes tokens that have converged.
            recorder: is given every iteration.
        """
        total = len(forcing)
        speed = energy = None
        for t in range(total):
            if stopping is None and recorder is None:
                new_x, new_v = self.step(drive, x, v, forcing[t])
            else:
                new_x, new_v, gains = self.step_with_gains(drive, x, v, forcing[t])
            if last_fraction is not None and t + 1 == total:
                new_x = torch.lerp(x, new_x, last_fraction.to(x.dtype))
                new_v = torch.lerp(v, new_v, last_fraction.to(v.dtype))
            if stopping is not None:
                forced = self.stride * gains.gate * forcing[t]
                new_x, new_v = stopping.freeze(t, (x, v), (new_x, new_v), forced)
            x, v = new_x, new_v
            if energy_power is not None:
                slow, work = self.loss_terms(x - drive.mu, v, speed_weights(total)[t], energy_power, total)
                speed, energy = (slow, work) if speed is None or energy is None else (speed + slow, energy + work)
            if recorder is not None:
                recorder.add(x, v, gains)
            if stopping is not None and stopping.all_stopped():
                break
        return Iterated(x, v, speed, energy)

    def loss_terms(self, error: Tensor, v: Tensor, weight: float, power: float, total: int) -> tuple[Tensor, Tensor]:
        """One step's part of sum_t w_t mean_D |x_t - mu| and of mean_t mean_D |v_t|^p, (B, S) each."""
        size = v.square() if power == 2.0 else v.abs().pow(power)
        return weight * error.abs().mean(-1), size.mean(-1) / total
