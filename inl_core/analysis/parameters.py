"""`inl inspect-params`: what the dynamics of a model learned, and what they do on real text.

- Integrators learn mu, gamma and phi, and their alpha, beta and gate are measured; a stream learns all coefficients.
- Each kind of figure has a function: statistics and drift in inl_core/training (dynamics.py, spread.py), periods and
  half-lives in timescales.py, effective ranks in ranks.py, changes of the weights in weight_changes.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from inl_core.analysis import timescales
from inl_core.analysis.convergence.collect import model_inputs
from inl_core.analysis.planning import count_parameters
from inl_core.analysis.ranks import MatrixRank, matrix_ranks
from inl_core.analysis.weight_changes import PartChange, check_same_shapes, starting_weights, weight_changes
from inl_core.errors import ArtefactError, InlError
from inl_core.inference.loading import LoadedModel
from inl_core.inference.texts import Text, default_window
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe.load import load_recipe
from inl_core.training.dynamics import Measured, measure
from inl_core.training.spread import distance, summarise, to_numbers

BINS = 16


@dataclass(frozen=True)
class ParameterReport:
    """The learned quantities of one checkpoint."""

    parameters: dict[str, int]
    """Parameters by part."""
    amplitude: float | None
    """A of the excitation; None without one."""
    text: str
    """The name of the text on which was measured what is not learned."""
    tokens: int
    """How many of its tokens were used."""
    layers: list[dict[str, Any]]
    """A row per layer and quantity: layer, quantity, mean, std, min, max, p5, p50, p95, and what follows.

    Of some quantities: saturated, drift and the variance's parts, as the records of a run have them; histogram, the
    counts of `histogram`; share, of values that have a time scale at all (without any there is no mean); against, the
    rms difference from the other checkpoint. The rows of a stream have a sub_layer, too, and the quantities of
    inl_core/training/depth.py; to all are added those of `time_scales`. Empty for a plain Transformer.
    """
    ranks: list[MatrixRank] = field(default_factory=list)
    """Of the matrices of embedding, head and controller."""
    since_start: list[PartChange] = field(default_factory=list)
    """How far the weights are from where training began; empty where that is not known."""
    start_unknown: str | None = None
    """Why it is not known."""
    against: str | None = None
    """The other checkpoint."""
    since_other: list[PartChange] = field(default_factory=list)
    """How far the weights are from those of the other checkpoint."""
    progress: float = 1.0
    """The share of its run's steps that the checkpoint has; 1 where the run is not known."""

    def of(self, quantity: str) -> list[dict[str, Any]]:
        """The rows of one quantity, by layer."""
        return [row for row in self.layers if row["quantity"] == quantity]


def report_parameters(
    loaded: LoadedModel, text: Text, *, max_tokens: int = 2048, against: LoadedModel | None = None
) -> ParameterReport:
    """Measure a model on the first whole windows of `text`, about `max_tokens` tokens; every iteration runs.

    Args:
        against: another checkpoint of the same model, which is measured on the same tokens.

    Raises:
        ArtefactError: the other checkpoint is one of another model.
    """
    model, since_other = loaded.model, []
    if against is not None:
        check_same_shapes(loaded, against)
        since_other = weight_changes(model, dict(against.model.named_parameters()))
    since_start, start_unknown = [], None
    try:
        since_start = weight_changes(model, starting_weights(loaded))
    except ArtefactError as error:
        start_unknown = str(error)
    rows, tokens = _measured_rows(loaded, text, max_tokens, against) if model.config.has_dynamics else ([], 0)
    return ParameterReport(
        count_parameters(model),
        model.excitation_amplitude.item() if model.config.excites else None,
        text.name,
        tokens,
        rows,
        matrix_ranks(model),
        since_start,
        start_unknown,
        None if against is None else str(against.path),
        since_other,
        _progress(loaded),
    )


def histogram(values: Tensor) -> list[int]:
    """How many of the finite values lie in each of 16 equal bins from the least to the greatest of them."""
    array = values.detach().double().numpy(force=True).ravel()
    array = array[np.isfinite(array)]
    return np.histogram(array, BINS)[0].tolist() if array.size else [0] * BINS


def time_scales(model: IntegratorLanguageModel, found: list[Measured]) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Place, quantity and values, in iterations or steps, NaN where a value has no such figure.

    period of the excitation's gamma; half_life of alpha as a decay of the velocity; mode_half_life and mode_period of
    the step with its alpha, beta and gate frozen, where there is a pull towards mu.
    """
    integrators = model.integrators()
    by_place: dict[tuple[Any, ...], dict[str, Measured]] = {}
    for one in found:
        by_place.setdefault(tuple(one.place.values()), {})[one.name] = one
    for named in by_place.values():
        place, values = next(iter(named.values())).place, {name: one.values for name, one in named.items()}
        if "gamma" in values:
            yield place, "period", timescales.period(values["gamma"])
        if "alpha" in values:
            yield place, "half_life", timescales.half_life(values["alpha"])
        if "alpha" in values and "beta" in values:
            stride: Tensor | float = 1.0
            if "gate" in values:
                config = integrators[place["layer"]].config
                stride = config.dt * config.velocity_scale * values["gate"]
            modes = timescales.frozen_modes(values["alpha"], values["beta"], stride)
            yield place, "mode_half_life", modes.half_life
            yield place, "mode_period", modes.period


def _progress(loaded: LoadedModel) -> float:
    try:
        recipe = load_recipe(loaded.path / "recipe.yaml", allow_pipe=False)
    except InlError:
        return 1.0
    return loaded.step / recipe.training.num_steps


def _measured_rows(
    loaded: LoadedModel, text: Text, max_tokens: int, against: LoadedModel | None
) -> tuple[list[dict[str, Any]], int]:
    """The rows of a report, and the number of tokens they were measured on."""
    # Windows without padding: as many whole ones as fit, or the part of one that a short text fills.
    window = min(default_window(loaded), text.num_targets)
    num_windows = max(1, min(max_tokens, text.num_targets) // window)
    batch = next(text.windows(window=window, batch_size=num_windows))
    inputs = model_inputs(batch, loaded.model.embedding.table.weight.device)
    found = measure(loaded.model, **inputs)
    figures = [one.figures() for one in found]
    if against is not None:
        for figure, one, other in zip(figures, found, measure(against.model, **inputs), strict=True):
            if one.values.shape == other.values.shape:  # not where the two drew another number of iterations
                figure["against"] = distance(one.values, other.values)
    rows = [
        {**one.place, "quantity": one.name, **row, "histogram": histogram(one.values)}
        for one, row in zip(found, to_numbers(figures), strict=True)
    ]
    for place, name, values in time_scales(loaded.model, found):
        finite = values[values.isfinite()]
        row = {**place, "quantity": name, "share": finite.numel() / values.numel()}
        rows.append(row | ({**summarise(finite), "histogram": histogram(finite)} if finite.numel() else {}))
    return rows, batch.tokens.size
