"""The integrator: one step, T steps, per-token early stopping.

    u      = act(h W_h + b_h + x_t W_x + v_t W_v)
    a,b,g,c = (u W_out) * scale_l + bias_l
    alpha_base = sigmoid(a)    beta = min(softplus(b), beta_max)    gate = sigmoid(g)    v_cand = c or given
    error  = x_t - mu
    alpha  = alpha_base (1 - exp(-kappa rms(error)))
    v_{t+1} = alpha v_t + (1 - alpha) v_cand - beta error + A sin(gamma t + phi)
    x_{t+1} = x_t + dt velocity_scale gate v_{t+1}

- Source: docs 000 and 002, and model.md sections 1-2, which bounds beta and takes the rms for the seeds' norm.
- No trajectory is kept unless asked for; the auxiliary losses' terms are reduced to one number a token as they appear.
- Legend: B batch, S sequence, D d_model, T iterations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inl_core.model.backends.rule import Around, Inputs, Result, Rule
from inl_core.model.backends.select import backend_name, find_backend, run_around, takes_around
from inl_core.model.controller import Controller, Head, Modulation, num_groups
from inl_core.model.derivatives import is_plain
from inl_core.model.equilibrium import Equilibrium
from inl_core.model.excitation import Excitation
from inl_core.model.loss_terms import LossTerms
from inl_core.model.mixture import Experts, Router, Routing, Share, build_controller, shares
from inl_core.recipe import IntegratorConfig


def rms(x: Tensor) -> Tensor:
    """Root mean square over the last dimension, kept: (..., D) -> (..., 1). Its gradient at zero is zero, not NaN."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(x.shape[-1])


class Gains(NamedTuple):
    """One step's coefficients, each (B, S, D); `candidate` may be shared by all steps, or None for no such term."""

    alpha: Tensor
    beta: Tensor
    gate: Tensor
    candidate: Tensor | None


class Step(NamedTuple):
    """One step's result: state and velocity (B, S, D)."""

    state: Tensor
    velocity: Tensor
    gains: Gains


class Drive(NamedTuple):
    """What one controller brings to a layer, the same at every iteration; v_cand (..., D) may be None."""

    controller: Controller
    head: Head
    hoisted: Tensor
    """h W_h + b_h, (..., C)"""
    candidate: Tensor | None


@dataclass
class Trajectory:
    """Every iteration of one layer: states and velocities (T+1, B, S, D), alpha, beta, gate (T, B, S, D).

    candidate: v_cand (T, B, S, D), one tensor seen T times where all steps share it; None where there is none.
    """

    states: Tensor
    velocities: Tensor
    alpha: Tensor
    beta: Tensor
    gate: Tensor
    candidate: Tensor | None = None


@dataclass
class IntegratorOutput:
    """What T iterations leave behind.

    state, velocity: (B, S, D) at the end.  num_iterations: steps that were run.
    iterations: (B, S) iterations each token used, or None = all of them.
    speed: (B, S) sum_t w_t mean_D |x_t - mu|.  energy: (B, S) mean_t mean_D |v_t|^p.  Both only when asked for.
    routing: which experts each token took, in a mixture of integrators.
    """

    state: Tensor
    velocity: Tensor
    num_iterations: int
    iterations: Tensor | None = None
    speed: Tensor | None = None
    energy: Tensor | None = None
    trajectory: Trajectory | None = None
    routing: Routing | None = None
    stream: Tensor | None = None
    """The read-out of this state, (B, S, D), where it was asked for and the backend does it: void for another state."""


class Integrator(nn.Module):
    """The dynamics of one layer: its mu, gamma, phi and modulation, driven by a controller it may share.

    `context_dim` is the width of h where it is not the state's (a controller of the layer's own only).
    """

    def __init__(self, config: IntegratorConfig, dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.equilibrium = Equilibrium(config.mu, dim)
        self.excitation = Excitation(config.excitation, dim)
        self.modulation = Modulation(config, dim)
        self.controller = None if config.controller.shared else build_controller(config, dim, context_dim)
        self.router = Router(config, context_dim or dim) if config.controller.experts > 1 else None

    def initialise(self) -> None:
        """Everything of this layer that starts without random numbers."""
        self.equilibrium.initialise()
        self.excitation.initialise()
        self.modulation.initialise()

    def gains(self, drive: Drive, x: Tensor, v: Tensor | None, error: Tensor) -> Gains:
        """alpha, beta, gate and v_cand at one step, in the state's precision (under autocast the GEMM is not)."""
        hidden = drive.controller.hidden(drive.hoisted, x, v)
        parts = F.linear(hidden, drive.head.weight, drive.head.bias).to(x.dtype).chunk(num_groups(self.config), dim=-1)
        alpha = torch.sigmoid(parts[0])
        if self.config.dynamic_alpha:
            alpha = alpha * -torch.expm1(-self.config.kappa * rms(error))
        beta = F.softplus(parts[1])
        if self.config.beta_max is not None:
            beta = beta.clamp(max=self.config.beta_max)
        return Gains(alpha, beta, torch.sigmoid(parts[2]), parts[3] if len(parts) == 4 else drive.candidate)

    def step(self, drive: Drive, x: Tensor, v: Tensor | None, mu: Tensor, forcing: Tensor) -> Step:
        """One iteration of one controller's dynamics; `forcing` (D,) is the excitation at this step."""
        error = x - mu
        gains = self.gains(drive, x, v, error)
        new_v = step_velocity(gains, v, error, forcing)
        return Step(torch.addcmul(x, gains.gate, new_v, value=self.stride), new_v, gains)

    def recomputes(self, *, is_compiled: bool, is_low_precision: bool) -> bool:
        """Whether training keeps nothing of the single iterations: every backend but the plain loop."""
        device = self.equilibrium().device
        return backend_name(self.config, device, is_compiled=is_compiled, is_low_precision=is_low_precision) != "plain"

    @property
    def stride(self) -> float:
        """dt velocity_scale."""
        return self.config.dt * self.config.velocity_scale

    def mixed_step(
        self,
        experts: list[tuple[Share, Drive]],
        x: Tensor,
        v: Tensor | None,
        mu: Tensor,
        forcing: Tensor,
    ) -> Step:
        """The experts' steps on their tokens, mixed; the gains are mixed alike, for the records."""
        flat, flat_v = x.flatten(0, -2), None if v is None else v.flatten(0, -2)  # (N, D)
        sums = [torch.zeros_like(flat) for _ in range(6)]
        for share, drive in experts:
            part = self.step(drive, flat[share.rows], None if flat_v is None else flat_v[share.rows], mu, forcing)
            for index, value in enumerate((part.state, part.velocity, *part.gains)):
                if value is not None:
                    sums[index] = sums[index].index_add(0, share.rows, share.weight.to(value.dtype) * value)
        state, velocity, *gains = (total.view_as(x) for total in sums)
        return Step(state, velocity, Gains(*gains))

    def advance(
        self, controller: Controller | Experts, h: Tensor, candidate: Tensor | None, routing: Routing | None
    ) -> Callable[[Tensor, Tensor | None, Tensor, Tensor], Step]:
        """(x, v, mu, forcing) -> one iteration of this layer, with everything that does not depend on t done."""
        if isinstance(controller, Controller):
            drive = Drive(controller, self.modulation.fold(controller), controller.hoist(h), candidate)
            return partial(self.step, drive)
        assert routing is not None
        flat_h, flat_candidate = h.flatten(0, -2), None if candidate is None else candidate.flatten(0, -2)
        experts = []
        for share, expert in zip(shares(routing), controller, strict=True):
            assert isinstance(expert, Controller)
            own = None if flat_candidate is None else flat_candidate[share.rows]
            drive = Drive(expert, self.modulation.fold(expert), expert.hoist(flat_h[share.rows]), own)
            experts.append((share, drive))
        return partial(self.mixed_step, experts)

    def forward(
        self,
        h: Tensor,
        state: Tensor,
        velocity: Tensor | None,
        *,
        amplitude: Tensor,
        candidate: Tensor | None = None,
        controller: Controller | Experts | None = None,
        num_iterations: int | None = None,
        first_step: int = 0,
        last_fraction: Tensor | None = None,
        energy_power: float | None = None,
        keep_trajectory: bool = False,
        early_stopping: bool = True,
        stream: Tensor | None = None,
        gain: Tensor | None = None,
    ) -> IntegratorOutput:
        """Run T iterations from x_0 = `state`, v_0 = `velocity` (None is zeros), all (B, S, D).

        Args:
            h: context (B, S, D).
            amplitude: A, a 0-dim tensor.
            candidate: v_cand (B, S, D) when the block's feed-forward provides it.
            controller: the shared controller (or experts); None uses the layer's own.
            num_iterations: T instead of the configured one.
            first_step: t of the first iteration, for a caller that runs the T iterations in parts.
            last_fraction: how much of the last step counts, a 0-dim tensor (budget.py); None is all of it.
            energy_power: p; when given, the terms of the speed and energy losses are returned.
            keep_trajectory: return every iteration.
            early_stopping: False runs all T iterations also where the configuration would stop early.
            stream, gain: (B, S, D) and (D,); a backend that can gives stream + gain (s_T - s_0) with the rest.
        """
        config = self.config
        total = num_iterations or config.num_iterations
        controller = controller or self.controller
        assert controller is not None, "a shared controller must be passed in"
        mu, forcing = self.equilibrium(), self.excitation(first_step + total, amplitude)[first_step:]
        candidate = None if candidate is None else candidate.to(state.dtype)
        routing = self.router(h) if self.router else None
        stops = early_stopping and _stops_early(self)
        run = None if stops or keep_trajectory else find_backend(config, state, mu)
        if run is not None and isinstance(controller, Controller):
            rule = self.rule(total, energy_power)
            return self._run_flat(
                run, rule, controller, h, _Start(state, velocity, candidate, mu, forcing, last_fraction), stream, gain
            )
        advance = self.advance(controller, h, candidate, routing)
        stopping = _EarlyStopping(config, state) if stops else None
        recorder = _Recorder(state, velocity) if keep_trajectory else None
        losses = LossTerms(total, energy_power) if energy_power is not None else None

        x, v = state, velocity
        for t in range(total):
            new_x, new_v, gains = advance(x, v, mu, forcing[t])
            if last_fraction is not None and t + 1 == total:
                new_x = torch.lerp(x, new_x, last_fraction.to(x.dtype))
                new_v = torch.lerp(torch.zeros_like(new_v) if v is None else v, new_v, last_fraction.to(x.dtype))
            if stopping is not None:
                new_x, new_v = stopping.freeze(t, x, v, new_x, new_v, self.stride * gains.gate * forcing[t])
            x, v = new_x, new_v
            if losses is not None:
                losses.add(t, x - mu, v)
            if recorder is not None:
                recorder.add(x, v, gains)
            if stopping is not None and stopping.all_stopped:
                break
        assert v is not None
        return IntegratorOutput(
            x,
            v,
            total,
            stopping.iterations if stopping else None,
            losses.speed if losses else None,
            losses.energy if losses else None,
            recorder.trajectory() if recorder else None,
            routing,
        )

    def rule(self, num_iterations: int, energy_power: float | None) -> Rule:
        """The constants of this layer's dynamics."""
        config = self.config
        return Rule(
            num_iterations,
            self.stride,
            config.kappa if config.dynamic_alpha else None,
            config.beta_max,
            config.controller.activation,
            energy_power,
        )

    def _run_flat(
        self,
        run: Callable[[Rule, Inputs], Result],
        rule: Rule,
        controller: Controller,
        h: Tensor,
        start: "_Start",
        stream: Tensor | None,
        gain: Tensor | None,
    ) -> IntegratorOutput:
        """All iterations by a backend, which sees tokens in one row and no controller but its matrices."""
        shape, head = start.state.shape, self.modulation.fold(controller)
        tokens = [None if value is None else value.expand(shape).reshape(-1, shape[-1]) for value in start[:3]]
        x, v, candidate = tokens
        assert x is not None
        inner = controller.state_velocity.weight
        fraction = None if start.last_fraction is None else start.last_fraction.to(x.dtype)
        rest = (inner, head.weight, head.bias, start.mu, start.forcing, fraction)
        inputs = Inputs(x, v, x.new_empty(0, len(inner)), candidate, *rest)
        context = h.expand(*shape[:-1], -1).reshape(x.shape[0], h.shape[-1])
        read_out = (None, None) if stream is None or gain is None else (stream.expand(shape).reshape(x.shape), gain)
        around = Around(context, *controller.context_layer, *read_out)
        if takes_around(run, inputs, around):
            result = run_around(rule, inputs, around)
        else:
            result = run(rule, inputs._replace(hoisted=controller.hoist(context)))
        output = IntegratorOutput(result.x.view(shape), result.v.view(shape), rule.num_iterations)
        output.stream = None if result.stream is None else result.stream.view(shape)
        if result.speed is not None and result.energy is not None:
            output.speed, output.energy = result.speed.view(shape[:-1]), result.energy.view(shape[:-1])
        return output


class _Start(NamedTuple):
    """What one call of a layer brings: x_0, v_0, v_cand (B, S, D); mu (D,); forcing (T, D); the last step's share."""

    state: Tensor
    velocity: Tensor | None
    candidate: Tensor | None
    mu: Tensor
    forcing: Tensor
    last_fraction: Tensor | None


def step_velocity(gains: Gains, v: Tensor | None, error: Tensor, forcing: Tensor) -> Tensor:
    """v_{t+1} = alpha v + (1 - alpha) v_cand - beta error + forcing; `v` None is zeros."""
    candidate = gains.candidate
    if candidate is None:
        mixed = torch.zeros_like(error) if v is None else gains.alpha * v
    elif v is None:
        mixed = torch.addcmul(candidate, gains.alpha, candidate, value=-1.0)
    else:
        mixed = torch.lerp(candidate, v, gains.alpha)
    return torch.addcmul(mixed + forcing, gains.beta, error, value=-1.0)


def _stops_early(layer: Integrator) -> bool:
    return not layer.training and layer.config.early_stopping.convergence_threshold > 0


class _EarlyStopping:
    """Per-token stopping: a token whose state has stopped moving by itself is frozen exactly.

    The displacement the excitation causes at this step is known and does not count as movement: with it, a driven
    system would never be seen to converge.
    """

    def __init__(self, config: IntegratorConfig, state: Tensor) -> None:
        self.threshold = config.early_stopping.convergence_threshold
        self.min_iterations = config.early_stopping.min_iterations
        self.active = torch.ones(state.shape[:-1], dtype=torch.bool, device=state.device)  # (B, S)
        self.iterations = torch.zeros(state.shape[:-1], dtype=torch.int32, device=state.device)
        self.all_stopped = False

    def freeze(
        self, t: int, x: Tensor, v: Tensor | None, new_x: Tensor, new_v: Tensor, forced: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The next state and velocity, with stopped tokens left as they were."""
        moved = rms(new_x - x - forced).squeeze(-1)
        keep = self.active[..., None]
        new_x = torch.where(keep, new_x, x)
        new_v = new_v if v is None else torch.where(keep, new_v, v)  # at t = 0 every token is active
        self.iterations = self.iterations + self.active
        if t + 1 >= self.min_iterations:
            self.active = self.active & (moved >= self.threshold)
            self.all_stopped = not (is_plain() or bool(self.active.any()))  # vmap cannot branch on a value
        return new_x, new_v


class _Recorder:
    """Collects a trajectory."""

    def __init__(self, state: Tensor, velocity: Tensor | None) -> None:
        self.states = [state]
        self.velocities = [torch.zeros_like(state) if velocity is None else velocity]
        self.gains: list[Gains] = []

    def add(self, x: Tensor, v: Tensor, gains: Gains) -> None:
        self.states.append(x)
        self.velocities.append(v)
        self.gains.append(gains)

    def trajectory(self) -> Trajectory:
        alpha, beta, gate = (
            torch.stack([getattr(step, name) for step in self.gains]) for name in ("alpha", "beta", "gate")
        )
        return Trajectory(torch.stack(self.states), torch.stack(self.velocities), alpha, beta, gate, self._candidate())

    def _candidate(self) -> Tensor | None:
        """Stacked only where the steps differ: the feed-forward's candidate is one tensor for all of them."""
        found = [step.candidate for step in self.gains]
        first = found[0]
        if first is None:
            return None
        if all(candidate is first for candidate in found):
            return first.expand(len(found), *first.shape)
        return torch.stack([candidate for candidate in found if candidate is not None])
