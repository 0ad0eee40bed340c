"""The feed-forward network: SwiGLU (arXiv 2002.05202) or GELU."""

import torch.nn.functional as F
from torch import Tensor, nn

from inl_core.recipe import ModelConfig


class FeedForward(nn.Module):
    """(B, S, D) -> (B, S, D) through the configuration's hidden width; gate and up projection are one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.feed_forward == "swiglu"
        hidden = config.hidden_dim
        self.up = nn.Linear(config.d_model, 2 * hidden if self.gated else hidden, bias=config.bias)
        self.down = nn.Linear(hidden, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """down(silu(gate x) * up x), or down(gelu(up x))."""
        if not self.gated:
            return self.down(F.gelu(self.up(x)))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
