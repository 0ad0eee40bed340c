"""What the report says of a stream: one system whose 2L steps are the sub-layers of the model.

- Step t >= 1 leads from x_{t-1} to x_t; the states before the first are those of the embedding.
- mu and the excitation are those of each step. `end` is where the token's own state ends, x_2L.
- Legend: N tokens, D d_model, L layers.
"""

from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from inl_core.analysis.convergence.layer_statistics import PathStatistics
from inl_core.model import IntegratorLanguageModel, Trajectory
from inl_core.training.depth import EMBEDDING, coefficients, places, step_shares
from inl_core.training.spread import summarise

COEFFICIENTS = ("alpha", "transport", "anchor", "beta", "mu", "gamma", "phi")


class StreamStatistics(PathStatistics):
    """The statistics of a stream, with the coefficients of its steps and the shares of their terms."""

    def __init__(self, model: IntegratorLanguageModel, epsilon: float) -> None:
        steps = 2 * model.config.num_layers
        super().__init__(steps, steps, epsilon)
        self.model, self.steps = model, model.steps()
        self.mu, self.coefficients = mu_by_step(model), coefficients_by_place(model)

    def add(self, path: Trajectory) -> dict[str, Tensor]:
        """Count the trajectories of N tokens, states (2L+1, N, D); returns their measures, (2L+1, N) each."""
        amplitude = self.model.excitation_amplitude
        targets = {"end": path.states[-1]} if self.mu is None else {"mu": self.mu, "end": path.states[-1]}
        forcing = [0.0 if s.excitation is None else s.excitation.at(s.time, amplitude) for s in self.steps]
        displaced = torch.stack([torch.zeros_like(path.states[0, :1]) + force for force in forcing])
        shares: dict[str, Tensor] = {}
        for t, step in enumerate(self.steps):
            for name, values in step_shares(step, path, t, amplitude).items():
                shares.setdefault(name, torch.full_like(path.states[..., 0], torch.nan))[t + 1] = values
        return self.add_path(path, targets, displaced, shares)

    def row_of_step(self, t: int) -> dict[str, Any]:
        """Where the step happens, and its learned coefficients over channels."""
        place, vectors = self.coefficients[t]
        return {**place, **{name: summarise(vector) for name, vector in vectors.items()}}


def mu_by_step(model: IntegratorLanguageModel) -> Tensor | None:
    """mu of the step that led to each state, (2L+1, 1, D); for the first state, of the step that leaves it."""
    found = [step.mu for step in model.steps()]
    mus = [mu.detach() for mu in found if mu is not None]
    return torch.stack([*mus[:1], *mus])[:, None] if mus else None


def coefficients_by_place(model: IntegratorLanguageModel) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """The learned vectors of the embedding and of each step, in their order."""
    assert model.entry is not None
    entry = model.entry.transport
    found = [(EMBEDDING, {} if entry is None else {"transport": entry.detach()})]
    steps = zip(places(model.config.num_layers), model.steps(), strict=True)
    return [*found, *((place, coefficients(step)) for place, step in steps)]


def coefficient_table(model: IntegratorLanguageModel) -> pa.Table | None:
    """coefficients.parquet: a row for each step and channel; None for a model with integrators.

    gamma and phi are null in channels that are not excited.
    """
    if model.entry is None:
        return None
    rows = []
    for number, (place, vectors) in enumerate(coefficients_by_place(model)):
        columns: dict[str, list[float | None]] = {name: vector.tolist() for name, vector in vectors.items()}
        if "gamma" in columns:
            excitation = model.steps()[number - 1].excitation
            assert excitation is not None
            excited = excitation.excited.tolist()
            for name in ("gamma", "phi"):
                found = dict(zip(excited, columns[name], strict=True))
                columns[name] = [found.get(channel) for channel in range(model.config.d_model)]
        for channel in range(model.config.d_model):
            own = {name: values[channel] for name, values in columns.items()}
            rows.append({"step": number, **place, "channel": channel, **own})
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


_SCHEMA = pa.schema(
    [("step", pa.int32()), ("layer", pa.int32()), ("sub_layer", pa.string()), ("channel", pa.int32())]
    + [(name, pa.float32()) for name in COEFFICIENTS]
)
