"""The documents' regression model: a backbone gives the context and x_0, the integrator moves x, x_T is the prediction.

    h   = backbone(inputs)                  two ReLU layers
    x_0 = initial_state(h)   v_0 = 0
    x_T = T iterations of the integrator under h
    y   = readout(x_T)                      starts as the identity

- Source: document 002, its training example and its diagram (docs/model.md, "The three documents").
- The document does not say where x starts. Here x_0 depends on the input, as in a language model's block, and lies
  around target_value: only then do "steps to equilibrium" tell something about an input.
- Legend: B batch, I input_dim, H hidden_dim, D output_dim, T iterations.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from inl_core.documents.building import materialise
from inl_core.documents.layer import IntegratorNeuronLayer
from inl_core.model.initialisation import draw


class IntegratorModel(nn.Module):
    """inputs (B, I) -> predictions (B, D) by T iterations of `inl`, an IntegratorNeuronLayer.

    Args:
        input_dim: I.
        hidden_dim: H.
        num_iterations: T.
        output_dim: D.
        seed: of every drawn weight.
        layer_options: any other argument of IntegratorNeuronLayer: target_value, dt, learnable_mu, ...
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        num_iterations: int = 10,
        output_dim: int = 1,
        *,
        seed: int = 0,
        **layer_options: Any,
    ) -> None:
        super().__init__()
        if num_iterations < 1:
            raise ValueError(f"num_iterations {num_iterations}: must be at least 1")
        self.num_iterations = num_iterations
        with torch.device("meta"):
            self.backbone = nn.Sequential(
                nn.Linear(input_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU()
            )
            self.initial_state = nn.Linear(hidden_dim, output_dim)
            self.inl = IntegratorNeuronLayer(hidden_dim, output_dim, **layer_options)
            self.readout = nn.Linear(output_dim, output_dim)
        materialise(self, lambda: self.initialise(seed))

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every parameter to its start: He's spread in the backbone (arXiv 1502.01852), read-out the identity."""
        for name, linear in (("backbone.0", self.backbone[0]), ("backbone.2", self.backbone[2])):
            assert isinstance(linear, nn.Linear)
            draw(linear.weight, math.sqrt(2 / linear.in_features), seed, name)
            linear.bias.zero_()
        draw(self.initial_state.weight, 1 / math.sqrt(self.initial_state.in_features), seed, "initial_state")
        self.initial_state.bias.fill_(self.inl.config.mu.init)
        nn.init.eye_(self.readout.weight)
        self.readout.bias.zero_()
        self.inl.initialise(seed)

    def forward(self, inputs: Tensor, *, return_trajectory: bool = False) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """inputs (B, I) -> predictions (B, D).

        With `return_trajectory` also a dictionary: x and v (B, T+1, D), alpha, beta and gate (B, T, D).
        """
        context = self.backbone(inputs)
        state, _, *kept = self.inl(
            context,
            self.initial_state(context),
            num_iterations=self.num_iterations,
            return_trajectory=return_trajectory,
        )
        outputs = self.readout(state)
        return (outputs, kept[0]) if return_trajectory else outputs

    def get_learned_mu(self) -> Tensor:
        """mu (D,), with its gradient; a copy, so that the moving average cannot change it under a pending backward."""
        return self.inl.mu.clone()
