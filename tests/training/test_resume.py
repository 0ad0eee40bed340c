"""A run that is stopped and resumed is the run that was never stopped, bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch

from inl_core.corpus.preparation import prepare
from inl_core.errors import ArtefactError, Interrupted
from inl_core.inference.checkpoint_files import list_checkpoints
from inl_core.recipe import DataSettings
from inl_core.recipe.load import load_recipe
from inl_core.training.checkpoint import newest_valid
from inl_core.training.distributed import World
from inl_core.training.metrics import read_metrics
from inl_core.training.run import RunFiles
from inl_core.training.run_data import open_data
from inl_core.training.session import Resumption, empty_model, open_session
from inl_core.training.trainer import Trainer
from tests.training.conftest import Listener, before_each_step

VARIANTS = {
    "v5": {},
    "v4": {"model": {"preset": "v4"}},
    "transformer": {"model": {"preset": "transformer"}},
    "muon, drawn iterations": {
        "model": {"preset": "v4"},
        "training": {"optimizer": {"name": "muon"}, "min_iterations": 1},
    },
    "experts, dynamic budget": {
        "model": {
            "preset": "v4",
            "integrator": {"num_iterations": 3, "controller": {"experts": 3}, "budget": {"strategy": "dynamic"}},
        },
        "training": {"evaluation": {"every": 2, "tokens": 512}},
    },
    "v3, hybrid budget": {
        "model": {"preset": "v3", "d_model": 64},
        "training": {"evaluation": {"every": 2, "tokens": 512}},
    },
    "cycle, losses, moving mu": {
        "model": {"preset": "v4", "integrator": {"mu": {"adaptation_rate": 0.01}}},
        "training": {"cycle": {"preset": "balanced"}, "losses": {"lambda_speed": 0.1}, "micro_batch_size": 4},
    },
}


def timeless(rows):
    """Metric rows without what a clock or the machine decides."""
    return [
        {k: v for k, v in row.items() if k not in ("time", "tokens_per_second", "memory_bytes", "validation_seconds")}
        for row in rows
    ]


def stop_after(trainer, step: int) -> None:
    """Make the trainer see a signal when it has done `step` steps."""

    def ask_to_stop(done, stop):
        if done == step - 1:
            stop.requested, stop.name = True, "SIGTERM"

    before_each_step(trainer, ask_to_stop)


def finishes_like(whole, last) -> None:
    """Resume and finish `last`; its metrics and weights are those of the run that never stopped."""
    last.resume(newest_valid(last.run.checkpoints, pytest.fail))
    last.fit()
    assert timeless(read_metrics(last.run.path)) == timeless(read_metrics(whole.run.path))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, last.model.state_dict()[name]), name


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_resuming_twice_equals_never_stopping(make_recipe, make_trainer, changes):
    recipe = make_recipe(**changes)
    whole, _ = make_trainer(recipe, "whole")
    whole.fit()
    for stop in (5, 9):
        trainer, _ = make_trainer(recipe, "parts")
        if stop > 5:
            trainer.resume(newest_valid(trainer.run.checkpoints, pytest.fail))
        stop_after(trainer, stop)
        with pytest.raises(Interrupted):
            trainer.fit()
        assert list_checkpoints(trainer.run.checkpoints)[-1].name == f"step-{stop:08d}"
    finishes_like(whole, make_trainer(recipe, "parts")[0])


def test_resuming_across_an_epoch_boundary(make_recipe, make_trainer):
    windows = make_trainer(make_recipe(), "probe")[0].loader.num_windows
    sequences = 2 * windows // 5  # the third step spans two epochs
    boundary = 3
    model = {"d_model": 16, "num_layers": 1}
    recipe = make_recipe(training={"batch_tokens": 32 * sequences, "steps": 4}, model=model)
    whole, heard = make_trainer(recipe, "whole")
    whole.fit()
    assert heard.rows[boundary - 2]["epoch"] < 1 < heard.rows[boundary - 1]["epoch"]
    trainer, _ = make_trainer(recipe, "parts")
    stop_after(trainer, boundary)
    with pytest.raises(Interrupted):
        trainer.fit()
    finishes_like(whole, make_trainer(recipe, "parts")[0])


def test_the_trial_checkpoint_leaves_no_trace_in_the_training(make_recipe, make_trainer):
    tried, _ = make_trainer(make_recipe(training={"steps": 3}), "tried")
    tried.fit()
    untried, _ = make_trainer(make_recipe(training={"steps": 3}), "untried")
    untried.saver.try_before_first_step = lambda state: None
    untried.fit()
    for name, value in tried.model.state_dict().items():
        assert torch.equal(value, untried.model.state_dict()[name]), name
    assert not (tried.run.path / "checkpoints.trial").exists()


def test_an_evaluation_that_a_stop_prevented_is_made_up_for(make_recipe, make_trainer):
    recipe = make_recipe(training={"evaluation": {"every": 4, "tokens": 512}})
    whole, _ = make_trainer(recipe, "whole")
    whole.fit()
    trainer, _ = make_trainer(recipe, "parts")
    stop_after(trainer, 4)
    with pytest.raises(Interrupted):
        trainer.fit()
    finishes_like(whole, make_trainer(recipe, "parts")[0])


def test_a_signal_during_an_evaluation_ends_it_and_the_run_goes_on_as_if_it_had_not(make_recipe, make_trainer):
    recipe = make_recipe(training={"evaluation": {"every": 4, "tokens": 512, "final_tokens": 1024}})
    whole, _ = make_trainer(recipe, "whole")
    whole.fit()
    for step in (4, 12):  # a periodic evaluation, and the last one
        trainer, heard = make_trainer(recipe, "parts")
        if step > 4:
            trainer.resume(newest_valid(trainer.run.checkpoints, pytest.fail))
        score = trainer.validation.score

        def interrupted_score(model, tokens, stop, trainer=trainer, score=score, at=step):
            if stop is not None and trainer.state.step == at:
                stop.requested, stop.name = True, "SIGTERM"
            return score(model, tokens, stop)

        trainer.validation.score = interrupted_score
        with pytest.raises(Interrupted, match=f"SIGTERM at step {step}, saved"):
            trainer.fit()
        assert step not in [at for at, _ in heard.evaluations]
        assert (trainer.run.path / "preempted.json").exists()
    finishes_like(whole, make_trainer(recipe, "parts")[0])


def test_a_run_finds_its_data_from_another_directory(make_recipe, data_directory, tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    shutil.copy(data_directory / "modules.jsonl", tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    data = {"sources": ("modules.jsonl",), "directory": Path("set")}
    recipe, world = make_recipe(data=data, training={"steps": 1}), World(0, 1, torch.device("cpu"))
    opened = open_data(recipe, world)
    run = RunFiles(Path("runs/first"), recipe, opened.tokenizer, opened.directory)
    run.create()

    def no_preparation(settings, path):
        raise AssertionError(path)

    def found(run):
        again = open_data(load_recipe(run / "recipe.yaml"), world, no_preparation, run=run)
        assert again.train.fingerprint == opened.train.fingerprint
        return again.directory.resolve()

    run_path = tmp_path / "project/runs/first"
    monkeypatch.chdir(tmp_path)
    assert found(run_path) == tmp_path / "project/set"  # though it has no checkpoint yet
    monkeypatch.chdir(tmp_path / "project")
    model = empty_model(recipe, opened.tokenizer)
    Trainer(model, opened, run, world, Listener()).fit()
    assert found(Path("runs/first")) == tmp_path / "project/set"
    monkeypatch.chdir(tmp_path)
    assert found(run_path) == tmp_path / "project/set"
    (tmp_path / "project").rename(tmp_path / "moved")
    assert found(tmp_path / "moved/runs/first") == tmp_path / "moved/set"
    changed = load_recipe(tmp_path / "moved/runs/first/recipe.yaml", ["data.validation_fraction=0.2"])
    with pytest.raises(AssertionError):  # other data is prepared from its sources, and then refused as another's
        open_data(changed, world, no_preparation, run=tmp_path / "moved/runs/first")


def test_a_data_set_in_the_place_of_a_runs_own_is_refused(make_recipe, data_directory, tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(data_directory / "modules.jsonl", project)
    monkeypatch.chdir(project)
    data = {"sources": ("modules.jsonl",), "directory": Path("set")}
    recipe, world = make_recipe(data=data, training={"steps": 1}), World(0, 1, torch.device("cpu"))
    opened = open_data(recipe, world)
    RunFiles(Path("runs/first"), recipe, opened.tokenizer, opened.directory).create()
    other = recipe.data.model_copy(update={"validation_fraction": 0.3})
    prepare(other, "set", overwrite=True)
    monkeypatch.chdir(tmp_path)  # no checkpoint says what the content was
    with pytest.raises(ArtefactError, match=r"set: prepared with other settings: validation_fraction"):
        open_data(recipe, world, run=project / "runs/first")


def test_a_data_set_named_by_its_directory_alone_trains_and_is_found_from_another_directory(
    make_recipe, data_directory, tmp_path, monkeypatch
):
    project = tmp_path / "project"
    project.mkdir()
    shutil.copytree(data_directory / "set", project / "set")
    monkeypatch.chdir(project)
    whole = make_recipe(training={"steps": 2})
    alone = whole.model_copy(update={"data": DataSettings(directory=Path("set"))})
    results = []
    for recipe, run in ((whole, "runs/whole"), (alone, "runs/alone")):
        with open_session(recipe, run) as session:
            data = session.open_data()
            evaluation = session.build_trainer(data).fit()
            assert evaluation
            results.append((data.train.fingerprint, evaluation.loss))
    assert results[0] == results[1]
    monkeypatch.chdir(tmp_path)
    longer = alone.model_copy(update={"training": alone.training.model_copy(update={"steps": 3})})
    with open_session(longer, project / "runs/alone", resumption=Resumption()) as session:
        assert session.open_data().train.fingerprint == results[0][0]
    with open_session(alone, "other") as session, pytest.raises(ArtefactError, match=r"^set: no data set here"):
        session.open_data()
