"""The names that the code released with the documents, and transformers, use for what has other names here."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from inl_core.documents.arguments import check_name
from inl_core.recipe.presets import merge

_KEYS = {
    "hierarchical_group_size": "integrator.mu.group_size",
    "excitation_sparsity": "integrator.excitation.sparsity",
    "use_shared_controllers": "integrator.controller.shared",
    "budget_strategy": "integrator.budget.strategy",
    "rope_base": "rope_theta",
}
"""Arguments of the released constructors, and the keys of a recipe's model section that they are."""
_REFUSED = {
    "budget_convergence_threshold": "tokens stop by convergence_threshold alone; leave it out",
    "rank_ratio": "it is called lowrank_ratio",
}
_OTHERS = ("adaptive_convergence_threshold", "use_adaptive_budget", "dropout")


def released_overrides(
    released: dict[str, Any], convergence_threshold: float | None, own: Iterable[str] = ()
) -> tuple[dict[str, Any], float | None]:
    """Keys to lay over a preset, and the convergence threshold, from arguments by the released code's names.

    Args:
        own: the arguments that the constructor has itself, one of which may have been meant.

    Raises:
        ValueError: an argument that nobody knows, with the nearest name, or one that has no counterpart here.
    """
    overrides: dict[str, Any] = {}
    given = dict(released)
    for name, reason in _REFUSED.items():
        if name in given:
            raise ValueError(f"{name}: {reason}")
    for name in given:
        check_name("argument", name, [*own, *_KEYS, *_OTHERS])
    if given.pop("dropout", 0):
        raise ValueError(f"dropout {released['dropout']}: there is none here; leave it out, or give 0")
    adaptive = given.pop("use_adaptive_budget", True)
    if not isinstance(adaptive, bool):
        raise ValueError(f"use_adaptive_budget: expected True or False, got {adaptive!r}")
    if not adaptive:
        overrides = _nested("integrator.budget.strategy", "uniform")
        given.pop("budget_strategy", None)
    threshold = given.pop("adaptive_convergence_threshold", None)
    for name, value in given.items():
        overrides = merge(overrides, _nested(_KEYS[name], value))
    return overrides, convergence_threshold if threshold is None else threshold


def argument_names(released: Mapping[str, Any]) -> dict[str, str]:
    """The keys of a recipe's model section that these arguments set, each with its argument's name."""
    names = _KEYS | {"adaptive_convergence_threshold": "integrator.early_stopping.convergence_threshold"}
    return {key: name for name, key in names.items() if name in released}


def one_of(ids: Tensor | None, input_ids: Tensor | None) -> Tensor:
    """Token ids (B, S) that were given by one of two names.

    Raises:
        ValueError: by none of them, or by both, or they have another number of dimensions.
    """
    found = [given for given in (ids, input_ids) if given is not None]
    if len(found) != 1:
        raise ValueError("give the token ids once, as ids or as input_ids")
    if found[0].dim() != 2:
        raise ValueError(f"ids {tuple(found[0].shape)}: expected (B, S)")
    return found[0]


def _nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value
