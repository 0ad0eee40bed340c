"""The one line of a job script: it starts a run, begins it again, goes on with it, or finds it done."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

from inl_core.errors import ArtefactError, NonFiniteError, RecipeError
from inl_core.inference.checkpoint_files import list_checkpoints
from inl_core.recipe.load import dump_recipe
from inl_core.training.claim import claim
from inl_core.training.interruption import StopSignal
from inl_core.training.metrics import read_metrics
from inl_core.training.run_status import FAILED, PREEMPTED, read_status
from inl_core.training.session import Resumption, open_session
from tests.training.conftest import Listener, before_each_step
from tests.training.test_failures import STOPPED_AT_FIVE, finished, finished_once, run_python  # noqa: F401
from tests.training.test_resume import stop_after, timeless


class Killed(BaseException):
    """Stands for a SIGKILL: nothing of ours catches it, and no word is left."""


def killed_before_step(step):
    """A disturbance that kills the session when it has done `step` steps."""

    def disturb(trainer):
        def kill(done, stop):
            if done == step:
                raise Killed

        before_each_step(trainer, kill)

    return disturb


def run_once(recipe, path, disturb=lambda trainer: None, *, allowed=(), observer=None):
    """One session of the one command; how far it came."""
    wanted = Resumption(allowed, or_start=True)
    with StopSignal() as stop, open_session(recipe, path, resumption=wanted, observer=observer, stop=stop) as session:
        if session.ending():
            return "done already"
        trainer = session.build_trainer(session.open_data())
        disturb(trainer)
        trainer.fit(stop)
    return trainer.state.step


def weights(path):
    return (list_checkpoints(path / "checkpoints")[-1] / "model.safetensors").read_bytes()


def changed(recipe, **training):
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=training)})


@pytest.fixture
def recipe(make_recipe):
    return make_recipe(training={"steps": 6, "checkpoint": {"every": 4}, "logging": {"dynamics_every": 0}})


def test_the_same_command_brings_a_run_to_its_end_from_wherever_it_was_killed(recipe, tmp_path):
    assert run_once(recipe, tmp_path / "whole") == 6
    run = tmp_path / "run"
    for killed_at, state, saved in ((0, "resumable", 0), (3, "resumable", 0), (5, "resumable", 4)):
        with pytest.raises(Killed):
            run_once(recipe, run, killed_before_step(killed_at))
        assert (read_status(run).state, read_status(run).step) == (state, saved)
    assert run_once(recipe, run) == 6
    assert read_status(run).state == "done"
    assert timeless(read_metrics(run)) == timeless(read_metrics(tmp_path / "whole"))
    assert weights(run) == weights(tmp_path / "whole")
    assert run_once(recipe, run) == "done already"


def test_the_words_that_a_session_leaves_are_of_that_session_alone(recipe, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Exception, match="SIGTERM"):
        run_once(recipe, run, lambda trainer: stop_after(trainer, 2))
    status = read_status(run)
    assert (status.state, status.reason, status.step) == ("preempted", "SIGTERM", 2)

    def diverge(trainer):
        trainer.model.embedding.table.weight.data.fill_(float("nan"))

    with pytest.raises(NonFiniteError):
        run_once(recipe, run, diverge)
    assert not (run / PREEMPTED).exists()
    status = read_status(run)
    assert (status.state, status.step) == ("failed", 2)
    assert "step 3: loss nan" in status.reason
    assert run_once(recipe, run) == 6
    assert not (run / FAILED).exists()


def test_a_recipe_that_makes_another_experiment_is_refused_unless_it_is_meant_or_nothing_was_reached(recipe, tmp_path):
    run, other = tmp_path / "run", changed(recipe, seed=7)
    with pytest.raises(Killed):
        run_once(recipe, run, killed_before_step(3))
    heard = Listener()
    with pytest.raises(Killed):
        run_once(other, run, killed_before_step(5), observer=heard)
    assert "identity: training.seed: 0 -> 7" in heard.messages
    assert any("starting again from step 0" in text for text in heard.messages)
    for _ in range(2):  # also when it is done
        with pytest.raises(RecipeError, match=r"--allow-change training\.seed"):
            run_once(recipe, run)
        assert run_once(other, run) in (6, "done already")
    assert run_once(changed(recipe, steps=8), run, allowed=("training.seed",)) == 8


def test_a_directory_that_is_no_run_is_refused_and_left_as_it_is(recipe, tmp_path):
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "mother.txt").write_text("dear")
    with pytest.raises(ArtefactError, match="letters: not empty; start a new run with another --run-dir"):
        run_once(recipe, letters)
    assert [path.name for path in letters.iterdir()] == ["mother.txt"]
    with pytest.raises(ArtefactError, match="letters: not a run"):
        read_status(letters)


@pytest.mark.parametrize("damage", ["", "name: [", None])
def test_a_damaged_recipe_of_a_run_without_a_checkpoint_is_replaced_by_the_one_given(recipe, tmp_path, damage):
    run = tmp_path / "run"
    with pytest.raises(Killed):
        run_once(recipe, run, killed_before_step(3))
    (run / "recipe.yaml").unlink()
    if damage is not None:
        (run / "recipe.yaml").write_text(damage)
    if damage is None:  # nothing says that this was a run
        with pytest.raises(ArtefactError, match="not empty"):
            run_once(recipe, run)
    else:
        assert run_once(recipe, run) == 6
        assert (run / "recipe.yaml").read_text() == dump_recipe(recipe)


def test_checkpoints_that_were_lost_are_not_trained_over_and_the_way_out_is_named(recipe, tmp_path):
    run = tmp_path / "run"
    assert run_once(recipe, run) == 6
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ArtefactError, match=r"went on to step 6; put them back, remove \S+metrics.jsonl to train from"):
        run_once(recipe, run)
    assert read_status(run).state == "failed"
    (run / "metrics.jsonl").unlink()
    assert run_once(recipe, run) == 6


def test_a_session_says_what_the_numbers_may_depend_on_and_is_not_as_before(recipe, tmp_path):
    run, heard = tmp_path / "run", Listener()
    with pytest.raises(Killed):
        run_once(recipe, run, killed_before_step(5))
    path = run / "environment.json"
    before = json.loads(path.read_text())
    now = before["packages"]["torch"]
    path.write_text(json.dumps(before | {"packages": before["packages"] | {"torch": "1.0"}}))
    run_once(recipe, run, observer=heard)
    assert [text for text in heard.messages if "not as before" in text] == [
        f"not as before: torch 1.0 -> {now}; the run goes on, but perhaps not bit for bit as it would have"
    ]


def test_a_run_that_is_done_is_left_alone_at_once_and_without_torch(finished, recipe_file, tmp_path):  # noqa: F811
    recipe = recipe_file(training={"checkpoint": {"every": 4, "keep_last": 3}})
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    script = "import sys; from inl_cli.app import app; app(sys.argv[1:], standalone_mode=False); print(*sys.modules)"
    arguments = ["train", recipe, "--run-dir", "run", "--resume-or-start", "--json"]
    done = run_python("-c", script, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    outcome, modules = done.stdout.splitlines()
    assert not {"torch", "pandas", "pyarrow"} & set(modules.split())
    outcome = json.loads(outcome)
    assert (outcome["step"], outcome["checkpoint"]) == (12, "run/checkpoints/step-00000012")
    assert outcome["evaluation"]["loss"] == read_metrics(finished)[-1]["validation_loss"]
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_two_at_once_never_share_the_directory(recipe_file, inl, tmp_path):
    with claim(tmp_path / "run", pytest.fail):
        refused = inl("train", recipe_file(), "--run-dir", "run", "--resume-or-start")
    assert refused.exit_code == 4
    assert "in use by process" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--resume-or-start"], "needs --run-dir"), (["--run-dir", "run", "--allow-change", "name"], "--resume-or-start")],
)
def test_options_that_mean_nothing_alone_are_refused(recipe_file, inl, tmp_path, arguments, told):
    refused = inl("train", recipe_file(), *arguments)
    assert refused.exit_code == 2
    assert told in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "code", "state"),
    [
        (lambda run: None, 12, "empty"),
        (lambda run: run.mkdir(), 12, "empty"),
        (lambda run: put_run(run), 10, "resumable"),
        (lambda run: put_run(run, preempted='{"signal": "SIGUSR1", "step": 3}'), 75, "preempted"),
        (lambda run: put_run(run, preempted="["), 75, "preempted"),
        (lambda run: put_run(run, failed='{"error": "step 4: loss nan"}'), 13, "failed"),
    ],
)
def test_a_job_script_reads_the_state_from_a_word_and_from_the_exit_code(inl, tmp_path, make, code, state):
    make(tmp_path / "run")
    told, as_json = inl("run-status", "run"), inl("run-status", "run", "--json")
    assert (told.exit_code, as_json.exit_code) == (code, code)
    assert told.stdout.startswith(f"{state}: run: ")
    status = json.loads(as_json.stdout)
    assert (status["state"], status["exit_code"], status["step"]) == (state, code, 0)


def put_run(run, **words):
    """A run that ended before its first checkpoint."""
    run.mkdir()
    (run / "recipe.yaml").write_text("name: run\n")
    for name, text in words.items():
        (run / f"{name}.json").write_text(text)


def test_a_run_is_running_while_a_process_owns_it_and_what_is_no_run_is_refused(finished, inl, tmp_path):  # noqa: F811
    with claim(finished, pytest.fail):
        owned = inl("run-status", "run", "--json")
    assert owned.exit_code == 11
    assert json.loads(owned.stdout)["reason"].startswith("process ")
    assert inl("run-status", "run").exit_code == 0
    (finished / "file").touch()
    assert inl("run-status", "run/file").exit_code == 2
    assert inl("run-status", "run/checkpoints/step-00000012").exit_code == 4
    (finished / "checkpoints" / "step-00000012" / "model.safetensors").write_bytes(b"")
    damaged = inl("run-status", "run", "--json")
    assert (damaged.exit_code, json.loads(damaged.stdout)["step"]) == (10, 8)


@pytest.mark.slow
def test_torchrun_hides_the_exit_code_and_run_status_tells_it(recipe_file, tmp_path):
    recipe = recipe_file(training={"steps": 12, "checkpoint": {"every": 0}})
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED_AT_FIVE)

    def status():
        return run_python("-m", "inl_cli", "run-status", "run", cwd=tmp_path).returncode

    def launch(*program):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launcher, *program, "train", str(recipe), "--run-dir", "run", "--resume-or-start"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)

    assert status() == 12
    stopped = launch(str(script))
    assert (stopped.returncode, status()) == (1, 75), stopped.stderr
    assert json.loads((tmp_path / "run" / PREEMPTED).read_text())["signal"] == signal.SIGTERM.name
    done = launch("-m", "inl_cli")
    assert (done.returncode, status()) == (0, 0), done.stderr
    again = launch("-m", "inl_cli")
    assert again.returncode == 0, again.stderr
    assert "done already" in again.stderr
