"""What a resume starts from, and that one which is refused writes nothing."""

import json
import os
import shutil

import pytest

from inl_core import files
from inl_core.errors import ArtefactError, RecipeError, RecipeWarning
from inl_core.inference.checkpoint_files import list_checkpoints
from inl_core.recipe.load import dump_recipe
from inl_core.training.resuming import changed_recipe, choose_checkpoint
from inl_core.training.run_data import _describes_same_data
from inl_core.training.session import Resumption, open_session


@pytest.fixture
def train(make_recipe, make_trainer):
    """train(preset) -> a finished run of 4 steps with checkpoints at 2 and 4: (its directory, its recipe)."""

    def finished(preset="v5"):
        training = {"steps": 4, "checkpoint": {"every": 2}, "logging": {"dynamics_every": 0}}
        recipe = make_recipe(training=training, model={"preset": preset})
        trainer, _ = make_trainer(recipe)
        trainer.fit()
        return trainer.run, recipe

    return finished


@pytest.fixture
def trained(train):
    """Such a run of the default preset."""
    return train()


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
    chosen = choose_checkpoint(run.path, recipe, (), warn=pytest.fail)
    assert chosen
    assert chosen.name == "step-00000004"
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


@pytest.mark.parametrize(("preset", "other"), [("v5", "v4"), ("v5", "transformer"), ("v4", "v5")])
def test_a_run_keeps_its_generation(train, preset, other):
    run, recipe = train(preset)
    assert changed(run.path, f"model.preset={preset}") == recipe
    for override in (f"model.preset={other}", f"model.preset='{other}'", f"model={{preset: {other}}}"):
        with pytest.raises(RecipeError, match=r"model\.preset.* cannot change in a run") as refused:
            changed(run.path, override, allowed=("model.preset", "model"))
        assert "--allow-change" not in str(refused.value)


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
    kept = run.path / "kept"
    run.checkpoints.rename(kept)
    for step in (1, 4):  # the checkpoint of step 2 may have been on its way until that of step 4 was due
        (run.path / "metrics.jsonl").write_text(json.dumps({"step": step, "loss": 5.0}) + "\n")
        said = []
        assert choose_checkpoint(run.path, recipe, (), warn=said.append) is None
        assert "from step 0" in said[0]
    (run.path / "metrics.jsonl").write_text('{"step": 4, "validation_loss": 5.0}\n')
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


@pytest.mark.parametrize("start", ["changed_recipe", "resume", "train"])
@pytest.mark.parametrize("lost", [(), ("config.json", "model.safetensors", "manifest.json")], ids=["sealed", "damaged"])
def test_a_checkpoint_in_the_place_of_a_run_is_refused_and_nothing_is_written_into_it(trained, start, lost):
    run, recipe = trained
    checkpoint = list_checkpoints(run.checkpoints)[-1]
    for name in lost:
        (checkpoint / name).unlink()
    (checkpoint / "preempted.json").touch()
    before = sorted(checkpoint.rglob("*"))
    starts = {
        "changed_recipe": lambda: changed(checkpoint),
        "resume": lambda: open_session(recipe, checkpoint, resumption=Resumption()).__enter__(),
        "train": lambda: open_session(recipe, checkpoint).__enter__(),
    }
    with pytest.raises(ArtefactError, match=f"step-00000004: is a checkpoint; its run is {run.path}"):
        starts[start]()
    assert sorted(checkpoint.rglob("*")) == before


def test_a_checkpoint_that_was_copied_out_of_its_run_is_refused_too(trained, tmp_path):
    shutil.copytree(list_checkpoints(trained[0].checkpoints)[-1], tmp_path / "copy")
    with pytest.raises(ArtefactError, match="is a checkpoint; name a run instead"):
        changed(tmp_path / "copy")


def test_a_recipe_in_the_place_of_a_run_is_refused_with_the_way_to_start_one(inl, recipe_file):
    for words in (["resume", recipe_file()], ["train", recipe_file(), "--run-dir", recipe_file()]):
        refused = inl(*words)
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
        assert "recipe.yaml: a file, not a run's directory; `inl train RECIPE` starts a run" in refused.stderr


@pytest.mark.parametrize(
    ("key", "advice"), [("foo", "; the keys here are name"), ("training.sed", r"; did you mean 'seed'\?")]
)
def test_an_allowed_change_must_be_of_a_key_that_exists(trained, key, advice):
    with pytest.raises(RecipeError, match=f"--allow-change {key}: unknown key{advice}"):
        changed(trained[0].path, allowed=(key,))


def test_a_recipe_of_an_earlier_version_is_resumed_without_a_word_and_without_a_difference(train, recwarn):
    run, recipe = train("v4")
    checkpoint = list_checkpoints(run.checkpoints)[-1]
    text = dump_recipe(recipe).replace("  integrator:\n", "  integrator:\n    backend: native\n")
    for line in ("  stream: null\n", "  transport: false\n", "    stream_rate_factor: 5.0\n"):
        assert text.count(line) == 1
        text = text.replace(line, "")
    for directory in (run.path, checkpoint):
        (directory / "recipe.yaml").write_text(text)
    seen = []
    resumed = changed_recipe(run.path, (), (), show=seen.append, warn=pytest.fail)
    assert (resumed, seen, recwarn.list) == (recipe, [], [])
    with pytest.warns(RecipeWarning, match="--set model.integrator.backend=eager: this key is not used any more"):
        assert changed(run.path, "model.integrator.backend=eager", allowed=("model.integrator.backend",)) == recipe


def test_a_learning_rate_that_rises_again_is_warned_of(make_recipe, make_trainer):
    decayed = {"steps": 4, "schedule": {"warmup_fraction": 0, "decay_fraction": 0.5, "final_ratio": 0}}
    trainer, _ = make_trainer(make_recipe(training=decayed))
    trainer.fit()
    run, warnings = trainer.run.path, []
    more = changed(run, "training.steps=8")
    assert choose_checkpoint(run, more, (), warn=warnings.append)
    peak = more.training.optimizer.learning_rate  # the last step had half of it; of 8 steps the fifth has all of it
    assert f"{peak / 2:.2e} at step 4, now rises to {peak:.2e}, since the schedule ends at step 8 and" in warnings.pop()
    lower = changed(run, "training.steps=8", f"training.optimizer.learning_rate={peak / 2}")
    assert choose_checkpoint(run, lower, (), warn=pytest.fail)


def test_a_finished_run_says_so_and_is_evaluated_again(inl, trained):
    done = inl("resume", trained[0].path)
    assert done.exit_code == 0
    lines = done.stderr.splitlines()
    assert lines[0] == (
        f"{trained[0].path}: at its last step already; `inl resume {trained[0].path} --steps N` trains up to step N"
    )
    assert "eta" not in done.stderr
    assert "step 4: validation loss" in done.stderr
