"""Where tokens come in and predictions go out: embedding, the head that reuses it, the loss over the vocabulary.

`Lookup` and `VocabularyLoss` have no parameters; `inl_core.kernels.apply` may put others with the same results in their
places. Legend: B batch, S sequence, N tokens, D d_model, V vocabulary, R rank.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inl_core.recipe import ModelConfig

IGNORED = -100
"""The target of a token that does not count."""


class Lookup(nn.Module):
    """Rows of the table by their numbers."""

    def forward(self, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, S), table (V, R or D) -> its rows (B, S, R or D), and the table for the loss of the same pass."""
        return F.embedding(ids, table), table


class VocabularyLoss(nn.Module):
    """The cross-entropy of logits z W^T, all logits (N, V) at once."""

    def forward(self, z: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Sum over targets other than -100 of the cross-entropy in nats: z (N, R), W (V, R), targets (N,)."""
        logits = F.linear(z, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)


class Embedding(nn.Module):
    """Token embeddings, full (V, D) or E (V, R) P (R, D), and the head that reuses them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size, "the vocabulary size is the tokenizer's: ModelConfig.with_vocab_size"
        self.normalise, self.eps = config.embedding_norm, config.norm_eps
        self.scale = math.sqrt(config.d_model) if config.embedding_scale == "sqrt_dim" else 1.0
        self.table = nn.Embedding(config.vocab_size, config.rank or config.d_model)
        self.lookup = Lookup()
        self.project_up = nn.Linear(config.rank, config.d_model, bias=False) if config.rank else None

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, S) -> (B, S, D), and the table (V, R or D) as the loss of the same pass should see it."""
        x, table = self.lookup(ids, self.table.weight)
        if self.project_up:
            x = self.project_up(x).to(x.dtype)  # the residual stream keeps its precision under autocast
        if self.normalise:
            x = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        return (x if self.scale == 1.0 else x * self.scale), table

    def head_factors(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """z and E with logits = z E^T: hidden (..., D) -> z (..., R or D), E (V, R or D)."""
        return (F.linear(hidden, self.project_up.weight.T) if self.project_up else hidden), self.table.weight
