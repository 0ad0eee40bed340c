"""A small real data set and a small recipe that trains in seconds."""

import inspect
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from inl_core.corpus.preparation import prepare
from inl_core.inference.evaluate import Evaluation
from inl_core.recipe import DataSettings, Recipe
from inl_core.recipe.presets import merge
from inl_core.training.distributed import World
from inl_core.training.interruption import StopSignal
from inl_core.training.observer import Observer
from inl_core.training.run import RunFiles
from inl_core.training.run_data import RunData
from inl_core.training.session import empty_model
from inl_core.training.trainer import Trainer

MODEL = {"d_model": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "max_seq_len": 64}
TRAINING = {
    "steps": 12,
    "sequence_length": 32,
    "batch_tokens": 256,
    "evaluation": {"every": 0, "final_tokens": 2048},
    "checkpoint": {"every": 0},
    "logging": {"every": 1, "dynamics_every": 4},
}


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory) -> Path:
    """A data set of a few standard-library modules, each cut into documents of some 40 lines."""
    import dataclasses
    import statistics

    base = tmp_path_factory.mktemp("data")
    rows = []
    for module in (dataclasses, statistics):
        lines = inspect.getsource(module).splitlines(keepends=True)
        rows += [{"text": "".join(lines[start : start + 40])} for start in range(0, len(lines), 40)]
    source = base / "modules.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings.model_validate(
        {"sources": (str(source),), "tokenizer": {"vocab_size": 400}, "validation_fraction": 0.1, "num_shards": 2}
    )
    prepare(settings, base / "set")
    return base


class Listener(Observer):
    """An observer that keeps what it hears."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.evaluations: list[tuple[int, Evaluation]] = []
        self.saved: list[Path] = []
        self.messages: list[str] = []

    def on_metrics(self, row):
        self.rows.append(row)

    def on_evaluation(self, step, evaluation):
        self.evaluations.append((step, evaluation))

    def on_checkpoint(self, path, seconds):
        self.saved.append(path)

    def on_message(self, text):
        self.messages.append(text)

    on_warning = on_message


def small_recipe(data_directory: Path, **changes: Any) -> Recipe:
    """A recipe on the small data set; `changes` are laid over its sections."""
    data = {
        "sources": (str(data_directory / "modules.jsonl"),),
        "directory": data_directory / "set",
        "tokenizer": {"vocab_size": 400},
        "validation_fraction": 0.1,
        "num_shards": 2,
    }
    base = {"name": "test", "model": MODEL, "training": TRAINING, "data": data}
    return Recipe.model_validate(merge(base, changes))


@pytest.fixture
def make_recipe(data_directory):
    """make_recipe(training={...}, model={...}) -> Recipe on the small data set."""
    return partial(small_recipe, data_directory)


@pytest.fixture
def make_trainer(data_directory, tmp_path):
    """make_trainer(recipe, name, data=DIRECTORY) -> (Trainer, Listener), its files below the test's directory."""
    import torch

    def make(recipe: Recipe, name: str = "run", data: Path | None = None) -> tuple[Trainer, Listener]:
        world, listener = World(0, 1, torch.device("cpu")), Listener()
        opened = RunData.load(data or data_directory / "set", recipe)
        model = empty_model(recipe, opened.tokenizer)
        run = RunFiles(tmp_path / name, recipe, opened.tokenizer, opened.directory)
        trainer = Trainer(model, opened, run, world, listener)
        trainer.run.create()
        return trainer, listener

    return make


@pytest.fixture
def recipe_file(make_recipe, tmp_path):
    """recipe_file(**changes) -> the path of a YAML recipe."""
    from inl_core.recipe.load import dump_recipe

    def write(**changes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(dump_recipe(make_recipe(**changes)))
        return path

    return write


@pytest.fixture
def inl(tmp_path, monkeypatch):
    """inl("train", ...) -> what the command says in the test's directory, run in this process."""
    from inl_cli.app import app

    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def before_each_step(trainer: Trainer, action: Callable[[int, StopSignal], object]) -> None:
    """Call `action` with the number of steps that are done, and who listens for signals, before each step is taken."""
    take = trainer.stepper.take

    def act_and_take(step, stop):
        action(step, stop)
        return take(step, stop)

    trainer.stepper.take = act_and_take


def limit_files(size: int | None) -> None:
    """No file of this process grows beyond `size` bytes from now on, as on a full disk; None lets them grow again."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))


@contextmanager
def files_limited_to(size: int | None = None) -> Iterator[None]:
    """`limit_files` until the end of the context, which must come before pytest writes the result, maybe to a file."""
    limit_files(size)
    try:
        yield
    finally:
        limit_files(None)


def run_python(*arguments: object, cwd: Path, **options) -> subprocess.CompletedProcess:
    """Python in a process of its own, for what concerns all of a process."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, **options)
