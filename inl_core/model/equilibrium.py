"""The learned equilibrium mu of one layer, in its three forms, and its moving average.

- Source: docs/model.md, "The equilibrium".
- mu gets no weight decay: it is a place, not a weight.
"""

import torch
from torch import Tensor, nn

from inl_core.recipe import MuConfig


class Equilibrium(nn.Module):
    """mu (D,): `per_dim` learns D values, `hierarchical` one global value and an offset per group, `fixed` none."""

    def __init__(self, config: MuConfig, dim: int) -> None:
        super().__init__()
        self.form, self.initial, self.dim = config.form, config.init, dim
        if config.form == "per_dim":
            self.mu = nn.Parameter(torch.empty(dim))
        elif config.form == "hierarchical":
            self.mu_global = nn.Parameter(torch.empty(1))
            self.mu_offsets = nn.Parameter(torch.empty(dim // config.group_size))
        else:
            self.register_buffer("mu", torch.empty(dim))

    def initialise(self) -> None:
        """Every dimension starts at the configured value."""
        with torch.no_grad():
            if self.form == "hierarchical":
                self.mu_global.fill_(self.initial)
                self.mu_offsets.zero_()
            else:
                self.mu.fill_(self.initial)

    def forward(self) -> Tensor:
        """mu as (D,), whatever its form."""
        if self.form == "hierarchical":
            return (self.mu_global + self.mu_offsets).repeat_interleave(self.dim // self.mu_offsets.numel())
        return self.mu

    @torch.no_grad()
    def adapt(self, mean_state: Tensor, rate: float) -> None:
        """mu <- (1 - rate) mu + rate mean_state (D,), a moving average; of group means when hierarchical.

        For `hierarchical` the movement of the group values splits into the global value (their mean) and the offsets.
        """
        if self.form == "fixed":
            return
        if self.form == "per_dim":
            self.mu.lerp_(mean_state.to(self.mu.dtype), rate)
            return
        groups = mean_state.to(self.mu_global.dtype).view(self.mu_offsets.numel(), -1).mean(dim=1)
        moved = torch.lerp(self.mu_global + self.mu_offsets, groups, rate)
        shift = moved.mean() - (self.mu_global + self.mu_offsets).mean()
        self.mu_offsets.copy_(moved - self.mu_global - shift)
        self.mu_global.add_(shift)
