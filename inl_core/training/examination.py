"""A step taken again without its update, to see where it goes wrong: a run does so before it stops, and `inl replay`.

The gradient here is the one before it was clipped: clipping by a norm that is NaN makes all of it NaN.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inl_core.model import IntegratorLanguageModel
from inl_core.training.cycles import Regime
from inl_core.training.first_bad import Place, count_bad, watched
from inl_core.training.gradients import Gradients
from inl_core.training.loss_module import MicroBatch
from inl_core.training.parallel import whole_tensor

_ORDER = ("weight", "output", "loss", "gradient of output", "gradient of weight", "gradient norm")


@dataclass(frozen=True)
class Examination:
    """What the forward and backward passes of one batch hold."""

    losses: dict[str, float]
    gradient_norm: float
    first_bad: Place | None
    """In the order of the computation; None where all is finite, or where it is bad on other ranks alone."""
    layers: list[dict[str, Any]]
    """For each layer, and each part of the model outside of them: its name (`layer`), the norms of its `weights` and
    of their `gradient`, and the root mean square of its `output`, which is None where there is no tensor."""
    not_finite: dict[str, dict[str, int]]
    """The parameters with bad values or bad gradients, by name: `elements`, `bad_values`, `bad_gradients`."""


def examine(
    gradients: Gradients,
    parts: list[MicroBatch],
    now: Regime,
    *,
    step: int,
    count: float,
) -> Examination:
    """Run the passes of `step`, counted from 0, under watch; the parameters have no gradients afterwards.

    All ranks must call this together.

    Args:
        parts: this rank's micro-batches.
        count: target tokens of the global batch.
    """
    model = gradients.parallel.model
    model.zero_grad(set_to_none=True)
    with watched(model) as watch:
        terms = gradients.backward(parts, now, step, count)
    losses = {name: value.item() for name, value in terms.items() if value.numel() == 1}
    norm = float(gradients.parallel.gradient_norm())
    not_finite, layers = _parameters(model)
    model.zero_grad(set_to_none=True)
    places = [
        *(Place("weight", name, one["bad_values"], one["elements"]) for name, one in not_finite.items()),
        watch.forward,
        *(Place("loss", name, int(not math.isfinite(value)), 1) for name, value in losses.items()),
        watch.backward,
        *(Place("gradient of weight", name, one["bad_gradients"], one["elements"]) for name, one in not_finite.items()),
        Place("gradient norm", "of all parameters", int(not math.isfinite(norm)), 1),
    ]
    for layer, own in layers.items():
        own["output"] = watch.sizes.get(layer)
    first = next((place for place in places if place and place.bad), None)
    return Examination(losses, norm, first, [{"layer": layer, **own} for layer, own in layers.items()], not_finite)


def earliest(places: Iterable[Place | None]) -> tuple[int, Place] | None:
    """(rank, place) of what went wrong first, from what each rank found; the lowest rank of several."""
    found = [(_ORDER.index(place.what), rank, place) for rank, place in enumerate(places) if place]
    return min(found, key=lambda entry: entry[:2])[1:] if found else None


def _parameters(model: IntegratorLanguageModel) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, Any]]]:
    """(not_finite, layers) of an `Examination`, the latter by name and without outputs."""
    not_finite, layers = {}, {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        bad_values, bad_gradients = count_bad(parameter), 0 if gradient is None else count_bad(gradient)
        if bad_values or bad_gradients:
            counts = {"elements": parameter.numel(), "bad_values": bad_values, "bad_gradients": bad_gradients}
            not_finite[name] = counts
        parts = name.split(".")
        own = layers.setdefault(".".join(parts[: 2 if parts[0] == "blocks" else 1]), {"weights": 0.0, "gradient": 0.0})
        own["weights"] = math.hypot(own["weights"], _norm(parameter))
        own["gradient"] = math.hypot(own["gradient"], 0.0 if gradient is None else _norm(gradient))
    return not_finite, layers


def _norm(tensor: Tensor) -> float:
    return float(whole_tensor(torch.linalg.vector_norm(tensor.detach())))
