"""How much of what a GPU could compute a run makes use of: model FLOPs utilisation (PaLM, arXiv 2204.02311).

The FLOPs are those of the model (model/flops.py), without what is computed a second time to save memory, over the
manufacturer's peak of dense matrix products in bfloat16.
"""

from typing import NamedTuple

import torch

from inl_core.model.flops import training_flops
from inl_core.recipe import Recipe
from inl_core.training.distributed import World
from inl_core.training.precision import uses_bf16

_PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""FLOPs a second by a part of the name that torch gives; the first that fits counts. From the makers' data sheets."""


def peak_flops(name: str) -> float | None:
    """FLOPs a second of dense bfloat16 products of a GPU by its name; None where that is not known here."""
    words = f" {name.replace('-', ' ')} "
    return next((peak for part, peak in _PEAKS.items() if f" {part} " in words), None)


class Utilisation(NamedTuple):
    """What turns a run's speed into a share of its GPUs' peak."""

    flops_per_token: int
    peak: float
    """Of all GPUs together."""

    def of(self, tokens: float, seconds: float) -> float:
        """The share of the peak, where this many tokens went through the model in this many seconds."""
        return tokens * self.flops_per_token / seconds / self.peak


def utilisation_of(recipe: Recipe, vocab_size: int, world: World) -> Utilisation | None:
    """None where the peak is not known, and where a run does not compute in bfloat16, to which the peaks belong."""
    if world.device.type != "cuda" or not uses_bf16(recipe, world.device):
        return None
    peak = peak_flops(torch.cuda.get_device_name(world.device))
    if peak is None:
        return None
    flops = training_flops(recipe.model.with_vocab_size(vocab_size), recipe.training.sequence_length)
    return Utilisation(flops, peak * world.size)
