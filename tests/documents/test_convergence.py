"""The five metrics against a loop over elements."""

import math

import numpy as np
import pytest
import torch

from inl_core import compute_convergence_metrics

KEYS = ["time_to_converge", "final_rmse", "final_mean", "final_std", "fraction_converged"]


def slow(x: np.ndarray, target: np.ndarray, epsilon: float) -> dict[str, float]:
    """The metrics of x (N, T+1) and target (N,), one element after the other."""
    times, converged, squares = [], 0, 0.0
    for path, goal in zip(x, target, strict=True):
        time = len(path) - 1
        for t in range(len(path)):
            if all(abs(value - goal) < epsilon for value in path[t:]):
                time = t
                break
        times.append(time)
        converged += abs(path[-1] - goal) < epsilon
        squares += (path[-1] - goal) ** 2
    final = x[:, -1]
    mean = sum(final) / len(final)
    return {
        "time_to_converge": sum(times) / len(times),
        "final_rmse": math.sqrt(squares / len(final)),
        "final_mean": mean,
        "final_std": math.sqrt(sum((value - mean) ** 2 for value in final) / len(final)),
        "fraction_converged": converged / len(final),
    }


@pytest.mark.parametrize("shape", [(6, 9, 2), (2, 3, 9, 4), (9, 1), (5, 1, 3)])
@pytest.mark.parametrize("kind", ["number", "per dimension", "per element"])
def test_the_metrics_equal_a_loop(shape, kind):
    generator = torch.Generator().manual_seed(0)
    # An oscillation about 5 that decays at a different rate in each element: some cross the target and leave again.
    start, rate = (torch.rand(*shape[:-2], 1, shape[-1], generator=generator) for _ in range(2))
    t = torch.arange(shape[-2]).view(-1, 1)
    x = 5 + 2 * start * (0.4 + 0.6 * rate) ** t * torch.cos(1.3 * t)
    target = {
        "number": 5.0,
        "per dimension": torch.linspace(4.9, 5.1, shape[-1]),
        "per element": 5 + 0.1 * torch.rand(*shape[:-2], shape[-1], generator=generator),
    }[kind]
    elements = x.movedim(-2, -1).reshape(-1, shape[-2]).double().numpy()
    goals = torch.as_tensor(target).double().expand(*shape[:-2], shape[-1]).reshape(-1).numpy()
    for epsilon in (0.1, 0.4):
        found = compute_convergence_metrics(x_trajectory=x, target_value=target, epsilon=epsilon)
        assert list(found) == KEYS
        assert all(isinstance(value, float) for value in found.values())
        assert found == pytest.approx(slow(elements, goals, epsilon), rel=1e-9, abs=1e-12)


def test_time_counts_from_where_an_element_stays():
    far, near = 9.0, 5.0
    paths = torch.tensor([[near] * 5, [far, far, near, near, near], [near, near, far, far, near], [far] * 5])
    times = [compute_convergence_metrics(path[:, None], 5.0)["time_to_converge"] for path in paths]
    assert times == [0.0, 2.0, 4.0, 4.0]
    assert compute_convergence_metrics(paths[:, :, None], 5.0)["fraction_converged"] == 0.75


def test_bad_arguments_are_named():
    x = torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match="x_trajectory"):
        compute_convergence_metrics(x[0, 0], 0.0)
    with pytest.raises(ValueError, match="target_value"):
        compute_convergence_metrics(x, torch.zeros(5))
    with pytest.raises(ValueError, match="epsilon"):
        compute_convergence_metrics(x, 0.0, epsilon=0.0)
