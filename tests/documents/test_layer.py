"""The stand-alone layer against a slow float64 reference, its arguments and mu's moving average."""

import math

import numpy as np
import pytest
import torch

from inl_core import IntegratorNeuronLayer

HIDDEN, DIM, BATCH = 7, 3, 4


def build(**changes) -> IntegratorNeuronLayer:
    """A layer in float64 whose parameters have all been moved away from their start."""
    layer = IntegratorNeuronLayer(HIDDEN, **({"output_dim": DIM, "controller_width": 5} | changes)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return layer


def inputs(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Context (B, H), state around 5 and velocity (B, D)."""
    generator = torch.Generator().manual_seed(seed)
    context, state, velocity = (
        torch.randn(BATCH, width, generator=generator, dtype=torch.float64) for width in (HIDDEN, DIM, DIM)
    )
    return context, 5 + state, velocity


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(layer, context, state, velocity, first_step: int, total: int, **arguments):
    """The dynamics (docs/model.md, "One step"), one sample at a time; arguments as the documents name them."""
    weights = {name: value.detach().numpy() for name, value in layer.dynamics.controller.named_parameters()}
    bias = layer.dynamics.modulation.bias.detach().numpy()
    mu, amplitude = layer.mu.detach().numpy(), layer.excitation_amplitude
    gamma, phi = layer.excitation_gamma.detach().numpy(), layer.excitation_phi.detach().numpy()
    ends = []
    for h, x, v in zip(context.numpy(), state.numpy(), velocity.numpy(), strict=True):
        for t in range(first_step, first_step + total):
            hidden = weights["context.weight"] @ h + weights["context.bias"]
            hidden = np.maximum(hidden + weights["state_velocity.weight"] @ np.concatenate([x, v]), 0)
            a, b, g, candidate = (weights["output.weight"] @ hidden).reshape(4, DIM) + bias[:, None]
            error = x - mu
            alpha = sigmoid(a)
            if arguments.get("dynamic_alpha", True):
                distance = math.sqrt(np.mean(error**2))
                alpha = alpha * (1 - math.exp(-arguments.get("alpha_kappa", 1.0) * distance))
            beta = np.log1p(np.exp(b))
            beta = np.minimum(beta, 2.0) if arguments.get("beta_max", 2.0) else beta
            v = alpha * v + (1 - alpha) * candidate - beta * error + amplitude * np.sin(gamma * t + phi)
            x = x + arguments.get("dt", 0.1) * arguments.get("velocity_scale", 1.0) * sigmoid(g) * v
        ends.append((x, v))
    return (np.array(part) for part in zip(*ends, strict=True))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dt": 0.3, "velocity_scale": 0.7},
        {"dynamic_alpha": False},
        {"alpha_kappa": 0.2},
        {"excitation_amplitude": 0.5},
        {"learnable_mu": False, "target_value": 4.0},
        {"init_alpha": 0.3, "init_beta": 1.5, "init_gate": 0.9},
        {"init_beta": 3.0, "beta_max": None},
    ],
)
@pytest.mark.parametrize(("first_step", "total"), [(0, 1), (3, 4)])
def test_the_layer_equals_the_documents_equations(arguments, first_step, total):
    layer = build(**arguments).eval()
    context, state, velocity = inputs()
    found = layer(context, state, velocity, step=first_step, num_iterations=total)
    expected = reference(layer, context, state, velocity, first_step, total, **arguments)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.detach().numpy(), two, rtol=1e-6, atol=1e-7)  # A is kept in float32


def test_iterations_one_by_one_are_the_iterations_at_once():
    layer = build(excitation_amplitude=0.5).eval()
    context, state, velocity = inputs()
    x, v, path = layer(context, state, velocity, num_iterations=5, return_trajectory=True)
    states, velocities = [state], [velocity]
    for t in range(5):
        state, velocity = layer(context, state, velocity, step=t)
        states.append(state)
        velocities.append(velocity)
    torch.testing.assert_close(x, state, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(v, velocity, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(path["x"], torch.stack(states, dim=1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(path["v"], torch.stack(velocities, dim=1), rtol=1e-12, atol=1e-12)
    assert path["alpha"].shape == path["beta"].shape == path["gate"].shape == (BATCH, 5, DIM)


def test_the_defaults_are_the_documents_table():
    layer = IntegratorNeuronLayer(HIDDEN)
    config = layer.config
    assert layer.output_dim == 1
    assert layer.mu.tolist() == [5.0]
    assert isinstance(layer.mu, torch.nn.Parameter)
    assert layer.excitation_amplitude == pytest.approx(0.03)
    assert (config.dt, config.velocity_scale, config.dynamic_alpha, config.kappa) == (0.1, 1.0, True, 1.0)
    assert (config.init_alpha, config.init_beta, config.init_gate) == (0.8, 0.5, 0.5)
    assert config.mu.adaptation_rate == 1e-4


def test_the_gains_start_where_they_are_asked_to():
    layer = IntegratorNeuronLayer(HIDDEN, DIM, init_alpha=0.3, init_beta=0.7, init_gate=0.6, dynamic_alpha=False)
    context, state, velocity = (tensor.float() for tensor in inputs())
    with torch.no_grad():
        layer.dynamics.controller.output.weight.zero_()
    _, _, path = layer(context, state, velocity, return_trajectory=True)
    for name, value in (("alpha", 0.3), ("beta", 0.7), ("gate", 0.6)):
        torch.testing.assert_close(path[name], torch.full_like(path[name], value))


def test_the_start_depends_on_the_seed_alone_and_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = IntegratorNeuronLayer(HIDDEN, DIM, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    two, other = IntegratorNeuronLayer(HIDDEN, DIM, seed=3), IntegratorNeuronLayer(HIDDEN, DIM, seed=4)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    assert not torch.equal(one.dynamics.controller.context.weight, other.dynamics.controller.context.weight)


def test_the_amplitude_can_be_set_acts_and_is_saved():
    layer = build().eval()
    context, state, velocity = inputs()
    quiet = layer(context, state, velocity)[1]
    layer.excitation_amplitude = 0.5
    loud = layer(context, state, velocity)[1]
    wave = (0.5 - 0.03) * torch.sin(layer.excitation_phi)
    torch.testing.assert_close(loud - quiet, wave.expand_as(loud), rtol=1e-6, atol=1e-7)
    copy = build().eval()
    copy.load_state_dict(layer.state_dict())
    assert copy.excitation_amplitude == 0.5
    with pytest.raises(ValueError, match="excitation_amplitude -1"):
        layer.excitation_amplitude = -1


def test_mu_moves_in_training_only_towards_the_mean_final_state():
    layer = build(mu_adaptation_rate=0.25)
    context, state, velocity = inputs()
    before = layer.mu.detach().clone()
    layer.eval()(context, state, velocity, num_iterations=3)
    assert torch.equal(layer.mu, before)
    x, _ = layer.train()(context, state, velocity, num_iterations=3)
    torch.testing.assert_close(layer.mu.detach(), 0.75 * before + 0.25 * x.detach().mean(0))


@pytest.mark.parametrize("changes", [{"mu_adaptation_rate": 0.0}, {"learnable_mu": False}])
def test_mu_stays_where_its_adaptation_is_off(changes):
    layer = build(**changes).train()
    before = layer.mu.detach().clone()
    layer(*inputs())
    assert torch.equal(layer.mu, before)


def test_the_moving_average_leaves_the_gradient_as_it_is():
    gradients = []
    for rate in (0.0, 0.5):
        layer = build(mu_adaptation_rate=rate).train()
        x, v = layer(*inputs(), num_iterations=4)
        (x.square().sum() + v.sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in layer.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_alpha": 1.5}, "init_alpha: expected a number less than 1"),
        ({"alpha_kappa": 0.0}, "alpha_kappa: expected a number of at least"),
        ({"mu_adaptation_rate": 2.0}, "mu_adaptation_rate: expected a number less than 1"),
        ({"target_value": "five"}, "target_value: expected a number"),
        ({"init_beta": 2.5}, "init_beta 2.5 must be below beta_max 2.0"),
        ({"dt": math.nan}, "dt: expected a"),
    ],
)
def test_a_bad_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        IntegratorNeuronLayer(HIDDEN, **arguments)


def test_a_wrong_shape_is_named():
    layer, (context, state, velocity) = build(), inputs()
    for arguments, name in (
        ((context[:, :2], state), "context"),
        ((context, state[:, :1]), "state"),
        ((context, state[:2]), "state"),
        ((context, state, velocity[:2]), "velocity"),
    ):
        with pytest.raises(ValueError, match=name):
            layer(*arguments)
    with pytest.raises(ValueError, match="num_iterations 0"):
        layer(context, state, num_iterations=0)
