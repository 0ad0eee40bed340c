"""Plans: parameters, FLOPs, memory and schedule of a recipe before anything is allocated."""

from inl_core.analysis.planning.flops import flops_by_part, forward_flops, training_flops
from inl_core.analysis.planning.parameters import count_parameters, meta_model
from inl_core.analysis.planning.plan import (
    ModelPlan,
    Plan,
    find_vocabulary,
    plan_model,
    plan_recipe,
    recipe_of_model,
)

__all__ = [
    "ModelPlan",
    "Plan",
    "count_parameters",
    "find_vocabulary",
    "flops_by_part",
    "forward_flops",
    "meta_model",
    "plan_model",
    "plan_recipe",
    "recipe_of_model",
    "training_flops",
]
