"""What the dynamics of a model hold and do, for the records of a run and for `inl inspect-params`.

- It is measured by an extra forward pass without gradients, in a run on the first rows of the step's batch, so that
  the training pass need not keep the trajectory.
- It describes, for each layer's integrator, mu, gamma, phi, alpha, beta, gate, velocity, how far all iterations move
  the state and the residual of each; for each sub-layer of a stream, what depth.py lists.
- What is learned is also told by its drift, the distance from its start. None of it starts at random.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inl_core.model import Integrator, IntegratorLanguageModel, Options, Trajectory
from inl_core.model.excitation import Excitation
from inl_core.training.depth import FORCES, MOVEMENTS, Place, quantities, token_rms
from inl_core.training.spread import distance, saturation, statistics_of, to_numbers, variance_parts


@dataclass(frozen=True)
class Measured:
    """One quantity at one place."""

    place: Place
    """layer, and of a stream sub_layer."""
    name: str
    values: Tensor
    """A learned vector; a figure of each token, of any shape; or, where `by_token`, a coefficient (T, B, S, D)."""
    start: Tensor | float | None = None
    """Where a learned vector started; None for what is not learned."""
    by_token: bool = False
    """A coefficient of each token and dimension."""
    saturated: Tensor | None = None
    """The share of values at a bound, ()."""

    def figures(self) -> dict[str, Tensor]:
        """The statistics that a record has of it, each ()."""
        found = statistics_of(self.values)
        if self.saturated is not None:
            found["saturated"] = self.saturated
        if self.start is not None:
            found["drift"] = distance(self.values, self.start)
        return found | (variance_parts(self.values) if self.by_token else {})


@torch.no_grad()
def measure(
    model: IntegratorLanguageModel, ids: Tensor, *, positions: Tensor | None = None, document_ids: Tensor | None = None
) -> list[Measured]:
    """Everything there is to say of the dynamics on the tokens ids (B, S), layer by layer.

    The model runs all T iterations, as in training: no token stops early.
    """
    paths = _paths(model, ids, positions, document_ids)
    if model.config.integrator is None:
        return list(_of_stream(model, paths[0]))
    layers = enumerate(zip(model.integrators(), paths, strict=True))
    return [one for index, (integrator, path) in layers for one in _of_layer({"layer": index}, integrator, path)]


def record_layers(
    model: IntegratorLanguageModel, ids: Tensor, *, positions: Tensor | None = None, document_ids: Tensor | None = None
) -> list[dict[str, Any]]:
    """One row per layer and quantity: layer, sub_layer, quantity, mean, std, min, max, percentiles, saturated, drift.

    The columns that a quantity does not have are absent, as sub_layer is in v1 to v4.
    """
    found = measure(model, ids, positions=positions, document_ids=document_ids)
    with torch.no_grad():
        figures = to_numbers([one.figures() for one in found])
    return [{**one.place, "quantity": one.name, **row} for one, row in zip(found, figures, strict=True)]


@torch.no_grad()
def last_residuals(
    model: IntegratorLanguageModel, ids: Tensor, *, positions: Tensor | None = None, document_ids: Tensor | None = None
) -> list[float]:
    """The root mean square change of the state in each layer's last iteration, averaged over tokens, (L,)."""
    return [_residuals(path)[-1].mean().item() for path in _paths(model, ids, positions, document_ids)]


def _paths(
    model: IntegratorLanguageModel, ids: Tensor, positions: Tensor | None, document_ids: Tensor | None
) -> list[Trajectory]:
    """The trajectory of each integrator, or the only one of a stream."""
    was_training = model.training
    model.train()
    output = model(ids, positions=positions, document_ids=document_ids, options=Options(keep_trajectory=True))
    model.train(was_training)
    return [layer.trajectory for layer in output.layers if layer.trajectory is not None]


def _residuals(trajectory: Trajectory) -> Tensor:
    """||x_{t+1} - x_t|| / sqrt(D), (T, B, S)."""
    return token_rms(trajectory.states[1:] - trajectory.states[:-1])


def _of_stream(model: IntegratorLanguageModel, path: Trajectory) -> Iterator[Measured]:
    """The quantities of depth.py. All vectors start at 0 but gamma and phi, which start alike in every step."""
    starts: dict[str, Tensor | float] = dict.fromkeys(("alpha", "transport", "anchor", "beta", "mu"), 0.0)
    steps = model.steps()
    starts |= _excitation_starts(steps[0].excitation if steps else None)
    for place, name, values in quantities(model, path):
        by_token = name == "alpha" and values.dim() > 1  # a dynamic alpha is (B, S, D)
        yield Measured(
            place, name, values[None] if by_token else values, None if by_token else starts.get(name), by_token
        )


def _excitation_starts(excitation: Excitation | None) -> dict[str, Tensor]:
    if excitation is None:
        return {}
    starts = zip(("gamma", "phi"), excitation.start(), strict=True)
    return {name: start.to(excitation.gamma) for name, start in starts}


def _of_layer(place: Place, integrator: Integrator, path: Trajectory) -> Iterator[Measured]:
    config, starts = integrator.config, _excitation_starts(integrator.excitation)
    yield Measured(place, "mu", integrator.equilibrium().detach(), config.mu.init)
    for name, start in starts.items():
        yield Measured(place, name, getattr(integrator.excitation, name).detach(), start)
    for name in ("alpha", "beta", "gate"):
        values = getattr(path, name)
        bound = saturation(name, values, config.beta_max)
        yield Measured(place, name, values, by_token=True, saturated=bound)
    yield Measured(place, "velocity", token_rms(path.velocities[1:]))  # (T, B, S)
    yield Measured(place, "displacement", _displacement(path))
    for t, residual in enumerate(_residuals(path)):
        yield Measured(place, f"residual_{t + 1}", residual)


def _displacement(path: Trajectory) -> Tensor:
    """How far all iterations together move the state, as a share of its size before them, (B, S)."""
    tiny = torch.finfo(torch.float32).tiny
    return token_rms(path.states[-1] - path.states[0]) / token_rms(path.states[0]).clamp(min=tiny)


def headline(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The means over layers, or sub-layers, that go into the row of metrics.

    alpha_mean, beta_mean, gate_mean, velocity_rms; of a stream also transport_mean, anchor_mean, state_rms,
    residual_rms, and the shares of its terms, as depth.py names them.
    """
    names = {name: f"{name}_mean" for name in ("alpha", "beta", "gate", "transport", "anchor")} | {
        name: f"{name}_rms" for name in ("velocity", "state", "residual")
    }
    names |= {f"force_{name}": f"force_{name}" for name in FORCES}
    names |= {f"movement_{name}": f"movement_{name}" for name in MOVEMENTS}
    found = {label: [row["mean"] for row in rows if row["quantity"] == name] for name, label in names.items()}
    return {label: sum(values) / len(values) for label, values in found.items() if values}
