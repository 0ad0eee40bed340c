"""The commands as a whole: quick help, uniform options, exit codes, pure JSON."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from inl_cli.app import app
from inl_core.recipe import DataSettings

ROOT = Path(__file__).parents[2]
MOST_MODULES = 10  # of inl_core: errors, files, and the settings of generation, whose defaults the help shows
HEAVY = ("torch", "pandas", "numpy", "pyarrow", "rich", "yaml", "inl_core.recipe")


def inl(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def commands(group: Any = None, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its full name, those of groups included."""
    for name, command in (group or cast(Any, typer.main.get_command(app))).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{above}{name} ")
        else:
            yield f"{above}{name}", command


ALL = dict(commands())


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], (*HEAVY, "pydantic")),
        (["prepare-data", "--help"], HEAVY),  # Typer itself looks at pydantic when it builds a command's options
        (["recipe", "show", "--help"], HEAVY),
    ],
)
def test_help_imports_nothing_heavy_and_little_of_ours(arguments: list[str], heavy: tuple[str, ...]) -> None:
    """Importing modules is what takes time in `inl --help`."""
    script = f"""
import sys
from inl_cli.app import app
try:
    app({arguments!r})
except SystemExit as exit:
    assert exit.code == 0
ours = [name for name in sys.modules if name.startswith("inl_core")]
print([name for name in {heavy!r} if name in sys.modules], len(ours) <= {MOST_MODULES}, file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Usage:" in result.stdout
    assert result.stderr == "[] True\n"


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_command_has_json_and_quiet_help_and_exit_codes(name: str) -> None:
    command = ALL[name]
    options = {option: parameter for parameter in command.params for option in parameter.opts}
    assert {"--json", "--quiet"} <= options.keys()
    assert command.help
    assert [option for option, parameter in options.items() if not getattr(parameter, "help", "")] == []
    assert command.callback.__wrapped__.__dict__.get("maps_errors"), "decorate it with @errors_to_exit_codes"


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["recipe", "show"], ["recipe", "show", "--nonsense"], ["prepare-data"]]
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    result = inl(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage:" in result.stderr


@pytest.mark.parametrize(
    ("path", "expected"),
    [("", "'' names no file; write . if"), ("s3://bucket/x", "a URL; only paths of this"), ("file:///x", "a URL")],
)
def test_a_path_that_can_be_none_is_refused_by_name_wherever_a_path_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    num_checked = 0
    for name, command in commands():
        types = get_type_hints(ALL[name].callback)
        required = [p.name for p in command.params if p.param_type_name == "argument" and p.required]
        for parameter in command.params:
            if types.get(parameter.name) not in (Path, Path | None):
                continue
            is_option = parameter.param_type_name == "option"
            others = ["train" for other in required if other != parameter.name]
            given = [*others, parameter.opts[0], path] if is_option else [*others, path]
            result = inl(*name.split(), *given)
            assert result.exit_code == 2, (name, parameter.name)
            assert expected in result.stderr
            assert not is_option or f"'{parameter.opts[0]}'" in result.stderr
            num_checked += 1
    assert num_checked >= 15
    assert not list(tmp_path.iterdir())


def test_a_mistyped_path_is_told_before_torch_is_imported_which_takes_seconds() -> None:
    commands = ["check resume x.yaml", "check equivalence x", "check checkpoint x", "replay x.json", "run-status x"]
    commands += ["slurm x.yaml --time 1:00:00", "slurm prepare x.yaml --parts 2 --time 1:00:00", "resume x"]
    script = f"""
import sys
from inl_cli.app import app
for command in {commands!r}:
    try:
        app(command.split())
    except SystemExit as exit:
        assert exit.code in (2, 4, 12), command
    assert "torch" not in sys.modules, command
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [*done.stderr.splitlines(), *done.stdout.splitlines()]
    assert len(said) == len(commands)
    assert all(" x" in f" {line}" for line in said)


def test_version() -> None:
    result = inl("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("inl ")


def test_the_module_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "inl_cli", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == inl("--version").stdout


CONTROL_C_WHILE_IMPORTING = """
import sys
class Impatient:
    def find_spec(self, name, *rest):
        if name == "inl_cli.console":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Impatient())
"""


@pytest.mark.parametrize(
    "entry",
    [
        "import runpy; runpy.run_module('inl_cli', run_name='__main__')",
        "from importlib.metadata import EntryPoint; EntryPoint('inl', {script!r}, 'console_scripts').load()()",
    ],
)
def test_control_c_while_importing_is_exit_130_and_silent(entry: str) -> None:
    script = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"]["inl"]
    run = [sys.executable, "-c", CONTROL_C_WHILE_IMPORTING + entry.format(script=script)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_closed_pipe_ends_quietly() -> None:
    command = f"{sys.executable} -m inl_cli recipe schema | head -1"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("{\n", "")


def test_show_prints_a_recipe_that_loads_and_json_that_parses(tmp_path: Path) -> None:
    shown = inl("recipe", "show", "recipes/tiny.yaml", "--set", "training.steps=7", "--set", "name=other")
    assert shown.exit_code == 0
    path = tmp_path / "shown.yaml"
    path.write_text(shown.stdout)
    as_json = inl("recipe", "show", str(path), "--json")
    recipe = json.loads(as_json.stdout)
    assert (recipe["name"], recipe["training"]["steps"], recipe["training"]["tokens"]) == ("other", 7, None)
    assert inl("recipe", "show", str(path)).stdout == shown.stdout


def test_schema_prints_the_committed_schema() -> None:
    assert inl("recipe", "schema").stdout == (ROOT / "recipes" / "recipe.schema.json").read_text()
    assert json.loads(inl("recipe", "schema", "--json").stdout)["title"] == "inl recipe"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes/tinny.yaml"], "recipes/tinny.yaml: no such file; did you mean 'recipes/tiny.yaml'?\n"),
        (
            ["recipes/tiny.yaml", "--set", "model.d_modl=3", "--set", "x=1"],
            "--set model.d_modl=3: unknown key; did you mean 'd_model'?\n--set x=1: unknown key; "
            "the keys here are name, model, data, training\n",
        ),
        (
            ["recipes/tiny.yaml", "--set", "training.micro_batch_size=5"],
            "recipes/tiny.yaml:24 (with --set training.micro_batch_size=5) training: batch_tokens 2048 = 16 sequences "
            "of 128; micro_batch_size 5 x world size 1 = 5 does not divide 16\n",
        ),
    ],
)
def test_a_bad_recipe_is_exit_2_and_says_why(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    result = inl("recipe", "show", *arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_recipe_is_exit_2(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: x\n")
    path.chmod(0)
    result = inl("recipe", "show", str(path))
    assert (result.exit_code, result.stderr) == (2, f"{path}: cannot be read: Permission denied\n")


def test_prepare_data_starts_from_the_recipes_defaults() -> None:
    settings = DataSettings()
    fields = {
        "vocab_size": settings.tokenizer.vocab_size,
        "validation_fraction": settings.validation_fraction,
        "num_shards": settings.num_shards,
        "max_bad_ratio": settings.max_bad_ratio,
    }
    parameters = {parameter.name: parameter.default for parameter in ALL["prepare-data"].params}
    assert {name: parameters[name] for name in fields} == fields


def test_prepare_data_names_the_option_that_is_wrong() -> None:
    result = inl("prepare-data", "builtin:python", "--vocab-size", "20", "--validation-fraction", "1")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "--vocab-size: expected a number of at least 272, got 20",
        "--validation-fraction: expected a number less than 1.0, got 1.0",
    ]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    directory = tmp_path / "text"
    directory.mkdir()
    for number in range(30):
        (directory / f"{number}.txt").write_text(f"document {number} says " + "lorem ipsum dolor " * (number + 5))
    return directory


def test_prepare_data_prints_one_object_under_json_and_a_table_without(text: Path, tmp_path: Path) -> None:
    arguments = ["prepare-data", str(text), "--output", str(tmp_path / "data"), "--vocab-size", "300"]
    result = inl(*arguments, "--json", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    summary = json.loads(result.stdout)
    assert summary["directory"] == str(tmp_path / "data")
    assert sum(split["documents"] for split in summary["splits"].values()) == 30
    again = inl(*arguments)
    assert again.exit_code == 0
    assert summary["fingerprint"][:16] in again.stdout
    assert "validation" in again.stdout


def test_prepare_data_of_nothing_is_an_error_of_the_user(tmp_path: Path) -> None:
    result = inl("prepare-data", str(tmp_path / "missing"), "--output", str(tmp_path / "data"))
    assert result.exit_code == 2
    assert result.stderr == f"{tmp_path / 'missing'}: no such file or directory\n"


def test_ctrl_c_while_preparing_is_exit_75(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("inl_core.corpus.preparation.prepare", interrupted)
    result = inl("prepare-data", "builtin:python", "--output", str(tmp_path))
    assert result.exit_code == 75
    assert result.stderr.startswith(f"{tmp_path}: stopped; the same command goes on")
