"""`integrator.iterations_per_layer`: every layer its own number of iterations."""

import pytest
import torch
from pydantic import ValidationError

from inl_core.inference.evaluate import most_iterations
from inl_core.model import IntegratorLanguageModel, Options
from inl_core.recipe import ModelConfig


def build(preset: str, **integrator) -> IntegratorLanguageModel:
    values = {"preset": preset, "d_model": 64, "num_layers": 3, "vocab_size": 40, "integrator": integrator}
    model = IntegratorLanguageModel(ModelConfig.model_validate(values)).eval()
    model.initialise(1)
    return model


@pytest.mark.parametrize("preset", ["v1", "v2", "v3", "v4"])
def test_each_layer_runs_its_own_iterations(preset):
    off = {"early_stopping": {"convergence_threshold": 0.0}, "budget": {"strategy": "uniform"}}
    model, plain = build(preset, iterations_per_layer=[1, 4, 2], **off), build(preset, **off)
    ids = torch.arange(10)[None]
    own = model(ids, options=Options(keep_trajectory=True))
    assert [len(layer.trajectory.alpha) for layer in own.layers] == [1, 4, 2]
    told = Options(num_iterations=(1, 4, 2), keep_trajectory=True)
    assert torch.equal(own.hidden, plain(ids, options=told).hidden)
    assert not torch.equal(own.hidden, plain(ids).hidden)
    overridden = model(ids, options=Options(num_iterations=3)).hidden
    assert torch.equal(overridden, plain(ids, options=Options(num_iterations=3)).hidden)


def test_the_mean_over_layers_is_what_is_reported():
    assert most_iterations(build("v4", iterations_per_layer=[1, 4, 2]), None) == pytest.approx(7 / 3)


def test_a_configuration_survives_its_own_dump():
    config = build("v2", iterations_per_layer=[1, 4, 2]).config
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("integrator", "message"),
    [
        ({"iterations_per_layer": [1, 2]}, "has 2 entries for 3 layers"),
        ({"iterations_per_layer": [1, 1, 2], "budget": {"strategy": "learned"}}, "needs budget.strategy uniform"),
        ({"iterations_per_layer": [1, 0, 2]}, "greater than 0"),
        ({"iterations_per_layer": [3, 2, 3], "early_stopping": {"min_iterations": 3}}, "exceeds num_iterations 2"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(integrator, message):
    with pytest.raises(ValidationError, match=message):
        build("v4", **integrator)
