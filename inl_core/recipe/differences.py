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
    "data.directory": "operational",  # a data set may move: its fingerprint is what resume compares
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


@dataclass(frozen=True)
class Difference:
    """One key that is not the same; a section that came or went is one difference, with None on the empty side."""

    path: str
    old: Any
    new: Any
    kind: Kind

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
