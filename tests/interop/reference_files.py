"""The reference generations for the tests: small random files, and the logits of their models in float64.

Nothing here uses our model: the logits are computed from the file's own tensors, head by head and step by step.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
GENERATIONS = ("released", "earlier")
HEADS, VOCAB, LAYERS, HIDDEN = 4, 300, 3, 85  # 85 = int(128 * 2 / 3)


def random_tensors(
    generation: str, *, dim: int = 128, kv_heads: int = 2, place: str = "inl.inl", vocab: int = VOCAB, seed: int = 0
) -> Tensors:
    """Every tensor that a model of the generation computes with."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, around: float = 0.0, spread: float | None = None) -> Tensor:
        spread = 1.0 / math.sqrt(shape[-1]) if spread is None and len(shape) == 2 else spread or 0.2
        return around + spread * torch.randn(shape, generator=generator)

    rank, head_dim = max(64, int(dim / 8)), dim // HEADS
    norms = {"weight": 1.0} if generation == "released" else {"weight": 1.0, "bias": 0.0}
    tensors = {
        "token_embedding.embed_low.weight": draw(vocab, rank, spread=0.5),
        "token_embedding.project_up.weight": draw(dim, rank),
        "lm_head.weight": draw(vocab, dim),
        **{f"final_norm.{part}": draw(dim, around=mean) for part, mean in norms.items()},
    }
    for layer in range(LAYERS):
        own = {f"{norm}.{part}": draw(dim, around=mean) for norm in NORMS for part, mean in norms.items()}
        own |= {
            f"{place}.mu_global": draw(1).squeeze(0),
            f"{place}.mu_local_offsets": draw(math.ceil(dim / 64)),
            f"{place}.controller.0.weight": draw(64, 3 * dim),
            f"{place}.controller.0.bias": draw(64),
            f"{place}.controller.2.weight": draw(3 * dim, 64),
            # wide, so that alpha, beta and gate spread and some beta lies beyond 2
            f"{place}.controller.2.bias": draw(3 * dim, spread=1.5),
        }
        if generation == "released":
            own |= {f"attention.{name}_proj.weight": draw(dim, dim) for name in ("q", "out")}
            own |= {f"attention.{name}_proj.weight": draw(kv_heads * head_dim, dim) for name in ("k", "v")}
            own |= {"ff.w1.weight": draw(HIDDEN, dim), "ff.w3.weight": draw(HIDDEN, dim)}
            own |= {"ff.w2.weight": draw(dim, HIDDEN)}
        else:
            own |= {"attention.in_proj_weight": draw(3 * dim, dim), "attention.in_proj_bias": draw(3 * dim)}
            own |= {"attention.out_proj.weight": draw(dim, dim), "attention.out_proj.bias": draw(dim)}
            own |= {"ff.0.weight": draw(HIDDEN, dim), "ff.0.bias": draw(HIDDEN)}
            own |= {"ff.3.weight": draw(dim, HIDDEN), "ff.3.bias": draw(dim)}
        tensors |= {f"layers.{layer}.{name}": tensor for name, tensor in own.items()}
    return tensors


NORMS = ("norm_attn", "norm1", "norm2")


def ignored_tensors(generation: str, *, dim: int = 128, length: int = 64) -> Tensors:
    """The tensors that a saved model of the generation also holds, though no output depends on them."""
    tensors = {
        "shared_controller.controller_h.weight": torch.randn(64, dim),
        "shared_controller.layer_scalers": torch.ones(LAYERS, 4),
        "layers.1.shared_controller.controller_h.weight": torch.randn(64, dim),
    }
    if generation == "earlier":
        return tensors | {"pos_encoding.pe": torch.randn(1, length, dim)}
    half = dim // HEADS // 2
    frequencies = 10_000.0 ** (-torch.arange(half) / half)
    tables = torch.outer(torch.arange(length), frequencies).repeat(1, 2)[None, None]
    tensors |= {"budget_allocator.layer_budgets": torch.ones(LAYERS), "layers.0.budget_allocator.phase": torch.ones(1)}
    for layer in range(LAYERS):
        tensors |= {
            f"layers.{layer}.attention.rope.inv_freq": frequencies.clone(),
            f"layers.{layer}.attention.rope.cos_cached": tables.cos(),
            f"layers.{layer}.attention.rope.sin_cached": tables.sin(),
            f"layers.{layer}.inl.avg_iterations": torch.tensor(1.9),
            f"layers.{layer}.inl.num_forwards": torch.tensor(12),
        }
    return tensors


def write_file(path: Path, tensors: Tensors) -> Path:
    """A safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def reference_logits(
    file: Tensors, ids: Tensor, *, iterations: list[int], eps: float, group_size: int = 64, base: float = 10_000.0
) -> Tensor:
    """Logits (S, V) of ids (S,) in float64; `eps` is the norms', `base` that of the rotary frequencies."""
    tensors = {name: tensor.double() for name, tensor in file.items() if tensor.is_floating_point()}
    released = "layers.0.attention.q_proj.weight" in tensors
    place = "inl.inl" if "layers.0.inl.inl.mu_global" in tensors else "inl"

    def norm(x: Tensor, name: str) -> Tensor:
        weight = tensors[name + ".weight"]
        if released:
            return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + tensors[name + ".bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        bias = tensors.get(name + ".bias")
        return x @ tensors[name + ".weight"].T + (0 if bias is None else bias)

    if "token_embedding.weight" in tensors:
        x = tensors["token_embedding.weight"][ids]
    else:
        x = linear(tensors["token_embedding.embed_low.weight"][ids], "token_embedding.project_up")  # (S, D)
    dim = x.shape[1]
    if not released:
        x = x + sinusoids(len(ids), dim)
    for layer, steps in enumerate(iterations):
        at = f"layers.{layer}."
        seen = norm(x, at + "norm_attn")
        if released:
            parts = [seen @ tensors[f"{at}attention.{name}_proj.weight"].T for name in "qkv"]
        else:
            fused = seen @ tensors[at + "attention.in_proj_weight"].T + tensors[at + "attention.in_proj_bias"]
            parts = [fused[:, :dim], fused[:, dim : 2 * dim], fused[:, 2 * dim :]]
        h = linear(attend(*parts, base=base if released else None), at + "attention.out_proj")
        x = x + h

        mu = tensors[f"{at}{place}.mu_global"] + tensors[f"{at}{place}.mu_local_offsets"].repeat_interleave(group_size)
        mu = mu[:dim]
        state = norm(x, at + "norm1")
        velocity = torch.zeros_like(state)
        for _ in range(steps):
            hidden = linear(torch.cat([h, state, velocity], dim=-1), f"{at}{place}.controller.0").clamp(min=0)
            raw = linear(hidden, f"{at}{place}.controller.2")
            alpha, beta, gate = (
                raw[:, :dim].sigmoid(),
                (1 + raw[:, dim : 2 * dim].exp()).log(),
                raw[:, 2 * dim :].sigmoid(),
            )
            velocity = alpha * velocity - beta * (state - mu)
            state = state + 0.1 * gate * velocity
        x = x + state

        seen = norm(x, at + "norm2")
        if released:
            gated = linear(seen, at + "ff.w1")
            x = x + linear(gated * gated.sigmoid() * linear(seen, at + "ff.w3"), at + "ff.w2")
        else:
            x = x + linear(F.gelu(linear(seen, at + "ff.0")), at + "ff.3")
    return norm(x, "final_norm") @ tensors["lm_head.weight"].T


def attend(queries: Tensor, keys: Tensor, values: Tensor, *, base: float | None) -> Tensor:
    """Causal attention of (S, D) queries over (S, K F) keys and values, one head at a time."""
    length, dim = queries.shape
    size = dim // HEADS
    shared_by = HEADS // (keys.shape[1] // size)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    outputs = []
    for head in range(HEADS):
        own, other = slice(head * size, (head + 1) * size), (head // shared_by) * size
        query, key, value = queries[:, own], keys[:, other : other + size], values[:, other : other + size]
        if base is not None:
            query, key = rotate_half(query, base), rotate_half(key, base)
        scores = (query @ key.T / math.sqrt(size)).masked_fill(hidden, -math.inf)
        outputs.append(scores.softmax(-1) @ value)
    return torch.cat(outputs, dim=-1)


def rotate_half(x: Tensor, base: float) -> Tensor:
    """x cos + [-x_2, x_1] sin for the halves x_1, x_2 of (S, F); tables in float32 precision, as models store them."""
    length, size = x.shape
    angle = torch.arange(length).double()[:, None] * base ** (-torch.arange(0, size, 2).double() / size)
    cos, sin = (table.float().double().repeat(1, 2) for table in (angle.cos(), angle.sin()))
    first, second = x[:, : size // 2], x[:, size // 2 :]
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def sinusoids(length: int, dim: int) -> Tensor:
    """Sines on even, cosines on odd dimensions, (S, D), rounded to float32."""
    table = torch.empty(length, dim, dtype=torch.float64)
    angle = torch.arange(length).double()[:, None] * 10_000.0 ** (-torch.arange(0, dim, 2).double() / dim)
    table[:, 0::2], table[:, 1::2] = angle.sin(), angle.cos()
    return table.float().double()
