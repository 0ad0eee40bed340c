"""The recipes that come with the package, and their schema."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inl_core.recipe.differences import recipe_differences
from inl_core.recipe.load import load_recipe, shipped_recipes
from inl_core.recipe.presets import PRESETS
from inl_core.recipe.schema import recipe_schema, schema_text

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = ("medium", "small", "tiny", "tiny-transformer", "tiny-v1", "tiny-v2", "tiny-v3")


def test_the_shipped_recipes_are_these() -> None:
    assert set(shipped_recipes()) == set(NAMES)
    assert shipped_recipes()["tiny"] == RECIPES / "tiny.yaml"


@pytest.mark.parametrize("name", NAMES)
def test_each_recipe_starts_with_its_command_and_its_schema_and_runs_without_data_to_bring(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    lines = path.read_text().splitlines()
    assert lines[0] == f"# inl train recipes/{name}.yaml"
    assert "# yaml-language-server: $schema=recipe.schema.json" in lines
    recipe = load_recipe(path)
    assert recipe.name == name
    assert recipe.data.sources == ("builtin:python",)


def test_the_baseline_differs_in_nothing_but_name_and_preset() -> None:
    tiny, baseline = load_recipe(RECIPES / "tiny.yaml"), load_recipe(RECIPES / "tiny-transformer.yaml")
    one, other = PRESETS["v4"], PRESETS["transformer"]
    of_the_preset = {f"model.{key}" for key in one if one[key] != other[key]}
    differing = {difference.path for difference in recipe_differences(tiny, baseline)}
    assert differing == {"name", "model.preset", *of_the_preset}
    assert baseline.model.integrator is None


def test_the_baseline_file_differs_in_two_lines() -> None:
    def body(name: str) -> list[str]:
        return [line for line in (RECIPES / name).read_text().splitlines() if not line.startswith("#")]

    pairs = list(zip(body("tiny.yaml"), body("tiny-transformer.yaml"), strict=True))
    assert [pair for pair in pairs if pair[0] != pair[1]] == [
        ("name: tiny", "name: tiny-transformer"),
        ("  preset: v4", "  preset: transformer"),
    ]


@pytest.mark.parametrize("preset", ["v1", "v2", "v3"])
def test_the_generations_are_trained_as_v4_is(preset: str) -> None:
    tiny, other = load_recipe(RECIPES / "tiny.yaml"), load_recipe(RECIPES / f"tiny-{preset}.yaml")
    assert other.model.preset == preset
    differing = {difference.path for difference in recipe_differences(tiny, other)}
    assert {path for path in differing if not path.startswith("model.")} == {"name"}


def test_the_quick_start_recipe_is_that_of_the_study() -> None:
    training = load_recipe(RECIPES / "tiny.yaml").training
    assert (training.batch_size, training.num_steps) == (16, 1221)
    assert training.optimizer.betas == (0.9, 0.95)


def _keys(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for section in [schema, *schema["$defs"].values()]:
        yield from section.get("properties", {}).items()


def test_the_committed_schema_is_current() -> None:
    assert (RECIPES / "recipe.schema.json").read_text() == schema_text(), "run `make schema`"


def test_the_schema_explains_every_key_and_closes_every_section() -> None:
    schema = recipe_schema()
    assert [name for name, key in _keys(schema) if not key.get("description")] == []
    assert all(section["additionalProperties"] is False for section in [schema, *schema["$defs"].values()])
    assert schema["required"] == ["name", "training"]
    json.dumps(schema)
