"""The frozen Recipe tree: a YAML file and overrides -> one validated object. It imports no torch.

The files, in the order in which data goes through them:

- `yaml_text.py`: the text of a YAML file -> plain values, with the line of each key.
- `load.py`: plain values and overrides -> a Recipe, and a Recipe -> YAML.
- `presets.py`, `sizes.py`: what a preset and a size stand for, put under the keys of the model section.
- `base.py`, `model.py`, `data.py`, `training.py`, `recipe.py`: the sections, with the bounds of every key.
- `problems.py`: what is wrong with a recipe, in words.
- `differences.py`: what changed between two recipes, and whether a run may go on across the change.
- `schema.py`: the recipe as a JSON schema, for editors.

Use:
    recipe = load_recipe("tiny", overrides=["training.steps=100"])
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
