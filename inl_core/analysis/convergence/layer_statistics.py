"""What the report says about one layer, or a whole stream: sums and distributions over tokens, for every iteration.

- Iteration t >= 1 is the step from x_{t-1} to x_t: its alpha, beta, gate and fixed point are those of that step.
- Legend: N tokens, D d_model, T iterations followed.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from inl_core.analysis.convergence.sample import GAINS
from inl_core.analysis.convergence.sketch import Distribution
from inl_core.analysis.convergence.stability import BETA_FLOOR, KINDS, fixed_point, frozen_stability
from inl_core.documents.convergence import ConvergenceMetrics
from inl_core.model import Trajectory
from inl_core.training.depth import token_rms

_FROM_START = ("state_rms", "velocity_rms", "energy", "displacement")


class PathStatistics:
    """What the report says about one system, gathered from its trajectories batch by batch.

    Args:
        num_iterations: how many are followed.
        used_iterations: how many of them the model itself runs.
        epsilon: tolerance of the convergence metrics.
    """

    def __init__(self, num_iterations: int, used_iterations: int, epsilon: float) -> None:
        self.num_iterations, self.used_iterations, self.epsilon = num_iterations, used_iterations, epsilon
        self.num_tokens = 0
        self.against: dict[str, ConvergenceMetrics] = {}
        self.token_measures: list[str] = []
        self.distributions = defaultdict(lambda: [Distribution() for _ in range(num_iterations + 1)])
        # Sums over elements, by how many iterations are looked at, those that the model runs and all: the number of
        # turns times the length of the path, and the length of the path.
        self.turning: dict[int, float] = defaultdict(float)
        self.motion: dict[int, float] = defaultdict(float)

    def add_path(
        self, path: Trajectory, targets: dict[str, Tensor], displaced: Tensor, more: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Count the trajectories of N tokens, states (T+1, N, D); returns their measures, (T+1, N) each.

        Args:
            targets: what the states are compared with, of a shape that broadcasts to theirs.
            displaced: as `measure_tokens` wants it.
            more: measures of steps, (T+1, N), NaN before the first.
        """
        measures = measure_tokens(path, targets, displaced) | more
        self.token_measures = list(measures)
        self.num_tokens += path.states.shape[1]
        for name, target in targets.items():
            metrics = self.against.setdefault(name, ConvergenceMetrics(self.num_iterations, self.epsilon))
            metrics.add(path.states, target.expand_as(path.states))
        for name, values in measures.items():
            is_of_step = not (name in _FROM_START or name.startswith("distance_"))
            for t in range(int(is_of_step), self.num_iterations + 1):
                self.distributions[name][t].add(values[t])
        for count in {min(self.used_iterations, self.num_iterations), self.num_iterations}:
            self._add_turns(path.states[: count + 1], count)
        return measures

    def _add_turns(self, states: Tensor, count: int) -> None:
        moves = states.diff(dim=0)
        turns = (moves[1:] * moves[:-1] < 0).sum(0)  # (N, D)
        paths = torch.nan_to_num(moves.abs().sum(0), nan=0.0, posinf=0.0)
        self.turning[count] += (turns * paths).sum(dtype=torch.float64).item()
        self.motion[count] += paths.sum(dtype=torch.float64).item()

    def num_turns(self, count: int) -> float:
        """How often a dimension of a token turns back in `count` iterations, weighted by its path's length: 0 .. T - 1.

        `count` is the iterations that the model runs, or all that were followed.
        """
        return self.turning[count] / self.motion[count] if self.motion[count] else 0.0

    def rows(self) -> list[dict[str, Any]]:
        """One row an iteration, 0 (the start) to T."""
        against = {f"against_{name}": metrics.rows() for name, metrics in self.against.items()}
        return [
            {
                "iteration": t,
                "used": t <= self.used_iterations,
                **{name: rows[t] for name, rows in against.items()},
                **{name: self.distributions[name][t].summary() for name in self.token_measures},
                "nonfinite_tokens": self.distributions["state_rms"][t].num_nonfinite,
                **self.row_of_step(t),
            }
            for t in range(self.num_iterations + 1)
        ]

    def row_of_step(self, t: int) -> dict[str, Any]:
        """What else there is to say of the step that led to iteration t; t = 0 is the start."""
        return {}


class LayerStatistics(PathStatistics):
    """The statistics of one layer's integrator, with the gains and the stability of its steps."""

    def __init__(self, num_iterations: int, used_iterations: int, epsilon: float) -> None:
        super().__init__(num_iterations, used_iterations, epsilon)
        # By iteration, how many elements are of each kind of stability, and how many have no fixed point.
        self.kinds = torch.zeros(len(KINDS), num_iterations + 1, dtype=torch.float64)
        self.without_fixed_point = torch.zeros(num_iterations + 1, dtype=torch.float64)

    def add(self, path: Trajectory, mu: Tensor, forcing: Tensor, stride: float) -> dict[str, Tensor]:
        """Count the trajectories of N tokens, states (T+1, N, D); returns their measures, (T+1, N) each.

        `forcing` (T, D) is the excitation; `stride` is dt velocity_scale.
        """
        targets = {"mu": mu, "fixed_point": fixed_points(path, mu)}
        measures = self.add_path(path, targets, stride * path.gate * forcing[:, None, :], {})
        for t in range(self.num_iterations):
            self._add_step(t + 1, path.alpha[t], path.beta[t], path.gate[t], stride)
        return measures

    def _add_step(self, t: int, alpha: Tensor, beta: Tensor, gate: Tensor, stride: float) -> None:
        stability = frozen_stability(alpha, beta, gate, stride)
        for name, values in (("alpha", alpha), ("beta", beta), ("gate", gate), ("radius", stability.radius)):
            self.distributions[name][t].add(values)
        self.kinds[:, t] += torch.stack([getattr(stability, kind).sum() for kind in KINDS]).double().cpu()
        self.without_fixed_point[t] += (beta < BETA_FLOOR).sum().item()

    def row_of_step(self, t: int) -> dict[str, Any]:
        """The gains and the stability of the step; nothing for the start."""
        if not t:
            return {}
        radius = self.distributions["radius"][t]
        count = max(1, radius.count + radius.num_nonfinite)
        shares = {kind: self.kinds[index, t].item() / count for index, kind in enumerate(KINDS)}
        return {
            **{name: self.distributions[name][t].summary() for name in GAINS},
            "stability": {**shares, "spectral_radius": radius.summary()},
            "share_without_fixed_point": self.without_fixed_point[t].item() / count,
        }


def fixed_points(path: Trajectory, mu: Tensor) -> Tensor:
    """Where each state would rest if the step that led to it were repeated without the excitation: (T+1, N, D).

    No step led to x_0; its fixed point is that of the step that leaves it.
    """
    found = fixed_point(mu, path.alpha, path.beta, path.candidate)
    return torch.cat((found[:1], found))


def measure_tokens(path: Trajectory, targets: dict[str, Tensor], displaced: Tensor) -> dict[str, Tensor]:
    """Norms of every token at every iteration, (T+1, N), as root mean squares over the D dimensions.

    residual is |x_t - x_{t-1}|, unforced_residual the same without `displaced`, how far the excitation of this very
    step moves the state, (T, N or 1, D); both are NaN at t = 0. energy is the mean square of v, and distance_NAME how
    far the state is from each target.
    """
    states, velocities = path.states, path.velocities
    moves = states.diff(dim=0)
    never = states.new_full((1, states.shape[1]), torch.nan)
    return {
        "state_rms": token_rms(states),
        "velocity_rms": token_rms(velocities),
        "energy": velocities.square().mean(-1),
        "displacement": token_rms(states - states[:1]),
        **{f"distance_{name}": token_rms(states - target) for name, target in targets.items()},
        "residual": torch.cat((never, token_rms(moves))),
        "unforced_residual": torch.cat((never, token_rms(moves - displaced))),
    }
