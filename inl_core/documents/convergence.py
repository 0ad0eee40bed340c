"""How far states have come towards an equilibrium: the documents' five metrics (docs/model.md, "Convergence metrics").

An element is one dimension of one state.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

METRICS = ("time_to_converge", "final_rmse", "final_mean", "final_std", "fraction_converged")


class ConvergenceMetrics:
    """The metrics of trajectories that arrive in parts, after each number of iterations 0..T.

    Only means are kept, (T+1) numbers for each metric, however many trajectories there are.

    Args:
        num_iterations: T.
        epsilon: an element has converged when it is closer to its target than this, in units of the state.
    """

    def __init__(self, num_iterations: int, epsilon: float) -> None:
        self.epsilon, self.num_elements = epsilon, 0
        # By iteration: time to converge, squared error, state, whether it is within epsilon; and the state's variance.
        self.means = torch.zeros(4, num_iterations + 1, dtype=torch.float64)
        self.variance = torch.zeros(num_iterations + 1, dtype=torch.float64)

    def add(self, states: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
        """Count the T+1 states of some tokens, each (..., D), and where each should go, of a shape that broadcasts."""
        settled: Tensor | None = None  # the first iteration from which each element has been inside, (..., D)
        columns, size = [], 0
        for t, (x, target) in enumerate(zip(states, targets, strict=True)):
            error = x - target
            inside = error.abs() < self.epsilon
            settled = torch.where(inside, torch.zeros_like(error) if settled is None else settled, t + 1.0)
            parts = (settled.clamp(max=float(t)), error.square(), x, inside)
            columns.append([*(part.mean(dtype=torch.float64) for part in parts), x.double().var(correction=0)])
            size = x.numel()
        found = torch.stack([torch.stack(column) for column in columns], dim=1).cpu()  # (5, T+1)
        self.num_elements += size
        share, change = size / self.num_elements, found[:4] - self.means
        self.means += share * change
        self.variance += share * (found[4] - self.variance) + share * (1 - share) * change[2].square()

    def rows(self) -> list[dict[str, float]]:
        """The five metrics of the trajectory cut after iteration 0, 1, ... T."""
        time, squared_error, mean, inside = self.means.tolist()
        columns = (time, map(math.sqrt, squared_error), mean, map(math.sqrt, self.variance.tolist()), inside)
        return [dict(zip(METRICS, values, strict=True)) for values in zip(*columns, strict=True)]


@torch.no_grad()
def compute_convergence_metrics(
    x_trajectory: Tensor, target_value: float | Tensor, epsilon: float = 0.1
) -> dict[str, float]:
    """The five metrics of whole trajectories.

    Args:
        x_trajectory: (..., T+1, D), iterations next to last: (B, T+1, D), or a language model layer's (B, S, T+1, D).
        target_value: the equilibrium: a number, (D,) values, or anything that broadcasts to (..., D).
        epsilon: an element has converged when it is closer to its target than this.

    Returns:
        time_to_converge: mean over elements of the first iteration from which the element stays within epsilon to the
            end; 0 when it starts there, T when it does not end there.
        final_rmse: root mean square of the final states' distance to the target.
        final_mean, final_std: mean and standard deviation (not Bessel's) of the final states over all elements.
        fraction_converged: share of elements that end within epsilon.

    Raises:
        ValueError: shapes that do not fit, or an epsilon that is not positive.
    """
    if x_trajectory.dim() < 2 or not x_trajectory.numel():
        raise ValueError(f"x_trajectory {tuple(x_trajectory.shape)}: expected (..., T+1, D) with at least one state")
    if not epsilon > 0:
        raise ValueError(f"epsilon {epsilon}: must be above 0")
    states = x_trajectory.double().movedim(-2, 0)  # (T+1, ..., D)
    target = torch.as_tensor(target_value, dtype=states.dtype, device=states.device)
    try:
        target = target.expand_as(states[0])
    except RuntimeError:
        raise ValueError(f"target_value {tuple(target.shape)} does not broadcast to {tuple(states[0].shape)}") from None
    metrics = ConvergenceMetrics(len(states) - 1, epsilon)
    metrics.add(states, [target] * len(states))
    return metrics.rows()[-1]
