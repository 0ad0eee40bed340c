"""What a session does around the trainer: the run's directory, the checkpoint it starts from, and what it leaves."""

import json
import os
import shutil
import signal

import pytest

from inl_core.errors import ArtefactError, Interrupted, RecipeError
from inl_core.inference.checkpoint_files import list_checkpoints
from inl_core.training.interruption import StopSignal
from inl_core.training.session import Resumption, Session, open_session
from inl_core.training.trainer import Trainer
from tests.training.conftest import Listener


@pytest.fixture
def recipe(make_recipe):
    logging = {"dynamics_every": 0}
    return make_recipe(training={"steps": 4, "checkpoint": {"every": 2}, "device": "cpu", "logging": logging})


def train(recipe, path, **options) -> Trainer:
    """The whole session; the trainer at its end."""
    with StopSignal() as stop, open_session(recipe, path, stop=stop, **options) as session:
        trainer = session.build_trainer(session.open_data())
        trainer.fit(stop)
    return trainer


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda path: (path / "model.safetensors").write_bytes(b"")])
def test_a_checkpoint_that_goes_between_its_check_and_its_opening_is_passed_over(recipe, tmp_path, monkeypatch, damage):
    train(recipe, tmp_path / "run")
    load, newest = Trainer.resume, list_checkpoints(tmp_path / "run" / "checkpoints")[-1]

    def resume(trainer, checkpoint):
        if checkpoint == newest:
            damage(checkpoint)
        load(trainer, checkpoint)

    monkeypatch.setattr(Trainer, "resume", resume)
    heard = Listener()
    assert train(recipe, tmp_path / "run", resumption=Resumption(), observer=heard).state.step == 4
    assert any(f"skipped: {newest} changed while it was opened" in text for text in heard.messages)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4]  # the last row is the evaluation


@pytest.mark.parametrize(("place", "resumption"), [("open_data", None), ("_accept", Resumption())])
def test_a_signal_before_the_first_step_leaves_word_and_a_run_that_can_go_on(
    recipe, tmp_path, monkeypatch, place, resumption
):
    original = getattr(Session, place)

    def interrupt(*arguments):
        found = original(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Session, place, interrupt)
        with pytest.raises(Interrupted, match="SIGTERM"):
            train(recipe, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "preempted.json").read_text())["step"] == 0
    assert not (tmp_path / "run" / "run.lock").exists()
    assert train(recipe, tmp_path / "run", resumption=resumption).state.step == 4
    assert not (tmp_path / "run" / "preempted.json").exists()


def test_where_nobody_else_listens_pythons_logging_hears_the_run(recipe, tmp_path, caplog):
    with caplog.at_level("INFO", "inl"):
        train(recipe, tmp_path / "run")
    for said in ("checkpoint tried", "step 4: loss ", "step 4: validation loss", f"saved {tmp_path / 'run'}"):
        assert said in caplog.text


@pytest.mark.parametrize("resumption", [None, Resumption(must_advance=True)], ids=["train", "resume"])
def test_a_refused_session_leaves_no_word_of_an_earlier_stop(recipe, make_trainer, tmp_path, resumption):
    trainer, _ = make_trainer(recipe)
    trainer.fit()
    word = trainer.run.path / "preempted.json"
    word.write_text("{}")
    with pytest.raises((ArtefactError, RecipeError), match=r"resume|adds none"):
        train(recipe, trainer.run.path, resumption=resumption)
    assert not word.exists()


def test_a_directory_that_cannot_be_resumed_is_not_said_to_be(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 3}\n')
    with pytest.raises(ArtefactError, match="not empty; start a new run with another --run-dir") as refused:
        train(recipe, tmp_path / "run")
    assert "resume" not in str(refused.value)
