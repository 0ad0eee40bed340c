"""What a trained integrator does: mu, gamma and phi as learned, alpha, beta and gate measured on real text."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from inl_core.analysis.planning import count_parameters
from inl_core.corpus.loader import Batch
from inl_core.inference.loading import LoadedModel
from inl_core.inference.texts import Text, default_window
from inl_core.model.excitation import Excitation
from inl_core.training.dynamics import record_layers, summarise


@dataclass(frozen=True)
class ParameterReport:
    """The learned quantities of one checkpoint."""

    parameters: dict[str, int]
    """Parameters by part."""
    amplitude: float | None
    """A of the excitation; None without an integrator."""
    text: str
    """What alpha, beta, gate, velocity and residual were measured on."""
    tokens: int
    """Tokens of it."""
    layers: list[dict[str, Any]]
    """A row per layer and quantity: layer, quantity, mean, std, min, max, p5, p50, p95, saturated, drift.

    mu's drift is its rms distance from its start; period is 2 pi / gamma in iterations; saturated is the share of
    values within 1% of a bound; residual_t is the rms change of the state in iteration t. Empty without an integrator.
    """

    def of(self, quantity: str) -> list[dict[str, Any]]:
        """The rows of one quantity, by layer."""
        return [row for row in self.layers if row["quantity"] == quantity]


def report_parameters(loaded: LoadedModel, text: Text, *, max_tokens: int = 2048) -> ParameterReport:
    """Measure a model on the first whole windows of `text`, about `max_tokens` tokens; every iteration runs."""
    model = loaded.model
    counts = count_parameters(model)
    if model.config.integrator is None:
        return ParameterReport(counts, None, text.name, 0, [])
    batch = _first_windows(loaded, text, max_tokens)
    device = model.embedding.table.weight.device
    arrays = (batch.tokens, batch.positions, batch.document_ids)
    ids, positions, document_ids = (None if array is None else torch.from_numpy(array).to(device) for array in arrays)
    assert ids is not None
    rows = record_layers(model, ids, positions=positions, document_ids=document_ids)
    rows += _periods(loaded)
    return ParameterReport(counts, model.excitation_amplitude.item(), text.name, ids.numel(), rows)


def _first_windows(loaded: LoadedModel, text: Text, max_tokens: int) -> Batch:
    """Windows without padding: as many whole ones as fit, or the part of one that a short text fills."""
    window = min(default_window(loaded), text.num_targets)
    num_windows = max(1, min(max_tokens, text.num_targets) // window)
    return next(text.windows(window=window, batch_size=num_windows))


def _periods(loaded: LoadedModel) -> list[dict[str, Any]]:
    rows = []
    modules = (module for module in loaded.model.modules() if isinstance(module, Excitation))
    for index, excitation in enumerate(modules):
        gamma = excitation.gamma.detach()
        rows.append({"layer": index, "quantity": "period", **summarise(2 * math.pi / gamma.abs())})
    return rows
