"""One layer for one new token a row, as functions over packed weights that torch.compile takes whole.

- The same equations and order of operations as inl_core/model; nothing here depends on the token's number but the slot
  it fills, which is a tensor, so a compiled layer is compiled once.
- Compiled for one row on the CPU, a matrix-vector product is written as a sum, which the compiler turns into one pass
  over the matrix at the memory's speed; MKL's own is slower on some processors (docs/performance.md).
- Legend: B rows, D d_model, H query heads, K key-value heads, F head size, M cache slots, C controller, V vocabulary.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inl_core.inference.packing import Dynamics, Layer, Matrix, Norm
from inl_core.model.controller import ACTIVATIONS


class Reach(NamedTuple):
    """Where the new token stands, the same for all layers."""

    slot: Tensor
    """(1,) the cache slot it fills"""
    rotary: tuple[Tensor, Tensor] | None
    """cos and signed sin, (1 or B, 1, F)"""
    mask: Tensor | None
    """(1 or B, 1, 1, M), True = visible; None: every slot given is"""


class Begun(NamedTuple):
    """A layer after attention, before its integrator: x, s_0 and the candidate (B, D), the hoisted context (B, C)."""

    x: Tensor
    start: Tensor
    candidate: Tensor | None
    hoisted: Tensor


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    """x (B, in) -> (B, out)."""
    if matrix.is_reordered:
        product = torch.ops.inl.reordered_linear if torch.compiler.is_compiling() else _reordered_linear
        return product(x, matrix.weight, matrix.bias)
    if not _as_sum(x):
        return F.linear(x, matrix.weight, matrix.bias)
    total = (matrix.weight * x).sum(-1)[None]
    return total if matrix.bias is None else total + matrix.bias


def _reordered_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# The compiler takes oneDNN's own operation only with weights that are constants of what it compiles; under a name of
# ours it calls it as it is.
torch.library.define("inl::reordered_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("inl::reordered_linear", "CompositeExplicitAutograd", _reordered_linear)


@torch.library.register_fake("inl::reordered_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def add_linear(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """total (B, out) plus x (B, in) through a matrix."""
    if not _as_sum(x):
        return torch.addmm(total, x, weight.T)
    return total + (weight * x).sum(-1)


def _as_sum(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and len(x) == 1 and x.device.type == "cpu"


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """RMS or layer norm over D."""
    if norm.is_rms and x.dtype.itemsize >= 4:  # on the CPU F.rms_norm is twice as many small operations
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    if norm.is_rms:
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def attend(layer: Layer, x: Tensor, reach: Reach, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one new token over keys and values (B, K, M, F), which it joins: x (B, D) -> (B, D)."""
    batch, width, heads = len(x), x.shape[-1], layer.num_kv_heads
    kv_width = heads * layer.head_dim
    query_key, value = linear(x, layer.query_key_value).split((width + kv_width, kv_width), dim=-1)
    query_key = query_key.view(batch, -1, layer.head_dim)  # (B, H + K, F)
    if reach.rotary is not None:
        cos, sin = reach.rotary
        query_key = torch.addcmul(query_key * cos, query_key.roll(layer.head_dim // 2, -1), sin)
    query, key = query_key.split((query_key.shape[1] - heads, heads), dim=1)
    keys.index_copy_(2, reach.slot, key[:, :, None])
    values.index_copy_(2, reach.slot, value.view(batch, heads, 1, layer.head_dim))
    # A group's queries stand where a sequence's would: they share a key head, and all see the same slots.
    query = query.reshape(batch, heads, -1, layer.head_dim)
    mixed = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=reach.mask, scale=1.0 / math.sqrt(layer.head_dim)
    )
    return linear(mixed.reshape(batch, width), layer.attention_output)


def feed_forward(layer: Layer, x: Tensor) -> Tensor:
    """(B, D) -> (B, D)."""
    up = linear(x, layer.network.up)
    if not layer.network.is_gated:
        return linear(F.gelu(up), layer.network.down)
    gate, up = up.chunk(2, dim=-1)
    return linear(F.silu(gate) * up, layer.network.down)


def begin(layer: Layer, x: Tensor, reach: Reach, keys: Tensor, values: Tensor) -> Begun:
    """Attention, and all of the integrator that does not depend on t."""
    assert layer.norm_state is not None
    assert layer.dynamics is not None
    h = attend(layer, normalise(x, layer.norm_attention), reach, keys, values)
    x = x + h
    start = normalise(x, layer.norm_state)
    candidate = feed_forward(layer, start) if layer.norm_feed_forward is None else None
    return Begun(x, start, candidate, linear(h, layer.dynamics.context))


class Iterated(NamedTuple):
    """One iteration: state and velocity (B, D); `moved` (B, 1), the rms of the state's change less its forced part."""

    state: Tensor
    velocity: Tensor
    moved: Tensor | None


def integrator_step(
    dynamics: Dynamics, begun: Begun, x: Tensor, v: Tensor, forcing: Tensor, *, measured: bool = False
) -> Iterated:
    """One iteration; the equations stand in inl_core/model/integrator.py. `measured` asks how far the state moved."""
    root = math.sqrt(x.shape[-1])
    hidden = add_linear(add_linear(begun.hoisted, x, dynamics.of_state), v, dynamics.of_velocity)
    parts = linear(ACTIVATIONS[dynamics.activation](hidden), dynamics.output).chunk(
        len(dynamics.output.weight) // x.shape[-1], dim=-1
    )
    error = x - dynamics.mu
    alpha, beta, gate = torch.sigmoid(parts[0]), F.softplus(parts[1]), torch.sigmoid(parts[2])
    if dynamics.kappa is not None:
        size = torch.linalg.vector_norm(error, dim=-1, keepdim=True)
        alpha = alpha * -torch.expm1(size * (-dynamics.kappa / root))
    if dynamics.beta_max is not None:
        beta = beta.clamp(max=dynamics.beta_max)
    candidate = parts[3] if len(parts) == 4 else begun.candidate
    mixed = alpha * v if candidate is None else torch.lerp(candidate, v, alpha)
    free = torch.addcmul(mixed, beta, error, value=-1.0)
    new_v = free + forcing
    moved = torch.linalg.vector_norm(gate * free, dim=-1, keepdim=True) * (dynamics.stride / root) if measured else None
    return Iterated(torch.addcmul(x, gate, new_v, value=dynamics.stride), new_v, moved)


def freeze(active: Tensor | None, new: Iterated, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """State and velocity with stopped rows left as they were; `active` (B,), None is all."""
    if active is None:
        return new.state, new.velocity
    keep = active[:, None]
    return torch.where(keep, new.state, x), torch.where(keep, new.velocity, v)


def finish(layer: Layer, begun: Begun, state: Tensor) -> Tensor:
    """The readout and, where it is not the candidate, the feed-forward."""
    x = begun.x + state if layer.gain is None else torch.addcmul(begun.x, layer.gain, state - begun.start)
    if layer.norm_feed_forward is None:
        return x
    return x + feed_forward(layer, normalise(x, layer.norm_feed_forward))


def layer_step(
    layer: Layer, x: Tensor, velocity: Tensor, reach: Reach, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """One layer with all its iterations: x and the velocity it ends with, (B, D)."""
    if layer.dynamics is None:
        assert layer.norm_feed_forward is not None
        x = x + attend(layer, normalise(x, layer.norm_attention), reach, keys, values)
        return x + feed_forward(layer, normalise(x, layer.norm_feed_forward)), velocity
    begun = begin(layer, x, reach, keys, values)
    state = begun.start
    for t in range(layer.dynamics.num_iterations):
        state, velocity, _ = integrator_step(layer.dynamics, begun, state, velocity, layer.dynamics.forcing[t])
    return finish(layer, begun, state), velocity


def head_logits(hidden: Tensor, down: Matrix | None, head: Matrix) -> Tensor:
    """hidden (B, D) -> logits (B, V) in float32, through the factors where there are two."""
    return linear(hidden if down is None else linear(hidden, down), head).float()
