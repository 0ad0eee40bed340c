"""INL-LLM: recipe -> corpus -> model -> training -> inference -> analysis; each imports what stands before it.

- The documents' Python API is importable from here: `from inl_core import create_model` (docs/python-api.md).
- Nothing is imported before a name is used (PEP 562), so that `inl --help`, which passes through here, needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inl_core.documents.convergence import compute_convergence_metrics
    from inl_core.documents.creation import create_model, create_optimized_model
    from inl_core.documents.cycles import CycleScheduler, create_cycle_scheduler
    from inl_core.documents.language_model import (
        IntegratorLanguageModel,
        OptimizedIntegratorLanguageModel,
        UltraOptimizedIntegratorLanguageModel,
    )
    from inl_core.documents.layer import IntegratorNeuronLayer
    from inl_core.documents.losses import IntegratorLoss
    from inl_core.documents.regression import IntegratorModel

__all__ = [
    "CycleScheduler",
    "IntegratorLanguageModel",
    "IntegratorLoss",
    "IntegratorModel",
    "IntegratorNeuronLayer",
    "OptimizedIntegratorLanguageModel",
    "UltraOptimizedIntegratorLanguageModel",
    "compute_convergence_metrics",
    "create_cycle_scheduler",
    "create_model",
    "create_optimized_model",
]
_HOMES = {  # the module of inl_core.documents that a name lives in, where it is not language_model
    "CycleScheduler": "cycles",
    "IntegratorLoss": "losses",
    "IntegratorModel": "regression",
    "IntegratorNeuronLayer": "layer",
    "compute_convergence_metrics": "convergence",
    "create_cycle_scheduler": "cycles",
    "create_model": "creation",
    "create_optimized_model": "creation",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'inl_core' has no attribute '{name}'")
    return getattr(import_module(f"inl_core.documents.{_HOMES.get(name, 'language_model')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
