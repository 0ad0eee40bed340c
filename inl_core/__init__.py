"""INL-LLM: recipe -> corpus -> model -> training -> inference -> analysis; each imports what stands before it.

- The documents' Python API is importable from here: `from inl_core import create_model` (docs/python-api.md).
- Nothing is imported before a name is used, so that `inl --help`, which passes through here, needs no torch (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inl_core.documents import (
        CycleScheduler,
        IntegratorLanguageModel,
        IntegratorLoss,
        IntegratorModel,
        IntegratorNeuronLayer,
        OptimizedIntegratorLanguageModel,
        UltraOptimizedIntegratorLanguageModel,
        compute_convergence_metrics,
        create_cycle_scheduler,
        create_model,
        create_optimized_model,
    )

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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'inl_core' has no attribute '{name}'")
    return getattr(import_module("inl_core.documents"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
