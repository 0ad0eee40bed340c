"""Mixture of integrators: a router over h picks expert controllers for every token; their steps are mixed.

    p = softmax(h W_r)                      router, (B, S, E)
    top-k of p, renormalised to sum 1       weights w_e, zero for the others
    x_{t+1} = sum_e w_e x_{t+1}^(e)         v likewise; mu, gamma and phi are shared by the experts

- Routing depends on h alone, so it is done once a layer and holds for all T iterations.
- Batched by expert: each expert takes its tokens in one gather and its results return in one scatter; no token loop.
- Every expert runs in training also when it has no token: its parameters then get a gradient of zeros, which DDP needs.
- Load balancing (Switch Transformer, arXiv 2101.03961), E sum_e f_e P_e over target tokens: training/losses.py.
- Source: docs/model.md, "Mixture of integrators".
- Legend: B batch, S sequence, N = B*S tokens, D d_model, E experts, k experts per token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inl_core.model.controller import Controller
from inl_core.model.dynamics import Drive, Dynamics, Gains
from inl_core.recipe import IntegratorConfig


class Experts(nn.ModuleList):
    """E controllers in the place of one."""

    def __init__(self, config: IntegratorConfig, dim: int, context_dim: int | None = None) -> None:
        super().__init__(Controller(config, dim, context_dim) for _ in range(config.controller.experts))


def build_controller(config: IntegratorConfig, dim: int, context_dim: int | None = None) -> Controller | Experts:
    """One controller, or as many as the configuration has experts."""
    kind = Experts if config.controller.experts > 1 else Controller
    return kind(config, dim, context_dim)


class Routing(NamedTuple):
    """Who goes where: probabilities (B, S, E) with gradient; mixing weights (B, S, E), zero outside the top k."""

    probabilities: Tensor
    weights: Tensor

    @property
    def chosen(self) -> Tensor:
        """1.0 where an expert is one of the token's k, (B, S, E)."""
        return (self.weights > 0).to(self.probabilities.dtype)


class Share(NamedTuple):
    """One expert's tokens: their rows in (N, D) tensors, and the weight of its step in theirs, (rows, 1)."""

    rows: Tensor
    weight: Tensor


class Router(nn.Module):
    """h -> experts; one for each layer."""

    def __init__(self, config: IntegratorConfig, dim: int) -> None:
        super().__init__()
        self.top_k = config.controller.top_k
        # Put in from outside (inl_core.kernels.apply): each expert then takes every token, most of them with weight 0,
        # which is more arithmetic, and nobody waits to hear how many tokens an expert has.
        self.takes_every_token = False
        self.gate = nn.Linear(dim, config.controller.experts, bias=False)

    def forward(self, h: Tensor) -> Routing:
        """h (B, S, D) -> the routing, in the weights' precision.

        With k = 1 the renormalised weight is 1 whatever the router says: only load balancing then trains it.
        """
        with torch.autocast(h.device.type, enabled=False):
            probabilities = torch.softmax(self.gate(h.to(self.gate.weight.dtype)), dim=-1)
        values, indices = probabilities.topk(self.top_k, dim=-1)
        weights = torch.zeros_like(probabilities).scatter(-1, indices, values / values.sum(-1, keepdim=True))
        return Routing(probabilities, weights)

    def shares(self, routing: Routing) -> list[Share]:
        """Each expert's share of the tokens."""
        weights = routing.weights.flatten(0, -2)  # (N, E)
        found, every = [], torch.arange(len(weights), device=weights.device)
        for expert in range(weights.shape[1]):
            rows = every if self.takes_every_token else weights[:, expert].nonzero().squeeze(-1)
            found.append(Share(rows, weights[rows, expert, None]))
        return found


class MixedDrive(NamedTuple):
    """What a layer's steps need from each expert, on that expert's tokens."""

    shares: list[Share]
    drives: list[Drive]
    mu: Tensor
    """(D,), shared"""


class MixedDynamics(Dynamics):
    """The dynamics of several controllers, whose steps are mixed."""

    branches_on_values = True

    def step_with_gains(self, drive: Any, x: Tensor, v: Tensor, forcing: Tensor) -> tuple[Tensor, Tensor, Gains]:
        """The experts' steps on their tokens, mixed; `drive` is a MixedDrive. The gains are mixed too."""
        flat_x, flat_v = x.flatten(0, -2), v.flatten(0, -2)  # (N, D)
        sums = [torch.zeros_like(flat_x) for _ in range(6)]
        for share, own in zip(drive.shares, drive.drives, strict=True):
            state, velocity, gains = super().step_with_gains(own, flat_x[share.rows], flat_v[share.rows], forcing)
            for index, value in enumerate((state, velocity, *gains)):
                if value is not None:
                    sums[index] = sums[index].index_add(0, share.rows, share.weight.to(value.dtype) * value)
        state, velocity, *mixed = (total.view_as(x) for total in sums)
        return state, velocity, Gains(*mixed)
