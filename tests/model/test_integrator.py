"""The integrator against a slow float64 reference, its laws, and its early stopping."""

import math

import numpy as np
import pytest
import torch

from inl_core.model.controller import Controller
from inl_core.model.dynamics import rms, speed_weights
from inl_core.model.integrator import Integrator
from inl_core.recipe import IntegratorConfig

DIM, WIDTH, BATCH, LENGTH = 8, 5, 2, 3


def build(dim: int = DIM, **changes) -> tuple[Integrator, Controller]:
    """An integrator and its controller, both with random parameters, in float64."""
    defaults = {"num_iterations": 3, "controller": {"width": WIDTH}, "dt": 0.3, "velocity_scale": 0.7}
    config = IntegratorConfig.model_validate(defaults | changes)
    layer = Integrator(config, dim).double()
    layer.initialise()
    layer.excitation.reset_buffers()
    controller = layer.controller or Controller(config, dim).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(dict([*layer.named_parameters(), *controller.named_parameters()]).items()):
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return layer, controller


def inputs(dim: int = DIM, seed: int = 1) -> list[torch.Tensor]:
    """h, x_0, v_0 and a candidate, each (B, S, D)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, LENGTH, dim, generator=generator, dtype=torch.float64) for _ in range(4)]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def reference(layer: Integrator, controller: Controller, h, x, v, candidate, amplitude: float):
    """The equations of docs/model.md, "One step", one token and one dimension at a time."""
    config, dim = layer.config, x.shape[-1]
    weights = {name: value.detach().numpy() for name, value in controller.named_parameters()}
    mu = np.empty(dim)
    for d in range(dim):
        if config.mu.form == "hierarchical":
            offset = layer.equilibrium.mu_offsets.detach().numpy()[d // config.mu.group_size]
            mu[d] = layer.equilibrium.mu_global.item() + offset
        else:
            mu[d] = layer.equilibrium.mu.detach().numpy()[d]
    gamma, phi = layer.excitation.gamma.detach().numpy(), layer.excitation.phi.detach().numpy()
    excited = {int(d): i for i, d in enumerate(layer.excitation.excited)}
    activation = {"relu": lambda u: np.maximum(u, 0), "tanh": np.tanh}[config.controller.activation]
    scale = None if layer.modulation.scale is None else layer.modulation.scale.detach().numpy()
    bias = layer.modulation.bias.detach().numpy()
    states, velocities = x.numpy().copy(), v.numpy().copy()
    for b, s in np.ndindex(states.shape[:2]):
        xt, vt = states[b, s].copy(), velocities[b, s].copy()
        for t in range(config.num_iterations):
            xv = np.concatenate([xt, vt])
            u = (
                weights["context.weight"] @ h[b, s].numpy()
                + weights["context.bias"]
                + weights["state_velocity.weight"] @ xv
            )
            raw = (weights["output.weight"] @ activation(u)).reshape(-1, dim)
            for g in range(raw.shape[0]):
                raw[g] = raw[g] * (1.0 if scale is None else scale[g]) + bias[g]
            error = xt - mu
            alpha = sigmoid(raw[0])
            if config.dynamic_alpha:
                alpha = alpha * (1 - math.exp(-config.kappa * math.sqrt((error**2).mean())))
            beta = np.minimum(np.log1p(np.exp(raw[1])), config.beta_max)
            c = raw[3] if config.candidate == "controller" else candidate[b, s].numpy()
            forcing = np.zeros(dim)
            for d, i in excited.items():
                forcing[d] = amplitude * math.sin(gamma[i] * t + phi[i])
            vt = alpha * vt + (1 - alpha) * c - beta * error + forcing
            xt = xt + config.dt * config.velocity_scale * sigmoid(raw[2]) * vt
        states[b, s], velocities[b, s] = xt, vt
    return states, velocities


VARIANTS = {
    "v4": {},
    "controller candidate": {"candidate": "controller"},
    "hierarchical mu": {"mu": {"form": "hierarchical", "group_size": 4}},
    "fixed mu": {"mu": {"form": "fixed", "init": 0.3}},
    "sparse excitation": {"excitation": {"sparsity": 0.4}},
    "channel modulation": {"controller": {"width": WIDTH, "modulation": "channel"}},
    "own controller": {"controller": {"width": WIDTH, "shared": False}},
    "tanh": {"controller": {"width": WIDTH, "activation": "tanh"}},
    "plain alpha": {"dynamic_alpha": False},
    "low beta_max": {"beta_max": 0.4},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_step_equals_the_equations(changes):
    layer, controller = build(**changes)
    h, x, v, candidate = inputs()
    given = None if layer.config.candidate == "controller" else candidate
    out = layer(h, x, v, amplitude=torch.tensor(0.2, dtype=torch.float64), candidate=given, controller=controller)
    states, velocities = reference(layer, controller, h, x, v, candidate, 0.2)
    np.testing.assert_allclose(out.state.detach().numpy(), states, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(out.velocity.detach().numpy(), velocities, rtol=1e-10, atol=1e-12)


def test_a_state_at_rest_at_mu_stays():
    layer, controller = build(num_iterations=6)
    h = inputs()[0]
    x = layer.equilibrium().expand_as(h).clone()
    out = layer(
        h, x, torch.zeros_like(x), amplitude=torch.tensor(0.0), candidate=torch.zeros_like(x), controller=controller
    )
    assert torch.equal(out.state, x)
    assert torch.equal(out.velocity, torch.zeros_like(x))


def test_the_gradient_at_mu_is_finite():
    layer, controller = build()
    h = inputs()[0]
    x = layer.equilibrium().detach().expand_as(h).clone().requires_grad_()
    still = torch.zeros_like(x)
    out = layer(h, x, still, amplitude=torch.tensor(0.1), candidate=still, controller=controller)
    out.state.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_the_trajectory_is_kept_only_when_asked_for_and_agrees_with_the_result():
    layer, controller = build()
    h, x, v, candidate = inputs()
    arguments = {"amplitude": torch.tensor(0.2), "candidate": candidate, "controller": controller}
    plain, kept = layer(h, x, v, **arguments), layer(h, x, v, keep_trajectory=True, **arguments)
    assert plain.trajectory is None
    assert kept.trajectory.states.shape == (4, BATCH, LENGTH, DIM)
    assert torch.equal(kept.trajectory.states[-1], kept.state)
    torch.testing.assert_close(kept.state, plain.state, rtol=1e-12, atol=1e-14)
    assert torch.equal(kept.trajectory.velocities[0], v)
    assert kept.trajectory.beta.max() <= layer.config.beta_max


def test_loss_terms_equal_their_definitions_on_the_trajectory():
    layer, controller = build()
    h, x, v, candidate = inputs()
    out = layer(
        h,
        x,
        v,
        amplitude=torch.tensor(0.2),
        candidate=candidate,
        controller=controller,
        energy_power=3.0,
        keep_trajectory=True,
    )
    states, velocities, mu = out.trajectory.states[1:], out.trajectory.velocities[1:], layer.equilibrium()
    weights = np.exp(-np.arange(1, 4) / 1.0)
    weights /= weights.sum()
    np.testing.assert_allclose(speed_weights(3), weights)
    speed = sum(w * (state - mu).abs().mean(-1) for w, state in zip(weights, states, strict=True))
    torch.testing.assert_close(out.speed, speed)
    torch.testing.assert_close(out.energy, velocities.abs().pow(3).mean(-1).mean(0))


def stopped_by_hand(layer, controller, h, x, v, candidate, amplitude, threshold, minimum):
    """Run each token alone, step by step, and stop it by the rule."""
    total = layer.config.num_iterations
    run = layer(h, x, v, amplitude=amplitude, candidate=candidate, controller=controller, keep_trajectory=True)
    path, forcing = run.trajectory, layer.excitation(total, amplitude)
    stride = layer.config.dt * layer.config.velocity_scale
    state, used = torch.empty_like(x), torch.empty(x.shape[:2], dtype=torch.int32)
    for b, s in np.ndindex(tuple(x.shape[:2])):
        for t in range(total):
            free = path.states[t + 1, b, s] - path.states[t, b, s] - stride * path.gate[t, b, s] * forcing[t]
            if (t + 1 >= minimum and rms(free).item() < threshold) or t == total - 1:
                state[b, s], used[b, s] = path.states[t + 1, b, s], t + 1
                break
    return state, used


@pytest.mark.parametrize("minimum", [1, 3])
def test_early_stopping_freezes_each_token_where_its_own_run_stops(minimum):
    # The reference reads each token off the full trajectory: tokens do not interact inside the integrator.
    threshold = 0.14 if minimum == 1 else 0.15
    stopping = {"convergence_threshold": threshold, "min_iterations": minimum}
    layer, controller = build(num_iterations=8, early_stopping=stopping)
    h, x, v, candidate = inputs()
    amplitude = torch.tensor(0.5, dtype=torch.float64)
    layer.train()
    state, used = stopped_by_hand(layer, controller, h, x, v, candidate, amplitude, threshold, minimum)
    out = layer.eval()(h, x, v, amplitude=amplitude, candidate=candidate, controller=controller)
    assert out.iterations.tolist() == used.tolist()
    assert len(set(used.flatten().tolist())) > 1, "the case must tell tokens apart"
    torch.testing.assert_close(out.state, state, rtol=1e-12, atol=1e-12)


def test_early_stopping_does_not_act_in_training():
    layer, controller = build(num_iterations=8, early_stopping={"convergence_threshold": 1e9})
    h, x, v, candidate = inputs()
    out = layer.train()(h, x, v, amplitude=torch.tensor(0.0), candidate=candidate, controller=controller)
    assert out.iterations is None


@pytest.mark.parametrize("form", ["per_dim", "hierarchical"])
def test_the_moving_average_of_mu(form):
    layer, _ = build(mu={"form": form, "group_size": 4})
    before, mean_state = layer.equilibrium().detach().clone(), torch.linspace(-1, 1, DIM, dtype=torch.float64)
    target = mean_state if form == "per_dim" else mean_state.view(2, 4).mean(1).repeat_interleave(4)
    layer.equilibrium.adapt(mean_state, 0.25)
    torch.testing.assert_close(layer.equilibrium(), 0.75 * before + 0.25 * target)


def test_beta_stays_bounded_and_ten_thousand_steps_stay_finite():
    layer, controller = build(num_iterations=10_000, dt=0.1)
    with torch.no_grad():
        layer.modulation.bias[1] += 50.0
    h, x, v, candidate = inputs()
    with torch.no_grad():
        out = layer(h, 10 * x, v, amplitude=torch.tensor(0.1), candidate=candidate, controller=controller)
    assert torch.isfinite(out.state).all()
