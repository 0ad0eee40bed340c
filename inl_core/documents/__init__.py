"""The Python API that the three INL-LLM documents show, on this project's own model, losses and cycles.

In reading order: layer.py the integrator alone; regression.py a model around it; language_model.py, creation.py and
generation.py language models, how they are made and how they continue ids; losses.py, cycles.py and convergence.py
what trains and measures them; arguments.py and building.py what all constructors share.

- The package stands above model, training and inference, which know nothing of it.
- Everything here is importable from `inl_core` directly; docs/python-api.md is the guide, and docs/model.md, "The three
  documents", says what the documents are.
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
