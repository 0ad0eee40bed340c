"""From what the user names to the candidates: a recipe or a preset with dimensions, against another or Llama.

- A preset as the other one takes the first one's dimensions (d_model, layers, heads, feed-forward, context, vocabulary)
  and its training section; `llama` too, with a SwiGLU of two thirds of the feed-forward's width, rounded down to a
  multiple of 64.
- A recipe as the other one keeps its own model, and takes the batch, the length and, where it names none, the
  vocabulary of the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from inl_core.analysis.bench.llama_work import require_transformers
from inl_core.analysis.bench.settings import Candidate
from inl_core.analysis.planning import find_vocabulary
from inl_core.analysis.planning.documents import VOCABULARY
from inl_core.errors import RecipeError
from inl_core.recipe import Recipe
from inl_core.recipe.load import load_recipe, recipe_from_mapping
from inl_core.recipe.presets import DEFAULT_PRESET, PRESETS
from inl_core.recipe.shipped import shipped_recipes

LLAMA, UNCACHED = "llama", "uncached"
_DIMENSIONS = ("d_model", "num_layers", "num_heads", "num_kv_heads", "feedforward_dim", "max_seq_len", "vocab_size")
_PRESET_BATCH, _PRESET_LENGTH, _PRESET_CONTEXT = 4, 256, 1024


@dataclass(frozen=True)
class Choice:
    """What the command line says of the first candidate: a recipe's file, or a preset and keys of the model section."""

    recipe: Path | None = None
    preset: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    """Keys of the model section that have options of their own, as far as they are given."""
    overrides: Sequence[str] = ()
    """KEY=VALUE texts, as of `--set`."""
    batch_size: int | None = None
    sequence_length: int | None = None


def first_candidate(choice: Choice, *, context: int | None = None) -> Candidate:
    """The candidate the command is about, its vocabulary resolved.

    Args:
        context: positions a row needs where that is not the training length (decoding).

    Raises:
        RecipeError: a bad recipe, or a context longer than the model's.
    """
    recipe = _of_preset(choice, context) if choice.recipe is None else _of_file(choice, choice.recipe)
    if context and context > recipe.model.max_seq_len:
        raise RecipeError(
            f"{context:,} positions are needed and model.max_seq_len is {recipe.model.max_seq_len:,}: "
            f"--set model.max_seq_len={context}, or fewer tokens"
        )
    return _candidate(recipe.model.preset if choice.recipe is None else recipe.name, recipe)


def other_candidate(against: str, first: Candidate, overrides: Sequence[str] = ()) -> Candidate:
    """What the first candidate is measured against: `llama`, `uncached`, a preset's name, or a recipe's path.

    Raises:
        RecipeError: no such preset or recipe, a bad one, or `transformers` is missing.
    """
    if against in (LLAMA, UNCACHED) and overrides:
        raise RecipeError(f"--against-set {overrides[0]}: --against {against} takes no overrides")
    if against == UNCACHED:
        return Candidate(f"{first.name} uncached", "uncached", first.recipe)
    if against == LLAMA:
        require_transformers()
        rounding = {"feed_forward_rounding": "down_64", "norm_eps": first.config.norm_eps}
        return Candidate(LLAMA, "llama", _of_dimensions("transformer", first, rounding, ()))
    if against in PRESETS:
        other = _candidate(against, _of_dimensions(against, first, {}, overrides))
    elif against.endswith((".yaml", ".yml")) or Path(against).exists() or against in shipped_recipes():
        training = first.recipe.training
        batch = _batch_overrides(training.batch_size, training.sequence_length)
        recipe = load_recipe(against, [*overrides, *batch])
        vocab_size = recipe.model.vocab_size or first.config.vocab_size or 0
        other = _candidate(recipe.name, _with_vocabulary(recipe, vocab_size))
    else:
        raise RecipeError(f"--against {against}: neither {', '.join((LLAMA, UNCACHED, *PRESETS))} nor a recipe")
    return replace(other, name=f"{other.name} (2)") if other.name == first.name else other


def _of_preset(choice: Choice, context: int | None) -> Recipe:
    rows, length = choice.batch_size or _PRESET_BATCH, choice.sequence_length or _PRESET_LENGTH
    model = {"preset": choice.preset or DEFAULT_PRESET, "vocab_size": VOCABULARY, **choice.model}
    if "size" not in model:
        model.setdefault("max_seq_len", max(_PRESET_CONTEXT, length, context or 0))
    training = {"steps": 1, "sequence_length": length, "batch_tokens": rows * length}
    return recipe_from_mapping({"name": "model", "model": model, "training": training}, choice.overrides, "inl bench")


def _of_file(choice: Choice, path: Path) -> Recipe:
    overrides = [*choice.overrides, *(f"model.{key}={value}" for key, value in choice.model.items())]
    if choice.batch_size or choice.sequence_length:
        own = load_recipe(path, choice.overrides).training
        rows, length = choice.batch_size or own.batch_size, choice.sequence_length or own.sequence_length
        overrides += _batch_overrides(rows, length)
    recipe = load_recipe(path, overrides)
    return _with_vocabulary(recipe, find_vocabulary(recipe).size)


def _with_vocabulary(recipe: Recipe, vocab_size: int) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.with_vocab_size(vocab_size)})


def _batch_overrides(rows: int, length: int) -> list[str]:
    return [
        f"training.sequence_length={length}",
        f"training.batch_tokens={rows * length}",
        "training.micro_batch_size=null",
    ]


def _of_dimensions(preset: str, first: Candidate, model: dict[str, Any], overrides: Sequence[str]) -> Recipe:
    """A preset in the first candidate's dimensions, trained as it is."""
    config = first.config
    same = {key: getattr(config, key) for key in _DIMENSIONS}
    same["feedforward_dim"] = config.feedforward_dim or 4 * config.d_model
    training = first.recipe.training.model_dump(mode="json")
    if PRESETS[preset]["integrator"] is None:  # then it cannot have an integrator's losses, cycles and recomputation
        training |= {"losses": {}, "cycle": None}
        if training["recomputation"] == "integrator":
            training["recomputation"] = "none"
    values = {"name": preset, "model": {"preset": preset, **same, **model}, "training": training}
    return recipe_from_mapping(values, overrides, f"--against {preset}")


def _candidate(name: str, recipe: Recipe) -> Candidate:
    """A model of ours, whose name also says how many iterations it has."""
    config = recipe.model
    return Candidate(f"{name} T={config.mean_iterations:g}" if config.integrator else name, "inl", recipe)
