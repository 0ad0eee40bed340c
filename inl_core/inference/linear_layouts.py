"""Linear layers for few rows, where a product is little but the matrix's way from memory.

- On a CPU the weight can be read as it is, by torch's own product, or as a copy in oneDNN's layout for few rows; and
  compiled for one row, a product can be written as a sum, which becomes one pass over the matrix.
- Which of these is the fastest differs between processors (docs/performance.md): it is measured on the machine, once
  for a large matrix, and remembered (inl_core/kernels/measuring.py).
"""

from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inl_core.kernels.measuring import least_seconds, remembered

_FEWEST_MEASURED = 2**17
"""Elements: 0.5 MB. Smaller matrices would not gain."""
_MEASURED = (16384, 512)
"""A matrix of 32 MB, which does not fit the caches of a few cores."""
_TURNS = 40
_LEAST_GAIN = 1.05
"""How much faster than the first way another one must be."""
_ROWS_EXPECTED = 8
"""oneDNN's layout for 1 row is bad for more; the one for 8 is good from 1 to 32."""


class SharedLinear(nn.Module):
    """x (..., in) -> (..., out) by the weight (out, in) of another module."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class SummedLinear(SharedLinear):
    """The same for one row, as a sum."""

    def forward(self, x: Tensor) -> Tensor:
        """(1, ..., in) -> (1, ..., out)."""
        total = (self.weight * x.reshape(1, -1)).sum(-1)
        return (total if self.bias is None else total + self.bias).view(*x.shape[:-1], -1)


class ReorderedLinear(SharedLinear):
    """The same by oneDNN, with a copy of the weight in its layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_EXPECTED), bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return torch.ops.inl.reordered_linear(x, self.weight, self.bias)


_WAYS = {"as it is": SharedLinear, "reordered": ReorderedLinear, "sum": SummedLinear}


def laid_out(weight: Tensor, bias: Tensor | None, *, one_row: bool) -> nn.Module:
    """The linear layer that reads this weight (out, in) fastest.

    Args:
        one_row: it will be compiled, for one row.
    """
    if weight.device.type != "cpu" or weight.dtype.itemsize < 4:
        return SharedLinear(weight, bias)
    ways = ("sum", "as it is", "reordered") if one_row else ("as it is", "reordered")
    has_layout = weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    way = fastest(ways) if has_layout and weight.numel() >= _FEWEST_MEASURED else ways[0]
    return _WAYS[way](weight, bias)


def fastest(ways: tuple[str, ...]) -> str:
    """The first of the ways, unless another one is faster on this machine."""
    seconds = _seconds(ways, torch.get_num_threads())
    best = min(ways, key=lambda way: seconds[way])
    return best if seconds[ways[0]] > _LEAST_GAIN * seconds[best] else ways[0]


@lru_cache
def _seconds(ways: tuple[str, ...], threads: int) -> dict[str, float]:
    what = ("row", *(way.replace(" ", "_") for way in ways), str(threads))
    return remembered(what, ways, lambda: measure(ways))


@torch.inference_mode()
def measure(ways: tuple[str, ...]) -> dict[str, float]:
    """way -> seconds of one row through a large matrix, the least of a few turns; compiled where `sum` is a way."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(shape, generator=generator) for shape in (_MEASURED, (1, 1, _MEASURED[1])))
    layers = {way: _WAYS[way](weight, None) for way in ways}
    if "sum" in ways:
        layers = {way: torch.compile(layer, fullgraph=True) for way, layer in layers.items()}
    return least_seconds({way: partial(layer, x) for way, layer in layers.items()}, _TURNS)


def _reordered_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# The compiler takes oneDNN's own operation only with weights that are constants of what it compiles; under a name of
# ours it calls it as it is.
torch.library.define("inl::reordered_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("inl::reordered_linear", "CompositeExplicitAutograd", _reordered_linear)


@torch.library.register_fake("inl::reordered_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
