"""Jacobians and Lyapunov exponents of systems with known answers, in float64, and of the model against differences."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from inl_core.analysis.report.jacobians import _systems, jacobians, lyapunov_exponents, react
from inl_core.corpus.loader import Batch
from tests.inference.tiny import tiny_model

ALPHA, BETA = 0.81, 0.3


def oscillator(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A frozen step with mu = 0: v' = alpha v - beta x, x' = x + v'."""
    new_v = ALPHA * v - BETA * x
    return x + new_v, new_v


def henon(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The Henon map, a = 1.4, b = 0.3, whose exponents are 0.41922 and ln 0.3 - 0.41922 (Sprott, 2003)."""
    return 1 - 1.4 * x.square() + v, 0.3 * x


def steps_of(flow, count: int, start: float = 0.1) -> list[Tensor]:
    x = v = torch.full((1, 1), start, dtype=torch.float64)
    found = []
    for _ in range(count):
        found.append(jacobians(flow, x, v))
        x, v = flow(x, v)
    return found


def test_a_damped_oscillator_has_its_contraction_rate_and_period() -> None:
    found = react("oscillator", steps_of(oscillator, 100))
    angle = math.acos((1 + ALPHA - BETA) / (2 * math.sqrt(ALPHA)))  # trace = 2 r cos(angle), det = r^2 = alpha
    np.testing.assert_allclose(found.spectral_radius, math.sqrt(ALPHA), rtol=1e-10)
    np.testing.assert_allclose(found.period, 2 * math.pi / angle, rtol=1e-10)
    np.testing.assert_allclose(found.exponents, math.log(ALPHA) / 2, atol=0.02)  # of 100 steps; exact without end
    assert found.exponents.sum() == pytest.approx(math.log(ALPHA), rel=1e-10)


def test_a_chaotic_map_has_its_lyapunov_exponents() -> None:
    [found] = lyapunov_exponents(steps_of(henon, 300)).tolist()
    assert found[0] == pytest.approx(0.41922, abs=0.04)
    assert sum(found) == pytest.approx(math.log(0.3), rel=1e-10)


def test_exponents_over_few_steps_are_those_of_the_products_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = list(torch.randn(3, 2, 5, 5, generator=generator, dtype=torch.float64))
    wanted = torch.linalg.svdvals(steps[2] @ steps[1] @ steps[0]).log() / 3
    torch.testing.assert_close(lyapunov_exponents(steps), wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["v3", "v4", "v5"])
def test_a_models_jacobians_are_those_of_differences(preset: str) -> None:
    model = tiny_model(preset).double()
    tokens = np.arange(24).reshape(2, 12)
    for _, flows, x, v in _systems(model, Batch(tokens, tokens)):
        for flow in flows:
            found, dim = jacobians(flow, x, v), x.shape[-1]
            for column in (0, 7, dim + 3):
                small = torch.zeros(2 * dim, dtype=x.dtype)
                small[column] = 1e-5
                up, down = (torch.cat(flow(x + sign * small[:dim], v + sign * small[dim:]), -1) for sign in (1, -1))
                torch.testing.assert_close(found[..., column], (up - down) / 2e-5, rtol=1e-4, atol=1e-6)
            x, v = flow(x, v)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["v4", "v5"])
def test_the_steps_of_a_system_lead_where_the_model_goes(preset: str) -> None:
    model = tiny_model(preset)
    tokens = np.arange(24).reshape(2, 12)
    ends = []
    for _, flows, x, v in _systems(model, Batch(tokens, tokens)):
        for flow in flows:
            x, v = flow(x, v)
        ends.append(x)
    hidden = model(torch.from_numpy(tokens)).hidden[:, -1]
    if preset == "v5":
        torch.testing.assert_close(model.norm_final(ends[0]), hidden, rtol=1e-4, atol=1e-5)
        return
    kept: list[Tensor] = []
    handles = [
        one.register_forward_hook(lambda _, args, out: kept.append(out.state[:, -1])) for one in model.integrators()
    ]
    model(torch.from_numpy(tokens))
    assert len(handles) == len(kept) == len(ends)
    for end, wanted in zip(ends, kept, strict=True):
        torch.testing.assert_close(end, wanted, rtol=1e-4, atol=1e-5)
