"""torch's Muon, with updates that a GPU can leave out by itself.

Fused AdamW leaves an update out where a flag on the device says so, and nobody waits to read the flag. torch's Muon
does not know of it. Here each matrix and its momentum are taken back where the flag is set, one after another,
so that no more than one copy of a matrix exists.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """torch.optim.Muon; `found_inf` as fused AdamW has it, a float tensor () that is 1 where an update is left out."""

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update, unless the flag is set."""
        if self.found_inf is None:
            return super().step(closure)
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(group, parameter, self.found_inf > 0)
        finally:
            self.param_groups = groups
        return None

    def _update(self, group: dict[str, Any], parameter: Tensor, is_left_out: Tensor) -> None:
        state = self.state[parameter]
        state.setdefault("momentum_buffer", torch.zeros_like(parameter))  # as torch starts it
        kept = [(tensor, tensor.clone()) for tensor in (parameter, state["momentum_buffer"])]
        self.param_groups = [{**group, "params": [parameter]}]
        super().step()
        for tensor, before in kept:
            tensor.copy_(torch.where(is_left_out, before, tensor))
