"""The settings of generation, validated. Imports no torch, so that `inl generate --help` is quick."""

from dataclasses import dataclass

from inl_core.errors import RecipeError

_LEAST_TEMPERATURE = 1e-30
_MOST = {"num_samples": 10_000, "num_iterations": 10_000}


@dataclass(frozen=True)
class GenerationSettings:
    """How tokens are chosen and when to stop. The order is: repetition penalty, temperature, top-k, top-p, min-p."""

    max_new_tokens: int = 200
    """Tokens generated per completion, at most."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most probable token (greedy), as does what float32 cannot divide by."""
    top_k: int | None = None
    """Only the k most probable tokens."""
    top_p: float | None = None
    """Only the most probable tokens that together reach this probability (arXiv 1904.09751)."""
    min_p: float | None = None
    """Only tokens at least this fraction as probable as the most probable one (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Lowers the logits of tokens already in prompt or completion (CTRL, arXiv 1909.05858); 1 is off."""
    seed: int = 0
    """Seed of the draws; a completion depends on it, its prompt and its sample number, not on its neighbours."""
    stop: tuple[str, ...] = ()
    """A completion ends before the first of these strings."""
    num_samples: int = 1
    """Completions per prompt."""
    bos: bool = True
    """Begin the prompt with the token that begins a document in training."""
    num_iterations: int | None = None
    """Integrator iterations T instead of the model's own."""
    early_stopping: bool = True
    """Let tokens stop iterating early where the model's configuration says so."""
    batch_size: int = 32
    """Completions generated side by side, at most; it changes speed and memory, not text."""
    bf16: bool = False
    """Multiply matrices in bfloat16, and keep keys and values in it."""
    end_ids: tuple[int, ...] = ()
    """Special tokens that end a completion, as the end-of-text token does in any case."""
    compiled: bool = False
    """Decode with torch.compile: faster after tens of seconds of compiling, the same text but for rounding."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "num_samples", "num_iterations", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{_spelt(name)} {value}: must be at least 1")
        for name, most in _MOST.items():
            if (getattr(self, name) or 0) > most:
                raise RecipeError(f"{_spelt(name)} {getattr(self, name):,}: must be at most {most:,}")
        if not 0 <= self.temperature < float("inf"):
            raise RecipeError(f"temperature {self.temperature:g}: must be a number from 0 (greedy) up")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RecipeError(f"top-p {self.top_p:g}: must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise RecipeError(f"min-p {self.min_p:g}: must be between 0 and 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise RecipeError(f"repetition-penalty {self.repetition_penalty:g}: must be above 0; 1 is off, 1.1 is mild")
        if any(not text for text in self.stop):
            raise RecipeError("stop '': an empty stop string would end every completion at once; remove it")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken, and nothing is drawn."""
        return self.temperature < _LEAST_TEMPERATURE

    @property
    def sampling(self) -> tuple[float | int | tuple[int, ...] | None, ...]:
        """How a token is chosen from the logits; completions for which it is the same can share a batch."""
        return (self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.end_ids)

    def without_effect(self) -> list[str]:
        """One sentence for each setting that a greedy choice ignores."""
        if not self.is_greedy:
            return []
        given = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        found = [f"{_spelt(name)} has no effect at temperature {self.temperature:g}" for name in given]
        if self.num_samples > 1:
            found.append(f"{self.num_samples} samples at temperature {self.temperature:g} are all the same")
        return found


def _spelt(name: str) -> str:
    """The name of the command line's option, without dashes."""
    return "iterations" if name == "num_iterations" else name.replace("_", "-")
