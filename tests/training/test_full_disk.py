"""A disk that is full, or cannot be written for another reason: no half files, no torn rows, no other exit code."""

import errno
import json
import re
from pathlib import Path

import pytest
import torch

from inl_core.errors import InlError, Interrupted, NonFiniteError
from inl_core.files import append_line
from inl_core.training import checkpoint_writing
from inl_core.training.metrics import cut_metrics, read_metrics
from tests.training.conftest import before_each_step, files_limited_to, limit_files
from tests.training.test_resume import stop_after


def full_from(trainer, step: int, size: int) -> None:
    """The disk is full, as far as `limit_files` makes it so, from the beginning of a step on."""

    def fill(done, stop):
        if done == step:
            trainer.saver.finish()  # what is being saved in the background still finds room
            limit_files(size)

    before_each_step(trainer, fill)


def test_a_line_that_does_not_fit_is_taken_back_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_line(path, '{"step": 1}')
    size = path.stat().st_size
    with files_limited_to(size + 5), pytest.raises(OSError, match="too large"):
        append_line(path, '{"step": 2}')
    assert path.stat().st_size == size
    append_line(path, '{"step": 3}')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]


def test_a_line_after_a_torn_one_begins_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    append_line(tmp_path / "metrics.jsonl", '{"step": 3}')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]
    cut_metrics(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 3}\n'


def test_rows_hold_no_word_that_json_does_not_know(make_recipe, make_trainer):
    trainer, _ = make_trainer(make_recipe())
    row = {"step": 1, "loss": float("nan"), "budget": [1.0, float("inf")], "word": "NaN"}
    trainer.log.metrics.write({"kind": "train", "time": 2.5} | row)
    text = trainer.log.metrics.path.read_text()
    assert text == '{"kind": "train", "time": 2.5, "step": 1, "loss": null, "budget": [1.0, null], "word": "NaN"}\n'


def test_a_full_disk_leaves_no_half_files_and_is_reported(make_recipe, make_trainer):
    recipe = make_recipe(
        training={"steps": 6, "checkpoint": {"every": 2}, "logging": {"dynamics_every": 1}}, model={"preset": "v4"}
    )
    trainer, heard = make_trainer(recipe)
    full_from(trainer, 2, size=500)
    with files_limited_to(), pytest.raises(ValueError, match=r"trained to step 6 .*make room"):
        trainer.fit()
    files = {path.relative_to(trainer.run.path).as_posix() for path in trainer.run.path.rglob("*") if path.is_file()}
    assert not [name for name in files if name.endswith(".tmp") or "step-00000004" in name]
    assert {"dynamics/step-00000002.parquet", "checkpoints/step-00000002/manifest.json"} <= files
    assert [row["step"] for row in read_metrics(trainer.run.path) if "loss" in row][:2] == [1, 2]
    for word in ("checkpoints: checkpoint of step 4 not saved", "dynamics of step 3", "metrics.jsonl: cannot be"):
        assert sum(word in text for text in heard.messages) == 1, (word, heard.messages)


def test_nan_while_the_disk_is_full_is_still_a_nonfinite_error(make_recipe, make_trainer):
    trainer, _ = make_trainer(make_recipe(training={"checkpoint": {"every": 2}}))
    full_from(trainer, 3, size=100)
    update = trainer.optimizers.step

    def step():
        update()
        if trainer.state.step == 4:
            with torch.no_grad():
                trainer.model.blocks[0].attention.output.weight.fill_(float("nan"))

    trainer.optimizers.step = step
    told = r"step 6: .*could not be written.*goes on from .*step-00000002"
    with files_limited_to(), pytest.raises(NonFiniteError, match=told):
        trainer.fit()
    assert not list((trainer.run.path / "reports").iterdir())


def test_a_stop_that_leaves_no_word_is_still_a_stop(make_recipe, make_trainer, monkeypatch):
    trainer, heard = make_trainer(make_recipe(training={"steps": 4}))
    stop_after(trainer, 2)
    (trainer.run.path / "preempted.json").mkdir()  # cannot be written, whoever runs the test
    with pytest.raises(Interrupted):
        trainer.fit()
    assert sum("preempted.json" in text for text in heard.messages) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_any_failing_disk_costs_one_checkpoint_and_no_more(make_recipe, make_trainer, monkeypatch, number):
    trainer, heard = make_trainer(make_recipe())
    trainer.state.step = 1
    assert trainer.saver.save(trainer.state)

    def fail(path: Path) -> None:
        raise OSError(number, "no", str(path))

    monkeypatch.setattr(checkpoint_writing, "_sync", fail)
    trainer.state.step = 2
    assert not trainer.saver.save(trainer.state)
    assert [path.name for path in trainer.run.checkpoints.iterdir()] == ["step-00000001"]
    assert sum("step 2 not saved" in text and "make room" in text for text in heard.messages) == 1
    assert json.loads((trainer.run.checkpoints / "step-00000001" / "manifest.json").read_text())["step"] == 1


def test_a_disk_too_small_for_one_checkpoint_is_said_before_the_first_step(make_recipe, make_trainer):
    trainer, _ = make_trainer(make_recipe())
    with files_limited_to(50_000), pytest.raises(InlError) as told:
        trainer.fit()
    message = r"\S*/checkpoints\.trial/step-00000000\.tmp/model\.safetensors: File too large: a checkpoint cannot be "
    assert re.fullmatch(message + "saved here; make room or choose another --run-dir", str(told.value))
    assert type(told.value) is InlError  # exit code 1
    assert not list(trainer.run.path.glob("checkpoints*/*"))
