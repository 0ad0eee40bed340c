"""Which keys of a recipe may change when a run is resumed."""

import json

import pytest

from inl_core.errors import RecipeError
from inl_core.recipe.differences import _FIXED, _KINDS, kind_of, recipe_differences
from inl_core.recipe.load import recipe_from_mapping
from inl_core.recipe.problems import section_at
from inl_core.recipe.recipe import Recipe

VALUES = {"name": "x", "training": {"steps": 10}}
V4 = {**VALUES, "model": {"preset": "v4"}, "data": {"sources": ["builtin:python"]}}


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("name=y", "operational"),
        ("model.num_layers=5", "identity"),
        ("model.integrator.excitation.amplitude=0.1", "identity"),
        ("data.validation_fraction=0.2", "identity"),
        ("data.directory=elsewhere", "operational"),
        ("training.seed=1", "identity"),
        ("training.sequence_length=64", "identity"),
        ("training.batch_tokens=4096", "identity"),
        ("training.gradient_clip=2.0", "identity"),
        ("training.optimizer.betas=[0.8, 0.9]", "identity"),
        ("training.optimizer.learning_rate=1e-4", "schedule"),
        ("training.steps=20", "schedule"),
        ("training.schedule.decay_fraction=0.1", "schedule"),
        ("training.losses.lambda_mean=1.0", "schedule"),
        ("training.cycle={preset: balanced}", "schedule"),
        ("training.micro_batch_size=4", "operational"),
        ("training.device=cpu", "operational"),
        ("training.compile=true", "operational"),
        ("training.recomputation=block", "operational"),
        ("training.evaluation.every=1", "operational"),
        ("training.checkpoint.keep_last=1", "operational"),
        ("training.logging.every=1", "operational"),
    ],
)
def test_a_change_is_found_and_classed(override: str, kind: str) -> None:
    differences = recipe_differences(recipe_from_mapping(V4), recipe_from_mapping(V4, [override]))
    assert [(found.path, found.kind) for found in differences] == [(override.split("=")[0], kind)]


def test_equal_recipes_do_not_differ() -> None:
    assert recipe_differences(recipe_from_mapping(VALUES), recipe_from_mapping(VALUES)) == []


def test_a_section_that_went_is_one_difference() -> None:
    old = recipe_from_mapping(V4)
    new = recipe_from_mapping(VALUES, ["model.preset=transformer"])
    found = {difference.path: difference for difference in recipe_differences(old, new)}
    assert set(found) == {"model.preset", "model.feed_forward_rounding", "model.integrator"}
    assert found["model.integrator"].new is None
    assert str(found["model.preset"]) == "model.preset: v4 -> transformer"


def test_the_table_names_only_keys_that_exist() -> None:
    for key in filter(None, _KINDS):
        *above, last = key.split(".")
        section = section_at(Recipe, tuple(above))
        assert section is not None, key
        assert last in section.model_fields, key


def test_a_key_nobody_classed_is_refused() -> None:
    assert kind_of("training.something_new") == "identity"
    assert kind_of("something_new") == "identity"


ALTERNATIVES = {
    "model.num_kv_heads": 2,
    "model.feedforward_dim": 128,
    "model.feedforward_hidden": 96,
    "model.max_seq_len": 128,
    "model.norm": "layernorm",
    "model.norm_eps": 1e-5,
    "model.rope_theta": 1e5,
    "model.feed_forward": "gelu",
    "model.feed_forward_rounding": "exact",
    "model.bias": True,
    "model.embedding_rank": 16,
    "model.embedding_norm": False,
    "model.embedding_std": 0.02,
    "model.embedding_scale": "sqrt_dim",
    "model.tie_head": False,
    "model.d_model": 128,
    "model.num_layers": 3,
    "model.vocab_size": 401,
    "model.stream": None,
    "model.stream.momentum": False,
    "model.stream.anchor": False,
    "model.stream.equilibrium": False,
    "model.stream.excitation": None,
    "model.stream.excitation.sparsity": 0.5,
    "model.stream.kappa": 2.0,
    "model.transport": False,
    "model.integrator": None,
    "model.integrator.num_iterations": 3,
    "model.integrator.dt": 0.5,
    "model.integrator.candidate": "controller",
    "model.integrator.carry_velocity": False,
    "model.integrator.readout": "state",
    "model.integrator.mu.form": "hierarchical",
    "model.integrator.mu.init": 1.0,
    "model.integrator.excitation.amplitude": 0.1,
    "model.integrator.excitation.sparsity": 0.5,
    "model.integrator.controller.width": 32,
    "model.integrator.controller.shared": False,
    "model.integrator.controller.modulation": "channel",
    "model.integrator.controller.activation": "gelu",
    "model.integrator.controller.experts": 3,
    "model.integrator.budget.strategy": "learned",
}


@pytest.mark.parametrize("key", ALTERNATIVES)
def test_a_key_of_the_model_is_fixed_when_the_weights_would_not_fit(key: str) -> None:
    import torch

    from inl_core.model import IntegratorLanguageModel

    base = ["model.d_model=64", "model.vocab_size=400", "model.num_layers=2"]
    old = recipe_from_mapping(V4 if key.startswith("model.integrator") else VALUES, base).model_dump(mode="json")
    new, shapes = recipe_from_mapping(old, [f"{key}={json.dumps(ALTERNATIVES[key])}"]), []
    for recipe in (recipe_from_mapping(old), new):
        with torch.device("meta"):
            model = IntegratorLanguageModel(recipe.model)
        shapes.append({name: tensor.shape for name, tensor in model.state_dict().items()})
    (difference,) = recipe_differences(recipe_from_mapping(old), new)
    assert difference.is_fixed == (shapes[0] != shapes[1])


def test_the_fixed_keys_exist_and_are_of_the_experiment() -> None:
    for key in _FIXED:
        assert kind_of(key) == "identity", key
        *above, last = key.split(".")
        section = section_at(Recipe, tuple(above))
        assert section is not None, key
        assert last in section.model_fields, key


@pytest.mark.parametrize("name", [".", "..", "...", ".hidden", "a/b", "a\0b", "a\n", "", " ", "x" * 101])
def test_a_name_that_is_no_directory_of_its_own_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="name"):
        recipe_from_mapping({**VALUES, "name": name})
