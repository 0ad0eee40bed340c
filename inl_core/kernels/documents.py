"""Attention inside documents on a GPU by torch's `flex_attention`, without a mask of every pair of tokens.

- A dense mask rules flash attention out, takes B S S bytes, and has every pair computed, seen or not. Here each layer
  is given a `BlockMask`, made once a forward pass: which blocks of 128 x 128 pairs are seen wholly, in part, or not.
- A document is a run of tokens, so what a query sees is one range of keys, and the blocks follow by arithmetic from
  where each token's document begins. No mask of pairs is made on the way, and the host waits for nothing.
- Where no document begins inside a window there is no mask at all, and torch's own attention is the fastest.
- Legend: B batch, S sequence, n blocks of a row.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from inl_core.model.attention import InnerAttention, KVCache, Visibility, first_of_document
from inl_core.model.derivatives import needs_plain_operations

_BLOCK = 128
_LEAST_HEAD = 16
"""The smallest head that flex_attention takes."""


def why_not_flex(head_dim: int) -> str:
    """Why `flex_attention` cannot be used on this machine's GPU; empty where it can."""
    from torch.utils._triton import has_triton

    if head_dim < _LEAST_HEAD:
        return f"heads of {head_dim} numbers are too small for flex_attention"
    return "" if has_triton() else "flex_attention needs triton, which does not run here"


class DocumentBlocks(Visibility):
    """Who sees whom: a BlockMask where documents are told apart, else the usual mask."""

    def forward(self, ids: Tensor, document_ids: Tensor | None, cache: KVCache | None) -> Any:
        """A BlockMask of (B, 1, S, S), or what `Visibility` gives."""
        if document_ids is None or cache is not None or needs_plain_operations():
            return super().forward(ids, document_ids, cache)
        return block_mask(first_of_document(document_ids.expand(ids.shape)))


def block_mask(first: Tensor) -> BlockMask:
    """The blocks of a causal mask inside documents, from where each token's document begins: first (B, S)."""
    length, device = first.shape[1], first.device
    blocks = torch.arange(-(-length // _BLOCK), device=device)
    last_row = (blocks * _BLOCK + _BLOCK - 1).clamp(max=length - 1)
    # Of the queries of a block the first one sees furthest back, and the last one least far.
    begin = first[:, blocks * _BLOCK] // _BLOCK  # (B, n): the first block of keys that any of them sees
    whole = (first[:, last_row] + _BLOCK - 1) // _BLOCK  # the first one that all of them see from its first key
    is_seen = (blocks >= begin[..., None]) & (blocks <= blocks[:, None])  # (B, n, n)
    is_whole = (blocks >= whole[..., None]) & (blocks < blocks[:, None])

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first[batch, query] <= key) & (key <= query)

    counts, indices = _in_order(is_seen & ~is_whole)
    whole_counts, whole_indices = _in_order(is_whole)
    return BlockMask.from_kv_blocks(
        counts, indices, whole_counts, whole_indices, BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, (B, 1, n), and which, those first, (B, 1, n, n)."""
    chosen = blocks[:, None].int()
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).int()


class FlexAttention(InnerAttention):
    """The model's inner attention, by flex_attention where it is given a BlockMask."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
        """softmax(q k^T scale) v, (B, H, S, F)."""
        if not isinstance(mask, BlockMask):
            return super().mix(query, key, value, mask, scale)
        is_grouped = self.num_kv_heads != self.num_heads
        # Outside of a compiled block it is compiled by itself: uncompiled it would make every score.
        attend = flex_attention if query.device.type == "cpu" or torch.compiler.is_compiling() else _compiled()
        return attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=is_grouped)


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)
