"""One layer with an integrator inside.

    h   = attention(norm_1(x));  x = x + h
    s_0 = norm_2(x);  s_T, v_T = integrator(h, s_0, v_0)
    x   = x + layer_gain * (s_T - s_0)        readout delta        x = x + s_T        readout state
    x   = x + feed_forward(norm_3(x))         not with `candidate: feed_forward`

- The candidate velocity is the velocity that the context proposes; the integrator's own velocity is drawn towards it in
  each iteration (docs/model.md, "One step"). With `candidate: feed_forward` (v4) it is the feed-forward of s_0, and
  there is no third norm.
- `enter` and `leave` are functions of tensors alone, so that a compiler takes each whole, once for all
  layers, whatever the integrator does between them.
- Legend: B batch, S sequence, D d_model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inl_core.model.attention import Attention, LayerCache, Rotary
from inl_core.model.budget import LayerBudget
from inl_core.model.controller import Controller
from inl_core.model.feed_forward import FeedForward, build_norm
from inl_core.model.integrator import Integrator, IntegratorOutput
from inl_core.model.mixture import Experts
from inl_core.recipe import ModelConfig


@dataclass(frozen=True)
class Options:
    """What a forward pass should do beyond computing: iterations and by-products."""

    num_iterations: int | tuple[int, ...] | None = None
    """T of every layer, or of each; None is the configured one."""
    energy_power: float | None = None
    """p of the energy loss; when given, the terms of the speed and energy losses are returned."""
    keep_trajectory: bool = False
    early_stopping: bool = True
    """False runs all T iterations also where the configuration stops early (in evaluation only)."""


@dataclass(frozen=True)
class SharedInputs:
    """What one forward pass gives to all of its layers."""

    rotary: Rotary | None
    """cos and sin at the tokens' positions, each (B, S, 1, F/2); None with sinusoidal positions."""
    mask: Tensor | None
    """Who sees whom, as attention.Visibility makes it."""
    controller: Controller | Experts | None
    """None where each layer has its own."""
    amplitude: Tensor
    """A of the excitation, 0-dim."""
    options: Options


class Block(nn.Module):
    """One layer: attention, then the integrator and the feed-forward in the configuration's arrangement."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        integrator = config.integrator_of(layer)
        assert integrator is not None
        self.feeds_candidate = integrator.candidate == "feed_forward"
        self.norm_attention = build_norm(config)
        self.attention = Attention(config)
        self.norm_state = build_norm(config)
        self.integrator = Integrator(integrator, config.d_model)
        self.layer_gain = nn.Parameter(torch.empty(config.d_model)) if integrator.readout == "delta" else None
        self.norm_feed_forward = None if self.feeds_candidate else build_norm(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, velocity: Tensor, shared: SharedInputs, budget: LayerBudget, cache: LayerCache | None = None
    ) -> tuple[Tensor, IntegratorOutput]:
        """x (B, S, D) and the velocity carried from below (B, S, D) -> x and the integrator's output."""
        x, h, start, candidate = self.enter(x, shared.rotary, shared.mask, cache)
        output = self.integrator(
            h,
            start,
            velocity,
            candidate=candidate,
            controller=shared.controller,
            amplitude=shared.amplitude,
            num_iterations=budget.num_iterations,
            last_fraction=budget.last_fraction,
            energy_power=shared.options.energy_power,
            keep_trajectory=shared.options.keep_trajectory,
            early_stopping=shared.options.early_stopping,
        )
        return self.leave(x, start, output.state), output

    def enter(
        self, x: Tensor, rotary: Rotary | None, mask: Tensor | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Attention, and what the integrator starts from: x, h, s_0 and v_cand, each (B, S, D)."""
        h = self.attention(self.norm_attention(x), rotary, mask, cache)
        x = x + h
        start = self.norm_state(x)
        return x, h, start, self.feed_forward(start) if self.feeds_candidate else None

    def leave(self, x: Tensor, start: Tensor, state: Tensor) -> Tensor:
        """x and the read-out of s_T, then the feed-forward that did not give the candidate: (B, S, D)."""
        x = x + (state if self.layer_gain is None else self.layer_gain * (state - start))
        return x if self.norm_feed_forward is None else x + self.feed_forward(self.norm_feed_forward(x))
