"""Causal attention: rotary positions, grouped queries, and the key-value cache.

- Legend: B batch, S sequence, D d_model, H query heads, K key-value heads, F head size, M cache slots.
- Who sees whom is decided once a forward pass, by `Visibility`, and handed to every layer as its mask.
- The integrator runs inside a token, so the cache holds keys and values of attention alone and does not depend on T:
  a token that stops early leaves no hole in it.
- `Visibility` and `InnerAttention` have no parameters; `inl_core.kernels.apply` may put faster ones in their places.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inl_core.recipe import ModelConfig

Rotary = tuple[Tensor, Tensor]
"""cos and sin of each position's angles, each (B, S, 1, F/2)."""


def rotary_tables(length: int, head_dim: int, theta: float) -> Rotary:
    """cos and sin, each (length, F/2), of position * theta^(-2i/F) (RoFormer, arXiv 2104.09864)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def sinusoidal_table(length: int, d_model: int) -> Tensor:
    """Sines on even and cosines on odd dimensions, (length, D) (arXiv 1706.03762)."""
    frequency = 10_000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :d_model].float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + F/2) of x (B, S, heads, F) by the angles in cos, sin (..., S, 1, F/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class LayerCache(NamedTuple):
    """One layer's keys and values (B, K, M, F), and the slots (S,) that the new tokens fill.

    previous: the last token's velocity after each of the layer's two steps, (B, 1, D), where velocity travels along the
        text (stream.py); else twice None.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    previous: Sequence[Tensor] | Sequence[None]


class KVCache:
    """Preallocated keys and values of each layer, (B, K, M, F), and the number of filled slots.

    padding: (B,) the number of leading slots of a row that hold no token (left padding), or None.
    dtype: of keys and values.
    stream_dtype: of `previous`, which is part of the residual stream.
    is_static: attention always runs over all M slots, hidden ones behind a mask, and `length` is a 0-dim tensor. So
        nothing that a compiler makes code for changes from token to token.
    """

    length: int | Tensor

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        slots: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        stream_dtype: torch.dtype,
        is_static: bool = False,
    ) -> None:

        def zeros(count: int, *shape: int, dtype: torch.dtype = dtype) -> list[Tensor]:
            # Tensors of their own: a compiler copies the whole of one that is written to in parts.
            return [torch.zeros(batch, *shape, device=device, dtype=dtype) for _ in range(count)]

        shape = (config.key_value_heads, slots, config.head_dim)
        self.keys, self.values = zeros(config.num_layers, *shape), zeros(config.num_layers, *shape)
        # Where velocity travels along the text (stream.py): the last token's embedding and its velocity after each of
        # the 2L steps, 2L+1 times (B, 1, D).
        rows = 2 * config.num_layers + 1
        self.previous = zeros(rows, 1, config.d_model, dtype=stream_dtype) if config.transport else None
        self.length = torch.zeros((), dtype=torch.int64, device=device) if is_static else 0
        self.padding: Tensor | None = None
        self.is_static = is_static

    def visible_slots(self, num_new: int) -> int:
        """How many slots attention runs over when this many tokens are added."""
        return self.length + num_new if isinstance(self.length, int) else self.keys[0].shape[2]

    def new_slots(self, num_new: int) -> Tensor:
        """The slots (S,) that this many new tokens fill."""
        return torch.arange(num_new, device=self.keys[0].device) + self.length

    def layers(self, num_new: int) -> list[LayerCache]:
        """Each layer's part for a pass that adds this many tokens."""
        end = self.visible_slots(num_new)
        slots = self.new_slots(num_new)
        previous = self.previous or [None] * (2 * len(self.keys) + 1)
        return [
            LayerCache(keys[:, :, :end], values[:, :, :end], slots, previous[2 * layer + 1 : 2 * layer + 3])
            for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True))
        ]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch only (finished requests leave)."""
        self.keys, self.values = [keys[rows] for keys in self.keys], [values[rows] for values in self.values]
        self.previous = None if self.previous is None else [previous[rows] for previous in self.previous]
        self.padding = None if self.padding is None else self.padding[rows]


def token_positions(ids: Tensor, positions: Tensor | None, cache: KVCache | None, last: int) -> Tensor:
    """(B, S): the position of each new token of `ids` (B, S) inside its document.

    Args:
        positions: (B, S) where the caller knows them.
        last: the largest position there is. In a static batch a row that has filled its context stands still there
            while shorter rows go on.
    """
    if positions is not None:
        return positions
    num_new = ids.shape[1]
    slots = cache.new_slots(num_new) if cache else torch.arange(num_new, device=ids.device)
    slots = slots.expand(ids.shape)
    if cache is None or cache.padding is None:
        return slots
    return (slots - cache.padding[:, None]).clamp(min=0, max=last)


def first_of_document(document_ids: Tensor) -> Tensor:
    """(B, S): where the run of equal ids begins that each token belongs to."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(starts, torch.arange(document_ids.shape[1], device=document_ids.device), 0).cummax(1).values


class Visibility(nn.Module):
    """Which earlier tokens each token sees, as the mask that `InnerAttention` wants."""

    def forward(self, ids: Tensor, document_ids: Tensor | None, cache: KVCache | None) -> Tensor | None:
        """(B or 1, 1, S, M) bool, True = visible. None is the plain case: every earlier token, or one new token.

        Args:
            ids: (B, S), the new tokens.
            document_ids: (B, S); a document is a run of equal ones, and attention stays inside it. Not with a cache.
        """
        num_new, device = ids.shape[1], ids.device
        slots = torch.arange(cache.visible_slots(num_new) if cache else num_new, device=device)
        queries = cache.new_slots(num_new) if cache else slots
        visible = slots <= queries[:, None]  # (S, M)
        if cache is not None and cache.padding is not None:
            real = slots >= cache.padding[:, None, None]  # (B, 1, M)
            # A padding query would see nothing and softmax to NaN; it sees itself instead, and nobody sees it.
            return ((real & visible) | (slots == queries[:, None]))[:, None]
        if document_ids is not None:
            return (visible & (first_of_document(document_ids)[:, :, None] <= slots))[:, None]
        if cache is not None and (cache.is_static or (cache.length and num_new > 1)):
            return visible[None, None]
        return None


class InnerAttention(nn.Module):
    """softmax(q k^T / sqrt(F)) v with rotary positions, by torch's `scaled_dot_product_attention`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.key_value_heads, config.head_dim

    def forward(self, packed: Tensor, rotary: Rotary | None, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        """[queries | keys | values] (B, S, (H + 2K) F) -> the heads' outputs side by side (B, S, H F)."""
        batch, length, _ = packed.shape
        heads = packed.view(batch, length, -1, self.head_dim)
        query_key, value = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=2)
        if rotary is not None:
            query_key = rotate(query_key, *rotary).to(value.dtype)
            value = value.clone()  # or autograd would keep all that it is a slice of
        query, key = query_key.transpose(1, 2).split((self.num_heads, self.num_kv_heads), dim=1)  # (B, heads, S, F)
        value = value.transpose(1, 2)
        if cache is not None:
            key = cache.keys.index_copy_(2, cache.slots, key.to(cache.keys.dtype))
            value = cache.values.index_copy_(2, cache.slots, value.to(cache.values.dtype))
            query = query.to(key.dtype)
        mixed = self.mix(query, key, value, mask, 1.0 / math.sqrt(self.head_dim))
        mixed = mixed.view(batch, self.num_heads, length, -1).transpose(1, 2).reshape(batch, length, -1)
        return mixed.to(packed.dtype)  # a cache may hold another one

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """softmax(q k^T scale) v: queries (B, H, S, F), keys and values (B, K, M, F) -> (B, H, S, F), or as many."""
        batch, _, length, _ = query.shape
        is_causal = True if mask is None and length > 1 else False  # noqa: SIM210 - a bool for a compiler, too
        is_grouped = self.num_kv_heads != self.num_heads
        if length == 1 and is_grouped:
            # A group's queries stand where a sequence's would: they share a key head, and all see the same slots.
            query, is_grouped = query.reshape(batch, self.num_kv_heads, -1, self.head_dim), False
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
        )


class Attention(nn.Module):
    """Grouped-query causal attention (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kv_width = config.key_value_heads * config.head_dim
        self.query_key_value = nn.Linear(config.d_model, config.d_model + 2 * kv_width, bias=config.bias)
        self.inner_attention = InnerAttention(config)
        self.output = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, rotary: Rotary | None, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        """(B, S, D) -> (B, S, D); `rotary` at the tokens' positions, `mask` as `Visibility` makes it."""
        return self.output(self.inner_attention(self.query_key_value(x), rotary, mask, cache))
