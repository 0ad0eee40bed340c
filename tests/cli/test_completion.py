"""What the shell offers on tab, and that help tells whole sentences on a narrow terminal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inl_cli.app import app
from inl_core.errors import RecipeError
from inl_core.recipe.load import load_recipe
from inl_core.recipe.shipped import shipped_recipes
from tests.cli.test_app import ALL

OFFER = """
import sys
sys.modules["torch"] = None  # importing it fails
from inl_cli.app import app
app(prog_name="inl")
"""


def offered(words: str, directory: Path) -> list[str]:
    """What bash is offered for the last of the words."""
    place = {"_INL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", OFFER], cwd=directory, env=os.environ | place, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_tab_offers_recipes_runs_presets_and_keys_without_torch(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "mine.txt").touch()
    (tmp_path / "runs" / "first").mkdir(parents=True)
    assert set(offered("inl train tiny", tmp_path)) == {name for name in shipped_recipes() if name.startswith("tiny")}
    assert offered("inl train mi", tmp_path) == ["mine.yaml"]
    assert offered("inl eval runs/f", tmp_path) == ["runs/first"]
    assert offered("inl eval fi", tmp_path) == ["first"]
    assert offered("inl plan --preset trans", tmp_path) == ["transformer"]
    assert offered("inl train tiny --set data.dir", tmp_path) == ["data.directory="]


def test_every_key_that_is_offered_can_be_set_and_so_can_its_values() -> None:
    from inl_cli.completion import complete_set

    keys = complete_set("")
    assert {"training.steps=", "training.optimizer.learning_rate=", "model.integrator.mu.form="} <= set(keys)
    with pytest.raises(RecipeError) as error:  # of some keys null is no value
        load_recipe("tiny", [f"{key}null" for key in keys])
    assert "unknown key" not in str(error.value)
    assert complete_set("training.operations=p") == ["training.operations=plain"]
    assert complete_set("training.no-such-key=") == []


@pytest.mark.parametrize("arguments", [(), ("check",), ("recipe",), ("slurm",)])
def test_help_on_80_columns_cuts_no_sentence(arguments: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": "80"}, terminal_width=80).output
    assert max(map(len, shown.splitlines())) <= 80
    words = " ".join(shown.split())
    for name, command in ALL.items():
        group, _, own = name.rpartition(" ")
        if group == " ".join(arguments) and not command.hidden:
            sentence = " ".join(command.get_short_help_str(limit=1000).split())
            assert f" {own} {sentence}" in words, json.dumps(words)
