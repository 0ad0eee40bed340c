"""`inl inspect`: the key facts of a recipe, a data set, a run or a checkpoint, whichever a path holds.

- An overview is named sections, each a mapping of facts or a list of rows; what is printed is what --json writes.
- What can be read of a damaged artefact is shown, with the problem beside it.
"""

import math
import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, RootModel

from inl_core.analysis.planning import count_parameters, meta_model, plan_recipe
from inl_core.corpus.manifest import MANIFEST, QUARANTINE, WORK, Manifest, load_manifest, verify
from inl_core.errors import ArtefactError, RecipeError
from inl_core.files import open_regular, parse_json_object, read_record
from inl_core.inference.checkpoint_files import (
    PROGRESS,
    Scalar,
    checkpoint_step,
    is_checkpoint,
    list_checkpoints,
    read_config,
    verify_checkpoint,
)
from inl_core.inference.loading import fitting_model, read_model_config
from inl_core.recipe import ExcitationConfig, IntegratorConfig, ModelConfig
from inl_core.recipe.load import load_recipe
from inl_core.recipe.shipped import find_recipe
from inl_core.training.checkpoint import read_progress
from inl_core.training.metrics import stream_metrics
from inl_core.training.run_data import data_directory

Facts = dict[str, Any]
Rows = list[dict[str, Any]]

_RUN_FILES = ("checkpoints", "metrics.jsonl", "environment.json")
_BARS = [chr(0x2581 + level) for level in range(8)]
_CURVE_WIDTH = 60
_LONGEST_REASON, _MOST_REASONS = 1 << 20, 100_000


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
    """The overview of whatever `path` is.

    Raises:
        ArtefactError: it is none of the four kinds.
        RecipeError: the recipe cannot be used.
    """
    if path.suffix in (".yaml", ".yml") or (not os.path.lexists(path) and find_recipe(path) != path):
        return inspect_recipe(path)
    if not os.path.lexists(path):
        raise ArtefactError(f"{path}: no such file or directory")
    if path.is_dir() and is_checkpoint(path):
        return inspect_checkpoint(path)
    for inspect_kind, names in ((inspect_run, _RUN_FILES), (inspect_data, (MANIFEST, WORK))):
        if any((path / name).exists() for name in names):
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
    sources = recipe.data.sources or (manifest.settings["sources"] if manifest else ())
    data: Facts = {"sources": list(sources), "directory": directory, "prepared": manifest is not None}
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
        config = read_config(path)
        model = read_model_config(path, config)
    except ArtefactError as error:
        raise ArtefactError(problem or str(error)) from error
    # A damaged configuration may ask for a million layers: parameters are counted only if it fits the weights.
    misfit = _problem(lambda: fitting_model(path, model))
    progress: dict[str, Any] = {}
    if problem is None and os.path.lexists(path / PROGRESS):
        try:
            progress = read_progress(path).model_dump()
        except ArtefactError as error:
            problem = str(error)
    problem = problem or misfit
    kept = ("samples", "tokens", "seconds", "world_size", "data_fingerprint")
    step = progress.get("step", checkpoint_step(path))
    facts = {"step": step, "intact": problem is None, **{key: progress.get(key) for key in kept}}
    facts |= {"tokenizer": config.tokenizer, "sequence_length": config.sequence_length}
    sections = {
        "checkpoint": facts,
        **model_sections(model, counted=misfit is None),
        "files": _files(path),
        "provenance": config.provenance,
    }
    return Overview("checkpoint", path, sections, problem)


def inspect_run(path: Path) -> Overview:
    """How far it is, its losses and evaluations, its checkpoints, and where it ran."""
    problems: list[str] = []

    def read(name: str, how: Callable[[Path], Any]) -> Any:
        """What a file of the run holds; None where it is missing or damaged, and the rest is shown all the same."""
        try:
            return how(path / name) if os.path.lexists(path / name) else None
        except (ArtefactError, RecipeError) as error:
            problems.append(str(error))
            return None

    recipe = read("recipe.yaml", lambda file: load_recipe(file, allow_pipe=False))
    stop = read("preempted.json", lambda file: read_record(file, _Preempted))
    history = _History()
    read("metrics.jsonl", history.read)
    checkpoints = [_checkpoint_row(checkpoint) for checkpoint in list_checkpoints(path / "checkpoints")]
    sections: dict[str, Facts | Rows] = {
        "run": {
            "recipe": recipe.name if recipe else None,
            "preset": recipe.model.preset if recipe else None,
            "step": max([history.step, *(row["step"] for row in checkpoints if row["intact"])]),
            "steps_planned": recipe.training.num_steps if recipe else None,
            "stopped_by": stop.signal if stop else None,
            **history.remarks,
        }
    }
    if losses := history.losses:
        sections["last step"] = history.last
        figures = {"first": losses[0], "lowest": min(losses), "last": losses[-1]}
        sections["loss"] = {**figures, "curve": sparkline(losses)}
    if history.evaluations:
        sections["evaluations"] = history.evaluations
    sections["checkpoints"] = checkpoints
    if record := read("environment.json", lambda file: read_record(file, _Environment)):
        groups = (value if isinstance(value, dict) else {key: value} for key, value in record.root.items())
        sections["environment"] = {key: value for group in groups for key, value in group.items()}
    return Overview("run", path, sections, problems[0] if problems else None)


class _Preempted(BaseModel):
    """preempted.json, as far as it is shown."""

    model_config = ConfigDict(frozen=True, strict=True)

    signal: str


class _Environment(RootModel[dict[str, Scalar | list[Scalar] | dict[str, Scalar]]]):
    """environment.json: facts, lists of facts, and groups of them."""

    model_config = ConfigDict(frozen=True, strict=True)


class _History:
    """What is shown of metrics.jsonl, which may hold millions of rows."""

    def __init__(self) -> None:
        self.step = 0
        self.last: dict[str, Any] = {}
        self.losses: list[float] = []
        self.evaluations: Rows = []
        self.remarks: Facts = {}

    def read(self, file: Path) -> None:
        """Go through the file once. Where it is damaged it raises ArtefactError and keeps what came before."""
        for row in stream_metrics(file.parent, lambda text: self.remarks.update(note=text)):
            self.step = row["step"]
            if row.get("loss") is not None:
                self.last = row
                self.losses.append(row["loss"])
            if "validation_loss" in row:
                names = ("loss", "perplexity", "bits_per_byte", "accuracy", "iterations")
                scores = {name: row.get(f"validation_{name}") for name in names}
                reach, scored = {"step": row["step"], "tokens": row.get("tokens")}, row.get("validation_tokens")
                self.evaluations.append({**reach, **scores, "scored_tokens": scored})


def model_sections(config: ModelConfig, *, counted: bool = True) -> dict[str, Facts | Rows]:
    """The architecture, the integrator or stream and, with `counted`, the parameters by part."""
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
    if config.stream_terms:
        sections["stream"] = _stream_facts(config)
    if counted:
        counts = count_parameters(meta_model(config))
        total = sum(counts.values())
        parameters = [{"part": part, "number": number, "share": number / total} for part, number in counts.items()]
        sections["parameters"] = [*parameters, {"part": "total", "number": total, "share": 1.0}]
    return sections


def sparkline(values: list[float], width: int = _CURVE_WIDTH) -> str:
    """A curve as one line of bars of eight heights: the means of at most `width` equal parts of its finite values."""
    values = [value for value in values if math.isfinite(value)]
    count = min(width, len(values))
    edges = [index * len(values) // count for index in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    if not means:
        return ""
    low, spread = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BARS[min(7, int(8 * (mean - low) / spread))] for mean in means)


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
    """The ten most frequent reasons for setting rows aside, and how many rows each."""
    reasons: Counter[str] = Counter()
    with open_regular(path) as file:
        for line in islice(iter(lambda: file.readline(_LONGEST_REASON), b""), _MOST_REASONS):
            try:
                reason = parse_json_object(line.decode("utf-8"), str(path)).get("reason")
            except (ArtefactError, UnicodeDecodeError):
                reason = None
            reasons[reason if isinstance(reason, str) else "(a damaged row)"] += 1
    return [{"reason": reason, "rows": count} for reason, count in reasons.most_common(10)]


def _integrator_facts(config: IntegratorConfig) -> Facts:
    threshold = config.early_stopping.convergence_threshold
    controller = config.controller
    return {
        "iterations": config.iterations_per_layer or config.num_iterations,
        "dt": config.dt,
        "mu": config.mu.form,
        "candidate_velocity": config.candidate,
        "carries_velocity": config.carry_velocity,
        "readout": config.readout,
        "dynamic_alpha": config.dynamic_alpha,
        "excitation": _excitation_text(config.excitation),
        "controller": f"{controller.width} wide, {'shared' if controller.shared else 'one a layer'}",
        "early_stopping": f"below {threshold:g}" if threshold else "off",
    }


def _stream_facts(config: ModelConfig) -> Facts:
    excitation = config.stream.excitation if config.stream else None
    places = [name for name in ("embedding", "attention", "feed_forward") if config.transports_at(name)]
    return {
        "steps": 2 * config.num_layers,
        "terms": list(config.stream_terms),
        "transport_at": places,
        "excitation": _excitation_text(excitation) if excitation else None,
        "dynamic_alpha": bool(config.stream and config.stream.dynamic_alpha),
        "gate": 1,
        "dt": 1,
    }


def _excitation_text(excitation: ExcitationConfig) -> str:
    return f"A {excitation.amplitude:g} at the start, {excitation.sparsity:.0%} of the dimensions"


def _files(path: Path) -> Rows:
    """Name and size of every file below a directory, except those that a live run removes at this moment."""
    rows = []
    for file in sorted(path.rglob("*")):
        try:
            status = file.stat()
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            rows.append({"name": file.relative_to(path).as_posix(), "bytes": status.st_size})
    return rows


def _checkpoint_row(path: Path) -> dict[str, Any]:
    problem = _problem(lambda: verify_checkpoint(path))
    size = sum(row["bytes"] for row in _files(path))
    return {"step": checkpoint_step(path), "bytes": size, "intact": problem is None, "problem": problem}
