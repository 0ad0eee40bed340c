"""The model: token ids -> hidden states -> logits. Imports torch and the recipe, nothing else of ours."""

from inl_core.model.attention import KVCache
from inl_core.model.derivatives import plain_operations
from inl_core.model.integrator import Integrator, IntegratorOutput, Trajectory
from inl_core.model.language_model import IntegratorLanguageModel, ModelOutput, Options

__all__ = [
    "Integrator",
    "IntegratorLanguageModel",
    "IntegratorOutput",
    "KVCache",
    "ModelOutput",
    "Options",
    "Trajectory",
    "plain_operations",
]
