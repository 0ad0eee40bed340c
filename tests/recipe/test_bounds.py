"""Every number in a recipe is bounded: what is accepted can be built and planned, all else is refused in one line."""

import math
import re
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from inl_core.analysis.planning import meta_model, plan_model, plan_recipe
from inl_core.errors import RecipeError
from inl_core.recipe import Recipe
from inl_core.recipe.load import recipe_from_mapping
from inl_core.recipe.presets import merge
from inl_core.recipe.problems import section_at
from inl_core.recipe.schema import recipe_schema
from inl_core.training.cycles import regime
from inl_core.training.optimizers import build_optimizers
from inl_core.training.schedules import learning_rate_factor

INTEGERS = (-1, 0, 1, 3, 2**20, 2**31, 2**63, 2**64, 10**18, 10**300)
FLOATS = (-math.inf, -0.0, 5e-324, 1e-30, 0.5, 0.9999999999999999, 1.0, 1e30, 1e308, math.inf)
OF_THE_INTEGRATOR = {("model", "integrator")} | {("training", key) for key in ("cycle", "losses", "min_iterations")}
EXTREMES = (*sorted(INTEGERS + FLOATS), math.nan)


def numbers(section: type[BaseModel] = Recipe, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all keys whose values may be numbers."""
    found = []
    for name, field in section.model_fields.items():
        if below := section_at(section, (name,)):
            found += numbers(below, (*above, name))
        elif re.search(r"\b(int|float)\b", str(field.annotation)):
            found.append((*above, name))
    return found


def with_value(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    model: dict[str, Any] = {"d_model": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 100}
    if path[:2] in OF_THE_INTEGRATOR:
        model["preset"] = "v4"
    training: dict[str, Any] = {"steps": 10, "sequence_length": 1, "batch_tokens": 1}
    if path == ("training", "tokens"):
        del training["steps"]
    if path[-1] == "shard_size":
        training["distributed"] = {"strategy": "hsdp"}
    several = {"betas": 2, "iterations_per_layer": 2, "weights": 1}  # of these keys the value is a list
    over: Any = [value] * several[path[-1]] if path[-1] in several else value
    for key in reversed(path):
        over = {key: over}
    return merge({"name": "x", "model": model, "training": training}, over)


def accepted(path: tuple[str, ...]) -> list[Recipe]:
    """The valid ones of the recipes with an extreme value at `path`, rising; others are refused in short lines."""
    found = []
    for value in EXTREMES:
        try:
            found.append(recipe_from_mapping(with_value(path, value)))
        except RecipeError as error:
            message = str(error)
        else:
            continue
        assert len(message) < 500, value
        assert "\n" not in message or path[-1] in ("betas", "iterations_per_layer"), value
    return found


def build(recipe: Recipe) -> None:
    """Build all parts of a run that depend on numbers, without memory for the weights."""
    model = meta_model(recipe.model)
    build_optimizers(model, recipe.training.optimizer, torch.device("meta"))
    for module in model.modules():
        if module is not model and callable(initialise := getattr(module, "initialise", None)):
            initialise()
    training = recipe.training
    for step in {0, 1, training.num_steps // 2, training.num_steps - 1}:
        assert 0 <= learning_rate_factor(training.schedule, step, training.num_steps) <= 1
        assert math.isfinite(regime(training.losses, training.cycle, step, training.num_steps).lambda_mean)


@pytest.mark.parametrize("path", numbers(), ids=".".join)
def test_a_number_that_a_recipe_takes_can_be_built(path: tuple[str, ...]) -> None:
    recipes = accepted(path)
    assert recipes or path[-1] in ("min_iterations", "sequence_length", "batch_tokens"), "no extreme is accepted"
    for recipe in recipes:
        build(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("path", numbers(), ids=".".join)
def test_the_least_and_the_largest_number_that_a_recipe_takes_can_be_planned(path: tuple[str, ...]) -> None:
    recipes = accepted(path)
    for recipe in recipes[:1] + recipes[1:][-1:]:
        plan_model(recipe)


def test_every_number_is_bounded_on_both_sides() -> None:
    def check(schema: Any, place: str) -> None:
        if isinstance(schema, dict):
            if schema.get("type") in ("integer", "number"):
                assert schema.keys() & {"minimum", "exclusiveMinimum"}, place
                assert schema.keys() & {"maximum", "exclusiveMaximum"}, place
            for key, value in schema.items():
                check(value, f"{place}.{key}")
        elif isinstance(schema, list):
            for value in schema:
                check(value, place)

    check(recipe_schema(), "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"optimizer": {"betas": [0.9, 1.0]}}}, "betas.1: expected a number less than 1.0, got 1"),
        ({"training": {"optimizer": {"eps": 1e-40}}}, "eps: expected a number of at least 1e-30"),
        ({"training": {"optimizer": {"learning_rate": 1e308}}}, "learning_rate: expected a number of at most 1e+30"),
        ({"training": {"seed": 2**63}}, "seed: expected a number less than 9223372036854775808"),
        ({"training": {"steps": 10**12, "batch_tokens": 10**12, "sequence_length": 1}}, "are above 2,000,000,000"),
        ({"model": {"d_model": 10**12}}, "d_model: expected a number of at most 1048576"),
        ({"model": {"num_layers": 10**6}}, "num_layers: expected a number of at most 1000"),
        ({"model": {"feedforward_dim": 1, "feed_forward_rounding": "exact"}}, "leaves no hidden width"),
        (
            {"model": {"preset": "v4", "num_layers": 100, "integrator": {"controller": {"experts": 1000}}}},
            "num_layers x experts is",
        ),
        (
            {
                "model": {"vocab_size": 10**8, "max_seq_len": 2**23},
                "training": {"sequence_length": 2**23, "batch_tokens": 2**23},
            },
            "shorten the windows",
        ),
    ],
)
def test_what_would_fail_later_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("+", r"\+")):
        recipe_from_mapping(merge({"name": "x", "training": {"steps": 10}}, changes))


def test_the_widest_recipe_is_planned() -> None:
    model = {"d_model": 2**20, "num_heads": 2**19, "num_layers": 2, "vocab_size": 10**6, "max_seq_len": 2**20}
    length = {"sequence_length": 2**20, "batch_tokens": 2**20}
    recipe = recipe_from_mapping({"name": "x", "model": model, "training": {"steps": 1, **length}})
    assert plan_recipe(recipe, vocab_size=10**6).activation_bytes > 2**40
