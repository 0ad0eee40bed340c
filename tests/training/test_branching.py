"""A run that begins with a checkpoint of another one, and has a recipe of its own."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from inl_core.inference.checkpoint_files import file_digest
from inl_core.recipe.load import dump_recipe
from inl_core.training.metrics import read_metrics
from inl_core.training.session import open_session
from tests.training.conftest import files_limited_to, small_recipe
from tests.training.test_resume import timeless

CONSTANT = {"checkpoint": {"every": 4}, "schedule": {"name": "constant", "warmup_fraction": 0.0}}
DECAY = {"steps": 8, "schedule": {"name": "wsd", "warmup_fraction": 0.0, "decay_fraction": 0.5}}
FILES = ("model.safetensors", "training_state/optimizer.safetensors")


@pytest.fixture(scope="module")
def stopped(data_directory, tmp_path_factory):
    """A run of a constant rate that has done its 4 steps."""
    run = tmp_path_factory.mktemp("trunk") / "trunk"
    with open_session(small_recipe(data_directory, training=CONSTANT | {"steps": 4}), run) as session:
        session.build_trainer(session.open_data()).fit()
    return run


@pytest.fixture
def trunk(stopped, recipe_file, tmp_path):
    """A copy of that run's checkpoint of step 4, in the run `trunk`, and a recipe that decays from there."""
    shutil.copytree(stopped, tmp_path / "trunk")
    return tmp_path / "trunk/checkpoints/step-00000004", recipe_file(training=DECAY)


def test_a_decay_branch_is_the_run_that_had_this_schedule_from_the_start(trunk, inl, tmp_path):
    checkpoint, recipe = trunk
    digest = file_digest(checkpoint / "manifest.json")
    branch = inl("train", recipe, "--branch-from", "trunk", "--run-dir", "branch")
    assert branch.exit_code == 0, branch.stderr
    assert "schedule: training.schedule.name: constant -> wsd" in branch.stderr
    assert inl("train", recipe, "--run-dir", "straight").exit_code == 0
    branched, straight = (tmp_path / f"{run}/checkpoints/step-00000008" for run in ("branch", "straight"))
    for name in FILES:
        assert (branched / name).read_bytes() == (straight / name).read_bytes()
    rows = timeless(read_metrics(tmp_path / "straight"))
    assert timeless(read_metrics(tmp_path / "branch")) == [row for row in rows if row["step"] > 4]
    first, origin, last = json.loads((branched / "config.json").read_text())["provenance"]
    assert (first["run"], first["step"], last["run"], last["step"]) == ("trunk", 4, "branch", 8)
    assert origin == {"event": "branch", "checkpoint": str(checkpoint), "step": 4, "manifest_sha256": digest}
    # Its first checkpoint is its own, so that it is resumed without the run that it came from.
    shutil.rmtree(tmp_path / "trunk")
    shutil.rmtree(branched)
    (tmp_path / "branch/metrics.jsonl").unlink()
    assert inl("resume", "branch").exit_code == 0
    assert (branched / FILES[0]).read_bytes() == (straight / FILES[0]).read_bytes()
    assert timeless(read_metrics(tmp_path / "branch")) == [row for row in rows if row["step"] > 4]


@pytest.mark.slow
def test_a_branch_may_have_other_data_of_the_same_tokens(trunk, inl, tmp_path, make_recipe):
    checkpoint, _ = trunk
    source = tmp_path / "other.jsonl"
    source.write_text("".join(json.dumps({"text": f"line {row} of other text\n" * 20}) + "\n" for row in range(60)))
    data = {"sources": (str(source),), "directory": tmp_path / "other"}
    recipe = tmp_path / "other.yaml"
    recipe.write_text(dump_recipe(make_recipe(training=DECAY, data=data)))
    refused = inl("train", recipe, "--branch-from", checkpoint, "--run-dir", "branch")
    assert refused.exit_code == 4
    assert f"set data.tokenizer.file to {checkpoint / 'tokenizer.json'}" in refused.stderr
    data |= {"tokenizer": {"file": checkpoint / "tokenizer.json"}, "directory": tmp_path / "retokenized"}
    recipe.write_text(dump_recipe(make_recipe(training=DECAY, data=data)))
    branch = inl("train", recipe, "--branch-from", checkpoint, "--run-dir", "branch", "--json")
    assert branch.exit_code == 0, branch.stderr
    assert json.loads(branch.stdout)["step"] == 8
    before, after = (load_file(path / FILES[0]) for path in (checkpoint, tmp_path / "branch/checkpoints/step-00000008"))
    assert before.keys() == after.keys()


@pytest.mark.parametrize(
    ("changes", "code", "expected"),
    [
        ({"model.d_model": 64}, 2, "do not fit the recipe: model.d_model (32, not 64)"),
        ({"training.optimizer.name": "muon"}, 2, "do not fit the recipe: training.optimizer.name (adamw, not muon)"),
        ({"training.steps": 4}, 2, "training.steps 4 adds none; give more than 4"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_anything_is_written(trunk, inl, tmp_path, changes, code, expected):
    checkpoint, recipe = trunk
    overrides = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    refused = inl("train", recipe, "--branch-from", checkpoint, "--run-dir", "branch", *overrides)
    assert refused.exit_code == code, refused.stderr
    assert expected in refused.stderr
    assert not (tmp_path / "branch").exists()


def test_a_damaged_checkpoint_is_no_origin(trunk, inl):
    checkpoint, recipe = trunk
    (checkpoint / FILES[1]).write_bytes(b"")
    for origin in (checkpoint, "trunk", "nothing"):
        refused = inl("train", recipe, "--branch-from", origin, "--run-dir", "branch")
        assert refused.exit_code == 4
        assert refused.stderr.count("\n") <= 2


def test_a_branch_that_could_not_save_its_first_checkpoint_starts_again(trunk, inl, tmp_path):
    checkpoint, recipe = trunk
    with files_limited_to(50_000):
        stopped = inl("train", recipe, "--branch-from", checkpoint, "--run-dir", "branch")
    assert stopped.exit_code == 1
    assert "its first checkpoint could not be saved" in stopped.stderr
    assert inl("resume", "branch").exit_code == 4  # it must not begin with other weights
    again = inl("train", recipe, "--branch-from", checkpoint, "--run-dir", "branch")
    assert again.exit_code == 0, again.stderr


@pytest.fixture
def branch(trunk, inl, tmp_path):
    """The run `branch`, begun with step 4 of `trunk` and done; gives the command again by what it begins with."""
    _, recipe = trunk
    command = ("train", recipe, "--run-dir", "branch", "--resume-or-start", "--set", "training.checkpoint.every=2")
    assert inl(*command, "--branch-from", "trunk").exit_code == 0
    return lambda origin, *options: inl(*command, "--branch-from", origin, *options)


@pytest.mark.parametrize("is_done", [True, False])
def test_a_branch_that_is_resumed_must_have_begun_with_what_is_named(trunk, branch, inl, tmp_path, is_done):
    checkpoint, recipe = trunk
    assert inl("train", recipe, "--run-dir", "other", "--set", "training.seed=9").exit_code == 0
    last, kept = tmp_path / "branch/checkpoints/step-00000008", tmp_path / "branch/checkpoints/step-00000006"
    if not is_done:
        shutil.rmtree(last)
    for origin in ("other", tmp_path / "other/checkpoints/step-00000004", "nothing", kept):
        refused = branch(origin)
        assert refused.exit_code == 2, refused.stderr
        assert f"branch: branched from {checkpoint}, which {origin} does not hold" in refused.stderr
    shutil.move(tmp_path / "trunk", tmp_path / "moved")  # known by its checksum
    again = branch("moved")
    assert again.exit_code == 0
    assert "is gone" not in again.stderr


def test_a_branch_goes_on_without_its_origin_and_says_that_it_is_gone(trunk, branch, tmp_path):
    checkpoint, _ = trunk
    shutil.rmtree(checkpoint)  # as retention does, when the run has gone on
    for origin in ("trunk", checkpoint):
        again = branch(origin)
        assert again.exit_code == 0, again.stderr
        assert f"{checkpoint}: is gone, from which branch branched off" in again.stderr


@pytest.mark.parametrize("steps", [4, 8])
def test_a_run_that_is_no_branch_is_not_taken_for_one(trunk, inl, tmp_path, steps):
    _, recipe = trunk
    command = ("train", recipe, "--run-dir", "plain", "--set", "training.schedule.name=constant", "--resume-or-start")
    assert inl(*command, "--set", f"training.steps={steps}").exit_code == 0
    refused = inl(*command, "--branch-from", "trunk")
    assert refused.exit_code == 2
    assert "plain: is no branch, so it does not go on from trunk; leave out --branch-from" in refused.stderr
