"""The laws of docs/model.md, "Stability of a frozen step", against eigenvalues of the code's own Jacobian."""

import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from inl_core.model.dynamics import Gains, step_velocity

ALPHA = st.floats(0.0, 0.999)
STRIDE = st.floats(1e-3, 2.0)  # s = dt * velocity_scale * gate
BETA = st.floats(1e-3, 2.0)


def jacobian(alpha: float, beta: float, stride: float) -> torch.Tensor:
    """d(x', v') / d(x, v) of the step with frozen gains, (2, 2), by automatic differentiation."""

    def step(point: torch.Tensor) -> torch.Tensor:
        x, v = point[:1], point[1:]
        gains = Gains(*(torch.tensor([value], dtype=torch.float64) for value in (alpha, beta, 1.0, 0.3)))
        new_v = step_velocity(gains, v, x - 0.7, torch.zeros(1, dtype=torch.float64))
        return torch.cat((torch.addcmul(x, gains.gate, new_v, value=stride), new_v))

    return torch.autograd.functional.jacobian(step, torch.tensor([0.2, -0.4], dtype=torch.float64))


@given(ALPHA, BETA, STRIDE)
@settings(max_examples=200, deadline=None)
def test_the_jacobian_its_determinant_and_trace(alpha, beta, stride):
    found = jacobian(alpha, beta, stride)
    expected = torch.tensor([[1 - stride * beta, stride * alpha], [-beta, alpha]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert math.isclose(torch.linalg.det(found).item(), alpha, abs_tol=1e-12)
    assert math.isclose(found.trace().item(), 1 + alpha - stride * beta, abs_tol=1e-12)


@given(ALPHA, BETA, STRIDE)
@settings(max_examples=300, deadline=None)
def test_stable_exactly_inside_the_stated_region(alpha, beta, stride):
    pull = stride * beta
    assume(abs(pull - 2 * (1 + alpha)) > 1e-6)
    radius = torch.linalg.eigvals(jacobian(alpha, beta, stride)).abs().max().item()
    assert (radius < 1) == (0 < pull < 2 * (1 + alpha))


@given(ALPHA, BETA, STRIDE)
@settings(max_examples=300, deadline=None)
def test_oscillatory_exactly_between_the_stated_bounds_and_then_of_radius_root_alpha(alpha, beta, stride):
    pull, low, high = stride * beta, (1 - math.sqrt(alpha)) ** 2, (1 + math.sqrt(alpha)) ** 2
    assume(min(abs(pull - low), abs(pull - high)) > 1e-6)
    values = torch.linalg.eigvals(jacobian(alpha, beta, stride))
    is_oscillatory = bool(values.imag.abs().max() > 1e-9)
    assert is_oscillatory == (low < pull < high)
    if is_oscillatory:
        assert math.isclose(values.abs().max().item(), math.sqrt(alpha), rel_tol=1e-9)


@given(st.floats(0.05, 0.95), st.floats(0.05, 2.0), st.floats(0.1, 1.0), st.floats(-2, 2))
@settings(max_examples=60, deadline=None)
def test_a_stable_frozen_step_ends_at_its_fixed_point(alpha, beta, stride, candidate):
    assume(stride * beta < 1.9 * (1 + alpha))
    assume(torch.linalg.eigvals(jacobian(alpha, beta, stride)).abs().max() < 0.98)
    mu = 0.7
    gains = Gains(*(torch.tensor([value], dtype=torch.float64) for value in (alpha, beta, 1.0, candidate)))
    x, v = torch.tensor([5.0], dtype=torch.float64), torch.tensor([-3.0], dtype=torch.float64)
    for _ in range(900):
        v = step_velocity(gains, v, x - mu, torch.zeros(1, dtype=torch.float64))
        x = x + stride * v
    assert math.isclose(x.item(), mu + (1 - alpha) * candidate / beta, rel_tol=1e-6, abs_tol=1e-6)
