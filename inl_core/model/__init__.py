"""The model: token ids -> hidden states -> logits. Imports torch and the recipe, nothing else of ours.

In reading order:
- language_model.py  the whole model; embedding.py  its two ends
- stream.py  one layer of v5 and of the Transformer; block.py  one layer of v1 to v4, with an integrator inside
- attention.py, feed_forward.py  the two parts that every Transformer has
- integrator.py  one layer's second-order system; dynamics.py  the equation of one step and the loop over T steps
- controller.py (alpha, beta, gate, v_cand), equilibrium.py (mu), excitation.py (gamma, phi)  what a step is made of
- mixture.py  several controllers; budget.py  iterations of each layer; early_stopping.py and trajectory.py  by-products
- initialisation.py  every starting value; derivatives.py  when only torch's own operations may run

This is the reference: slow, obvious, with every derivative. `inl_core.kernels.apply` makes a model faster from outside.
"""

from inl_core.model.attention import KVCache
from inl_core.model.derivatives import plain_operations
from inl_core.model.integrator import Integrator, IntegratorOutput
from inl_core.model.language_model import IntegratorLanguageModel, ModelOutput, Options
from inl_core.model.trajectory import Trajectory

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
