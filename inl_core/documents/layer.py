"""The documents' stand-alone integrator layer: the language model's dynamics with a context of any width.

    v_{t+1} = alpha v_t + (1 - alpha) v_cand - beta (x_t - mu) + A sin(gamma t + phi)
    x_{t+1} = x_t + dt velocity_scale gate v_{t+1}

- Source: document 002 (docs/model.md, "One step"); the equations are those of inl_core/model/integrator.py.
- A forward pass is one iteration, since the documents' layer has no T; a caller may ask for more at once.
- Legend: B batch, H hidden_dim (context), D output_dim (state), T iterations.
"""

import math

import torch
from torch import Tensor, nn

from inl_core.documents.arguments import validated
from inl_core.documents.building import materialise
from inl_core.model.controller import Controller
from inl_core.model.initialisation import draw
from inl_core.model.integrator import Integrator, Trajectory
from inl_core.recipe import IntegratorConfig

_ARGUMENTS = {
    "mu.init": "target_value",
    "mu.adaptation_rate": "mu_adaptation_rate",
    "excitation.amplitude": "excitation_amplitude",
    "kappa": "alpha_kappa",
    "controller.width": "controller_width",
}


class IntegratorNeuronLayer(nn.Module):
    """A second-order dynamical system x (..., D), v (..., D), steered by a context (..., H).

    Args:
        hidden_dim: H.
        output_dim: D.
        target_value: where mu starts; where it stays when it is not learned.
        dt: step size.
        learnable_mu: mu is a parameter of D values, moved by the gradient and by the moving average.
        mu_adaptation_rate: eta of mu <- (1 - eta) mu + eta mean(x); 0 is off.
        excitation_amplitude: A; it may be set at any time (`layer.excitation_amplitude = 0.05`) and is saved.
        dynamic_alpha: alpha = alpha_base (1 - exp(-alpha_kappa rms(x - mu))).
        init_alpha, init_beta, init_gate: where alpha_base, beta and the gate start.
        velocity_scale: constant factor on the velocity.
        controller_width: C, hidden units of the controller.
        beta_max: upper clamp of beta; None leaves it unbounded, as the documents do.
        seed: of the controller's weights; everything else starts without random numbers.

    Raises:
        ValueError: an argument out of its range, named.
    """

    amplitude: Tensor

    def __init__(
        self,
        hidden_dim: int,
        output_dim: int = 1,
        target_value: float = 5.0,
        dt: float = 0.1,
        learnable_mu: bool = True,
        mu_adaptation_rate: float = 1e-4,
        excitation_amplitude: float = 0.03,
        dynamic_alpha: bool = True,
        alpha_kappa: float = 1.0,
        init_alpha: float = 0.8,
        init_beta: float = 0.5,
        init_gate: float = 0.5,
        velocity_scale: float = 1.0,
        *,
        controller_width: int = 64,
        beta_max: float | None = 2.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.hidden_dim, self.output_dim = hidden_dim, output_dim
        values = {
            "num_iterations": 1,
            "dt": dt,
            "velocity_scale": velocity_scale,
            "dynamic_alpha": dynamic_alpha,
            "kappa": alpha_kappa,
            "beta_max": beta_max,
            "init_alpha": init_alpha,
            "init_beta": init_beta,
            "init_gate": init_gate,
            "candidate": "controller",
            "mu": {
                "form": "per_dim" if learnable_mu else "fixed",
                "init": target_value,
                "adaptation_rate": mu_adaptation_rate,
            },
            "excitation": {"amplitude": excitation_amplitude},
            "controller": {"shared": False, "width": controller_width},
        }
        self.config = validated(IntegratorConfig, values, _ARGUMENTS)
        with torch.device("meta"):
            self.dynamics = Integrator(self.config, output_dim, context_dim=hidden_dim)
            self.register_buffer("amplitude", torch.empty(()))
        materialise(self, lambda: self.initialise(seed))

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set everything to its start values; each matrix is drawn from a random generator of its own."""
        self.dynamics.initialise()
        self.dynamics.excitation.reset_buffers()
        self.amplitude.fill_(self.config.excitation.amplitude)
        controller = self.dynamics.controller
        assert isinstance(controller, Controller)
        controller.context.bias.zero_()
        draw(controller.context.weight, 0.6 / math.sqrt(self.hidden_dim), seed, "context.weight")
        draw(controller.state_velocity.weight, 0.6 / math.sqrt(self.output_dim), seed, "state_velocity.weight")
        draw(controller.output.weight, 0.01, seed, "output.weight")

    @property
    def mu(self) -> Tensor:
        """The equilibrium, (D,): a parameter, or a buffer when it is not learned."""
        return self.dynamics.equilibrium.mu

    @property
    def excitation_gamma(self) -> nn.Parameter:
        """Frequencies gamma in radians per iteration, (D,)."""
        return self.dynamics.excitation.gamma

    @property
    def excitation_phi(self) -> nn.Parameter:
        """Phases phi in radians, (D,)."""
        return self.dynamics.excitation.phi

    @property
    def excitation_amplitude(self) -> float:
        """A."""
        return float(self.amplitude)

    @excitation_amplitude.setter
    def excitation_amplitude(self, value: float) -> None:
        if not 0 <= value < math.inf:
            raise ValueError(f"excitation_amplitude {value}: must be a finite number of at least 0")
        self.amplitude.fill_(value)

    def forward(
        self,
        context: Tensor,
        state: Tensor,
        velocity: Tensor | None = None,
        *,
        step: int = 0,
        num_iterations: int = 1,
        return_trajectory: bool = False,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, dict[str, Tensor]]:
        """`num_iterations` iterations from t = `step`: (state, velocity) after them, each (..., D).

        With `return_trajectory` also every iteration: x and v (..., T+1, D), alpha, beta and gate (..., T, D).

        In training mode mu's moving average takes one step after the pass, towards the mean of the final state over
        everything but D. The backward pass is not affected, since autograd keeps no reference to mu's values. Under
        activation checkpointing the pass runs twice and mu would take two steps: set mu_adaptation_rate to 0 there.

        Args:
            context: (..., H).
            state: x_t, (..., D).
            velocity: v_t, (..., D); None is zeros.
            step: t of the first iteration; the excitation depends on it.
        """
        velocity = torch.zeros_like(state) if velocity is None else velocity
        self._check(context, state, velocity, step, num_iterations)
        output = self.dynamics(
            context,
            state,
            velocity,
            amplitude=self.amplitude,
            num_iterations=num_iterations,
            first_step=step,
            keep_trajectory=return_trajectory,
        )
        rate = self.config.mu.adaptation_rate
        if self.training and rate > 0:
            self.dynamics.equilibrium.adapt(output.state.detach().flatten(0, -2).mean(0), rate)
        if output.trajectory is None:
            return output.state, output.velocity
        return output.state, output.velocity, trajectory_dict(output.trajectory)

    def _check(self, context: Tensor, state: Tensor, velocity: Tensor, step: int, num_iterations: int) -> None:
        if num_iterations < 1 or step < 0:
            raise ValueError(f"num_iterations {num_iterations} must be at least 1 and step {step} at least 0")
        expected = (*context.shape[:-1], self.output_dim)
        if context.shape[-1] != self.hidden_dim:
            raise ValueError(f"context {tuple(context.shape)}: the last dimension must be hidden_dim {self.hidden_dim}")
        for name, value in (("state", state), ("velocity", velocity)):
            if value.shape != expected:
                raise ValueError(f"{name} {tuple(value.shape)}: expected {expected} (output_dim {self.output_dim})")


def trajectory_dict(trajectory: Trajectory) -> dict[str, Tensor]:
    """The documents' form of a trajectory: x, v (..., T+1, D), alpha, beta, gate (..., T, D)."""
    parts = {
        "x": trajectory.states,
        "v": trajectory.velocities,
        "alpha": trajectory.alpha,
        "beta": trajectory.beta,
        "gate": trajectory.gate,
    }
    return {name: part.movedim(0, -2) for name, part in parts.items()}
