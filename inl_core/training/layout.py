"""How the processes of a run divide its model, and whether what each of them keeps fits its device.

- Counted is what stays from the first step to the last: weights, gradients and moments (optimizers.py). Activations
  come on top of it; `inl plan` shows them.
- The choice is made from numbers alone, so that `inl plan` makes it for machines elsewhere.
"""

import os
from dataclasses import dataclass
from typing import Literal

import torch

from inl_core.errors import RecipeError
from inl_core.recipe import TrainingSettings
from inl_core.training.optimizers import States

_KEY = "training.distributed"


@dataclass(frozen=True)
class Layout:
    """Who keeps what of a model."""

    strategy: Literal["one", "ddp", "fsdp", "hsdp"]
    """one: a single process, which keeps all. The others are the recipe's."""
    shard_size: int = 1
    """Processes among which one copy of the model is divided."""

    @property
    def is_sharded(self) -> bool:
        """Whether a process keeps only a part of each matrix."""
        return self.shard_size > 1


def choose_layout(settings: TrainingSettings, num_processes: int, states: States, device_bytes: int) -> Layout:
    """The layout of a recipe's run.

    Args:
        states: of the whole model.
        device_bytes: the memory of one process's device.

    Raises:
        RecipeError: the recipe's strategy does not suit the number of processes or the optimizer, or what a process
            keeps does not fit; the message has the arithmetic, and says what would fit.
    """
    wanted = settings.distributed
    if num_processes == 1:
        layout = Layout("one")
    elif wanted.strategy == "ddp" or (wanted.strategy == "auto" and states.total <= device_bytes):
        layout = Layout("ddp")
    else:
        layout = _sharded(wanted.shard_size or num_processes, num_processes)
    if layout.is_sharded and settings.optimizer.name == "muon":
        raise RecipeError(
            f"{_KEY}.strategy {wanted.strategy}: under {layout.strategy} a process has a part of every matrix, and "
            "muon needs whole ones; take training.optimizer.name adamw, or ddp where the model fits a device"
        )
    if states.total // layout.shard_size > device_bytes:
        raise RecipeError(_too_large(layout, num_processes, states, device_bytes))
    return layout


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _sharded(shard_size: int, num_processes: int) -> Layout:
    if num_processes % shard_size:
        raise RecipeError(
            f"{_KEY}.shard_size {shard_size} does not divide the {num_processes} processes of this run; start a "
            f"multiple of {shard_size}, or choose a divisor of {num_processes}"
        )
    return Layout("fsdp" if shard_size == num_processes else "hsdp", shard_size)


def _too_large(layout: Layout, num_processes: int, states: States, device_bytes: int) -> str:
    """The arithmetic, and how many processes would be enough."""
    parts = {"weights": states.weights, "gradients": states.gradients, "moments": states.optimizer}
    terms = " + ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    share = f" / {layout.shard_size} processes" if layout.is_sharded else ""
    enough = -(-states.total // device_bytes)
    fits = f"fsdp over {enough} or more processes leaves each {states.total / enough / 1e9:.1f} GB or less"
    if enough <= num_processes and not layout.is_sharded:
        fits = f"{_KEY}.strategy fsdp leaves {states.total / num_processes / 1e9:.1f} GB on each of the {num_processes}"
    return (
        f"{_KEY}.strategy: {terms} GB{share} = {states.total / layout.shard_size / 1e9:.1f} GB on each device, which "
        f"has {device_bytes / 1e9:.1f} GB; {fits}"
    )
