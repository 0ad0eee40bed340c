"""`inl plan`: parameters, FLOPs, memory and schedule of a recipe before anything is allocated.

In reading order: plan.py the plan as a whole; parameters.py and flops.py what is counted; memory.py bytes by kind, and
activations.py those that wait for the backward pass; optimisations.py what the documents' optimisations save;
documents.py the documents' own figures about sizes.
"""

from inl_core.analysis.planning.parameters import count_parameters, meta_model
from inl_core.analysis.planning.plan import (
    ModelPlan,
    Plan,
    find_vocabulary,
    plan_model,
    plan_recipe,
    recipe_of_model,
)
from inl_core.model.flops import flops_by_part, training_flops

__all__ = [
    "ModelPlan",
    "Plan",
    "count_parameters",
    "find_vocabulary",
    "flops_by_part",
    "meta_model",
    "plan_model",
    "plan_recipe",
    "recipe_of_model",
    "training_flops",
]
