"""Linear layers for few rows, where a product is little but the matrix's way from memory.

- On a CPU the layout that reads fastest is oneDNN's, chosen by it for few rows; MKL takes two to three times as long on
  some processors (docs/performance.md). It is a copy of the weight.
- Compiled for one row on a CPU, a product written as a sum becomes one pass over the matrix at the memory's speed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FEWEST_REORDERED = 2**17
"""Elements: 0.5 MB. Smaller matrices would not gain."""
_ROWS_EXPECTED = 8
"""oneDNN's layout for 1 row is bad for more; the one for 8 is good from 1 to 32."""


class SharedLinear(nn.Module):
    """x (..., in) -> (..., out) by the weight (out, in) of another module."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight, self.bias)


class SummedLinear(SharedLinear):
    """The same for one row, as a sum."""

    def forward(self, x: Tensor) -> Tensor:
        """(1, ..., in) -> (1, ..., out)."""
        total = (self.weight * x.reshape(1, -1)).sum(-1)
        return (total if self.bias is None else total + self.bias).view(*x.shape[:-1], -1)


class ReorderedLinear(SharedLinear):
    """The same by oneDNN, with the weight in its layout."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return torch.ops.inl.reordered_linear(x, self.weight, self.bias)


def laid_out(weight: Tensor, bias: Tensor | None, *, one_row: bool) -> nn.Module:
    """The linear layer that reads this weight (out, in) fastest.

    Args:
        one_row: it will be compiled, for one row.
    """
    if weight.device.type != "cpu":
        return SharedLinear(weight, bias)
    if one_row:
        return SummedLinear(weight, bias)
    is_known = weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if not is_known or weight.numel() < _FEWEST_REORDERED:
        return SharedLinear(weight, bias)
    return ReorderedLinear(torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_EXPECTED), bias)


def _reordered_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# The compiler takes oneDNN's own operation only with weights that are constants of what it compiles; under a name of
# ours it calls it as it is.
torch.library.define("inl::reordered_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("inl::reordered_linear", "CompositeExplicitAutograd", _reordered_linear)


@torch.library.register_fake("inl::reordered_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
