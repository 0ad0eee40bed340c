"""Key facts of a recipe, a data set, a run or a checkpoint, whichever a path holds.

- An overview is named sections, each a mapping of facts or a list of rows; what is printed is what --json writes.
- What can be read of a damaged artefact is shown, with the problem beside it.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from inl_core.analysis.planning import count_parameters, meta_model, plan_recipe
from inl_core.corpus.manifest import MANIFEST, QUARANTINE, WORK, Manifest, load_manifest, verify
from inl_core.errors import ArtefactError
from inl_core.inference.artefacts import (
    checkpoint_step,
    list_checkpoints,
    read_json,
    read_model_config,
    verify_checkpoint,
)
from inl_core.recipe import IntegratorConfig, ModelConfig, Recipe
from inl_core.recipe.load import load_recipe
from inl_core.training.launch import data_directory
from inl_core.training.metrics import read_metrics

Facts = dict[str, Any]
Rows = list[dict[str, Any]]

_BARS = [chr(0x2581 + level) for level in range(8)]
_CURVE_WIDTH = 60
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Overview:
    """What a path holds."""

    kind: str
    """recipe, data set, run or checkpoint."""
    path: Path
    sections: dict[str, Facts | Rows]
    problem: str | None = None
    """Why it cannot be used as it is, or None."""


def inspect_path(path: Path) -> Overview:
    """The overview of whatever `path` is; ArtefactError when it is none of the kinds, RecipeError for a bad recipe."""
    if path.suffix in (".yaml", ".yml"):
        return inspect_recipe(path)
    if not path.exists():
        near = [str(place) for place in (Path("runs") / path, Path("data") / path) if place.is_dir()]
        raise ArtefactError(f"{path}: no such file or directory" + (f"; did you mean {near[0]}?" if near else ""))
    for is_kind, inspect_kind in _KINDS:
        if is_kind(path):
            return inspect_kind(path)
    raise ArtefactError(f"{path}: is no recipe (a .yaml file), data set, run or checkpoint (directories)")


def inspect_recipe(path: Path) -> Overview:
    """The model, its parameters, the plan, and the data if it is prepared."""
    recipe = load_recipe(path)
    directory = data_directory(recipe)
    manifest = load_manifest(directory) if (directory / MANIFEST).is_file() else None
    vocab_size = recipe.model.vocab_size or (manifest.vocab_size if manifest else recipe.data.tokenizer.vocab_size)
    settings = recipe.training
    num_windows = (manifest.splits["train"].tokens - 1) // settings.sequence_length if manifest else None
    plan = plan_recipe(recipe, vocab_size=vocab_size, num_windows=num_windows)
    data: Facts = {"sources": list(recipe.data.sources), "directory": directory, "prepared": manifest is not None}
    if manifest:
        data |= {"train_tokens": manifest.splits["train"].tokens, "documents": manifest.splits["train"].documents}
    figures = {key: value for key, value in asdict(plan).items() if key != "parameters"}
    figures |= {
        "epochs": plan.epochs if manifest else None,
        "total_flops": plan.total_flops,
        "batch_tokens": settings.batch_tokens,
        "sequence_length": settings.sequence_length,
        "optimizer": settings.optimizer.name,
        "learning_rate": settings.optimizer.learning_rate,
        "schedule": settings.schedule.name,
        "seed": settings.seed,
    }
    sections = {
        "recipe": {"name": recipe.name},
        **model_sections(recipe.model.with_vocab_size(vocab_size)),
        "plan": figures,
        "data": data,
    }
    return Overview("recipe", path, sections)


def inspect_data(path: Path) -> Overview:
    """Documents, tokens and bytes of each split, the tokenizer, what was dropped, and whether it is intact."""
    manifest = load_manifest(path)
    problem = _problem(lambda: verify(path))
    sections = {
        "data set": {
            "fingerprint": manifest.fingerprint,
            "intact": problem is None,
            "vocabulary": manifest.vocab_size,
            "tokenizer": manifest.tokenizer_fingerprint,
            "document_policy": manifest.document_policy,
            "has_prompts": manifest.has_prompts,
            "bytes_on_disk": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
            "notes": list(manifest.notes),
        },
        "splits": _splits(manifest),
        "rows": {
            "read": manifest.rows,
            "duplicates": manifest.duplicates,
            "empty": manifest.empty,
            "quarantined": manifest.quarantined,
        },
        "sources": [{"name": s.name, "format": s.format, "bytes": s.size} for s in manifest.sources],
    }
    if manifest.quarantined:
        sections["quarantine"] = _quarantine(path / QUARANTINE)
    return Overview("data set", path, sections, problem)


def inspect_checkpoint(path: Path) -> Overview:
    """How far it was trained, the model, its files and where it comes from."""
    problem = _problem(lambda: verify_checkpoint(path))
    try:
        config = read_json(path / "config.json")
        model = read_model_config(path, config)
    except ArtefactError as error:
        raise ArtefactError(problem or str(error)) from error
    progress_path = path / "training_state" / "progress.json"
    progress = read_json(progress_path) if progress_path.is_file() and problem is None else {}
    kept = ("samples", "tokens", "seconds", "world_size", "data_fingerprint")
    facts = {"step": checkpoint_step(path), "intact": problem is None, **{key: progress.get(key) for key in kept}}
    facts |= {"tokenizer": config.get("tokenizer"), "sequence_length": config.get("sequence_length")}
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    sections = {
        "checkpoint": facts,
        **model_sections(model),
        "files": [{"name": file.relative_to(path).as_posix(), "bytes": file.stat().st_size} for file in files],
        "provenance": list(config.get("provenance", [])),
    }
    return Overview("checkpoint", path, sections, problem)


def inspect_run(path: Path) -> Overview:
    """How far it is, its losses and evaluations, its checkpoints, and where it ran."""
    recipe_path = path / "recipe.yaml"
    recipe = load_recipe(recipe_path) if recipe_path.is_file() else None
    rows = read_metrics(path)
    training = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "validation_loss" in row]
    environment = path / "environment.json"
    checkpoints = [_checkpoint_row(checkpoint) for checkpoint in list_checkpoints(path / "checkpoints")]
    step = max([0, *(row["step"] for row in (*rows[-1:], *checkpoints))])
    sections: dict[str, Facts | Rows] = {"run": _run_facts(path, recipe, step)}
    if training:
        sections["last step"] = training[-1]
        sections["loss"] = _curve([row["loss"] for row in training])
    if evaluations:
        sections["evaluations"] = [_evaluation_row(row) for row in evaluations]
    sections["checkpoints"] = checkpoints
    if environment.is_file():
        sections["environment"] = _flat(read_json(environment))
    return Overview("run", path, sections)


def model_sections(config: ModelConfig) -> dict[str, Facts | Rows]:
    """The architecture, the integrator and the parameters by part."""
    counts = count_parameters(meta_model(config))
    total = sum(counts.values())
    parameters = [{"part": part, "number": number, "share": number / total} for part, number in counts.items()]
    sections: dict[str, Facts | Rows] = {
        "model": {
            "preset": config.preset,
            "d_model": config.d_model,
            "layers": config.num_layers,
            "heads": config.num_heads,
            "key_value_heads": config.key_value_heads,
            "feed_forward": f"{config.feed_forward}, {config.hidden_dim} wide",
            "context": config.max_seq_len,
            "positions": config.positions,
            "vocabulary": config.vocab_size,
            "embedding_rank": config.rank,
        }
    }
    if config.integrator:
        sections["integrator"] = _integrator_facts(config.integrator)
    sections["parameters"] = [*parameters, {"part": "total", "number": total, "share": 1.0}]
    return sections


def sparkline(values: list[float], width: int = _CURVE_WIDTH) -> str:
    """A curve as one line of text: means of at most `width` equal parts, lowest to highest in eight steps."""
    count = min(width, len(values))
    edges = [index * len(values) // count for index in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    if not means:
        return ""
    low, spread = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BARS[min(7, int(8 * (mean - low) / spread))] for mean in means)


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("checkpoints", "metrics.jsonl", "environment.json"))


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and ((path / _WEIGHTS).exists() or path.name.startswith("step-"))


def _is_data(path: Path) -> bool:
    return any((path / name).exists() for name in (MANIFEST, WORK))


_KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Overview]], ...] = (
    (_is_checkpoint, inspect_checkpoint),
    (_is_run, inspect_run),
    (_is_data, inspect_data),
)


def _problem(check: Callable[[], Any]) -> str | None:
    try:
        check()
    except ArtefactError as error:
        return str(error)
    return None


def _splits(manifest: Manifest) -> Rows:
    return [
        {
            "split": name,
            "documents": split.documents,
            "tokens": split.tokens,
            "bytes": split.bytes,
            "shards": len(split.shards),
            "tokens_per_document": split.tokens / split.documents if split.documents else None,
            "bytes_per_token": split.bytes / split.tokens if split.tokens else None,
        }
        for name, split in manifest.splits.items()
    ]


def _quarantine(path: Path) -> Rows:
    """How many rows were set aside for each reason, the most frequent first."""
    with path.open(encoding="utf-8") as file:
        reasons = Counter(json.loads(line)["reason"] for line in islice(file, 100_000))
    return [{"reason": reason, "rows": count} for reason, count in reasons.most_common(10)]


def _integrator_facts(config: IntegratorConfig) -> Facts:
    threshold = config.early_stopping.convergence_threshold
    excitation, controller = config.excitation, config.controller
    return {
        "iterations": config.iterations_per_layer or config.num_iterations,
        "dt": config.dt,
        "mu": config.mu.form,
        "candidate_velocity": config.candidate,
        "carries_velocity": config.carry_velocity,
        "readout": config.readout,
        "dynamic_alpha": config.dynamic_alpha,
        "excitation": f"A {excitation.amplitude:g} at the start, {excitation.sparsity:.0%} of the dimensions",
        "controller": f"{controller.width} wide, {'shared' if controller.shared else 'one a layer'}",
        "early_stopping": f"below {threshold:g}" if threshold else "off",
    }


def _run_facts(path: Path, recipe: Recipe | None, step: int) -> Facts:
    preempted = path / "preempted.json"
    return {
        "recipe": recipe.name if recipe else None,
        "preset": recipe.model.preset if recipe else None,
        "step": step,
        "steps_planned": recipe.training.num_steps if recipe else None,
        "stopped_by": read_json(preempted).get("signal") if preempted.is_file() else None,
    }


def _evaluation_row(row: dict[str, Any]) -> dict[str, Any]:
    scores = ("loss", "perplexity", "bits_per_byte", "accuracy", "iterations")
    scored = {name: row.get(f"validation_{name}") for name in scores}
    return {"step": row["step"], "tokens": row.get("tokens"), **scored, "scored_tokens": row.get("validation_tokens")}


def _curve(losses: list[float]) -> Facts:
    return {"first": losses[0], "lowest": min(losses), "last": losses[-1], "curve": sparkline(losses)}


def _checkpoint_row(path: Path) -> dict[str, Any]:
    problem = _problem(lambda: verify_checkpoint(path))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"step": checkpoint_step(path), "bytes": size, "intact": problem is None, "problem": problem}


def _flat(values: dict[str, Any]) -> Facts:
    """Mappings inside become their own facts."""
    flat: Facts = {}
    for key, value in values.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat
