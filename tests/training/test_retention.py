"""Which checkpoints stay: what was just saved, the last intact ones, every n-th, and the best on one text."""

import json
import math
import os
from dataclasses import replace

import pytest

from inl_core.inference.checkpoint_files import list_checkpoints
from inl_core.inference.evaluate import Evaluation
from inl_core.training.metrics import read_scores
from inl_core.training.retention import remove_leftovers
from tests.damage import flip_a_bit

EVALUATION = {"every": 2, "tokens": 512, "final_tokens": None}
SCORE = Evaluation(
    loss=2.0, perplexity=7.4, bits_per_byte=9.0, accuracy=0.1, iterations=2, tokens=9, bytes=9, seconds=0
)


def steps_of(trainer) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(trainer.run.checkpoints)]


def save_at(trainer, step: int) -> None:
    trainer.state.step = step
    assert trainer.saver.save(trainer.state)


def scored(trainer, scores: dict[int, float], final: float) -> None:
    """Let the periodic evaluations and the final one come out as given."""

    def score(model, tokens, *rest):
        bits = final if tokens is None else scores[trainer.state.step]
        return replace(SCORE, bits_per_byte=bits)

    trainer.validation.score = score


def test_a_new_best_is_saved_where_no_checkpoint_is_due_and_stays(make_recipe, make_trainer):
    recipe = make_recipe(training={"evaluation": EVALUATION, "checkpoint": {"every": 4, "keep_last": 1}})
    trainer, heard = make_trainer(recipe)
    # Neither a NaN nor the final score, which is on other tokens, beats the 1.0 of step 6.
    scored(trainer, {2: 3.0, 4: 3.5, 6: 1.0, 8: 2.0, 10: math.nan}, final=0.5)
    trainer.fit()
    assert [path.name for path in heard.saved] == [f"step-{step:08d}" for step in (2, 4, 6, 8, 12)]
    assert steps_of(trainer) == [6, 12]


def test_without_keep_best_only_what_is_due_is_saved(make_recipe, make_trainer):
    checkpoint = {"every": 0, "keep_best": False}
    recipe = make_recipe(training={"steps": 4, "evaluation": {"every": 2, "tokens": 512}, "checkpoint": checkpoint})
    trainer, heard = make_trainer(recipe)
    trainer.fit()
    assert [path.name for path in heard.saved] == ["step-00000004"]


def test_no_checkpoint_but_the_last_is_saved_where_none_is_due(make_recipe, make_trainer):
    trainer, heard = make_trainer(make_recipe(training={"steps": 6, "evaluation": EVALUATION}))
    scored(trainer, {2: 3.0, 4: 1.0}, final=0.5)
    trainer.fit()
    assert [path.name for path in heard.saved] == ["step-00000006"]


def test_a_save_for_a_score_takes_no_place_of_a_regular_one(make_recipe, make_trainer):
    recipe = make_recipe(training={"evaluation": EVALUATION, "checkpoint": {"every": 4, "keep_last": 2}})
    trainer, heard = make_trainer(recipe)
    scored(trainer, {2: 3.0, 4: 3.5, 6: 2.5, 8: 2.6, 10: 2.0}, final=0.5)
    trainer.fit()
    assert [path.name for path in heard.saved] == [f"step-{step:08d}" for step in (2, 4, 6, 8, 10, 12)]
    assert steps_of(trainer) == [8, 10, 12]


def test_saves_for_a_score_are_the_last_ones_where_there_are_no_others(make_recipe, make_trainer):
    recipe = make_recipe(training={"steps": 8, "evaluation": EVALUATION, "checkpoint": {"every": 8, "keep_last": 2}})
    trainer, _ = make_trainer(recipe)
    kept = []
    save_best = trainer.saver.save_best
    trainer.saver.save_best = lambda state: (save_best(state), trainer.saver.finish(), kept.append(steps_of(trainer)))
    scored(trainer, {2: 3.0, 4: 2.0, 6: 1.0}, final=0.5)
    trainer.fit()
    assert kept == [[2], [2, 4], [4, 6]]
    assert steps_of(trainer) == [6, 8]


def test_earlier_scores_are_read_once(make_recipe, make_trainer, monkeypatch):
    trainer, _ = make_trainer(make_recipe(training={"evaluation": EVALUATION, "checkpoint": {"every": 4}}))
    scored(trainer, dict.fromkeys(range(2, 12, 2), 1.0), final=0.5)
    read = []
    monkeypatch.setattr("inl_core.training.saving.read_scores", lambda *about: read.append(about) or {})
    trainer.fit()
    assert len(read) == 1


def test_metrics_that_cannot_be_read_end_no_run(make_recipe, make_trainer):
    recipe = make_recipe(training={"steps": 6, "evaluation": EVALUATION, "checkpoint": {"every": 4, "keep_last": 1}})
    trainer, heard = make_trainer(recipe)
    trainer.log.metrics.path.mkdir()
    scored(trainer, {2: 1.0, 4: 2.0}, final=0.5)
    trainer.fit()
    assert steps_of(trainer) == [2, 6]
    assert sum(str(trainer.log.metrics.path) in text and "keep_best" in text for text in heard.messages) == 1


def test_of_the_saved_steps_the_best_stays_though_a_better_one_was_never_saved(make_recipe, make_trainer):
    trainer, _ = make_trainer(make_recipe(training={"checkpoint": {"keep_last": 1}}))
    rows = [(1, 2.0), (2, 1.5), (3, 1.0), (4, 1.7), (5, 1.9)]
    written = [{"step": step, "scored_on": trainer.saver.scored_on, "validation_bits_per_byte": x} for step, x in rows]
    trainer.log.metrics.path.write_text("".join(json.dumps(row) + "\n" for row in written))
    for step in (1, 2, 4, 5):
        save_at(trainer, step)
    assert steps_of(trainer) == [2, 5]


def test_scores_of_other_texts_are_left_out(tmp_path):
    rows = [
        {"step": 1, "scored_on": "a", "validation_bits_per_byte": 2.0},
        {"step": 2, "scored_on": "b", "validation_bits_per_byte": 1.0},
        {"step": 3, "validation_bits_per_byte": 0.5},
        {"step": 4, "scored_on": "a", "validation_bits_per_byte": None},
        {"step": 5, "scored_on": "a", "validation_bits_per_byte": 1.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_scores(tmp_path, "a") == {1: 2.0, 5: 1.5}


def test_what_was_just_saved_stays_beside_damaged_newer_ones(make_recipe, make_trainer):
    trainer, _ = make_trainer(make_recipe(training={"checkpoint": {"keep_last": 1, "keep_every": 9}}))
    for step in (18, 27, 30):
        save_at(trainer, step)
    (trainer.run.checkpoints / "step-00000027" / "manifest.json").unlink()
    flip_a_bit(trainer.run.checkpoints / "step-00000030" / "model.safetensors")
    save_at(trainer, 21)
    assert steps_of(trainer) == [18, 21, 27, 30]
    save_at(trainer, 24)
    assert steps_of(trainer) == [18, 24, 27, 30]


def test_damaged_older_ones_neither_count_nor_vanish(make_recipe, make_trainer):
    trainer, _ = make_trainer(make_recipe(training={"checkpoint": {"keep_last": 2}}))
    save_at(trainer, 1)
    save_at(trainer, 2)
    os.truncate(trainer.run.checkpoints / "step-00000002" / "training_state" / "optimizer.safetensors", 100)
    save_at(trainer, 3)
    assert steps_of(trainer) == [1, 2, 3]
    save_at(trainer, 4)
    assert steps_of(trainer) == [2, 3, 4]


@pytest.mark.parametrize("name", ["step-99999999999999999999", "step-x", "step-\u00b2", "step-00000002.old"])
def test_other_things_among_the_checkpoints_do_no_harm(make_recipe, make_trainer, name):
    trainer, _ = make_trainer(make_recipe(training={"checkpoint": {"keep_last": 1}}))
    odd = trainer.run.checkpoints / name
    odd.mkdir()
    (trainer.run.checkpoints / "step-00000001").write_text("a file")
    save_at(trainer, 2)
    save_at(trainer, 3)
    assert odd.is_dir()
    assert (trainer.run.checkpoints / "step-00000003").is_dir()
    assert not (trainer.run.checkpoints / "step-00000002").exists()


def test_what_a_killed_save_left_is_cleared_away(tmp_path):
    for name in ("checkpoints/step-00000004.tmp/training_state", "checkpoints/step-00000002", "checkpoints.trial"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "dynamics").mkdir()
    for name in ("dynamics/step-00000004.tmp", "dynamics/step-00000002.parquet", "metrics.jsonl"):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == [
        "checkpoints",
        "checkpoints/step-00000002",
        "dynamics",
        "dynamics/step-00000002.parquet",
        "metrics.jsonl",
    ]
