"""Causal attention: rotary positions, grouped queries, and the key-value cache.

- Legend: B batch, S sequence, D d_model, H query heads, K key-value heads, F head size, M cache slots.
- `scaled_dot_product_attention` does the work, and on a CPU without a cache a loop in C++ (native/attention.cpp). Which
  of them, and who sees whom, is decided once a forward pass, in `AttentionPlan`, for every layer.
- The integrator runs inside a token, so the cache holds keys and values of attention alone and does not depend on T:
  a token that stops early leaves no hole in it.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from inl_core.model.backends.select import has_native
from inl_core.model.derivatives import is_plain
from inl_core.model.native.attention import Given, attend
from inl_core.model.normed_linear import normed_linear
from inl_core.recipe import ModelConfig


def rotary_tables(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
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


class KVCache:
    """Preallocated keys and values of every layer, each (L, B, K, M, F), and the number of filled slots.

    `padding` (B,) is the number of leading slots of a row that hold no token (left padding), or None.
    """

    def __init__(
        self, config: ModelConfig, batch: int, slots: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_layers, batch, config.key_value_heads, slots, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.padding: Tensor | None = None

    def store(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write S new slots (B, K, S, F) of a layer; all its filled slots come back as views."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch only (finished requests leave)."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.padding = None if self.padding is None else self.padding[rows]


@dataclass(frozen=True)
class AttentionPlan:
    """Positions and visibility of one forward pass, the same for all layers."""

    positions: Tensor  # (S,) or (B, S): position of each query inside its document
    mask: Tensor | None  # (B, 1, S, M) bool, True = visible; None = the plain causal (or one-token) case
    is_causal: bool
    is_native: bool = False  # the loop in C++ attends, by `first`; there is no mask
    first: Tensor | None = None  # (B, S) the first token that each one sees; None = the row's first


def plan_attention(
    ids: Tensor,
    dtype: torch.dtype,
    *,
    positions: Tensor | None,
    document_ids: Tensor | None,
    cache: KVCache | None,
) -> AttentionPlan:
    """Decide who sees whom.

    Args:
        ids: (B, S), the new tokens.
        dtype: the model's precision.
        positions: (B, S) positions, or None for 0..S-1 after what the cache holds.
        document_ids: (B, S); a document is a run of equal ones, and attention stays inside it. Not with a cache.
    """
    num_new, device = ids.shape[1], ids.device
    start = cache.length if cache else 0
    slots = torch.arange(start + num_new, device=device)
    queries = slots[start:]
    if cache is not None and cache.padding is not None:
        real = slots >= cache.padding[:, None]  # (B, M)
        # A padding query would see nothing and softmax to NaN; it sees itself instead, and nobody sees it.
        visible = (real[:, None, :] & (slots <= queries[:, None])) | (slots == queries[:, None])
        where = (queries - cache.padding[:, None]).clamp(min=0)
        return AttentionPlan(where, visible[:, None], is_causal=False)
    where = queries if positions is None else positions
    first = None if document_ids is None else first_of_document(document_ids)
    if cache is None and _native_attends(ids, dtype):
        return AttentionPlan(where, None, is_causal=True, is_native=True, first=first)
    if first is not None:
        visible = (first[:, :, None] <= slots) & (slots <= queries[:, None])
        return AttentionPlan(where, visible[:, None], is_causal=False)
    if start and num_new > 1:
        return AttentionPlan(where, (slots <= queries[:, None])[None, None], is_causal=False)
    return AttentionPlan(where, None, is_causal=num_new > 1)


def first_of_document(document_ids: Tensor) -> Tensor:
    """(B, S): where the run of equal ids begins that each token belongs to."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(starts, torch.arange(document_ids.shape[1], device=document_ids.device), 0).cummax(1).values


def _native_attends(ids: Tensor, dtype: torch.dtype) -> bool:
    """Whether the loop in C++ takes a pass of a model of this precision: tensors in a CPU's memory, no autocast."""
    if is_plain():
        return False
    is_real = type(ids) is Tensor or torch.compiler.is_compiling()
    is_precise = dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return ids.device.type == "cpu" and is_real and is_precise and has_native()


class Attention(nn.Module):
    """Grouped-query causal attention (arXiv 2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.key_value_heads, config.head_dim
        kv_width = self.num_kv_heads * self.head_dim
        self.query_key_value = nn.Linear(config.d_model, config.d_model + 2 * kv_width, bias=config.bias)
        self.output = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        norm: nn.Module,
        plan: AttentionPlan,
        rotary: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        """Attention over norm(x), x (B, S, D) -> (B, S, D).

        `rotary` is (cos, sin), ((B,) S, 1, F/2) at the plan's positions, or None.
        """
        packed = normed_linear(norm, self.query_key_value, x)
        mixed = (
            self._attend_native(packed, plan, rotary)
            if plan.is_native
            else self._attend(packed, plan, rotary, cache, layer)
        )
        return normed_linear(None, self.output, mixed)

    def _attend_native(self, packed: Tensor, plan: AttentionPlan, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """[queries | keys | values] (B, S, ...) -> (B, S, D), by the loop in C++."""
        cos, sin = rotary or (None, None)
        if cos is not None and sin is not None:  # ((B,) S, 1, F/2) -> (1 or B, S, F/2)
            cos, sin = (table.to(packed.dtype).view(-1, packed.shape[1], self.head_dim // 2) for table in (cos, sin))
        given = Given(packed, cos, sin, plan.first, self.num_heads, self.num_kv_heads)
        if torch.compiler.is_compiling():
            # Imported here: an operation of a compiled graph brings the compiler with it.
            from inl_core.model.native import attention_traced

            return attention_traced.attend(given)
        return attend(given)

    def _attend(
        self,
        packed: Tensor,
        plan: AttentionPlan,
        rotary: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        """The same by the library, with a cache or without."""
        batch, length, _ = packed.shape
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        query_key, value = packed.split((width + kv_width, kv_width), dim=-1)
        query_key, value = (part.view(batch, length, -1, self.head_dim) for part in (query_key, value))
        if rotary is not None:
            query_key = rotate(query_key, *rotary).to(value.dtype)
            value = value.clone()  # or autograd would keep all that it is a slice of
        # Heads stay side by side in memory, in the output as in the query.
        query, key = query_key.transpose(1, 2).split((self.num_heads, self.num_kv_heads), dim=1)
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.store(layer, key.to(cache.keys.dtype), value.to(cache.values.dtype))
            query = query.to(key.dtype)
        # The library's fast forms have first derivatives alone.
        with sdpa_kernel(SDPBackend.MATH) if is_plain() else nullcontext():
            mixed = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=plan.mask,
                is_causal=plan.is_causal,
                scale=1.0 / math.sqrt(self.head_dim),
                enable_gqa=self.num_kv_heads != self.num_heads,
            )
        return mixed.transpose(1, 2).reshape(batch, length, -1)
