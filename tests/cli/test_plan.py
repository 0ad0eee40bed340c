"""`inl plan`: a recipe, a model, the documents' shares, the page of sizes, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from inl_cli import sizes_page
from inl_cli.app import app
from inl_core.corpus.preparation import prepare
from inl_core.recipe.load import load_recipe
from inl_core.recipe.shipped import shipped_recipes
from inl_core.training.run_data import data_directory

ROOT = Path(__file__).parents[2]
SMALL = ("--set", "model.d_model=64", "--set", "model.num_layers=2", "--set", "model.max_seq_len=64")


@pytest.fixture
def inl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """`inl plan` in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["plan", *arguments])


def figures(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    return json.loads(line)


def recipe_file(directory: Path, more: str = "") -> str:
    (directory / "some.txt").write_text("\n\n".join(f"document {number} has its words" for number in range(200)))
    path = directory / "a.yaml"
    path.write_text(
        "name: a\nmodel: {d_model: 64, num_layers: 2, max_seq_len: 64}\n"
        f"data: {{sources: [{directory / 'some.txt'}], tokenizer: {{vocab_size: 290}}}}\n"
        f"training: {{steps: 10, sequence_length: 32, batch_tokens: 128{more}}}\n"
    )
    return str(path)


def test_the_documents_three_shares_are_reproduced_at_their_own_dimensions(inl: Callable[..., Result]) -> None:
    dimensions = ("model.d_model=2048", "model.num_layers=24", "model.num_heads=16")
    arguments = [word for text in dimensions for word in ("--set", text)]
    sooner = (
        "--set",
        "model.integrator.num_iterations=2",
        "--sequence-length",
        "64",
    )  # parameters do not depend on T or S
    data = figures(inl("--preset", "v2", *arguments, "--vocab-size", "50000", *sooner, "--json"))
    rows = {row["part"]: row for row in data["optimisations"]}
    shares = {part: round(100 * row["change"]) for part, row in rows.items()}
    assert {part: shares[part] for part in ("embedding", "controller", "mu")} == {
        "embedding": -87,
        "controller": -96,
        "mu": -98,
    }
    # document 002 says: from 102M to 13.3M
    assert (rows["embedding"]["full"], rows["embedding"]["optimised"]) == (102_400_000, 13_324_288)
    assert (rows["mu"]["full"] / 24, rows["mu"]["optimised"] / 24) == (2048, 33)
    counts = {row["part"]: row["number"] for row in data["parameters"]}
    assert all(row["here"] == row["optimised"] == counts[part] for part, row in rows.items() if part in counts)


def test_a_model_is_planned_by_preset_and_size(inl: Callable[..., Result]) -> None:
    data = figures(inl("--preset", "v3", "--size", "3072x32", "--vocab-size", "4000", "--json"))
    assert (data["model"]["d_model"], data["model"]["iterations"], data["model"]["vocabulary"]) == (3072, 2, 4000)
    assert data["flops_per_token"]["sequence_length"] == data["model"]["context"] == 4096
    assert sum(row["number"] for row in data["parameters"]) == data["total_parameters"]
    assert "schedule" not in data
    assert data["flops_per_token"]["training"] == data["flops_per_token"]["training_by_iterations"]["2"]
    assert data["kv_cache"][0]["bytes_at_max_seq_len"] == 4096 * data["kv_cache"][0]["bytes_per_token"]
    assert {(row["recomputation"], row["sharding"]) for row in data["memory"]} == {
        (mode, degree) for mode in ("none", "integrator", "block") for degree in (1, 2, 4, 8, 16, 32)
    }


def test_people_see_every_table(inl: Callable[..., Result]) -> None:
    result = inl("--preset", "v2", *SMALL)
    assert result.exit_code == 0, result.output
    for title in (
        "parameters\n",
        "parameters without and with each optimisation",
        "FLOPs of one token, windows of 64",
        "training FLOPs of one token at T iterations",
        "key-value cache",
        "training state",
        "memory of one device, bf16, micro-batch 1 x 64",
        "a checkpoint",
    ):
        assert title in result.stdout
    assert "documents'" not in result.stderr
    transformer = inl("--preset", "transformer", *SMALL)
    assert transformer.exit_code == 0
    assert "at T iterations" not in transformer.stdout
    assert "integrator" not in transformer.stdout


def test_the_plan_of_a_stream_names_its_terms_and_counts_its_velocities(inl: Callable[..., Result]) -> None:
    data = figures(inl("--preset", "v5", *SMALL, "--json"))
    model = data["model"]
    assert model["stream"] == f"{2 * model['layers']} steps: transport, momentum, anchor, equilibrium, excitation"
    once = 4 * (2 * model["layers"] + 1) * model["d_model"]
    for row in data["kv_cache"]:
        assert row["bytes_per_sequence"] == once
        assert row["bytes_at_max_seq_len"] == model["context"] * row["bytes_per_token"] + once
    assert "of velocities a row" in inl("--preset", "v5", *SMALL).stdout
    transformer = figures(inl("--preset", "transformer", *SMALL, "--json"))
    assert "stream" not in transformer["model"]
    assert transformer["kv_cache"][0]["bytes_per_sequence"] == 0


def test_mixtures_budgets_and_uneven_iterations_are_planned(inl: Callable[..., Result]) -> None:
    experts = ("model.integrator.controller.experts=4", "model.integrator.iterations_per_layer=[1, 4]")
    data = figures(inl("--preset", "v4", *SMALL, *(word for text in experts for word in ("--set", text)), "--json"))
    assert data["model"]["iterations"] == "2.5 on average"
    plain = figures(inl("--preset", "v4", *SMALL, "--json"))
    assert data["flops_per_token"]["training"] > plain["flops_per_token"]["training"]
    assert data["memory"][0]["activations"] > plain["memory"][0]["activations"]


def test_windows_and_micro_batch_can_be_chosen(inl: Callable[..., Result]) -> None:
    def activations(*arguments: str) -> float:
        rows = figures(inl("--preset", "v4", *SMALL, *arguments, "--json"))["memory"]
        return next(row["activations"] for row in rows if (row["recomputation"], row["sharding"]) == ("none", 2))

    one = activations()
    assert activations("--micro-batch-size", "4") == pytest.approx(4 * one, rel=1e-6)
    assert activations("--sequence-length", "32") < one / 2  # the document mask grows with the square of the length


def test_a_recipe_adds_its_schedule_and_takes_options(inl: Callable[..., Result], tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    data = figures(inl(path, "--json"))
    assert data["schedule"]["tokens"] == 1280
    assert data["schedule"]["epochs"] is None
    assert (data["model"]["vocabulary"], data["model"]["vocabulary_from"]) == (290, "data.tokenizer.vocab_size")
    changed = figures(
        inl(path, "--json", "--set", "training.steps=20", "--vocab-size", "500", "--micro-batch-size", "2")
    )
    assert changed["schedule"]["tokens"] == 2560
    assert changed["model"]["vocabulary"] == 500
    assert changed["memory"][0]["rows"] == 2
    assert "schedule\n" in inl(path).stdout


def test_a_prepared_data_set_gives_vocabulary_and_epochs(inl: Callable[..., Result], tmp_path: Path) -> None:
    path = recipe_file(tmp_path)
    recipe = load_recipe(path)
    manifest = prepare(recipe.data, data_directory(recipe))
    data = figures(inl(path, "--json"))
    assert data["model"]["vocabulary"] == manifest.vocab_size
    assert "data set" in data["model"]["vocabulary_from"]
    epochs = 1280 / manifest.splits["train"].tokens
    assert data["schedule"]["epochs"] == pytest.approx(epochs, rel=0.05)
    assert "go through the data" not in inl(path).stderr
    steps = round(10 * 60 / epochs)
    assert "go through the data 6" in inl(path, "--set", f"training.steps={steps}").stderr


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_planned(inl: Callable[..., Result], name: str) -> None:
    """With two layers only, which takes less time."""
    data = figures(inl(str(shipped_recipes()[name]), "--json", "--set", "model.num_layers=2"))
    assert data["schedule"]["steps"] > 0
    assert data["memory"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs a recipe or a model: inl plan recipes/tiny.yaml"),
        (("--size", "14B"), "size '14B' is not one of small, medium"),
        (("--preset", "v9", "--size", "13B"), "expected 'v1', 'v2', 'v3', 'v4', 'v5' or 'transformer', got 'v9'"),
        (("--size", "small", "--set", "model.d_modle=3"), "did you mean 'd_model'?"),
        (("--size", "small", "--set", "nonsense"), "expected KEY=VALUE"),
        (("--size", "small", "--set", "model.num_heads=7"), "num_heads 7 must divide d_model 512"),
        (("--size", "small", "--sequence-length", "600"), "exceeds model.max_seq_len 512"),
        (("missing.yaml",), "missing.yaml: no such file"),
        (("a.yaml", "--size", "13B"), "a recipe names its own model"),
        (("--all-sizes", "--size", "13B"), "--all-sizes plans every size by itself"),
        (("--size", "small", "--vocab-size", "0"), "--vocab-size"),
        (("--preset", "transformer", "--set", "model.integrator.dt=1"), "has no integrator"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    inl: Callable[..., Result], arguments: tuple[str, ...], message: str
) -> None:
    result = inl(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_micro_batch_that_does_not_divide_shows_the_arithmetic(inl: Callable[..., Result], tmp_path: Path) -> None:
    result = inl(recipe_file(tmp_path), "--micro-batch-size", "3")
    assert result.exit_code == 2
    assert "micro_batch_size 3 x world size 1 = 3 does not divide 4" in result.stderr


def test_the_help_shows_how() -> None:
    assert "inl plan --preset v3 --size 13B --vocab-size 50000" in CliRunner().invoke(app, ["plan", "--help"]).stdout


def test_the_committed_page_has_the_current_flops() -> None:
    page = (ROOT / "docs" / "sizes.md").read_text()
    assert sizes_page._flops_table(("small", "3B", "13B", "3072x32")) in page, (
        "run `inl plan --all-sizes > docs/sizes.md`"
    )


@pytest.mark.slow
def test_the_committed_page_is_what_the_command_writes(inl: Callable[..., Result]) -> None:
    result = inl("--all-sizes")
    assert result.exit_code == 0
    assert result.stdout == (ROOT / "docs" / "sizes.md").read_text(), "run `inl plan --all-sizes > docs/sizes.md`"


@pytest.mark.parametrize("value", ["auto", "eager", "native", "compiled", "triton"])
def test_a_key_that_is_not_used_any_more_is_one_warning(inl: Callable[..., Result], tmp_path: Path, value: str) -> None:
    path = Path(recipe_file(tmp_path))
    told = "this key is not used any more: training.operations chooses\n"
    by_option = inl(str(path), "--set", "model.preset=v4", "--set", f"model.integrator.backend={value}")
    text = path.read_text(encoding="utf-8")
    section = f"model: {{preset: v4, integrator: {{backend: {value}}}, "
    path.write_text(text.replace("model: {", section), encoding="utf-8")
    in_file = inl(str(path))
    assert (by_option.exit_code, in_file.exit_code) == (0, 0)
    warned = [result.stderr[result.stderr.find("warning:") :] for result in (by_option, in_file)]
    expected = [f"warning: --set model.integrator.backend={value}: {told}"]
    expected += [f"warning: {path}:2 model.integrator.backend: {told}"]
    assert [text if "warning:" in text else "" for text in warned] == (["", ""] if value == "auto" else expected)


def test_a_recipe_is_refused_on_gpus_that_it_does_not_fit(inl: Callable[..., Result], tmp_path: Path) -> None:
    recipe, gpus = recipe_file(tmp_path), ("--gpus", "8", "--gpu-memory", "80GB")
    assert inl(recipe, *gpus).exit_code == 0
    refused = inl(recipe, "--gpus", "8", "--gpu-memory", "0.001 GB", "--set", "training.distributed.strategy=ddp")
    assert refused.exit_code == 2
    assert "weights 0.0 + gradients 0.0 + moments 0.0" in refused.stderr
    states = figures(inl(recipe, "--json"))["states"]["total"]
    tight = inl(recipe, "--gpus", "1", "--gpu-memory", f"{states / 1e9 + 0.0001:.3f}GB", "--quiet")
    assert tight.exit_code == 2
    assert "activations" in tight.stderr


def test_the_whole_gradient_counts_where_several_passes_make_a_step(inl: Callable[..., Result], tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path)
    gpus = ("--gpus", "2", "--gpu-memory", "0.001GB")  # half of all states fits, and little more
    divided = ("--set", "training.distributed.strategy=fsdp", "--set", "training.batch_tokens=64")
    one_pass = inl(recipe, *gpus, *divided, "--set", "training.micro_batch_size=1")
    several = inl(recipe, *gpus, *divided, "--set", "training.batch_tokens=256", "--set", "training.micro_batch_size=1")
    assert "rest of the gradient" not in one_pass.stderr
    assert several.exit_code == 2
    assert "+ the rest of the gradient while micro-batches add up" in several.stderr
    assert "all of the gradient while passes add up" in several.stdout
    assert "all of the gradient while passes add up" not in one_pass.stdout


@pytest.mark.parametrize("size", ["", "80", "0GB", "80 TB", "-1GB", "9" * 400 + "GB"])
def test_a_memory_that_is_no_size_is_refused(inl: Callable[..., Result], tmp_path: Path, size: str) -> None:
    outcome = inl(recipe_file(tmp_path), "--gpu-memory", size)
    assert outcome.exit_code == 2
    assert "write, for instance, 80GB" in outcome.stderr
