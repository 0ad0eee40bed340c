"""In which precision a run computes its forward passes. The weights are always float32."""

import torch

from inl_core.recipe import Recipe


def uses_bf16(recipe: Recipe, device: torch.device) -> bool:
    """Whether forward passes run under bfloat16 autocast; `auto` does so on every GPU that supports it."""
    wanted = recipe.training.precision
    if wanted == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return wanted == "bf16"


def autocast_of(recipe: Recipe, device: torch.device) -> torch.autocast:
    """The context in which a run's forward passes belong; it may be entered again and again."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(recipe, device))
