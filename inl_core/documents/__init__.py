"""The documents' Python API: their names, arguments and meaning, on this project's own model, losses and cycles.

- A package above model, training and inference: it needs all three, and nothing below needs the documents' names.
- Everything here is importable from `inl_core` directly; docs/python-api.md is the guide.
- What the documents are, and what is done where they leave something open: docs/model.md, "The three documents", and
  docs/python-api.md.
"""

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
