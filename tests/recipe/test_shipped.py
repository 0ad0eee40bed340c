"""The recipes that come with the package, and their schema."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inl_core.analysis.planning import count_parameters, meta_model, training_flops
from inl_core.analysis.planning.memory import memory_table, trace_modes
from inl_core.errors import RecipeError, RecipeWarning
from inl_core.recipe import ModelConfig
from inl_core.recipe.differences import recipe_differences
from inl_core.recipe.load import load_recipe
from inl_core.recipe.presets import PRESETS
from inl_core.recipe.schema import recipe_schema, schema_text
from inl_core.recipe.shipped import copy_shipped, describe_shipped, shipped_recipes
from inl_core.recipe.sizes import find_size

RECIPES = Path(__file__).parents[2] / "recipes"
SIZES = {
    "small": "small",
    "medium": "medium",
    "large": "large",
    "xlarge": "xlarge",
    "3b": "3B",
    "7b": "7B",
    "13b": "13B",
}
GENERATIONS = ("tiny-v1", "tiny-v2", "tiny-v3", "tiny-v4")
NAMES = ("tiny", "tiny-transformer", "tiny-transport", "tiny-early-stopping", *GENERATIONS, *SIZES)


def test_the_shipped_recipes_are_these() -> None:
    assert set(shipped_recipes()) == set(NAMES)
    assert shipped_recipes()["tiny"] == RECIPES / "tiny.yaml"


@pytest.mark.parametrize("name", NAMES)
def test_each_recipe_starts_with_its_command_and_its_schema_and_runs_without_data_to_bring(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    lines = path.read_text().splitlines()
    assert lines[0] == f"# inl train {name}"
    assert "# yaml-language-server: $schema=recipe.schema.json" in lines
    recipe = load_recipe(path)
    assert recipe.name == name
    assert recipe.data.sources == ("builtin:python",)


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_the_sizes_are_the_documents_and_one_to_four_gpus_can_share_the_batch(name: str, size: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    row = find_size(size)
    dimensions = (recipe.model.d_model, recipe.model.num_layers, recipe.model.num_heads, recipe.model.max_seq_len)
    assert dimensions == (row.d_model, row.num_layers, row.num_heads, row.max_seq_len)
    assert recipe.model.preset == "v5"
    for world_size in (1, 2, 4):
        recipe.training.micro_batch(world_size)  # raises where it does not divide


@pytest.mark.parametrize("name", SIZES)
def test_each_size_is_headed_by_the_figures_of_its_plan(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml", ["training.precision=bf16"])
    settings = recipe.training
    config = recipe.model.with_vocab_size(recipe.data.tokenizer.vocab_size)
    saved = trace_modes(recipe, config, bf16=True, modes=tuple({"none": 0, settings.recomputation: 0}))
    table = memory_table(recipe, config, saved, bf16=True, degrees=(1,))
    memory = next(row for row in table if row.recomputation == settings.recomputation)
    parameters = _num_parameters(config)
    flops = training_flops(config, settings.sequence_length) * settings.num_steps * settings.batch_tokens
    assert (
        f"# `inl plan`: {parameters / 1e6:.1f}M parameters, {flops:.1e} FLOP, {memory.total / 1e9:.1f} GB of memory in "
        f"bf16, micro-batch {settings.micro_batch(1)} x {settings.sequence_length}."
    ) in (RECIPES / f"{name}.yaml").read_text().splitlines()


def _num_parameters(config: ModelConfig) -> int:
    return sum(count_parameters(meta_model(config)).values())


def test_the_baseline_differs_in_nothing_but_name_and_preset() -> None:
    tiny, baseline = load_recipe(RECIPES / "tiny.yaml"), load_recipe(RECIPES / "tiny-transformer.yaml")
    of_the_preset = {f"model.{key}" for key in PRESETS["v5"] if PRESETS["v5"][key] != PRESETS["transformer"][key]}
    differing = {difference.path for difference in recipe_differences(tiny, baseline)}
    assert differing == {"name", "model.preset", *of_the_preset}
    assert (baseline.model.stream, baseline.model.transport) == (None, False)


def _body(name: str) -> list[str]:
    """The lines of a recipe that are not comments."""
    return [line for line in (RECIPES / f"{name}.yaml").read_text().splitlines() if not line.startswith("#")]


def test_the_baseline_file_differs_in_two_lines() -> None:
    pairs = list(zip(_body("tiny"), _body("tiny-transformer"), strict=True))
    assert [pair for pair in pairs if pair[0] != pair[1]] == [
        ("name: tiny", "name: tiny-transformer"),
        ("  preset: v5", "  preset: transformer"),
    ]


def test_the_control_is_the_baseline_with_the_transport_alone() -> None:
    expected = _body("tiny-transformer")
    expected[expected.index("name: tiny-transformer")] = "name: tiny-transport"
    expected.insert(expected.index("  preset: transformer") + 1, "  transport: true")
    assert _body("tiny-transport") == expected


@pytest.mark.parametrize("name", ["tiny", "tiny-transport", *SIZES])
def test_v5_has_the_parameters_of_a_transformer(name: str) -> None:
    ours, baseline = (
        load_recipe(RECIPES / f"{name}.yaml", overrides).model.with_vocab_size(32768)
        for overrides in ([], ["model.preset=transformer", "model.transport=false"])
    )
    assert _num_parameters(ours) == pytest.approx(_num_parameters(baseline), rel=0.01)


@pytest.mark.parametrize(("preset", "besides"), [("v1", "optimizer"), ("v2", "optimizer"), ("v3", "")])
def test_the_generations_are_trained_as_v4_is_but_for_what_they_say(preset: str, besides: str) -> None:
    tiny, other = load_recipe(RECIPES / "tiny-v4.yaml"), load_recipe(RECIPES / f"tiny-{preset}.yaml")
    assert other.model.preset == preset
    differing = {difference.path for difference in recipe_differences(tiny, other)}
    expected = {"name", "training.optimizer.name"} if besides else {"name"}
    assert {path for path in differing if not path.startswith("model.")} == expected


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


def test_a_name_is_a_shipped_recipe_anywhere_and_a_path_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("tiny") == load_recipe(RECIPES / "tiny.yaml")
    mine = (RECIPES / "tiny.yaml").read_text().replace("name: tiny", "name: mine")
    (tmp_path / "tiny.yaml").write_text(mine)
    with pytest.warns(RecipeWarning, match=r"^tiny: the shipped recipe, not the file here; name that one tiny\.yaml$"):
        assert load_recipe("tiny").name == "tiny"
    assert load_recipe("tiny.yaml").name == "mine"
    (tmp_path / "tiny").write_text(mine)
    with pytest.warns(RecipeWarning, match=r"^tiny: the file here, not the shipped recipe"):
        assert load_recipe("tiny").name == "mine"


def test_a_copy_computes_the_same_and_is_never_written_over_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        assert load_recipe(copy_shipped(name, None)) == load_recipe(RECIPES / f"{name}.yaml")
    assert copy_shipped("tiny", tmp_path / "other.yaml").read_text().startswith(f"# inl train {tmp_path}/other.yaml\n")
    (tmp_path / "medium.yaml").write_text("mine")
    with pytest.raises(RecipeError, match=r"medium\.yaml: exists already"):
        copy_shipped("medium", tmp_path)
    assert (tmp_path / "medium.yaml").read_text() == "mine"
    with pytest.raises(RecipeError, match="tinny: no shipped recipe; did you mean 'tiny'"):
        copy_shipped("tinny", None)


def test_the_list_says_of_each_shipped_recipe_what_it_is() -> None:
    rows = {row.name: row for row in describe_shipped()}
    assert set(rows) == set(NAMES)
    assert next(iter(rows)) == "tiny"
    assert (rows["tiny"].preset, rows["tiny"].size) == ("v5", "128 x 4")
    assert rows["tiny-v3"].about.startswith("Generation v3")
    assert all(row.about and "\n" not in row.about for row in rows.values())
