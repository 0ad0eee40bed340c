"""Budget allocation: how the model's L*T integrator iterations are divided among its layers.

    uniform   T each
    learned   b = L*T * softmax(w); ceil(b)-1 full steps and one with dt scaled by the remainder in (0, 1]
    dynamic   whole iterations, dealt out between evaluations by the measured residual of each layer's last step
    hybrid    b = L*T * softmax(w + c), c following the measured residuals

- The total is preserved always. The remainder gives w its true gradient: b is continuous in w, and so is the function,
  because at a remainder of 1 the last step is a full one and at 0 it changes neither state nor velocity.
- Source: docs/model.md, "Budgets".
- Legend: L layers, T iterations per layer on average.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inl_core.recipe import BudgetConfig

_ROUNDING = 1e-4
"""b this little above a whole number counts as that number: softmax in float32 does not hit 5.0 exactly."""
_CORRECTION_RATE = 0.5
"""How far one measurement moves the hybrid correction."""


class LayerBudget(NamedTuple):
    """One layer's share: the number of steps, and the fraction of the last one that counts (None is all of it)."""

    num_iterations: int
    last_fraction: Tensor | None


class Budget(nn.Module):
    """The iterations of every layer."""

    _known: tuple[Tensor, int, list[int]] | None = None
    """The allocation, its version, and what it held: it changes between evaluations, and is read in each pass."""
    allocation: Tensor
    correction: Tensor

    def __init__(self, config: BudgetConfig, num_layers: int, num_iterations: int) -> None:
        super().__init__()
        self.strategy, self.total = config.strategy, num_layers * num_iterations
        self.lowest, self.highest = config.min_iterations, config.max_iterations or 2 * num_iterations
        self.num_iterations = num_iterations
        if self.strategy in ("learned", "hybrid"):
            self.weight = nn.Parameter(torch.empty(num_layers))
        if self.strategy == "hybrid":
            self.register_buffer("correction", torch.empty(num_layers))
        if self.strategy == "dynamic":
            self.register_buffer("allocation", torch.empty(num_layers, dtype=torch.long))

    @property
    def follows_residuals(self) -> bool:
        """Whether `reallocate` does anything."""
        return self.strategy in ("dynamic", "hybrid")

    @torch.no_grad()
    def initialise(self) -> None:
        """Every layer starts with T iterations."""
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.fill_(self.num_iterations if self.strategy == "dynamic" else 0)

    def shares(self) -> Tensor:
        """b (L,), with sum L*T."""
        if self.strategy == "dynamic":
            return self.allocation.float()
        weight = self.weight + self.correction if self.strategy == "hybrid" else self.weight
        return self.total * torch.softmax(weight, dim=0)

    def forward(self) -> list[LayerBudget]:
        """The budget of each layer; one copy to the host for all."""
        values = self.allocation if self.strategy == "dynamic" else self.weight
        if values.is_meta:  # there is nothing to read
            return [LayerBudget(self.num_iterations, None)] * len(values)
        if self.strategy == "dynamic":
            return [LayerBudget(count, None) for count in self._allocated()]
        shares = self.shares()
        counts = [max(0, math.ceil(share - _ROUNDING) - 1) for share in shares.tolist()]
        return [LayerBudget(count + 1, shares[layer] - count) for layer, count in enumerate(counts)]

    def _allocated(self) -> list[int]:
        """The whole iterations of each layer; copied to the host only where they may have changed."""
        now = self.allocation
        if now.is_inference():  # which has no version
            return now.tolist()
        if self._known is None or self._known[0] is not now or self._known[1] != now._version:
            self._known = (now, now._version, now.tolist())
        return self._known[2]

    @torch.no_grad()
    def reallocate(self, residuals: Tensor) -> None:
        """Follow the measured residuals (L,), the rms state change of each layer's last iteration.

        dynamic: iterations in proportion, inside [min, max], whole. hybrid: the correction moves towards the log of
        the residuals over their geometric mean.
        """
        residuals = residuals.double().clamp(min=1e-12)
        if self.strategy == "dynamic":
            self.allocation.copy_(deal(residuals, self.total, self.lowest, self.highest))
        elif self.strategy == "hybrid":
            logs = residuals.log()
            self.correction.lerp_((logs - logs.mean()).to(self.correction), _CORRECTION_RATE)


def deal(weights: Tensor, total: int, lowest: int, highest: int) -> Tensor:
    """`total` whole iterations in proportion to `weights` (L,), each in [lowest, highest]: (L,) int64.

    One at a time to the layer furthest below its due share (the largest quotient of weight and count, Webster's
    method), so bounds and total hold by construction.
    """
    layers = len(weights)
    assert layers * lowest <= total <= layers * highest, "the configuration checks that the bounds leave room"
    counts, wanted = [lowest] * layers, weights.tolist()
    for _ in range(total - layers * lowest):
        open_layers = [layer for layer in range(layers) if counts[layer] < highest]
        most = max(open_layers, key=lambda layer: wanted[layer] / (counts[layer] + 0.5))
        counts[most] += 1
    return torch.tensor(counts)
