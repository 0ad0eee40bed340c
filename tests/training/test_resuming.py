"""What a resume starts from, and that one which is refused writes nothing."""

import os
import shutil

import pytest

from inl_core import files
from inl_core.errors import ArtefactError, RecipeError
from inl_core.inference.checkpoint_files import list_checkpoints
from inl_core.recipe.load import dump_recipe
from inl_core.training.resuming import changed_recipe, choose_checkpoint
from inl_core.training.run_data import _describes_same_data


@pytest.fixture
def trained(make_recipe, make_trainer):
    """A finished run of 4 steps with checkpoints at 2 and 4: (its directory, its recipe)."""
    recipe = make_recipe(training={"steps": 4, "checkpoint": {"every": 2}, "logging": {"dynamics_every": 0}})
    trainer, _ = make_trainer(recipe)
    trainer.fit()
    return trainer.run, recipe


def changed(run, *overrides, allowed=(), warn=pytest.fail):
    return changed_recipe(run, overrides, allowed, show=lambda change: None, warn=warn)


def put_directory(path):
    path.mkdir()


def put_broken_link(path):
    path.symlink_to("nothing")


@pytest.mark.parametrize("put", [os.mkfifo, put_directory, put_broken_link])
def test_a_recipe_that_is_no_file_is_refused_at_once(trained, put):
    run, _ = trained
    path = run.path / "recipe.yaml"
    path.unlink()
    put(path)
    with pytest.raises(ArtefactError, match=r"recipe.yaml: not a regular file; put the recipe back"):
        changed(run.path)


def test_a_fifo_in_the_place_of_a_recipe_is_not_waited_for(trained, monkeypatch):
    run, recipe = trained
    monkeypatch.setattr(files, "_read_pipe", lambda *args: pytest.fail("a pipe was read"))
    for path in (run.path / "recipe.yaml", list_checkpoints(run.checkpoints)[-1] / "recipe.yaml"):
        path.unlink()
        os.mkfifo(path)
    said = []
    assert choose_checkpoint(run.path, recipe, (), warn=said.append)
    assert "recipe.yaml" in said[-1]
    assert _describes_same_data(recipe, run.path)
    run.create()
    assert (run.path / "recipe.yaml").read_text() == dump_recipe(recipe)


def test_a_resume_starts_at_the_newest_checkpoint_and_must_add_steps(trained):
    run, recipe = trained
    assert choose_checkpoint(run.path, recipe, (), warn=pytest.fail).name == "step-00000004"
    with pytest.raises(RecipeError, match="has done 4 steps already"):
        choose_checkpoint(run.path, changed(run.path, "training.steps=3"), (), warn=pytest.fail)
    with pytest.raises(RecipeError, match="so 4 adds none"):
        choose_checkpoint(run.path, recipe, (), warn=pytest.fail, must_advance=True)


def test_a_change_that_no_leave_helps_is_not_offered(trained):
    run, _ = trained
    for allowed in ((), ("model.d_model",)):
        with pytest.raises(RecipeError, match=r"model.d_model cannot change in a run") as refused:
            changed(run.path, "model.d_model=64", allowed=allowed)
        assert "--allow-change" not in str(refused.value)
    with pytest.raises(RecipeError, match=r"--allow-change training.seed"):
        changed(run.path, "training.seed=1")


def test_what_cannot_be_resumed_is_not_sent_to_a_train_that_would_refuse_it(trained, tmp_path):
    run, recipe = trained
    with pytest.raises(ArtefactError, match="`inl train RECIPE` starts one"):
        changed(tmp_path / "nothing")
    for checkpoint in list_checkpoints(run.checkpoints):
        (checkpoint / "manifest.json").write_text("{}")
    with pytest.raises(ArtefactError, match="none of its 2 checkpoints is intact; start a new run with another"):
        choose_checkpoint(run.path, recipe, (), warn=lambda text: None)
    shutil.rmtree(run.checkpoints)
    (run.path / "recipe.yaml").unlink()
    with pytest.raises(ArtefactError, match=r"not a run .* start a new run with another --run-dir"):
        changed(run.path)


@pytest.mark.parametrize("damage", ["", "name: [", None, "name: x\n", "\0"])
def test_a_damaged_recipe_is_read_from_the_newest_intact_checkpoint_and_put_back(trained, damage):
    run, recipe = trained
    path = run.path / "recipe.yaml"
    path.unlink()
    if damage is not None:
        path.write_text(damage)
    (list_checkpoints(run.checkpoints)[-1] / "manifest.json").unlink()
    said = []
    assert changed(run.path, warn=said.append) == recipe
    assert len(said) == 1
    assert str(path) in said[0]
    assert "step-00000002" in said[0]
    assert path.exists() == (damage is not None)  # not before the resume is accepted
    run.create()
    assert path.read_text() == dump_recipe(recipe)


def test_a_damaged_recipe_without_a_checkpoint_is_refused_as_it_is(trained):
    run, _ = trained
    shutil.rmtree(run.checkpoints)
    (run.path / "recipe.yaml").write_text("")
    with pytest.raises(RecipeError, match="the recipe is empty"):
        changed(run.path)


def test_a_checkpoint_of_another_run_is_refused_by_the_keys_that_differ(trained):
    run, recipe = trained
    other = recipe.model_copy(update={"training": recipe.training.model_copy(update={"seed": 9})})
    (run.path / "recipe.yaml").write_text(dump_recipe(other))
    with pytest.raises(ArtefactError, match=r"training.seed \(0, not 9\).*--allow-change training.seed"):
        choose_checkpoint(run.path, changed(run.path), (), warn=pytest.fail)
    assert choose_checkpoint(run.path, other, ("training.seed",), warn=pytest.fail)


def test_a_run_without_a_checkpoint_starts_again_unless_checkpoints_were_there(trained):
    run, recipe = trained
    (run.path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
    kept = run.path / "kept"
    run.checkpoints.rename(kept)
    said = []
    assert choose_checkpoint(run.path, recipe, (), warn=said.append) is None
    assert "from step 0" in said[0]
    (run.path / "metrics.jsonl").write_text('{"step": 4, "loss": 5.0}\n')
    with pytest.raises(ArtefactError, match="went on to step 4"):
        choose_checkpoint(run.path, recipe, (), warn=pytest.fail)
    kept.rename(run.checkpoints)
    for path in list_checkpoints(run.checkpoints):
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ArtefactError, match="none of its 2 checkpoints is intact"):
        choose_checkpoint(run.path, recipe, (), warn=lambda text: None)


def test_what_is_the_same_is_not_written_again(trained):
    run, _ = trained
    files = [run.path / name for name in ("recipe.yaml", "environment.json")]
    before = [path.stat().st_ino for path in files]
    run.create()
    assert [path.stat().st_ino for path in files] == before
