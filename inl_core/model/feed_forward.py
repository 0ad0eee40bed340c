"""The feed-forward network: SwiGLU (arXiv 2002.05202) or GELU; and the norm before it.

Legend: B batch, S sequence, D d_model, H hidden width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from inl_core.recipe import ModelConfig


class FeedForward(nn.Module):
    """down(silu(gate x) * up x), or down(gelu(up x)). With SwiGLU `up` holds both matrices, the gate's first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.feed_forward == "swiglu"
        hidden = config.hidden_dim
        self.up = nn.Linear(config.d_model, 2 * hidden if self.gated else hidden, bias=config.bias)
        self.down = nn.Linear(hidden, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        up = self.up(x)  # (B, S, 2H) or (B, S, H)
        if not self.gated:
            return self.down(F.gelu(up))
        gate, up = up.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def build_norm(config: ModelConfig) -> nn.Module:
    """The configuration's norm over D: RMSNorm (arXiv 1910.07467) or LayerNorm."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
