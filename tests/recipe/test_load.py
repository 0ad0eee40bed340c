"""Reading, overriding and writing recipes."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from inl_core.errors import RecipeError
from inl_core.recipe import Recipe
from inl_core.recipe.load import dump_recipe, load_recipe, recipe_from_mapping
from inl_core.recipe.shipped import shipped_recipes
from inl_core.recipe.yaml_text import dump_yaml, parse_yaml

MINIMAL: dict[str, Any] = {"name": "x", "training": {"steps": 10}}


def loaded(text: str) -> Any:
    return parse_yaml(text, "text").values


def with_overrides(*overrides: str, values: dict[str, Any] = MINIMAL) -> Recipe:
    return recipe_from_mapping(values, overrides)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),  # text in YAML 1.1
        ("-2.5E+2", -250),
        (".5", 0.5),
        ("1e9", 1_000_000_000),
        ("2_500_000", 2_500_000),
        ("010", 10),  # 8 in YAML 1.1
        ("1:30", "1:30"),  # 90 in YAML 1.1
        ("on", "on"),  # true in YAML 1.1
        ("2024-01-01", "2024-01-01"),  # a date in YAML 1.1
        ("'1'", "1"),
        ("true", True),
        ("~", None),
        ("", None),
        ("1e400", float("inf")),
        ("[1, 1e-8]", [1, 1e-8]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    result = loaded(f"key: {text}")["key"]
    assert result == value
    assert type(result) is type(value)


def test_numbers_without_a_point_are_numbers_in_files_and_in_overrides(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: x\ntraining:\n  tokens: 1e6\n  optimizer:\n    learning_rate: 1e-3\n")
    recipe = load_recipe(path, ["training.optimizer.eps=1e-9", "model.preset=v4", "model.integrator.dt=2"])
    assert recipe.training.tokens == 1_000_000
    assert recipe.training.optimizer.learning_rate == 1e-3
    assert recipe.training.optimizer.eps == 1e-9
    assert recipe.model.integrator is not None
    assert recipe.model.integrator.dt == 2.0


def test_an_override_wins_over_the_file_and_the_last_over_the_others() -> None:
    assert with_overrides("training.seed=3", "training.seed=4").training.seed == 4


def test_an_override_makes_the_sections_it_needs() -> None:
    cycle = with_overrides("model.preset=v4", "training.cycle.equilibrium.lambda_mean=0.5").training.cycle
    assert cycle is not None
    assert cycle.equilibrium.lambda_mean == 0.5


def test_an_override_may_be_a_list_or_a_section() -> None:
    recipe = with_overrides("data.sources=[a, b]", "training.schedule={name: cosine}")
    assert recipe.data.sources == ("a", "b")
    assert recipe.training.schedule.name == "cosine"


def test_overrides_leave_the_given_mapping_alone() -> None:
    with_overrides("training.steps=11")
    assert MINIMAL == {"name": "x", "training": {"steps": 10}}


def test_an_override_of_steps_takes_the_place_of_tokens_and_the_other_way() -> None:
    tokens = {"name": "x", "training": {"tokens": 4096}}
    assert with_overrides("training.steps=3", values=tokens).training.num_steps == 3
    assert with_overrides("training.tokens=4096").training.num_steps == 2


def test_overriding_both_steps_and_tokens_is_an_error() -> None:
    with pytest.raises(RecipeError, match="give exactly one of steps and tokens"):
        with_overrides("training.tokens=4096", "training.steps=3")


AS_SHIPPED = [(name, []) for name in sorted(shipped_recipes())]
WITH_PRESET = [("tiny", [f"model.preset={preset}"]) for preset in ("v1", "v2", "v3", "v4", "transformer")]


@pytest.mark.parametrize(("name", "overrides"), AS_SHIPPED + WITH_PRESET)
def test_a_dumped_recipe_loads_back_equal(tmp_path: Path, name: str, overrides: list[str]) -> None:
    recipe = load_recipe(shipped_recipes()[name], overrides)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=20)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXT, PLAIN, max_size=4))
def test_plain_values_survive_yaml(values: dict[str, Any]) -> None:
    assert loaded(dump_yaml(values)) == (values or {})


@given(
    st.floats(1e-12, 10.0),
    st.integers(0, 2**31),
    st.from_regex(r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,11}\Z"),
    st.lists(TEXT.filter(lambda text: text[:1] not in ("", "~")), min_size=1, max_size=3),
    st.none() | st.integers(1, 8),
)
def test_any_valid_values_round_trip(
    rate: float, seed: int, name: str, sources: list[str], keep_every: int | None
) -> None:
    values = {
        "name": name,
        "data": {"sources": sources},
        "training": {
            "steps": 10,
            "seed": seed,
            "optimizer": {"learning_rate": rate},
            "checkpoint": {"keep_every": keep_every},
        },
    }
    recipe = recipe_from_mapping(values)
    again = recipe_from_mapping(loaded(dump_recipe(recipe)))
    assert again == recipe
    assert again.training.optimizer.learning_rate == rate
    assert again.data.sources == tuple(sources)


@given(st.floats(1e-12, 10.0), st.integers(0, 2**31))
def test_an_override_is_what_python_writes(rate: float, seed: int) -> None:
    recipe = with_overrides(f"training.optimizer.learning_rate={rate!r}", f"training.seed={seed}")
    assert (recipe.training.optimizer.learning_rate, recipe.training.seed) == (rate, seed)


def test_other_readers_of_yaml_see_the_same_recipe() -> None:
    recipe = with_overrides("name=on-1e3", "data.sources=['on', '1e3', '2024-01-01']")
    assert yaml.safe_load(dump_recipe(recipe)) == recipe.model_dump(mode="json")


def test_a_list_under_the_model_loads_and_a_dumped_one_again(tmp_path: Path) -> None:
    values = {"name": "a", "model": {"preset": "v4", "num_layers": 2}, "training": {"steps": 1}}
    recipe = recipe_from_mapping(values, ["model.integrator.iterations_per_layer=[1, 4]"])
    assert recipe.model.integrator is not None
    assert recipe.model.integrator.iterations_per_layer == (1, 4)
    (tmp_path / "a.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "a.yaml") == recipe
