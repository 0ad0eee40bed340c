"""What one benchmark measures and how long; without torch, and small enough to be sent to the worker processes."""

from dataclasses import dataclass, fields
from typing import Literal

from inl_core.errors import RecipeError
from inl_core.recipe import ModelConfig, Recipe

Task = Literal["train", "prefill", "decode"]
Mode = Literal["eager", "compiled"]
Kind = Literal["inl", "uncached", "llama"]

_MAY_BE_ZERO = ("warmup", "gemm_size", "seed")


@dataclass(frozen=True)
class BenchSettings:
    """One benchmark: the work, and how often it is repeated."""

    task: Task
    batch_size: int = 4
    """Rows of an optimizer step or a prefill, or rows decoded side by side."""
    sequence_length: int = 256
    """Tokens of a row in training and prefill."""
    prompt_tokens: int = 32
    """Tokens of a prompt in decoding."""
    new_tokens: int = 256
    """Tokens generated for each row in decoding."""
    rounds: int = 7
    """Turns each candidate takes."""
    warmup: int = 2
    """Repetitions before the first turn; compilation happens in them."""
    steps: int = 3
    """Timed repetitions in a turn."""
    mode: Literal["eager", "compiled", "best"] = "best"
    """best measures both and takes the faster for each candidate."""
    threads: int = 1
    """Threads of each worker."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the models run."""
    bf16: bool = False
    """Run forward passes under bfloat16 autocast."""
    gemm_size: int = 2048
    """n of the n x n matrices whose product is the ceiling; 0 measures none."""
    parts: bool = True
    """Profile one repetition of each candidate by part."""
    seed: int = 0
    """Seed of weights and token ids."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in _MAY_BE_ZERO else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise RecipeError(f"--{field.name.replace('_', '-')} {value}: must be at least {least}")

    @property
    def context(self) -> int:
        """Positions a row needs."""
        return self.prompt_tokens + self.new_tokens if self.task == "decode" else self.sequence_length

    @property
    def tokens(self) -> int:
        """Tokens that count in one repetition: in decoding those generated, else those read."""
        return self.batch_size * (self.new_tokens if self.task == "decode" else self.sequence_length)


@dataclass(frozen=True)
class Candidate:
    """One of the two models that are compared.

    kind: inl is a model of ours; uncached the same, decoded without a key-value cache; llama is transformers' model
    of the dimensions in `recipe.model`.
    """

    name: str
    kind: Kind
    recipe: Recipe
    """The model, and the optimizer, clipping, micro-batches and precision of its training."""

    @property
    def config(self) -> ModelConfig:
        """The model."""
        return self.recipe.model

    def modes(self, settings: BenchSettings) -> tuple[Mode, ...]:
        """The modes to measure it in: those asked for, but decoding without a cache is eager only."""
        if self.kind == "uncached":
            return ("eager",)
        return ("eager", "compiled") if settings.mode == "best" else (settings.mode,)
