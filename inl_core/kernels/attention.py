"""Causal attention inside documents in C++ (cpu/attention.cpp), rotary positions and grouped queries included.

- `inl::attention` is one operation of torch, the same in eager and in compiled blocks. It reads queries, keys and
  values where the projection wrote them and computes only what a query can see; no mask (B, 1, S, S) exists. Kept for
  the backward pass: what it was given, its output, and one number for each query and head.
- `CppAttention` and `DocumentStarts` take the places of the model's `InnerAttention` and `Visibility`.
- For CPUs, in single or double precision, without a cache; torch's attention does anything else.
- Legend: B batch, S sequence, H query heads, K key-value heads, F head size.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from inl_core.kernels.cpu import calls, structures
from inl_core.kernels.cpu.library import NAMES
from inl_core.model.attention import InnerAttention, KVCache, LayerCache, Rotary, Visibility, first_of_document
from inl_core.model.derivatives import needs_plain_operations
from inl_core.recipe import ModelConfig

_ARGUMENTS = "Tensor packed, Tensor? cosines, Tensor? sines, Tensor? first, int heads, int key_heads, str product"


class DocumentStarts(Visibility):
    """Who sees whom, as the operation wants it: where each token's document begins; with a cache, the usual mask."""

    def forward(self, ids: Tensor, document_ids: Tensor | None, cache: KVCache | None) -> Tensor | None:
        """(B, S) int64; zeros where every earlier token is seen, so that a compiler meets one kind of mask."""
        if cache is not None or needs_plain_operations():
            return super().forward(ids, document_ids, cache)
        return torch.zeros_like(ids) if document_ids is None else first_of_document(document_ids.expand(ids.shape))


class CppAttention(InnerAttention):
    """The model's inner attention by the operation. `product` is the library whose matrix product it calls."""

    def __init__(self, config: ModelConfig, product: str) -> None:
        super().__init__(config)
        self.product = product

    def forward(self, packed: Tensor, rotary: Rotary | None, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        """[queries | keys | values] (B, S, (H + 2K) F) -> the heads' outputs side by side (B, S, H F)."""
        if cache is not None or needs_plain_operations() or packed.dtype not in NAMES or packed.device.type != "cpu":
            return super().forward(packed, rotary, _as_mask(mask), cache)
        cos, sin = rotary or (None, None)
        if cos is not None and sin is not None:  # (B, S, 1, F/2) -> (B, S, F/2)
            cos, sin = (table.to(packed.dtype).reshape(-1, packed.shape[1], self.head_dim // 2) for table in (cos, sin))
        out, _ = torch.ops.inl.attention(
            packed.contiguous(), cos, sin, mask, self.num_heads, self.num_kv_heads, self.product
        )
        return out


def _as_mask(mask: Tensor | None) -> Tensor | None:
    """What the model's own attention takes: starts of documents (B, S) become a mask (B, 1, S, S), a mask stays one."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    slots = torch.arange(mask.shape[1], device=mask.device)
    return ((slots <= slots[:, None]) & (mask[:, :, None] <= slots))[:, None]


@torch.library.custom_op("inl::attention", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)")
def attention(packed, cosines, sines, first, heads, key_heads, product):
    """The heads' outputs side by side (B, S, H F), and log sum exp of each query's scores (B, H, S)."""
    out, log_sums = _results(packed, cosines, sines, first, heads, key_heads, product)
    given = (packed, cosines, sines, first, heads, key_heads, product)
    _run("attend", given, out=out, log_sums=log_sums)
    return out, log_sums


@attention.register_fake
def _results(packed, cosines, sines, first, heads, key_heads, product):
    batch, length, width = packed.shape
    out = packed.new_empty(batch, length, heads * (width // (heads + 2 * key_heads)))
    return out, packed.new_empty(batch, heads, length)


@torch.library.custom_op(
    "inl::attention_backward",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor out, Tensor log_sums, Tensor grad) -> Tensor",
)
def attention_backward(*arguments):
    """The gradient of `packed`."""
    *given, out, log_sums, grad = arguments
    grad_packed = torch.empty_like(given[0])
    _run("attend_back", given, out=out, log_sums=log_sums, grad_out=grad, grad_packed=grad_packed)
    return grad_packed


@attention_backward.register_fake
def _(*arguments):
    return torch.empty_like(arguments[0])


def _save(ctx, inputs, output) -> None:
    ctx.rest = inputs[4:]
    ctx.save_for_backward(*inputs[:4], *output)


def _differentiate(ctx, grad, _):
    *tensors, out, log_sums = ctx.saved_tensors
    found = torch.ops.inl.attention_backward(*tensors, *ctx.rest, out, log_sums, grad.contiguous())
    return found, *(None for _ in range(6))


attention.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.inl.attention)
def _flops(packed_shape, cosines_shape, sines_shape, first_shape, heads, key_heads, *_rest, **_kwargs) -> int:
    """Scores and mixtures over all keys, as torch counts them."""
    batch, length, width = packed_shape
    return 4 * batch * length * length * heads * (width // (heads + 2 * key_heads))


@register_flop_formula(torch.ops.inl.attention_backward)
def _(packed_shape, cosines_shape, sines_shape, first_shape, heads, key_heads, *_rest, **_kwargs) -> int:
    return 5 * _flops(packed_shape, None, None, None, heads, key_heads) // 2


def _run(name: str, given: Any, **others: Tensor) -> None:
    """The C++ function on what was given, once it is checked."""
    packed, cosines, sines, first, heads, key_heads, product = given
    _check(packed, cosines, sines, first, heads, key_heads)
    batch, length, width = packed.shape
    size = width // (heads + 2 * key_heads)
    if packed.numel() == 0:
        return
    call = structures.Attention(
        threads=torch.get_num_threads(),
        batch=batch,
        length=length,
        heads=heads,
        key_heads=key_heads,
        size=size,
        tables=0 if cosines is None else cosines.shape[0],
        scale=1 / math.sqrt(size),
    )
    tensors = {"packed": packed, "cosines": cosines, "sines": sines, "first": first, **others}
    what = f"attention over {batch:,} x {length:,} tokens"
    calls.run(name, call, tensors.items(), product, packed.dtype, what)


def _check(
    packed: Tensor, cosines: Tensor | None, sines: Tensor | None, first: Tensor | None, heads: int, key_heads: int
) -> None:
    """ValueError for what the loop, which trusts what it is told, would read beyond its end or misread."""
    (batch, length, width), parts = packed.shape, heads + 2 * key_heads
    if width % parts or heads % key_heads:
        raise ValueError(f"attention: {width} numbers a token are not {heads} queries and 2 x {key_heads} heads")
    if cosines is not None and width // parts % 2:
        raise ValueError(f"attention: heads of {width // parts} numbers have no pairs to rotate")
    rows = batch if cosines is not None and cosines.shape[0] == batch else 1
    table = (rows, length, width // parts // 2)
    calls.check_shapes(
        "attention", {"cosines": cosines, "sines": sines}, {"cosines": table, "sines": table}, packed.dtype
    )
    calls.check_shapes("attention", {"first": first}, {"first": (batch, length)}, torch.int64)
