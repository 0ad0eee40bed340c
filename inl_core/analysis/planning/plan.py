"""What a recipe will cost, computed on the meta device before anything is allocated.

- `Plan` holds the figures every run starts from (`inl train` shows them); `ModelPlan` all that `inl plan` shows.
- A model by itself, a preset at a size, is planned as a recipe of one step with windows as long as its context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inl_core.analysis.planning import documents
from inl_core.analysis.planning.memory import (
    CACHE_TYPES,
    Memory,
    cache_bytes,
    memory_table,
    stream_bytes,
    trace_modes,
)
from inl_core.analysis.planning.optimisations import Saving, compare_optimisations
from inl_core.analysis.planning.parameters import count_parameters, meta_model
from inl_core.corpus.manifest import MANIFEST, load_manifest
from inl_core.kernels import Choice, choose
from inl_core.model.flops import flops_by_part, training_flops
from inl_core.recipe import ModelConfig, Recipe
from inl_core.recipe.load import recipe_from_mapping
from inl_core.training.optimizers import States, count_states
from inl_core.training.precision import uses_bf16
from inl_core.training.run_data import data_directory

if TYPE_CHECKING:
    import torch

_MANY_EPOCHS = 40
"""Beyond about so many passes over the same text, more of them are worth nothing (arXiv 2305.16264)."""
_OTHER_ITERATIONS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Plan:
    """The figures a run starts from."""

    parameters: dict[str, int]
    num_steps: int
    train_tokens: int
    epochs: float
    flops_per_token: int
    """Training FLOPs of one token: forward and backward."""
    state_bytes: int
    """Weights, gradients and optimizer moments."""
    activation_bytes: int
    """Kept for the backward pass of one micro-batch."""
    checkpoint_bytes: int
    disk_bytes: int
    """All checkpoints that retention may hold at once."""

    @property
    def warning(self) -> str | None:
        """What to say of a run that repeats its data too often; None where it does not."""
        if self.epochs <= _MANY_EPOCHS:
            return None
        return (
            f"{self.num_steps:,} steps go through the data {self.epochs:,.0f} times, and beyond about {_MANY_EPOCHS} "
            "times a model only learns it by heart; lower training.steps or training.tokens, or name more text"
        )

    @property
    def total_flops(self) -> float:
        """Training FLOPs of the whole run."""
        return float(self.flops_per_token) * self.train_tokens

    @property
    def total_parameters(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def non_embedding_parameters(self) -> int:
        """All but the embedding and the head."""
        return self.total_parameters - self.parameters.get("embedding", 0) - self.parameters.get("head", 0)


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary a plan counts with, and the prepared data where there is some."""

    size: int
    source: str
    num_windows: int | None = None
    """Training windows of the prepared data set."""


@dataclass(frozen=True)
class ModelPlan:
    """Everything `inl plan` shows."""

    recipe: Recipe
    config: ModelConfig
    """The model, with its vocabulary."""
    vocabulary: Vocabulary
    bf16: bool
    operations: dict[str, Choice]
    """What computes the integrator's iterations on this machine."""
    run: Plan
    savings: list[Saving]
    flops: dict[str, int]
    """Forward FLOPs of one token by part."""
    flops_by_iterations: dict[int, int]
    """T -> training FLOPs of one token; empty without an integrator."""
    flops_by_recomputation: dict[str, int]
    """Mode -> FLOPs that the machine does for one token."""
    cache: dict[str, int]
    """Type -> bytes of one token in the key-value cache."""
    cache_of_sequence: int
    """Bytes that a sequence takes in the cache beside its tokens."""
    states: States
    memory: list[Memory]


def plan_recipe(recipe: Recipe, *, vocab_size: int, num_windows: int | None = None, world_size: int = 1) -> Plan:
    """The plan of a recipe for a vocabulary; `num_windows` of the data set gives the epochs."""
    config, settings = recipe.model.with_vocab_size(vocab_size), recipe.training
    operations = plans_operations(recipe, config)
    saved = trace_modes(recipe, config, bf16=plans_bf16(recipe), operations=operations, modes=(settings.recomputation,))
    return _run_plan(recipe, config, num_windows, saved[settings.recomputation].bytes(settings.micro_batch(world_size)))


def plan_model(recipe: Recipe) -> ModelPlan:
    """All figures of a recipe; its vocabulary and epochs are those of the prepared data where there is some."""
    vocabulary = find_vocabulary(recipe)
    config, settings = recipe.model.with_vocab_size(vocabulary.size), recipe.training
    length, bf16 = settings.sequence_length, plans_bf16(recipe)
    operations = plans_operations(recipe, config)
    saved = trace_modes(recipe, config, bf16=bf16, operations=operations)
    iterations = sorted({*_OTHER_ITERATIONS, round(config.mean_iterations)}) if config.integrator else []
    return ModelPlan(
        recipe=recipe,
        config=config,
        vocabulary=vocabulary,
        bf16=bf16,
        operations=operations,
        run=_run_plan(
            recipe, config, vocabulary.num_windows, saved[settings.recomputation].bytes(settings.micro_batch(1))
        ),
        savings=compare_optimisations(config),
        flops=flops_by_part(config, length),
        flops_by_iterations={count: training_flops(config, length, iterations=count) for count in iterations},
        flops_by_recomputation={mode: training_flops(config, length, recomputation=mode) for mode in saved},
        cache={name: cache_bytes(config, size) for name, size in CACHE_TYPES.items()},
        cache_of_sequence=stream_bytes(config),
        states=count_states(meta_model(config), settings.optimizer),
        memory=memory_table(recipe, config, saved, bf16=bf16),
    )


def recipe_of_model(
    model: dict[str, Any],
    *,
    sequence_length: int | None = None,
    micro_batch_size: int | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """A recipe of one step around a model: windows of its whole context, one at a time, bf16; RecipeError if it is bad.

    Args:
        model: keys of the model section, preset and size say; the documents' vocabulary where it names none.
        overrides: as of `--set`; those of the training section too.
    """
    rows = micro_batch_size or 1

    def build(length: int, texts: Sequence[str]) -> Recipe:
        batch = {"sequence_length": length, "batch_tokens": rows * length, "micro_batch_size": rows}
        training = {"steps": 1, "precision": "bf16", **batch}
        values = {"name": "model", "model": {"vocab_size": documents.VOCABULARY, **model}, "training": training}
        return recipe_from_mapping(values, texts, "inl plan")

    of_model = [text for text in overrides if text.lstrip().startswith("model.")]
    return build(sequence_length or build(1, of_model).model.max_seq_len, overrides)


def find_vocabulary(recipe: Recipe) -> Vocabulary:
    """The recipe's own vocabulary size, else that of the prepared data, else that of the tokenizer to be trained."""
    directory = data_directory(recipe)
    is_there = recipe.data.is_directory_alone or (directory / MANIFEST).is_file()
    manifest = load_manifest(directory) if is_there else None
    tokens = manifest.splits["train"].tokens if manifest else 0
    num_windows = max(1, (tokens - 1) // recipe.training.sequence_length) if manifest else None
    if recipe.model.vocab_size:
        return Vocabulary(recipe.model.vocab_size, "model.vocab_size", num_windows)
    if manifest:
        return Vocabulary(manifest.vocab_size, f"the data set {directory}", num_windows)
    return Vocabulary(recipe.data.tokenizer.vocab_size, "data.tokenizer.vocab_size")


def plans_bf16(recipe: Recipe) -> bool:
    """Whether forward passes would run under bfloat16 autocast; `auto` is decided by this machine."""
    return uses_bf16(recipe, _planned_device(recipe))


def plans_operations(recipe: Recipe, config: ModelConfig) -> dict[str, Choice]:
    """How each part of the model is computed on this machine, and why."""
    where = _planned_device(recipe)
    return choose(config, where, operations=recipe.training.operations, bf16=uses_bf16(recipe, where))


def _planned_device(recipe: Recipe) -> "torch.device":
    import torch

    has_gpu = recipe.training.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if has_gpu else "cpu")


def _run_plan(recipe: Recipe, config: ModelConfig, num_windows: int | None, activation_bytes: int) -> Plan:
    settings, model = recipe.training, meta_model(config)
    states = count_states(model, settings.optimizer)
    keep = settings.checkpoint
    # best, and the one being written beside those that stay
    held = keep.keep_last + int(keep.keep_best) + 1
    held += settings.num_steps // keep.keep_every if keep.keep_every else 0
    return Plan(
        parameters=count_parameters(model),
        num_steps=settings.num_steps,
        train_tokens=settings.num_steps * settings.batch_tokens,
        epochs=settings.num_steps * settings.batch_size / num_windows if num_windows else 0.0,
        flops_per_token=training_flops(config, settings.sequence_length),
        state_bytes=states.total,
        activation_bytes=activation_bytes,
        checkpoint_bytes=states.checkpoint,
        disk_bytes=states.checkpoint * held,
    )
