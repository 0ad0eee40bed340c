"""Mixture of integrators against a slow loop over tokens and experts."""

import pytest
import torch
import torch.nn.functional as F

from inl_core.model import IntegratorLanguageModel
from inl_core.model.mixture import Routing
from inl_core.recipe import ModelConfig
from tests.model.test_language_model import build, some_ids

EXPERTS = {"experts": 4, "top_k": 2}


def mixture(preset: str = "v4", **changes) -> IntegratorLanguageModel:
    return build(preset, integrator={"controller": {**EXPERTS, **changes}})


def one_token(layer, controllers, mu, forcing, h, x, v, candidate):
    """x_T, v_T of one token (D,), straight from the equations; every expert of the top k in turn."""
    config, dim = layer.config, x.numel()
    probabilities = torch.softmax(layer.router.gate.weight @ h, 0)
    values, chosen = probabilities.topk(config.controller.top_k)
    weights = values / values.sum()
    scale, bias = layer.modulation.scale, layer.modulation.bias
    for t in range(config.num_iterations):
        next_x, next_v = torch.zeros(dim).double(), torch.zeros(dim).double()
        for weight, expert in zip(weights, chosen.tolist(), strict=True):
            net = controllers[expert]
            u = F.relu(net.context.weight @ h + net.context.bias + net.state_velocity.weight @ torch.cat((x, v)))
            raw = (net.output.weight @ u).view(-1, dim)
            raw = raw * scale[:, None] + bias[:, None] if scale is not None else raw + bias[:, None]
            error = x - mu
            alpha = torch.sigmoid(raw[0]) * (1 - torch.exp(-config.kappa * error.square().mean().sqrt()))
            beta, gate = F.softplus(raw[1]).clamp(max=config.beta_max), torch.sigmoid(raw[2])
            cand = candidate if config.candidate == "feed_forward" else raw[3]
            new_v = alpha * v + (1 - alpha) * cand - beta * error + forcing[t]
            next_x += weight * (x + config.dt * config.velocity_scale * gate * new_v)
            next_v += weight * new_v
        x, v = next_x, next_v
    return x, v


@pytest.mark.parametrize("preset", ["v1", "v2", "v4"])
def test_the_mixed_layer_equals_a_loop_over_tokens_and_experts(preset):
    model = mixture(preset)
    layer = model.blocks[1].integrator
    generator = torch.Generator().manual_seed(3)
    h, state, velocity, candidate = (torch.randn(2, 3, 64, generator=generator, dtype=torch.float64) for _ in range(4))
    amplitude, controllers = torch.tensor(0.3).double(), layer.controller or model.controller
    given = candidate if layer.config.candidate == "feed_forward" else None
    output = layer(h, state, velocity, amplitude=amplitude, candidate=given, controller=model.controller)
    mu, forcing = layer.equilibrium(), layer.excitation(layer.config.num_iterations, amplitude)
    for row in range(2):
        for token in range(3):
            place = (row, token)
            x, v = one_token(layer, controllers, mu, forcing, h[place], state[place], velocity[place], candidate[place])
            torch.testing.assert_close(output.state[place], x, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(output.velocity[place], v, rtol=1e-6, atol=1e-7)


def test_each_token_takes_its_k_experts_with_weights_that_sum_to_one():
    model = mixture()
    routing: Routing = model(some_ids()).layers[0].routing
    assert torch.equal(routing.chosen.sum(-1), torch.full((2, 12), 2.0, dtype=torch.float64))
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(2, 12, dtype=torch.float64))
    assert sum(len(share.rows) for share in model.integrators()[0].router.shares(routing)) == 2 * 24
    best = routing.probabilities.argmax(-1, keepdim=True)
    assert (routing.chosen.gather(-1, best) == 1).all()


def test_every_expert_and_router_gets_a_gradient_also_one_without_tokens():
    model = mixture().float()
    with torch.no_grad():
        for block in model.blocks:
            block.integrator.router.gate.weight.zero_()  # equal probabilities: ties go to the first experts
    model.loss_sum(model(some_ids()).hidden, some_ids(seed=1)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    for block in model.blocks:
        assert block.integrator.router.gate.weight.grad.any()


def test_one_expert_is_the_plain_integrator():
    assert not any("router" in name or "experts" in name for name in build("v4").state_dict())
    with pytest.raises(ValueError, match="top_k 5 exceeds experts 3"):
        ModelConfig.model_validate({"preset": "v4", "integrator": {"controller": {"experts": 3, "top_k": 5}}})


def test_cached_generation_of_a_mixture_equals_the_uncached_forward_pass():
    model, ids = mixture().eval(), some_ids(2, 9)
    cache = model.new_cache(2, 9, dtype=torch.float64)
    with torch.no_grad():
        whole = model(ids).hidden
        parts = [model(ids[:, :6], cache=cache).hidden] + [
            model(ids[:, t : t + 1], cache=cache).hidden for t in (6, 7, 8)
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-6, atol=1e-7)
