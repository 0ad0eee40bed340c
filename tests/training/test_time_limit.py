"""A run whose time is up saves and stops before, goes on later, and comes to the end it would have come to."""

import json
import os
import signal
import time
from contextlib import suppress

import pytest
import torch

from inl_core.errors import Interrupted
from inl_core.training.checkpoint import newest_valid
from inl_core.training.interruption import StopSignal
from inl_core.training.run_status import PREEMPTED
from inl_core.training.time_limit import MAX_HOURS, SLURM, TimeLimit, find_limit, slurm_seconds_left
from tests.training.conftest import before_each_step

DAY, HOUR = 86400.0, 3600.0


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("1-02:03:04", DAY + 2 * HOUR + 184),
        ("2:00:05", 2 * HOUR + 5),
        ("10:30", 630.0),
        ("59", 59.0),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("", None),
    ],
)
def test_squeue_says_how_long_the_job_has(tmp_path, said, seconds):
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\n[ "$*" = "--noheader --job 7 --format %L" ] && echo "{said}"\n')
    squeue.chmod(0o755)
    assert slurm_seconds_left({"SLURM_JOB_ID": "7", "PATH": str(tmp_path)}) == seconds


@pytest.mark.parametrize("environment", [{}, {"SLURM_JOB_END_TIME": "9"}, {"SLURM_JOB_ID": "7", "PATH": "/nowhere"}])
def test_without_a_job_or_squeue_nothing_is_known(environment):
    assert slurm_seconds_left(environment) is None


def test_the_end_that_slurm_names_needs_no_squeue():
    end = int(time.time()) + 1000
    left = slurm_seconds_left({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(end), "PATH": "/nowhere"})
    assert left is not None
    assert 0 < left <= 1000


@pytest.mark.parametrize(("hours", "name"), [(0.1, MAX_HOURS), (1.0, SLURM), (None, SLURM)])
def test_the_limit_that_comes_first_counts(monkeypatch, hours, name):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1800))
    limit = find_limit(hours, time.monotonic())
    assert limit is not None
    assert limit.name == name


def test_a_limit_is_near_as_soon_as_what_is_left_to_do_would_pass_it():
    limit = TimeLimit(MAX_HOURS, time.monotonic() + 1000)
    assert not limit.is_near()
    limit.needed = 1001
    assert limit.is_near()


def test_a_run_stopped_by_its_limit_again_and_again_ends_as_one_that_was_not(make_recipe, make_trainer):
    whole, _ = make_trainer(make_recipe(training={"steps": 4}), "whole")
    whole.fit()
    steps = []
    for _ in range(4):
        trainer, _ = make_trainer(make_recipe(training={"steps": 4, "max_hours": 1e-6}), "limited")
        if steps:
            trainer.resume(newest_valid(trainer.run.checkpoints, pytest.fail))
        with pytest.raises(Interrupted, match=r"training.max_hours at step \d, saved; continue with"):
            trainer.fit()
        word = json.loads((trainer.run.path / PREEMPTED).read_text())
        assert word["signal"] == MAX_HOURS
        steps.append(word["step"])
    assert steps == [1, 2, 3, 4]  # however short the time is, each session takes a step
    trainer, _ = make_trainer(make_recipe(training={"steps": 4, "max_hours": 1e-6}), "limited")
    trainer.resume(newest_valid(trainer.run.checkpoints, pytest.fail))
    assert trainer.fit() is not None  # or the final evaluation, which heeds no limit then
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


def test_what_saving_and_a_step_take_is_kept_free(make_recipe, make_trainer):
    trainer, _ = make_trainer(make_recipe(training={"steps": 2, "max_hours": 1}), "run")

    def save_was_long(done, stop):
        assert trainer.saver.longest > 0  # that of the trial before the first step
        trainer.saver.longest = 1000.0

    before_each_step(trainer, save_was_long)
    with StopSignal() as stop:
        trainer.fit(stop)
    assert stop.limit is not None
    assert stop.limit.needed > 2000


def test_a_session_that_has_not_saved_yet_keeps_free_what_the_last_save_of_the_run_took(make_recipe, make_trainer):
    first, _ = make_trainer(make_recipe(training={"steps": 2}), "run")
    before_each_step(first, lambda done, stop: setattr(first.saver, "latest", 1000.0))
    first.fit()
    later, _ = make_trainer(make_recipe(training={"steps": 3, "max_hours": 1}), "run")
    later.resume(newest_valid(later.run.checkpoints, pytest.fail))
    needed = []
    before_each_step(later, lambda done, stop: stop.limit and needed.append(stop.limit.needed))
    later.fit()
    assert needed == [2000]


@pytest.mark.parametrize(("hours", "is_warned"), [(1e-6, True), (1, False)])
def test_a_limit_that_leaves_no_time_for_training_is_warned_of(make_recipe, make_trainer, hours, is_warned):
    trainer, listener = make_trainer(make_recipe(training={"steps": 2, "max_hours": hours}))
    with suppress(Interrupted):
        trainer.fit()
    said = f"{MAX_HOURS}: all of the time goes into starting and saving"
    assert any(text.startswith(said) for text in listener.messages) == is_warned


def test_the_first_signal_after_a_limit_still_lets_the_run_save():
    ended: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    try:
        with StopSignal(ended.append) as stop, stop.deferred():
            stop.limit = TimeLimit(MAX_HOURS, time.monotonic())
            assert stop.is_asking()
            assert stop.name == MAX_HOURS
            os.kill(os.getpid(), signal.SIGTERM)
        assert not ended
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_other_ranks_learn_that_it_was_the_limit():
    ranks = [StopSignal(), StopSignal()]
    ranks[0].limit = TimeLimit(SLURM, time.monotonic())
    assert [rank.is_asking() for rank in ranks] == [True, False]
    given: list[tuple[float, ...]] = []
    ranks[0].share(lambda *numbers: given.append(numbers) or list(numbers))
    ranks[1].share(lambda *numbers: [a + b for a, b in zip(numbers, given[0], strict=True)])
    assert ranks[1].name == SLURM
