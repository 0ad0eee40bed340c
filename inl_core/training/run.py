"""A run's directory: what it holds and how it is made.

runs/NAME/recipe.yaml  environment.json  metrics.jsonl  dynamics/*.parquet  reports/  checkpoints/

run_status.py has the words that a session leaves at its end: preempted.json and failed.json.
"""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from inl_core.corpus.chat_template import tokenizer_config
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import ArtefactError, InlError
from inl_core.files import read_json, shortened, write_whole
from inl_core.inference.checkpoint_files import TOKENIZER_CONFIG
from inl_core.inference.data_location import record_location
from inl_core.kernels import Choice
from inl_core.recipe import Recipe
from inl_core.recipe.load import dump_recipe, load_recipe
from inl_core.training.checkpoint import TrainState


@dataclass(frozen=True)
class RunFiles:
    """The directory of one run, and what goes into each of its checkpoints."""

    path: Path
    recipe: Recipe
    tokenizer: Tokenizer
    data_directory: Path
    provenance: tuple[dict[str, Any], ...] = ()
    """What happened to the weights before this session, oldest first."""
    chat_template: str | None = None
    """How conversations are written, in jinja2; None where the model does not learn any."""
    operations: dict[str, Choice] = field(default_factory=dict)
    """How each part of the model is computed in this session, and why."""

    @property
    def computed_before(self) -> dict[str, str]:
        """How each part of the model was computed until now, by part; empty where nothing says so."""
        before = next((event["computed_by"] for event in reversed(self.provenance) if "computed_by" in event), [])
        return dict(entry.partition(" (")[0].partition(": ")[::2] for entry in before)

    @property
    def computed_by(self) -> list[str]:
        """How each part of the model is computed, and why, as `attention: C++ with MKL (...)`."""
        return [f"{part}: {choice.way} ({choice.why})" for part, choice in self.operations.items()]

    @property
    def checkpoints(self) -> Path:
        """Where step-N directories go."""
        return self.path / "checkpoints"

    def create(self) -> None:
        """Make the directory, with the recipe and the environment in it; a file that says the same is left alone.

        Raises:
            OSError: a file could not be written; the one before it is untouched.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        path, text = self.path / "recipe.yaml", dump_recipe(self.recipe)
        before = path.read_bytes() if path.is_file() else b""
        if before != text.encode():
            if before and not _is_recipe(path):
                write_whole(self.path / "recipe.yaml.damaged", before)
            write_whole(path, text)
        path, environment = self.path / "environment.json", describe_environment()
        environment["operations"] = {part: f"{choice.way}: {choice.why}" for part, choice in self.operations.items()}
        if _lasting(environment) != _lasting(_read_environment(path)):
            write_whole(path, json.dumps(environment, indent=1))

    def environment_changes(self) -> list[str]:
        """What the numbers may depend on and is not as the last session left it, each as `name: before -> now`."""
        before, now = _read_environment(self.path / "environment.json"), describe_environment()
        if not before:
            return []
        versions = before.get("packages")
        old = before | (versions if isinstance(versions, dict) else {})
        new = now | now["packages"]
        names = ("python", *now["packages"], "git", "threads", "gpus")
        changed = (name for name in names if old.get(name) != new[name])
        return [f"{name} {shortened(str(old.get(name)), 60)} -> {new[name]}" for name in changed]

    def documents(self, state: TrainState) -> dict[str, str]:
        """The texts of a checkpoint at `state`, by file name: what its model, its tokenizer and its recipe are."""
        trained = {
            "event": "train",
            "run": self.path.name,
            "step": state.step,
            "tokens": state.tokens,
            "data": state.data_fingerprint,
            "inl": version("inl"),
            "torch": torch.__version__,
            "operations": self.recipe.training.operations,
            "computed_by": self.computed_by,
        }
        model = self.recipe.model.with_vocab_size(self.tokenizer.vocab_size)
        config = {
            "format": 1,
            "model": model.model_dump(mode="json"),
            "special_tokens": self.tokenizer.special_ids,
            "bos_id": self.tokenizer.bos_id,
            "eos_id": self.tokenizer.eos_id,
            "tokenizer": self.tokenizer.fingerprint,
            "sequence_length": self.recipe.training.sequence_length,
            **record_location(self.data_directory, self.path),
            "provenance": [*self.provenance, trained],
        }
        return {
            "config.json": json.dumps(config, indent=1),
            "tokenizer.json": self.tokenizer.to_json(),
            "recipe.yaml": dump_recipe(self.recipe),
        } | ({TOKENIZER_CONFIG: tokenizer_config(self.tokenizer, self.chat_template)} if self.chat_template else {})


def _is_recipe(path: Path) -> bool:
    try:
        load_recipe(path, allow_pipe=False)
    except InlError:
        return False
    return True


def _read_environment(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ArtefactError:
        return {}


def _lasting(environment: dict[str, Any]) -> dict[str, Any]:
    """The part of an environment that does not change from one session to the next on the same machine."""
    return {name: value for name, value in environment.items() if name not in ("time", "command")}


def describe_environment() -> dict[str, Any]:
    """The versions and the machine, as far as a result may depend on them."""
    packages = {name: version(name) for name in ("inl", "torch", "numpy", "tokenizers", "pyarrow", "safetensors")}
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": packages,
        "platform": platform.platform(),
        "processor_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "git": _git_revision(),
    }


def _git_revision() -> str | None:
    """The checkout's commit, when this runs from one."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=5, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
