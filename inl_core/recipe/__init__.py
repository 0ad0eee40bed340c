"""The frozen Recipe tree: YAML and overrides -> one validated object. Imports no torch.

Use:
    recipe = load_recipe("recipes/tiny.yaml", overrides=["training.steps=100"])
    recipe.model.d_model, recipe.training.num_steps
"""

from inl_core.recipe.data import DataSettings, TokenizerSettings
from inl_core.recipe.differences import recipe_differences
from inl_core.recipe.load import dump_recipe, load_recipe, recipe_from_mapping
from inl_core.recipe.model import (
    BudgetConfig,
    ControllerConfig,
    EarlyStoppingConfig,
    ExcitationConfig,
    IntegratorConfig,
    ModelConfig,
    MuConfig,
)
from inl_core.recipe.recipe import Recipe
from inl_core.recipe.training import CycleSettings, LossSettings, OptimizerSettings, ScheduleSettings, TrainingSettings

__all__ = [
    "BudgetConfig",
    "ControllerConfig",
    "CycleSettings",
    "DataSettings",
    "EarlyStoppingConfig",
    "ExcitationConfig",
    "IntegratorConfig",
    "LossSettings",
    "ModelConfig",
    "MuConfig",
    "OptimizerSettings",
    "Recipe",
    "ScheduleSettings",
    "TokenizerSettings",
    "TrainingSettings",
    "dump_recipe",
    "load_recipe",
    "recipe_differences",
    "recipe_from_mapping",
]
