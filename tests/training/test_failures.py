"""What can go wrong in a run: signals, bad numbers, full disks, damaged checkpoints, changed data."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from inl_core.errors import NonFiniteError
from inl_core.inference.checkpoint_files import list_checkpoints, verify_checkpoint
from inl_core.training.metrics import read_metrics
from inl_core.training.nonfinite import FiniteWatch
from inl_core.training.session import open_session
from tests.damage import cut_in_half, flip_a_bit, remove
from tests.training.conftest import before_each_step, files_limited_to, limit_files, run_python, small_recipe


@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "at the next log point"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_loss_stops_before_the_update(make_recipe, make_trainer, poison, deferred):
    trainer, _ = make_trainer(make_recipe(training={"logging": {"every": 10}}))
    if deferred:  # what a GPU does, so that the host need not wait for each step
        trainer.stepper.watch = FiniteWatch(trainer.optimizers, trainer.world.device, deferred=True)
    seen, before = [], {}

    def poison_the_fourth(step, stop):
        seen.append(step)
        if step == 3:
            with torch.no_grad():
                trainer.model.blocks[0].attention.output.weight[0, 0] = poison
            before.update((name, value.clone()) for name, value in trainer.model.state_dict().items())

    before_each_step(trainer, poison_the_fourth)
    with pytest.raises(NonFiniteError, match="step 4"):
        trainer.fit()
    assert (seen[-1] > 3) == deferred
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    report = json.loads((trainer.run.path / "reports" / "nonfinite-step-4-rank-0.json").read_text())
    assert "blocks.0.attention.output.weight" in report["not_finite"]
    assert len(report["batch"]) == 8
    assert report["batch"][0]["text"]


def test_a_non_finite_loss_exits_with_3(recipe_file, inl):
    recipe = recipe_file(training={"optimizer": {"learning_rate": 1e30}, "schedule": {"name": "constant"}})
    done = inl("train", recipe, "--run-dir", "run", "--quiet")
    assert done.exit_code == 3, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "learning_rate" in done.stderr


# The command line in a process that gets SIGTERM when it has written the fifth row of its metrics: no clock decides.
STOPPED_AT_FIVE = """
import os, signal
from inl_core.training.metrics import MetricsWriter
write, rows = MetricsWriter.write, []
def write_and_stop(self, row):
    found = write(self, row)
    rows.append(row)
    if len(rows) == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return found
MetricsWriter.write = write_and_stop
from inl_cli.app import main
main()
"""


def test_sigterm_saves_exits_with_75_and_resume_completes_the_same_run(recipe_file, inl, tmp_path):
    recipe = recipe_file()
    whole = inl("train", recipe, "--run-dir", "whole", "--quiet")
    assert whole.exit_code == 0, whole.stderr
    stopped = run_python("-c", STOPPED_AT_FIVE, "train", recipe, "--run-dir", "parts", cwd=tmp_path)
    assert stopped.returncode == 75, stopped.stderr
    assert "inl resume parts" in stopped.stderr
    assert 0 < json.loads((tmp_path / "parts" / "preempted.json").read_text())["step"] < 12
    resumed = inl("resume", "parts", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert json.loads(resumed.stdout)["step"] == 12
    assert not (tmp_path / "parts" / "preempted.json").exists()
    one, two = (
        [(row["step"], row["loss"]) for row in read_metrics(tmp_path / name) if "loss" in row]
        for name in ("whole", "parts")
    )
    assert one == two


def test_no_room_for_a_checkpoint_is_found_before_the_first_step(recipe_file, inl):
    recipe = recipe_file()
    with files_limited_to(20_000):
        done = inl("train", recipe, "--run-dir", "run", "--quiet")
    assert done.exit_code == 1, done.stderr
    assert "checkpoint cannot be saved" in done.stderr


def test_a_disk_that_fills_up_costs_no_earlier_checkpoint_and_does_not_stop_the_run(make_recipe, make_trainer):
    trainer, heard = make_trainer(make_recipe(training={"checkpoint": {"every": 4}}))

    def limit(step, stop):  # the save after step 8 meets a full disk, and no other
        trainer.saver.finish()
        limit_files(20_000 if 4 <= step < 9 else None)

    before_each_step(trainer, limit)
    with files_limited_to():
        trainer.fit()
    assert [path.name for path in heard.saved] == ["step-00000004", "step-00000012"]
    assert any("step 8 not saved" in message for message in heard.messages)
    for path in list_checkpoints(trainer.run.checkpoints):
        verify_checkpoint(path)
    assert not list(trainer.run.checkpoints.glob("*.tmp"))


@pytest.fixture(scope="module")
def finished_once(data_directory, tmp_path_factory):
    """What `finished` copies."""
    recipe = small_recipe(data_directory, training={"checkpoint": {"every": 4, "keep_last": 3}})
    path = tmp_path_factory.mktemp("finished") / "run"
    with open_session(recipe, path) as session:
        session.build_trainer(session.open_data()).fit()
    return path


@pytest.fixture
def finished(finished_once, tmp_path):
    """A finished run with checkpoints at steps 4, 8 and 12."""
    return Path(shutil.copytree(finished_once, tmp_path / "run"))


DAMAGE = {
    "flipped byte": lambda path: flip_a_bit(path / "model.safetensors"),
    "truncated": lambda path: cut_in_half(path / "training_state" / "optimizer.safetensors"),
    "no manifest": lambda path: remove(path / "manifest.json"),
    "missing file": lambda path: remove(path / "training_state" / "progress.json"),
}


def test_resume_takes_the_newest_intact_checkpoint_and_names_those_it_skipped(finished, inl, tmp_path):
    checkpoints = finished / "checkpoints"
    pristine = tmp_path / "pristine"
    shutil.copytree(checkpoints, pristine)
    for name, damage in DAMAGE.items():
        shutil.rmtree(checkpoints)
        shutil.copytree(pristine, checkpoints)
        damage(checkpoints / "step-00000012")
        done = inl("resume", "run", "--json")
        assert done.exit_code == 0, (name, done.stderr)
        assert "skipped" in done.stderr, name
        assert "step-00000012" in done.stderr, name
        assert json.loads(done.stdout)["step"] == 12
        assert [row["step"] for row in read_metrics(finished) if "loss" in row] == list(range(1, 13)), name


def test_resume_without_an_intact_checkpoint_exits_with_4(finished, inl):
    for path in list_checkpoints(finished / "checkpoints"):
        flip_a_bit(path / "model.safetensors")
    done = inl("resume", "run", "--quiet")
    assert done.exit_code == 4
    assert "none of its 3 checkpoints is intact" in done.stderr


def test_resume_refuses_a_change_of_the_experiment_and_accepts_it_when_allowed(finished, inl):
    refused = inl("resume", "run", "--steps", "14", "--set", "training.seed=1")
    assert refused.exit_code == 2
    assert "--allow-change training.seed" in refused.stderr
    changed = ("--set", "training.seed=1", "--allow-change", "training.seed")
    allowed = inl("resume", "run", "--steps", "14", *changed, "--json")
    assert allowed.exit_code == 0, allowed.stderr
    assert json.loads(allowed.stdout)["step"] == 14
    assert "training.steps" in allowed.stderr


def test_a_refused_resume_changes_nothing_and_a_finished_run_is_evaluated_once(finished, data_directory, inl, tmp_path):
    before = {name: (finished / name).read_text() for name in ("recipe.yaml", "metrics.jsonl", "environment.json")}
    other = tmp_path / "other"
    shutil.copytree(data_directory, other)
    with (other / "modules.jsonl").open("a") as file:
        file.write('{"text": "one more document of another corpus"}\n')
    settings = ["data.directory=fresh", f"data.sources=[{other / 'modules.jsonl'}]"]
    arguments = [word for setting in settings for word in ("--set", setting)]
    refused = inl("resume", "run", "--steps", "14", *arguments, "--allow-change", "data.sources")
    assert refused.exit_code == 4, refused.stderr
    assert "fingerprint" in refused.stderr
    assert {name: (finished / name).read_text() for name in before} == before
    again = inl("resume", "run", "--quiet")
    assert again.exit_code == 0, again.stderr
    assert len([row for row in read_metrics(finished) if "validation_loss" in row]) == 1


def test_training_into_a_run_that_exists_is_refused(finished, recipe_file, inl):
    done = inl("train", recipe_file(), "--run-dir", "run", "--quiet")
    assert done.exit_code == 4
    assert "inl resume run" in done.stderr


def test_a_batch_that_the_ranks_do_not_divide_shows_the_arithmetic(recipe_file, inl):
    done = inl("train", recipe_file(), "--set", "training.micro_batch_size=3", "--quiet")
    assert done.exit_code == 2
    assert "does not divide 8" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_data_changed_after_preparation_is_refused(recipe_file, data_directory, inl, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data_directory, copy)
    recipe = recipe_file(data={"directory": str(copy / "set"), "sources": [str(copy / "modules.jsonl")]})
    with (copy / "modules.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    done = inl("train", recipe, "--run-dir", "run", "--quiet")
    assert done.exit_code == 4, done.stderr
    assert "modules.jsonl" in done.stderr
    shard = next((copy / "set").glob("train-*.arrow"))
    os.truncate(shard, shard.stat().st_size // 2)
    shutil.copy(data_directory / "modules.jsonl", copy / "modules.jsonl")
    done = inl("train", recipe, "--run-dir", "run", "--quiet")
    assert done.exit_code == 4, done.stderr
    assert shard.name in done.stderr
