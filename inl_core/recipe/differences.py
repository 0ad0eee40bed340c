"""What changed between two recipes, and whether a run may be resumed across the change.

A key has the kind of the longest entry of `_KINDS` that it lies under. So a new key has the kind of its section, and a
change in a wholly new section is refused until someone decides on its kind.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from inl_core.errors import RecipeError
from inl_core.recipe.model import ModelConfig
from inl_core.recipe.recipe import Recipe

Kind = Literal["identity", "schedule", "operational"]
"""What resuming a run with another value means.

- identity: the model would compute something else, or the data be different; refused unless --allow-change names it.
- schedule: the steps to come differ from what they would have been; allowed, and shown.
- operational: the run computes the same; allowed.
"""

_KINDS: dict[str, Kind] = {
    "": "identity",
    "name": "operational",  # the run directory decides where a run lives
    "model": "identity",  # the weights belong to this function
    "data": "identity",  # the run's progress is counted in samples of this data
    # A data set and its sources may move: resume compares the fingerprints of the prepared data.
    "data.directory": "operational",
    "data.sources": "operational",
    "data.columns": "operational",
    "data.tokenizer.file": "operational",
    "data.tokenizer.sample_bytes": "operational",
    "data.max_bad_ratio": "operational",  # acts while data is prepared, and the result has a fingerprint
    "training": "identity",
    "training.steps": "schedule",
    "training.tokens": "schedule",
    "training.max_hours": "operational",
    "training.schedule": "schedule",
    "training.optimizer": "identity",  # its state was made with these betas and this eps
    "training.optimizer.learning_rate": "schedule",
    "training.optimizer.muon_learning_rate": "schedule",
    "training.optimizer.stream_rate_factor": "schedule",
    "training.losses": "schedule",  # a function of the step: nothing of the past depends on it
    "training.cycle": "schedule",
    "training.precision": "schedule",  # weights are fp32 in any case; only the steps to come are rounded differently
    "training.micro_batch_size": "operational",  # gradients are accumulated to the same
    "training.device": "operational",
    "training.compile": "operational",
    "training.operations": "operational",  # rounding alone differs, and a resume says so
    "training.recomputation": "operational",
    "training.distributed": "operational",  # the same sums, in another order
    "training.evaluation": "operational",  # only reads the weights
    "training.checkpoint": "operational",
    "training.logging": "operational",
    "training.nonfinite": "operational",  # only acts where the run would have ended
}

_FIXED = {
    "data.num_shards",
    "data.tokenizer.vocab_size",
    "data.validation_fraction",
    "model.bias",
    "model.d_model",
    "model.embedding_rank",
    "model.feed_forward",
    "model.feed_forward_rounding",
    "model.feedforward_dim",
    "model.feedforward_hidden",
    "model.integrator",
    "model.integrator.budget.strategy",
    "model.integrator.candidate",
    "model.integrator.controller.experts",
    "model.integrator.controller.modulation",
    "model.integrator.controller.shared",
    "model.integrator.controller.width",
    "model.integrator.excitation.sparsity",
    "model.integrator.mu.form",
    "model.integrator.mu.group_size",
    "model.integrator.readout",
    "model.num_kv_heads",
    "model.num_layers",
    "model.preset",
    "model.stream",
    "model.stream.anchor",
    "model.stream.equilibrium",
    "model.stream.excitation",
    "model.stream.excitation.sparsity",
    "model.stream.momentum",
    "model.tie_head",
    "model.transport",
    "model.vocab_size",
    "training.optimizer.name",
}
"""Keys that not even --allow-change can change: weights, optimizer state or data would not fit any more."""


@dataclass(frozen=True)
class Difference:
    """One key whose values differ. A section that only one recipe has is one difference; the other value is None."""

    path: str
    old: Any
    new: Any
    kind: Kind

    @property
    def is_fixed(self) -> bool:
        """Whether a run cannot go on with the new value even if the change is allowed."""
        return self.path in _FIXED

    def __str__(self) -> str:
        return f"{self.path}: {self.old} -> {self.new}"


def recipe_differences(old: Recipe, new: Recipe) -> list[Difference]:
    """The keys that differ, in the order of the recipe."""
    return _compare((), old.model_dump(mode="json"), new.model_dump(mode="json"))


def model_differences(old: ModelConfig, new: ModelConfig) -> list[Difference]:
    """The keys of two model sections that differ."""
    return _compare(("model",), old.model_dump(mode="json"), new.model_dump(mode="json"))


def check_changes(run: Path, changes: Sequence[Difference], allowed: Collection[str]) -> None:
    """Refuse what would make a run another experiment.

    Args:
        allowed: keys whose change is accepted although it makes another experiment.

    Raises:
        RecipeError: a change is not `allowed`, or no run can change that key.
    """
    if fixed := [change.path for change in changes if change.is_fixed]:
        raise RecipeError(
            f"{run}: {', '.join(fixed)} cannot change in a run, whose weights, optimizer and data would not fit any "
            "more; `inl train` starts a new run"
        )
    if refused := refused_changes(changes, allowed):
        names = ", ".join(change.path for change in refused)
        raise RecipeError(f"{run}: {names} would make this another experiment; if it is meant: {allow_flags(refused)}")


def refused_changes(changes: Sequence[Difference], allowed: Collection[str]) -> list[Difference]:
    """The changes that --allow-change would permit and does not; changes that nothing permits are not among them."""
    return [c for c in changes if c.kind == "identity" and not c.is_fixed and c.path not in allowed]


def allow_flags(changes: Sequence[Difference]) -> str:
    """The options of the command line that permit changes."""
    return " ".join(f"--allow-change {change.path}" for change in changes)


def kind_of(path: str) -> Kind:
    """The kind of a dotted key."""
    parts = path.split(".")
    above = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
    return next(_KINDS[key] for key in above if key in _KINDS)


def _compare(above: tuple[str, ...], old: Any, new: Any) -> list[Difference]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [found for key in keys for found in _compare((*above, key), old.get(key), new.get(key))]
    if old == new:
        return []
    path = ".".join(above)
    return [Difference(path, old, new, kind_of(path))]
