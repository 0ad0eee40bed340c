"""What changed between two recipes, and whether a run may be resumed across the change.

- A key takes the class of the longest entry of `_KINDS` that it lies under, so a new key inherits its section's class
  and a wholly new section is refused until someone decides.
"""

from dataclasses import dataclass
from typing import Any, Literal

from inl_core.recipe.recipe import Recipe

Kind = Literal["identity", "schedule", "operational"]
"""identity: another function or other data, refused on resume unless named by --allow-change; schedule: the steps to
come differ, shown; operational: the same numbers, free."""

_KINDS: dict[str, Kind] = {
    "": "identity",
    "name": "operational",  # the run directory decides where a run lives
    "model": "identity",  # the weights belong to this function
    "model.integrator.backend": "operational",
    "data": "identity",  # samples consumed are counted in this stream
    # A data set and its sources may move: what resume compares is the fingerprint of the prepared data.
    "data.directory": "operational",
    "data.sources": "operational",
    "data.tokenizer.file": "operational",
    "data.tokenizer.sample_bytes": "operational",
    "data.max_bad_ratio": "operational",  # acts while preparing, and the fingerprint covers the outcome
    "training": "identity",
    "training.steps": "schedule",
    "training.tokens": "schedule",
    "training.schedule": "schedule",
    "training.optimizer": "identity",  # its state was gathered under these betas, this eps and this assignment
    "training.optimizer.learning_rate": "schedule",
    "training.optimizer.muon_learning_rate": "schedule",
    "training.losses": "schedule",  # functions of the step: the past needs nothing from them
    "training.cycle": "schedule",
    "training.precision": "schedule",  # weights stay fp32, so only the steps to come round differently
    "training.micro_batch_size": "operational",  # accumulation gives the same gradient
    "training.device": "operational",
    "training.compile": "operational",
    "training.recomputation": "operational",
    "training.evaluation": "operational",  # reads the weights only
    "training.checkpoint": "operational",
    "training.logging": "operational",
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
    "model.tie_head",
    "model.vocab_size",
    "training.optimizer.name",
}
"""Keys that no leave can change in a run: its weights, its optimizer's state or its data would not fit any more."""


@dataclass(frozen=True)
class Difference:
    """One key that is not the same; a section that came or went is one difference, with None on the empty side."""

    path: str
    old: Any
    new: Any
    kind: Kind

    @property
    def is_fixed(self) -> bool:
        """Whether a run's checkpoints or data cannot go on with the new value, whoever allows it."""
        return self.path in _FIXED

    def __str__(self) -> str:
        return f"{self.path}: {self.old} -> {self.new}"


def recipe_differences(old: Recipe, new: Recipe) -> list[Difference]:
    """The keys that differ, in the order of the tree."""
    return _compare((), old.model_dump(mode="json"), new.model_dump(mode="json"))


def kind_of(path: str) -> Kind:
    """The class of a dotted key."""
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
