"""The root of the recipe tree."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from inl_core.recipe.base import Section
from inl_core.recipe.data import DataSettings
from inl_core.recipe.model import ModelConfig
from inl_core.recipe.training import TrainingSettings

_MOST_NUMBERS = 10**13


class Recipe(Section):
    """One experiment: the model, its data and its training."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=100)]
    """Names the run directory, runs/NAME."""
    model: ModelConfig = ModelConfig()
    """The architecture."""
    data: DataSettings = DataSettings()
    """The text."""
    training: TrainingSettings
    """The run."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.training.sequence_length > self.model.max_seq_len:
            raise ValueError(
                f"training.sequence_length {self.training.sequence_length} exceeds "
                f"model.max_seq_len {self.model.max_seq_len}"
            )
        integrator, losses, missing = self.model.integrator, self.training.losses, self.model.without_integrator
        weights = (losses.lambda_mean, losses.lambda_mean_final, losses.lambda_speed, losses.lambda_energy)
        if integrator is None and any(weights):
            raise ValueError(f"training.losses act on integrator states and {missing}: set them to 0")
        if integrator is None and self.training.recomputation == "integrator":
            raise ValueError(f"training.recomputation integrator: {missing}; use none or block")
        if integrator is None and self.training.cycle:
            raise ValueError(f"training.cycle drives an integrator and {missing}: remove it")
        self._check_min_iterations()
        self._check_window()
        return self

    def _check_window(self) -> None:
        """ValueError when the widest tensor of a window is so large that 64-bit integers cannot count a batch of it."""
        model, length = self.model, self.training.sequence_length
        width = max(model.vocab_size or 0, model.hidden_dim, 8 * model.d_model, model.num_heads * model.head_dim)
        if length * width > _MOST_NUMBERS:
            raise ValueError(
                f"training.sequence_length {length:,} x {width:,}, the model's widest tensor, is above "
                f"{_MOST_NUMBERS:,}; shorten the windows"
            )

    def _check_min_iterations(self) -> None:
        fewest, integrator = self.training.min_iterations, self.model.integrator
        if fewest is None:
            return
        if integrator is None:
            raise ValueError(f"training.min_iterations: {self.model.without_integrator}; remove it")
        if integrator.budget.strategy != "uniform":
            raise ValueError("training.min_iterations: the budget sets the iterations; use budget.strategy uniform")
        least = min(self.model.layer_iterations)
        if fewest > least:
            raise ValueError(f"training.min_iterations {fewest} exceeds a layer's num_iterations {least}; lower it")
