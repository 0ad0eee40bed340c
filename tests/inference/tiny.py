"""Tiny models with random weights, their tokenizer, and real checkpoints and data sets of them, for the tests."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from inl_core.corpus.manifest import load_manifest
from inl_core.corpus.preparation import prepare
from inl_core.corpus.tokenizer import Tokenizer, train_tokenizer
from inl_core.inference.checkpoint_files import MANIFEST, file_digest
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import DataSettings, ModelConfig, OptimizerSettings, Recipe, TokenizerSettings
from inl_core.recipe.load import recipe_from_mapping
from inl_core.training.checkpoint import TrainState
from inl_core.training.checkpoint_writing import take_snapshot, write_snapshot
from inl_core.training.optimizers import Optimizers, build_optimizers
from inl_core.training.run import RunFiles

TEXT = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs!\n"
    "def greet(name):\n    return f'Hello, {name}'\n\n"
    "Gr\u00fc\u00dfe aus K\u00f6ln, \u3053\u3093\u306b\u3061\u306f, \U0001f600.\n"
)
PRESETS = ("v3", "v4", "v5", "transformer")


@cache
def tokenizer() -> Tokenizer:
    """About 300 tokens, bytes included."""
    return train_tokenizer(iter([TEXT] * 4), vocab_size=300)


def config(preset: str, **changes: Any) -> ModelConfig:
    """d_model 32, two layers, grouped queries; `changes` are laid over."""
    values: dict[str, Any] = {
        "preset": preset,
        "d_model": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "max_seq_len": 64,
    }
    if preset == "v3":
        values["integrator"] = {"mu": {"group_size": 8}}
        values["embedding_rank"] = 16
    integrator = {**values.get("integrator", {}), **changes.pop("integrator", {})}
    values |= {"integrator": integrator} if integrator else {}
    return ModelConfig.model_validate(values | changes)


def tiny_model(preset: str, seed: int = 0, **changes: Any) -> IntegratorLanguageModel:
    """Random weights, far enough from the initial symmetry that every part matters."""
    model = IntegratorLanguageModel(config(preset, **changes).with_vocab_size(tokenizer().vocab_size))
    perturb(model, seed)
    return model.eval()


@torch.no_grad()
def perturb(model: IntegratorLanguageModel, seed: int) -> None:
    """Initialise, then move every parameter."""
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        spread = 0.3 if parameter.dim() == 1 else 0.1
        if "output.weight" in name or "down.weight" in name:
            spread = 0.4  # the initial values are small, and the block would hardly count
        parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)


def recipe(preset: str, **changes: Any) -> Recipe:
    """A recipe for the tiny model."""
    values = {
        "name": f"tiny-{preset}",
        "model": config(preset, **changes).model_dump(mode="json"),
        "data": {"tokenizer": {"vocab_size": 300}},
        "training": {"steps": 10, "sequence_length": 32, "batch_tokens": 64},
    }
    return recipe_from_mapping(values)


def save_checkpoint(
    parent: Path, state: TrainState, model: IntegratorLanguageModel, optimizers: Optimizers, documents: dict[str, str]
) -> Path:
    """Write a snapshot of now at once; arguments and errors are those of `take_snapshot` and `write_snapshot`."""
    return write_snapshot(parent, take_snapshot(state, model, optimizers, documents))


def write_checkpoint(run: Path, preset: str = "v4", *, step: int = 7, data: Path | None = None, **changes: Any) -> Path:
    """A checkpoint as training writes it, in a run directory of its own."""
    model = tiny_model(preset, **changes)
    files = RunFiles(run, recipe(preset, **changes), tokenizer(), data or Path("data/none"))
    files.create()
    optimizers = build_optimizers(model, OptimizerSettings(), torch.device("cpu"))
    fingerprint = load_manifest(data).fingerprint if data else "none"
    state = TrainState(step=step, samples=2 * step, tokens=64 * step, data_fingerprint=fingerprint)
    return save_checkpoint(files.checkpoints, state, model, optimizers, files.documents(state))


def reseal(checkpoint: Path) -> None:
    """Make the manifest fit changed files, as if they had been saved so."""
    path = checkpoint / MANIFEST
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        entry |= {"bytes": (checkpoint / name).stat().st_size, "sha256": file_digest(checkpoint / name)}
    path.write_text(json.dumps(manifest))


def write_data(directory: Path) -> Path:
    """A prepared data set of a few documents, encoded by `tokenizer()`."""
    source = directory.with_name(directory.name + "-source")
    source.mkdir(parents=True)
    for number in range(30):
        lines = [f"Document {number}, line {line}: {TEXT[line : line + 40]!r}\n" for line in range(number, number + 6)]
        (source / f"{number:02}.txt").write_text("".join(lines))
    file = directory.with_name("tokenizer.json")
    tokenizer().save(file)
    prepare(
        DataSettings(sources=(str(source),), tokenizer=TokenizerSettings(file=file), validation_fraction=0.2), directory
    )
    return directory
