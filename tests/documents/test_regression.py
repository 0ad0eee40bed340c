"""The regression model: its shapes, its parts' effects and gradients."""

import pytest
import torch

from inl_core import IntegratorLoss, IntegratorModel

INPUT, HIDDEN, BATCH, STEPS = 6, 16, 5, 4


def build(**changes) -> IntegratorModel:
    return IntegratorModel(INPUT, HIDDEN, STEPS, **({"output_dim": 2, "seed": 1} | changes))


def some_inputs() -> torch.Tensor:
    return torch.randn(BATCH, INPUT, generator=torch.Generator().manual_seed(0))


def test_the_prediction_is_the_readout_of_the_last_state():
    model = build().eval()
    outputs, trajectory = model(some_inputs(), return_trajectory=True)
    # A pass that keeps no trajectory may compute the same in another order.
    torch.testing.assert_close(model(some_inputs()), outputs, rtol=1e-5, atol=1e-5)
    assert trajectory["x"].shape == trajectory["v"].shape == (BATCH, STEPS + 1, 2)
    assert trajectory["alpha"].shape == (BATCH, STEPS, 2)
    context = model.backbone(some_inputs())
    torch.testing.assert_close(trajectory["x"][:, 0], model.initial_state(context))
    assert not trajectory["v"][:, 0].any()
    state, velocity = model.inl(context, trajectory["x"][:, 0], num_iterations=STEPS)
    torch.testing.assert_close(trajectory["x"][:, -1], state)
    torch.testing.assert_close(trajectory["v"][:, -1], velocity)
    torch.testing.assert_close(outputs, model.readout(state))


def test_states_start_around_the_target_value():
    start = build(target_value=50.0)(some_inputs(), return_trajectory=True)[1]["x"][:, 0]
    assert (start - 50).abs().max() < 10
    assert start.std() > 0.1


def test_every_parameter_gets_a_gradient_and_changes_the_output():
    model = build().eval()
    outputs, trajectory = model(some_inputs(), return_trajectory=True)
    losses = IntegratorLoss()(outputs, torch.zeros(BATCH, 2), trajectory, learned_mu=model.get_learned_mu())
    losses["total"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        with torch.no_grad():
            parameter.add_(0.1)
            assert not torch.equal(model(some_inputs()), outputs), name
            parameter.sub_(0.1)


def test_the_layers_arguments_reach_it():
    base, inputs = build().eval()(some_inputs()), some_inputs()
    for change in (
        {"target_value": 4.0},
        {"dt": 0.2},
        {"dynamic_alpha": False},
        {"excitation_amplitude": 0.5},
        {"velocity_scale": 2.0},
        {"init_beta": 1.0},
        {"seed": 2},
    ):
        assert not torch.equal(build(**change).eval()(inputs), base), change
    assert not build(learnable_mu=False).inl.mu.requires_grad
    with pytest.raises(TypeError, match="learnable_nu"):
        build(learnable_nu=True)
    with pytest.raises(ValueError, match="num_iterations 0"):
        IntegratorModel(INPUT, HIDDEN, 0)


def test_the_learned_mu_survives_the_moving_average_of_a_later_pass():
    model = build(mu_adaptation_rate=0.5).train()
    mu = model.get_learned_mu()
    loss = (mu * mu).sum()  # keeps mu's values for its backward pass
    model(some_inputs())
    loss.backward()
    torch.testing.assert_close(model.inl.mu.grad, 2 * mu.detach())
    assert not torch.equal(model.inl.mu, mu)
