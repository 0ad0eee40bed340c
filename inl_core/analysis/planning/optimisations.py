"""What each of the documents' parameter optimisations saves in a model, each variant built on the meta device.

- Source: documents 002 and 001 (docs/model.md: "Embedding and head", "The controller", "The equilibrium", "The
  excitation").
- The two variants have all four off and all four on; no part's count depends on another part's optimisation.
"""

from dataclasses import dataclass
from typing import Any

from inl_core.analysis.planning.parameters import count_parameters, meta_model
from inl_core.recipe import ExcitationConfig, ModelConfig

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
    variants = (config, _changed(config, optimised=False), _changed(config, optimised=True))
    here, full, optimised = (count_parameters(meta_model(variant)) for variant in variants)
    rows = [
        Saving(part, name, full[part], optimised[part], here[part])
        for part, name in OPTIMISATIONS.items()
        if part in full and (part != "mu" or config.integrator)  # a stream's mu has one form only
    ]
    totals = (sum(counts.values()) for counts in (full, optimised, here))
    return [*rows, Saving("all parameters", "all of these", *totals)]


def _changed(config: ModelConfig, *, optimised: bool) -> ModelConfig:
    """The model with all the optimisations it can have, or none; a width that no group of mu divides keeps its mu."""
    keys: dict[str, Any] = {"embedding_rank": (config.embedding_rank or "auto") if optimised else None}
    if integrator := config.integrator:
        mu = integrator.mu
        form = "hierarchical" if optimised and config.d_model % mu.group_size == 0 else "per_dim"
        parts = {
            "mu": mu.model_copy(update={"form": form}),
            "excitation": _sparse(integrator.excitation, optimised=optimised),
            "controller": integrator.controller.model_copy(update={"shared": optimised}),
        }
        keys["integrator"] = integrator.model_copy(update=parts)
    elif config.stream and config.stream.excitation:
        excitation = _sparse(config.stream.excitation, optimised=optimised)
        keys["stream"] = config.stream.model_copy(update={"excitation": excitation})
    return config.model_copy(update=keys)


def _sparse(excitation: ExcitationConfig, *, optimised: bool) -> ExcitationConfig:
    """The excitation of all dimensions, or of few: of as many as it has where these are not all."""
    few = excitation.sparsity if excitation.sparsity < 1 else _SPARSE
    return excitation.model_copy(update={"sparsity": few if optimised else 1.0})
