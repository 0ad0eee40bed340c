"""What does not fit the devices is refused with the arithmetic of the plan's table, and with advice that helps."""

import pytest

from inl_core.analysis.planning import plan_model
from inl_core.analysis.planning.fit import Devices, check_fit
from inl_core.errors import RecipeError
from inl_core.recipe.load import load_recipe, recipe_from_mapping


def test_what_is_refused_for_its_gradient_needs_what_the_table_says_and_is_told_to_take_one_pass() -> None:
    plan = plan_model(load_recipe("13b"))
    table = {(row.recomputation, row.sharding): row for row in plan.memory}
    row = table["block", 8]
    assert row.gradient == plan.states.gradients * 7 // 8
    assert table["block", 1].gradient == 0
    with pytest.raises(RecipeError) as refused:
        check_fit(plan, Devices(8, 40_000_000_000))
    assert f"= {row.total / 1e9:.1f} GB on each" in str(refused.value)
    assert f"would need {(row.total - row.gradient) / 1e9:.1f} GB in one pass a step: raise" in str(refused.value)
    assert "lower training.micro_batch_size" not in str(refused.value)


@pytest.mark.parametrize(
    ("micro", "advice"), [(1, "take devices with more memory"), (2, "lower training.micro_batch_size")]
)
def test_what_no_layout_fits_is_told_to_lower_what_it_can(micro: int, advice: str) -> None:
    settings = {"sequence_length": 1024, "batch_tokens": 1024 * micro, "micro_batch_size": micro, "steps": 1}
    model = {"d_model": 64, "num_heads": 2, "num_layers": 2, "max_seq_len": 1024, "vocab_size": 300}
    plan = plan_model(recipe_from_mapping({"name": "a", "model": model, "training": settings}))
    with pytest.raises(RecipeError, match=advice):
        check_fit(plan, Devices(1, plan.states.total))


def test_hybrid_sharding_takes_one_pass_over_all_devices_and_not_over_the_parts_of_one_copy() -> None:
    keys = ("training.distributed.strategy=hsdp", "training.distributed.shard_size=8", "training.batch_tokens=262144")
    assert check_fit(plan_model(load_recipe("13b", keys)), Devices(64, 40_000_000_000)).shard_size == 8
