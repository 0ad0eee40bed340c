"""The module that calls the iterations in C++, in the place of the model's own dynamics: when it does, and when not."""

import pytest
import torch

from inl_core.kernels.integrator import CppDynamics
from inl_core.model import plain_operations
from inl_core.model.dynamics import Drive, Dynamics
from inl_core.recipe import IntegratorConfig
from tests.kernels.native import OwnOperations, needs_library
from tests.kernels.test_integrator import make_case

pytestmark = needs_library


def module_and_inputs(tokens: int = 40, dtype: torch.dtype = torch.float32) -> tuple[CppDynamics, list]:
    case = make_case(tokens, 8, dtype=dtype)
    batch = [value.view(2, tokens // 2, -1) for value in (case.x, case.v, case.hoisted, case.candidate)]
    drive = Drive(batch[2], case.inner, case.outer, case.bias, batch[3], case.mu)
    return CppDynamics(IntegratorConfig(), "MKL"), [drive, *batch[:2], case.forcing]


def test_the_module_gives_what_the_model_s_own_gives_in_its_shapes():
    dynamics, given = module_and_inputs()
    with OwnOperations() as ran:
        found = dynamics(*given, energy_power=2.0, last_fraction=torch.tensor(0.3, dtype=torch.float64))
    assert ran.found == ["integrator"]
    expected = Dynamics(IntegratorConfig())(*given, energy_power=2.0, last_fraction=torch.tensor(0.3))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_views_that_are_not_contiguous_are_copied():
    dynamics, (drive, x, v, forcing) = module_and_inputs()
    expected = dynamics(drive, x, v, forcing)
    strided = dynamics(drive, x.transpose(0, 1).contiguous().transpose(0, 1), v[:1].expand(2, -1, -1), forcing)
    torch.testing.assert_close(strided.state[0], expected.state[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("circumstance", ["few tokens", "bfloat16", "mixed precision", "another device", "asked for"])
def test_what_the_operation_cannot_do_is_done_by_the_plain_loop(circumstance):
    dynamics, (drive, x, v, forcing) = module_and_inputs(14 if circumstance == "few tokens" else 40)
    if circumstance in ("bfloat16", "another device"):
        to = {"dtype": torch.bfloat16} if circumstance == "bfloat16" else {"device": "meta"}
        drive, x, v, forcing = Drive(*(value.to(**to) for value in drive)), x.to(**to), v.to(**to), forcing.to(**to)
    elif circumstance == "mixed precision":
        drive = drive._replace(hoisted=drive.hoisted.bfloat16())
    with OwnOperations() as ran:
        if circumstance == "asked for":
            with plain_operations():
                found = dynamics(drive, x, v, forcing)
        else:
            found = dynamics(drive, x, v, forcing)
    assert ran.found == []
    assert found.state.shape == x.shape


def test_mu_may_move_in_place_before_the_backward_pass():
    """As its moving average does."""
    dynamics, (drive, x, v, forcing) = module_and_inputs(dtype=torch.float64)
    found = []
    for moves in (False, True):
        own, mu = x.clone().requires_grad_(), drive.mu.clone()
        state = dynamics(drive._replace(mu=mu), own, v, forcing).state
        if moves:
            mu.add_(1.0)
        found.append(torch.autograd.grad(state.sum(), own)[0])
    torch.testing.assert_close(found[0], found[1])
