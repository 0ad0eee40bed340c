"""The integrator of one layer: its mu, gamma, phi and modulation, and the T steps it takes.

The equations are in dynamics.py. Nothing of the single iterations is returned unless it is asked for.
Legend: B batch, S sequence, D d_model, T iterations.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from inl_core.model.controller import Controller, Modulation
from inl_core.model.dynamics import Drive, Dynamics
from inl_core.model.early_stopping import EarlyStopping
from inl_core.model.equilibrium import Equilibrium
from inl_core.model.excitation import Excitation
from inl_core.model.mixture import Experts, MixedDrive, MixedDynamics, Router, Routing, build_controller
from inl_core.model.trajectory import Recorder, Trajectory
from inl_core.recipe import IntegratorConfig


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


class Integrator(nn.Module):
    """The dynamics of one layer, driven by a controller that it may share with others.

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
        self.dynamics = MixedDynamics(config) if config.controller.experts > 1 else Dynamics(config)

    def initialise(self) -> None:
        """Everything of this layer that starts without random numbers."""
        self.equilibrium.initialise()
        self.excitation.initialise()
        self.modulation.initialise()

    def drive(
        self, controller: Controller | Experts, h: Tensor, candidate: Tensor | None, routing: Routing | None
    ) -> Drive | MixedDrive:
        """All that the steps need and that does not change from step to step."""
        mu = self.equilibrium()
        if isinstance(controller, Controller):
            outer, bias = self.modulation.fold(controller)
            return Drive(controller.hoist(h), controller.state_velocity.weight, outer, bias, candidate, mu)
        assert self.router is not None
        assert routing is not None
        h, parts = h.flatten(0, -2), self.router.shares(routing)
        flat = None if candidate is None else candidate.flatten(0, -2)
        drives = []
        for share, expert in zip(parts, controller, strict=True):
            assert isinstance(expert, Controller)
            own = self.drive(expert, h[share.rows], None if flat is None else flat[share.rows], None)
            assert isinstance(own, Drive)
            drives.append(own)
        return MixedDrive(parts, drives, mu)

    def forward(
        self,
        h: Tensor,
        state: Tensor,
        velocity: Tensor,
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
    ) -> IntegratorOutput:
        """Run T iterations from x_0 = `state`, v_0 = `velocity`, both (B, S, D).

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
            early_stopping: False runs all T iterations also where the configuration would stop early in evaluation.
        """
        total = num_iterations or self.config.num_iterations
        controller = controller or self.controller
        assert controller is not None, "a shared controller must be passed in"
        candidate = None if candidate is None else candidate.to(state.dtype)
        routing = self.router(h) if self.router else None
        drive = self.drive(controller, h, candidate, routing)
        forcing = self.excitation(first_step + total, amplitude)[first_step:]

        stops = early_stopping and not self.training and self.config.early_stopping.convergence_threshold > 0
        stopping = EarlyStopping(self.config.early_stopping, state) if stops else None
        recorder = Recorder(state, velocity) if keep_trajectory else None
        found = self.dynamics(
            drive, state, velocity, forcing, last_fraction, energy_power, stopping=stopping, recorder=recorder
        )
        return IntegratorOutput(
            found.state,
            found.velocity,
            total,
            stopping.iterations if stopping else None,
            found.speed,
            found.energy,
            recorder.trajectory() if recorder else None,
            routing,
        )
