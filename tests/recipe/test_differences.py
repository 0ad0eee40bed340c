"""Which change of a recipe a run may be resumed across."""

import pytest

from inl_core.recipe.differences import _KINDS, kind_of, recipe_differences
from inl_core.recipe.load import recipe_from_mapping
from inl_core.recipe.problems import section_at
from inl_core.recipe.recipe import Recipe

VALUES = {"name": "x", "training": {"steps": 10}}


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
    differences = recipe_differences(recipe_from_mapping(VALUES), recipe_from_mapping(VALUES, [override]))
    assert [(found.path, found.kind) for found in differences] == [(override.split("=")[0], kind)]


def test_equal_recipes_do_not_differ() -> None:
    assert recipe_differences(recipe_from_mapping(VALUES), recipe_from_mapping(VALUES)) == []


def test_a_section_that_went_is_one_difference() -> None:
    old = recipe_from_mapping(VALUES)
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
