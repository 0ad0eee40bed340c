"""What each of the documents' parameter optimisations saves in a model, each variant built on the meta device.

- Source: documents 002 and 001 (docs/model.md: "Embedding and head", "The controller", "The equilibrium", "The
  excitation").
- The two variants have all four off and all four on; no part's count depends on another part's optimisation.
"""

from dataclasses import dataclass
from typing import Any

from inl_core.analysis.planning.parameters import count_parameters, meta_model
from inl_core.recipe import ModelConfig

_SPARSE = 0.1  # v2's sparsity, for models that excite every dimension

OPTIMISATIONS = {
    "embedding": "low rank",
    "controller": "shared by all layers",
    "mu": "hierarchical",
    "excitation": "sparse",
}


@dataclass(frozen=True)
class Saving:
    """One part with and without its optimisation, in parameters."""

    part: str
    optimisation: str
    full: int
    optimised: int
    here: int
    """What the planned model has."""

    @property
    def change(self) -> float:
        """optimised / full - 1."""
        return self.optimised / self.full - 1


def compare_optimisations(config: ModelConfig) -> list[Saving]:
    """A row for each part the model has, and one for the whole model."""
    here, full, optimised = (
        count_parameters(meta_model(variant)) for variant in (config, _without(config), _with(config))
    )
    rows = [
        Saving(part, name, full[part], optimised[part], here[part])
        for part, name in OPTIMISATIONS.items()
        if part in full
    ]
    totals = (sum(counts.values()) for counts in (full, optimised, here))
    return [*rows, Saving("all parameters", "all of these", *totals)]


def _without(config: ModelConfig) -> ModelConfig:
    return _changed(config, {"embedding_rank": None}, mu="per_dim", sparsity=1.0, shared=False)


def _with(config: ModelConfig) -> ModelConfig:
    integrator = config.integrator
    divides = integrator is not None and config.d_model % integrator.mu.group_size == 0
    sparsity = min(integrator.excitation.sparsity, 1.0) if integrator else 1.0
    return _changed(
        config,
        {"embedding_rank": config.embedding_rank or "auto"},
        mu="hierarchical" if divides else "per_dim",
        sparsity=sparsity if sparsity < 1 else _SPARSE,
        shared=True,
    )


def _changed(config: ModelConfig, keys: dict[str, Any], *, mu: str, sparsity: float, shared: bool) -> ModelConfig:
    integrator = config.integrator
    if integrator is not None:
        parts = {
            "mu": integrator.mu.model_copy(update={"form": mu}),
            "excitation": integrator.excitation.model_copy(update={"sparsity": sparsity}),
            "controller": integrator.controller.model_copy(update={"shared": shared}),
        }
        keys = {**keys, "integrator": integrator.model_copy(update=parts)}
    return config.model_copy(update=keys)
