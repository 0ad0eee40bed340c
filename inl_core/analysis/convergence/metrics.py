"""The five documented convergence metrics of trajectories that arrive in parts, for every number of iterations.

- Source: document 002 (docs/model.md, "Convergence metrics"); an element is one dimension of one token's state, as in
  `compute_convergence_metrics`, whose values on the trajectory cut after iteration t these are.
- Only sums are kept: memory is (T+1) numbers a metric, whatever the number of tokens.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

METRICS = ("time_to_converge", "final_rmse", "final_mean", "final_std", "fraction_converged")


class ConvergenceMetrics:
    """The five metrics after 0..T iterations.

    epsilon: an element has converged when it is closer to its target than this, in units of the state.
    """

    def __init__(self, num_iterations: int, epsilon: float) -> None:
        self.epsilon = epsilon
        self.num_elements = 0
        # time, squared error, state, squared state, inside; each by iteration
        self.sums = torch.zeros(5, num_iterations + 1, dtype=torch.float64)

    def add(self, states: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
        """Count the T+1 states (N, D) of N tokens and where each should go, (N, D) or (D,)."""
        settled: Tensor | None = None  # the first iteration from which each element has been inside, (N, D)
        for t, (x, target) in enumerate(zip(states, targets, strict=True)):
            error = x - target
            inside = error.abs() < self.epsilon
            settled = torch.zeros_like(error) if settled is None else settled
            settled = torch.where(inside, settled, t + 1.0)
            parts = (settled.clamp(max=float(t)), error.square(), x, x.square(), inside)
            self.sums[:, t] += torch.stack([part.sum(dtype=torch.float64) for part in parts]).cpu()
            if t == 0:
                self.num_elements += x.numel()

    def rows(self) -> list[dict[str, float]]:
        """The five metrics of the trajectory cut after iteration 0, 1, ... T."""
        time, squared_error, total, squares, inside = (self.sums / max(1, self.num_elements)).tolist()
        rows = []
        for t, mean in enumerate(total):
            variance = squares[t] - mean * mean
            values = (time[t], math.sqrt(squared_error[t]), mean, math.sqrt(max(0.0, variance)), inside[t])
            rows.append(dict(zip(METRICS, values, strict=True)))
        return rows
