"""The golden loss curves: what is trained, how it is trained, and how far a curve is from the recorded one.

- Each `*.json` beside this file is one curve: its `recipe` is laid over `COMMON`, and the rest was recorded.
- The recorded losses come from training in float64, whose rounding errors are too small to matter. Training in float32
  is held to the same numbers, with a wider tolerance, by whatever operations it computes.
- Every import of the package's own modules is in this file, so that moving a module changes no other one here.
"""

import json
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from inl_core.recipe import recipe_from_mapping
from inl_core.recipe.presets import PRESETS, merge
from inl_core.training.distributed import start_world
from inl_core.training.observer import Observer
from inl_core.training.run import RunFiles
from inl_core.training.run_data import open_data
from inl_core.training.session import empty_model
from inl_core.training.trainer import Trainer

__all__ = ["NUM_STEPS", "PRESETS", "TOLERANCE", "Curve", "curve_files", "merge", "read_curve", "train"]

NUM_STEPS = 200
TOLERANCE = {"float32": 1e-5, "float64": 1e-6}
"""The largest relative difference from the recorded curve, by the weights' data type; README.md says why."""

COMMON: dict[str, Any] = {
    "name": "golden",
    "model": {"d_model": 64, "num_layers": 2, "num_heads": 2, "feedforward_dim": 128, "max_seq_len": 64},
    "data": {"tokenizer": {"vocab_size": 320}, "validation_fraction": 0.05, "num_shards": 1},
    "training": {
        "steps": NUM_STEPS,
        "sequence_length": 64,
        "batch_tokens": 256,
        "precision": "fp32",
        "device": "cpu",
        # Small enough that rounding errors do not grow beyond the tolerance. A larger epsilon keeps AdamW from turning
        # a gradient that is nothing but rounding error into a whole step.
        "optimizer": {"learning_rate": 3e-4, "eps": 1e-5},
        "evaluation": {"every": 50},
        "checkpoint": {"every": 0},
        "logging": {"every": 1, "dynamics_every": 0},
    },
}


@dataclass
class Curve:
    """The losses of one training run, in nats a token."""

    loss: list[float] = field(default_factory=list)
    """The task loss at each step."""
    validation_loss: dict[str, float] = field(default_factory=dict)
    """The validation loss by the number of steps done."""
    data: str = ""
    """The fingerprint of the data trained on: other data, other losses."""

    def distance(self, other: "Curve") -> float:
        """The largest relative difference over the steps and evaluations that both have."""
        shared = self.validation_loss.keys() & other.validation_loss.keys()
        pairs = [(self.validation_loss[step], other.validation_loss[step]) for step in shared]
        pairs += zip(self.loss, other.loss, strict=False)
        return max(abs(a - b) / abs(b) for a, b in pairs)


def curve_files() -> dict[str, Path]:
    """The recorded curves by name."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.json"))}


def read_curve(path: Path) -> tuple[dict[str, Any], Curve]:
    """The recipe of a curve and its recorded losses, which are empty in a file that was never recorded."""
    file = json.loads(path.read_text(encoding="utf-8"))
    return file["recipe"], Curve(file.get("loss", []), file.get("validation_loss", {}), file.get("data", ""))


class _Enough(Exception):
    """The steps that were wanted are done."""


class _Listener(Observer):
    """Keeps the losses that the trainer reports, and ends the run after `last_step`."""

    def __init__(self, curve: Curve, last_step: int) -> None:
        self.curve, self.last_step = curve, last_step

    def on_metrics(self, row: dict[str, Any]) -> None:
        self.curve.loss.append(row["loss"])

    def on_evaluation(self, step: int, evaluation: Any) -> None:
        self.curve.validation_loss[str(step)] = evaluation.loss
        if step == self.last_step:
            raise _Enough


def train(
    recipe: dict[str, Any], directory: Path, dtype: str, *, is_plain: bool = False, last_step: int = NUM_STEPS
) -> Curve:
    """Train as `recipe` laid over `COMMON` says, up to `last_step`, which must be a step with an evaluation.

    Args:
        directory: for the text and the prepared data, which are used again when they are there already.
        dtype: of the weights, "float32" or "float64".
        is_plain: whether only torch's own operations are used, and none of the package's.
    """
    text = directory / "text.jsonl"
    if not text.exists():
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in _documents()), encoding="utf-8")
    source = {"data": {"sources": [str(text)], "directory": str(directory / "data")}}
    operations = {"training": {"operations": "plain" if is_plain else "auto"}}
    settings = recipe_from_mapping(merge(merge(merge(COMMON, source), operations), recipe))
    with TemporaryDirectory() as place, start_world("cpu") as world, suppress(_Enough):
        data = open_data(settings, world)
        curve = Curve(data=data.train.fingerprint)
        model = empty_model(settings, data.tokenizer).to(getattr(torch, dtype))
        run = RunFiles(Path(place) / "run", settings, data.tokenizer, data.directory)
        run.create()
        Trainer(model, data, run, world, _Listener(curve, last_step)).fit()
    return curve


def _documents() -> Iterator[str]:
    """600 documents of 20 to 80 made-up words, in which each word is followed by one of three others.

    Only `random()` is drawn from: it is the one whose numbers Python promises to be the same in every version.
    """
    draw = random.Random(0).random

    def pick(items: Any) -> Any:
        return items[int(draw() * len(items))]

    def syllables() -> str:
        return "".join(pick("bdfklmnprst") + pick("aeiou") for _ in range(1 + int(3 * draw())))

    words = [syllables() for _ in range(60)]
    successors = [[pick(range(60)) for _ in range(3)] for _ in words]
    for _ in range(600):
        chain = [pick(range(60))]
        for _ in range(20 + int(60 * draw())):
            chain.append(successors[chain[-1]][int(3 * draw() ** 2)])
        yield " ".join(words[index] for index in chain) + "."
