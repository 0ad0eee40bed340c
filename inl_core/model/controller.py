"""The controller's matrices, from which a step computes alpha, beta, gate and, where nothing else gives it, v_cand.

- u = act(h W_h + b_h + x W_x + v W_v), (a, b, g, c) = (u W_out) * scale_l + bias_l; the step itself is in dynamics.py.
- Source: docs/model.md, "The controller".
- `h W_h + b_h` does not depend on t: `hoist` computes it once a layer.
- scale_l is folded into the small matrix W_out (C x GD), never multiplied onto (B, S, GD).
- Legend: B batch, S sequence, D d_model, C width, G output groups (4 with a candidate, else 3).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inl_core.recipe import IntegratorConfig


def num_groups(config: IntegratorConfig) -> int:
    """Output groups: alpha, beta, gate, and v_cand when the controller provides it."""
    return 4 if config.candidate == "controller" else 3


class Controller(nn.Module):
    """The matrices of one controller; one for the whole model when shared, else one a layer.

    `context_dim` is the width of h; None is the state's, as in the language model.
    """

    def __init__(self, config: IntegratorConfig, dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        width = config.controller.width
        self.context = nn.Linear(context_dim or dim, width)
        # [W_x; W_v] is one parameter of shape (C, 2D).
        self.state_velocity = nn.Linear(2 * dim, width, bias=False)
        self.output = nn.Linear(width, num_groups(config) * dim, bias=False)

    def hoist(self, h: Tensor) -> Tensor:
        """h W_h + b_h, (B, S, D) -> (B, S, C)."""
        return self.context(h)


class Head(NamedTuple):
    """W_out of one layer with its modulation folded in: weight (GD, C), bias (GD,)."""

    weight: Tensor
    bias: Tensor


class Modulation(nn.Module):
    """What one layer adds to a controller: scale_l and bias_l, each (G,) or (G, D).

    bias_l sets where alpha, beta and gate start, so it exists also for a controller of the layer's own; scale_l does
    not, since W_out could absorb it.
    """

    def __init__(self, config: IntegratorConfig, dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim
        groups = num_groups(config)
        shape = (groups,) if config.controller.modulation == "scalar" else (groups, dim)
        self.scale = nn.Parameter(torch.empty(shape)) if config.controller.shared else None
        self.bias = nn.Parameter(torch.empty(shape))

    def initialise(self) -> None:
        """scale 1; bias such that alpha_base, beta and gate start at their configured values, v_cand at 0."""
        start = [
            math.log(self.config.init_alpha / (1 - self.config.init_alpha)),
            math.log(math.expm1(self.config.init_beta)),
            math.log(self.config.init_gate / (1 - self.config.init_gate)),
            0.0,
        ][: num_groups(self.config)]
        with torch.no_grad():
            if self.scale is not None:
                self.scale.fill_(1.0)
            column = torch.tensor(start, dtype=self.bias.dtype, device=self.bias.device)
            self.bias.copy_(column if self.bias.dim() == 1 else column[:, None].expand_as(self.bias))

    def fold(self, controller: Controller) -> Head:
        """The controller's output matrix and bias as this layer sees them."""
        weight = controller.output.weight
        if self.scale is not None:
            scale = self.scale[:, None] if self.scale.dim() == 1 else self.scale  # (G, 1) or (G, D)
            weight = (weight.view(-1, self.dim, weight.shape[1]) * scale[..., None]).view_as(weight)
        bias = self.bias[:, None].expand(-1, self.dim) if self.bias.dim() == 1 else self.bias
        return Head(weight, bias.reshape(-1))
