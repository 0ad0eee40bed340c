"""Defaults that fit the width of a model: heads, and the groups of mu."""

from collections.abc import Iterable
from typing import Any

_GROUP_SIZE = 64  # the default of MuConfig.group_size
_HEADS = 4  # the default of ModelConfig.num_heads


def fit_to_width(model: dict[str, Any], width: Any) -> dict[str, Any]:
    """The model section with heads and groups that divide d_model where the defaults do not and none are given.

    Args:
        width: the model's d_model, not validated yet.
    """
    if type(width) is not int or width < 1:
        return model
    divides = width % _HEADS == 0 and (width % (2 * _HEADS) == 0 or model.get("positions", "rope") != "rope")
    if "num_heads" not in model and not divides and (heads := fitting_heads(width, _HEADS)) != _HEADS:
        model = model | {"num_heads": heads}
    integrator = model.get("integrator")
    if isinstance(integrator, dict) and isinstance(mu := integrator.get("mu"), dict):
        needs_groups = mu.get("form") == "hierarchical" and "group_size" not in mu
        if needs_groups and width % _GROUP_SIZE:
            size = _first_divisor(width, range(min(width, _GROUP_SIZE), 0, -1))
            model = model | {"integrator": integrator | {"mu": mu | {"group_size": size}}}
    return model


def fitting_heads(width: int, most: int) -> int:
    """The largest number of heads up to `most` that divides the width into heads of even size; `most` if none does."""
    if width % 2:
        return most
    return _first_divisor(width // 2, range(most, 0, -1))


def _first_divisor(number: int, candidates: Iterable[int]) -> int:
    return next(candidate for candidate in candidates if number % candidate == 0)
