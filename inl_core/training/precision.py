"""In which precision a run computes its forward passes. The weights are always float32."""

import torch

from inl_core.recipe import Recipe


def uses_bf16(recipe: Recipe, device: torch.device) -> bool:
    """Whether forward passes run under bfloat16 autocast; `auto` does so on every GPU that has it in hardware."""
    return is_bf16(recipe.training.precision, device)


def is_bf16(wanted: str, device: torch.device) -> bool:
    """The same of what a recipe's `training.precision` or a command's --precision says."""
    return has_native_bf16(device) if wanted == "auto" else wanted == "bf16"


def has_native_bf16(device: torch.device) -> bool:
    """Whether this is a GPU that computes in bfloat16 itself; older ones emulate it, slower than float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast_of(recipe: Recipe, device: torch.device) -> torch.autocast:
    """The context in which a run's forward passes belong; it may be entered again and again."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(recipe, device))
