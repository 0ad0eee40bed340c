"""Nothing is decoration: every configuration field, every parameter and every described feature reaches the output."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import IntegratorConfig, ModelConfig
from inl_core.recipe.presets import merge
from tests.model.test_language_model import PRESETS, VOCAB, build, some_ids

BASE = {"d_model": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "vocab_size": VOCAB, "max_seq_len": 64}

# Each leaf of ModelConfig: (what else must be set for it to matter, its changed value). The integrator is v4's.
CHANGES: dict[str, tuple[dict[str, Any], Any]] = {
    "preset": ({}, "v3"),
    "size": ({}, "small"),
    "d_model": ({}, 128),
    "num_layers": ({}, 2),
    "num_heads": ({}, 2),
    "num_kv_heads": ({}, 4),
    "feedforward_dim": ({}, 512),
    "feedforward_hidden": ({}, 100),
    "max_seq_len": ({}, 32),
    "vocab_size": ({}, VOCAB + 1),
    "norm": ({}, "layernorm"),
    "norm_eps": ({}, 0.1),
    "positions": ({}, "sinusoidal"),
    "rope_theta": ({}, 100.0),
    "feed_forward": ({}, "gelu"),
    "feed_forward_rounding": ({}, "exact"),
    "bias": ({}, True),
    "embedding_rank": ({}, 16),
    "embedding_norm": ({}, False),
    "embedding_std": ({}, 0.3),
    "embedding_scale": ({}, "sqrt_dim"),
    "tie_head": ({}, False),
    "stream.momentum": ({}, False),
    "stream.anchor": ({}, False),
    "stream.equilibrium": ({}, False),
    "stream.excitation.amplitude": ({}, 0.3),
    "stream.excitation.sparsity": ({}, 0.25),
    "stream.dynamic_alpha": ({}, True),
    "stream.kappa": (merge({}, {"stream": {"dynamic_alpha": True}}), 2.0),
    "transport": ({}, "attention"),
    "integrator.num_iterations": ({}, 3),
    "integrator.iterations_per_layer": ({}, (1, 2, 3)),
    "integrator.dt": ({}, 0.4),
    "integrator.velocity_scale": ({}, 0.5),
    "integrator.dynamic_alpha": ({}, False),
    "integrator.kappa": ({}, 2.0),
    "integrator.beta_max": ({}, 0.051),
    "integrator.init_alpha": ({}, 0.7),
    "integrator.init_beta": ({}, 0.2),
    "integrator.init_gate": ({}, 0.4),
    "integrator.candidate": ({}, "controller"),
    "integrator.carry_velocity": ({}, False),
    "integrator.readout": ({}, "state"),
    "integrator.mu.form": ({}, "hierarchical"),
    "integrator.mu.group_size": ({"integrator": {"mu": {"form": "hierarchical"}}}, 32),
    "integrator.mu.init": ({}, 0.5),
    "integrator.mu.adaptation_rate": ({}, 0.5),
    "integrator.excitation.amplitude": ({}, 0.3),
    "integrator.excitation.sparsity": ({}, 0.25),
    "integrator.controller.width": ({}, 32),
    "integrator.controller.shared": ({}, False),
    "integrator.controller.modulation": ({}, "channel"),
    "integrator.controller.activation": ({}, "tanh"),
    "integrator.controller.experts": ({}, 3),
    "integrator.controller.top_k": ({"integrator": {"controller": {"experts": 3}}}, 1),
    "integrator.early_stopping.convergence_threshold": ({}, 10.0),
    "integrator.early_stopping.min_iterations": (
        {"integrator": {"early_stopping": {"convergence_threshold": 10.0}}},
        2,
    ),
    "integrator.budget.strategy": ({}, "dynamic"),
    "integrator.budget.min_iterations": (
        {"integrator": {"budget": {"strategy": "dynamic"}, "num_iterations": 4}},
        3,
    ),
    "integrator.budget.max_iterations": (
        {"integrator": {"budget": {"strategy": "dynamic"}, "num_iterations": 4}},
        5,
    ),
}


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of every field that is not itself a section."""
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        below = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if below:
            yield from leaves(below[0], f"{prefix}{name}.")
        else:
            yield prefix + name


def nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def everything_observable(values: dict[str, Any]) -> list[torch.Tensor]:
    """Starting weights, states in training and evaluation, iterations used, mu after an adaptation, budgets."""
    config = ModelConfig.model_validate(values)
    model = IntegratorLanguageModel(config)
    model.initialise(0)
    seen = [value.clone() for value in model.state_dict().values()]
    ids = some_ids(length=16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2.0)  # away from the small start, where norms hide a part's effect
        for name, parameter in model.named_parameters():
            if ".step_" in name:
                parameter.add_(0.1)  # away from the start, where v5's terms are nothing
        training, evaluated = model.train()(ids), model.eval()(ids)
        seen += [training.hidden, evaluated.hidden, model.logits(evaluated.hidden), evaluated.iterations()]
        seen.append(torch.tensor(model.position_table.shape))
        for integrator, layer in zip(model.integrators(), training.layers, strict=True):
            integrator.equilibrium.adapt(layer.state.mean((0, 1)), integrator.config.mu.adaptation_rate)
            seen.append(integrator.equilibrium().detach())
        if model.budget is not None:
            model.budget.reallocate(torch.tensor([1.0, 3.0, 90.0]))
            seen.append(model.budget.shares())
    return seen


def test_the_table_of_changes_names_every_field():
    where_weights_come_from = {"init_from"}  # the model is the same, whoever fills it
    assert set(leaves(ModelConfig)) - where_weights_come_from == set(CHANGES)


@pytest.mark.parametrize("path", CHANGES)
def test_every_field_changes_something(path):
    also, value = CHANGES[path]
    base = merge({"vocab_size": VOCAB} if path == "size" else BASE, also)
    base |= {"preset": "v4"} if path.startswith("integrator.") else {}
    one, two = everything_observable(base), everything_observable(merge(base, nested(path, value)))
    same = len(one) == len(two) and all(
        before.shape == after.shape and torch.equal(before, after) for before, after in zip(one, two, strict=True)
    )
    assert not same, f"{path} = {value} changes nothing"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_alone_moves_the_output(preset):
    model, ids = build(preset), some_ids()
    with torch.no_grad():
        before = model(ids).hidden
        for name, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            assert not torch.allclose(model(ids).hidden, before, rtol=1e-9, atol=1e-12), f"{name} is disconnected"
            parameter.copy_(kept)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_gets_a_gradient_in_the_first_training_step(preset):
    """From the true start, also mu, gamma, phi, the modulation and the budget. v5's mu follows one step later: it acts
    through beta, which starts at 0."""
    model = IntegratorLanguageModel(ModelConfig.model_validate(BASE | {"preset": preset}))
    model.initialise(0)
    model.loss_sum(model(some_ids()).hidden, some_ids(seed=1)).backward()
    silent = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert [name for name in silent if preset != "v5" or not name.endswith(".mu")] == []


# The documents' own features, each turned off alone in the generation that has it.
FEATURES = {
    "excitation": {"excitation": {"amplitude": 0.0}},
    "dynamic alpha": {"dynamic_alpha": False},
    "candidate velocity": {"candidate": "none"},
    "velocity": {"init_alpha": 1e-6},
    "equilibrium": {"mu": {"form": "fixed"}},
}


@pytest.mark.parametrize("preset", ["v1", "v2", "v3"])
@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES.keys())
def test_turning_a_feature_off_changes_the_output(preset, feature):
    full = build(preset)
    values = full.config.model_dump() | {"integrator": merge(full.config.model_dump()["integrator"], feature)}
    without = IntegratorLanguageModel(ModelConfig.model_validate(values)).double()
    without.initialise(0)
    kept = {name: value for name, value in full.state_dict().items() if _fits(without, name, value)}
    if "init_alpha" in feature:  # a start value: the biases that hold it must stay the new ones
        kept = {name: value for name, value in kept.items() if "modulation.bias" not in name}
    if "excitation" in feature:
        kept.pop("excitation_amplitude")
    if "mu" in feature:
        kept = {name: value for name, value in kept.items() if "equilibrium" not in name}
    without.load_state_dict(kept, strict=False)
    with torch.no_grad():
        assert not torch.allclose(full(some_ids()).hidden, without(some_ids()).hidden, rtol=1e-6, atol=1e-8)


def _fits(model: IntegratorLanguageModel, name: str, value: torch.Tensor) -> bool:
    own = model.state_dict().get(name)
    return own is not None and own.shape == value.shape


def test_a_shared_controller_is_called_by_every_layer_and_modulated_by_each():
    model, ids = build("v2"), some_ids()
    calls, hoist = [], model.controller.hoist
    model.controller.hoist = lambda h: (calls.append(1), hoist(h))[1]
    with torch.no_grad():
        before = model(ids).layers[2].state
        assert len(calls) == 3
        model.blocks[2].integrator.modulation.scale.mul_(1.5)
        assert not torch.allclose(model(ids).layers[2].state, before)


def test_the_defaults_are_those_of_v5_and_the_default_integrator_is_v4s():
    fields = ModelConfig.model_fields
    assert ModelConfig() == ModelConfig(preset="v5")
    for name in ("integrator", "stream", "transport"):
        assert getattr(ModelConfig(), name) == fields[name].default
    assert ModelConfig(preset="v4").integrator == IntegratorConfig()
