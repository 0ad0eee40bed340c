"""`inl inspect-params`: what the dynamics of a model learned, and what they do on real text.

Integrators learn mu, gamma and phi, and their alpha, beta and gate are measured; a stream learns all coefficients.
"""

import math
from dataclasses import dataclass
from typing import Any

from inl_core.analysis.convergence.collect import model_inputs
from inl_core.analysis.planning import count_parameters
from inl_core.inference.loading import LoadedModel
from inl_core.inference.texts import Text, default_window
from inl_core.training.depth import places
from inl_core.training.dynamics import record_layers
from inl_core.training.spread import summarise


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
    """A row per layer and quantity: layer, quantity, mean, std, min, max, p5, p50, p95, saturated, drift.

    mu's drift is its rms distance from its start; period is 2 pi / |gamma| in iterations; saturated is the share of
    values within 1% of a bound; residual_t is the rms change of the state in iteration t. The rows of a stream have a
    sub_layer, too, and the quantities of inl_core/training/depth.py. Empty for a plain Transformer.
    """

    def of(self, quantity: str) -> list[dict[str, Any]]:
        """The rows of one quantity, by layer."""
        return [row for row in self.layers if row["quantity"] == quantity]


def report_parameters(loaded: LoadedModel, text: Text, *, max_tokens: int = 2048) -> ParameterReport:
    """Measure a model on the first whole windows of `text`, about `max_tokens` tokens; every iteration runs."""
    model = loaded.model
    counts = count_parameters(model)
    if not model.config.has_dynamics:
        return ParameterReport(counts, None, text.name, 0, [])
    # Windows without padding: as many whole ones as fit, or the part of one that a short text fills.
    window = min(default_window(loaded), text.num_targets)
    num_windows = max(1, min(max_tokens, text.num_targets) // window)
    batch = next(text.windows(window=window, batch_size=num_windows))
    rows = record_layers(model, **model_inputs(batch, model.embedding.table.weight.device))
    systems = list(zip(places(model.config.num_layers), model.steps(), strict=False))
    systems += [({"layer": layer}, integrator) for layer, integrator in enumerate(model.integrators())]
    for place, system in systems:
        if system.excitation is not None:
            periods = 2 * math.pi / system.excitation.gamma.detach().abs()
            rows.append({**place, "quantity": "period", **summarise(periods)})
    amplitude = model.excitation_amplitude.item() if model.config.excites else None
    return ParameterReport(counts, amplitude, text.name, batch.tokens.size, rows)
