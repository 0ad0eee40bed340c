"""The plan against the real model: its tensors, and the operations torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from inl_core.analysis.planning import count_parameters, forward_flops, meta_model, plan_recipe
from tests.inference.tiny import PRESETS, config, recipe, tiny_model


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_by_part_are_all_parameters(preset: str) -> None:
    counts = count_parameters(meta_model(config(preset).with_vocab_size(300)))
    assert sum(counts.values()) == sum(parameter.numel() for parameter in tiny_model(preset).parameters())
    assert ("mu" in counts) == (preset != "transformer")


@pytest.mark.parametrize("preset", PRESETS)
def test_flops_are_those_torch_counts(preset: str) -> None:
    model, length = tiny_model(preset), 16
    if model.budget is not None:
        model.budget.initialise()  # T each: the plan's premise
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(torch.zeros(1, length, dtype=torch.long)).hidden)
    matrices = sum(count for name, count in counter.get_flop_counts()["Global"].items() if "mm" in str(name))
    dim, layers = model.config.d_model, model.config.num_layers
    attention = 2 * layers * dim * length  # a token; half of S in the mean, two products
    # Counted by the plan alone: W_v at a step that starts at rest. By torch alone: the low-rank embedding's projection.
    at_rest = {"v3": layers, "v4": 1, "transformer": 0}[preset]
    at_rest_flops = 2 * at_rest * dim * model.config.integrator.controller.width if model.config.integrator else 0
    projection = 2 * (model.config.rank or 0) * dim
    assert forward_flops(model.config, length) == matrices / length + attention + at_rest_flops - projection


def test_a_plan_adds_up() -> None:
    plan = plan_recipe(recipe("v4"), vocab_size=300, num_windows=100)
    assert plan.total_parameters == sum(plan.parameters.values())
    assert plan.train_tokens == 640
    assert plan.epochs == pytest.approx(0.2)
    assert plan.checkpoint_bytes < plan.disk_bytes
