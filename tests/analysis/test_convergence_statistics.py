"""Streaming statistics against slow references; a frozen step's fixed point and stability against iterating it."""

import math

import numpy as np
import pytest
import torch

from inl_core import compute_convergence_metrics
from inl_core.analysis.convergence.sketch import Distribution
from inl_core.analysis.convergence.stability import BETA_FLOOR, KINDS, fixed_point, frozen_stability
from inl_core.documents.convergence import METRICS, ConvergenceMetrics


@pytest.mark.parametrize("scale", [1e-6, 0.3, 5e4])
def test_percentiles_are_within_one_percent_and_the_mean_is_exact(scale: float) -> None:
    values = scale * np.random.default_rng(0).lognormal(sigma=2.0, size=20_000)
    whole, parts = Distribution(), Distribution()
    whole.add(torch.from_numpy(values))
    for part in np.array_split(values, 7):
        parts.add(torch.from_numpy(part))
    for percent in (5, 50, 95):
        wanted = np.percentile(values, percent, method="inverted_cdf")
        assert whole.percentile(percent) == pytest.approx(wanted, rel=0.01)
        assert parts.percentile(percent) == whole.percentile(percent)
    assert parts.mean == pytest.approx(values.mean(), rel=1e-6)


def test_percentiles_stay_inside_what_was_seen() -> None:
    found = Distribution()
    found.add(torch.tensor([0.0, 0.0, 0.999, 0.999]))
    assert found.summary() == pytest.approx({"mean": 0.4995, "p5": 0.0, "p50": 0.0, "p95": 0.999}, rel=0.01)
    for value in (0.9851, 0.9999, 2.0):  # near the lower and the upper edge of their bins
        found = Distribution()
        found.add(torch.full((3,), value))
        assert found.percentile(50) == pytest.approx(value, rel=1e-6)


def test_values_that_are_not_finite_are_counted_and_kept_out() -> None:
    found = Distribution()
    found.add(torch.tensor([1.0, math.nan, math.inf, 3.0]))
    assert (found.count, found.num_nonfinite, found.mean) == (2, 2, 2.0)
    assert math.isnan(Distribution().percentile(50))


def slow_metrics(states: np.ndarray, targets: np.ndarray, epsilon: float) -> list[float]:
    """The five metrics of document 002, an element at a time; states and targets (T+1, N, D)."""
    times, finals, errors, inside = [], [], [], []
    last = len(states) - 1
    for n, d in np.ndindex(states.shape[1:]):
        distance = [abs(states[t, n, d] - targets[t, n, d]) for t in range(last + 1)]
        time = last
        for t in range(last, -1, -1):
            if distance[t] >= epsilon:
                break
            time = t
        times.append(time)
        finals.append(states[last, n, d])
        errors.append(distance[last] ** 2)
        inside.append(distance[last] < epsilon)
    mean = sum(finals) / len(finals)
    spread = math.sqrt(sum((x - mean) ** 2 for x in finals) / len(finals))
    return [sum(times) / len(times), math.sqrt(sum(errors) / len(errors)), mean, spread, sum(inside) / len(inside)]


def test_the_five_metrics_equal_a_slow_reference_after_every_iteration() -> None:
    generator = np.random.default_rng(1)
    states = generator.normal(size=(6, 9, 5)) * np.linspace(1.5, 0.1, 6)[:, None, None] + 0.2
    targets = 0.2 + 0.15 * generator.normal(size=states.shape)
    metrics = ConvergenceMetrics(5, epsilon=0.25)
    for part in np.array_split(np.arange(9), 3):
        metrics.add(torch.from_numpy(states[:, part]), torch.from_numpy(targets[:, part]))
    rows = metrics.rows()
    for t in range(6):
        wanted = slow_metrics(states[: t + 1], targets[: t + 1], 0.25)
        assert [rows[t][name] for name in METRICS] == pytest.approx(wanted, rel=1e-9), t
    assert 0 < rows[-1]["fraction_converged"] < 1
    assert 0 < rows[-1]["time_to_converge"] < 5


def test_the_fixed_point_is_where_a_frozen_step_ends() -> None:
    generator = torch.Generator().manual_seed(2)
    draw = lambda low, high: low + (high - low) * torch.rand(40, generator=generator, dtype=torch.float64)  # noqa: E731
    alpha, beta, gate = draw(0.05, 0.95), draw(0.1, 2.0), draw(0.3, 0.95)
    mu, candidate, x, v = (draw(-1, 1) for _ in range(4))
    for _ in range(6_000):
        v = alpha * v + (1 - alpha) * candidate - beta * (x - mu)
        x = x + 0.3 * gate * v
    found = fixed_point(mu, alpha, beta, candidate)
    torch.testing.assert_close(found, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(v, torch.zeros_like(v), rtol=0, atol=1e-8)


def test_without_a_candidate_the_fixed_point_is_mu_and_a_vanishing_beta_counts_as_the_floor() -> None:
    half, one = torch.full((3,), 0.5), torch.ones(3)
    torch.testing.assert_close(fixed_point(0.3 * one, half, half, None), 0.3 * one)
    torch.testing.assert_close(fixed_point(0 * one, half, 0 * one, one), 0.5 / BETA_FLOOR * one)


def test_stability_equals_the_eigenvalues() -> None:
    generator = np.random.default_rng(3)
    alpha = np.concatenate([generator.uniform(0, 1, 400), [0.5, 0.0, 1.0]])
    beta = np.concatenate([generator.uniform(0, 5, 400), [0.0, 0.7, 0.5]])
    gate, stride = generator.uniform(0.05, 1.0, 403), 1.4
    found = frozen_stability(*(torch.from_numpy(part) for part in (alpha, beta, gate)), stride)
    for i in range(len(alpha)):
        s = stride * gate[i]
        values = np.linalg.eigvals(np.array([[1 - s * beta[i], s * alpha[i]], [-beta[i], alpha[i]]]))
        radius = abs(values).max()
        # Where both eigenvalues are equal, numpy finds them with half of the digits only.
        assert found.radius[i].item() == pytest.approx(radius, rel=1e-6, abs=1e-7)
        if abs(radius - 1) < 1e-9 or radius > 1:  # marginal: not stable
            kind = "unstable"
        elif abs(values.imag).max() > 1e-9:
            kind = "oscillatory"
        else:
            kind = "alternating" if values.real.min() < -1e-9 else "steady"
        assert [name for name in KINDS if getattr(found, name)[i]] == [kind], (alpha[i], beta[i], gate[i])
    assert all(getattr(found, kind).any() for kind in KINDS)


def test_the_report_and_the_documents_function_say_the_same() -> None:
    states = 0.5 * torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)  # N, T+1, D
    target = torch.linspace(-0.2, 0.2, 4, dtype=torch.float64)
    metrics = ConvergenceMetrics(6, epsilon=0.4)
    metrics.add(states.unbind(1), [target] * 7)
    for t, row in enumerate(metrics.rows()):
        assert row == pytest.approx(compute_convergence_metrics(states[:, : t + 1], target, epsilon=0.4))
