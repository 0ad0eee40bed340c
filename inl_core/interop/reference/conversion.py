"""A reference file's dimensions as our configuration, and its tensors under our names.

    x = x + h, h = attention(norm_attn(x));  s_0 = norm1(x), v_0 = 0
    alpha, beta, gate = sigmoid, softplus, sigmoid of Linear(ReLU(Linear([h; s_t; v_t])))
    v_{t+1} = alpha v_t - beta (s_t - mu);  s_{t+1} = s_t + 0.1 gate v_{t+1}
    x = x + s_T;  x = x + feed_forward(norm2(x))

- What the reference does not have is switched off: the candidate velocity, dynamic alpha, excitation (A = 0), the
  bound on beta, early stopping. So every key of the dynamics is written out here, and none comes from a preset.
- Legend: as in layout.py.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from inl_core.interop.reference.layout import FULL_EMBEDDING, Layout
from inl_core.recipe import ModelConfig
from inl_core.recipe.model import ControllerConfig, ExcitationConfig, IntegratorConfig, MuConfig

Read = Callable[[str], Tensor]

_RELEASED: dict[str, Any] = {
    "preset": "v3",
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "positions": "rope",
    "feed_forward": "swiglu",
    "bias": False,
}
_EARLIER: dict[str, Any] = {
    "preset": "v2",
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "positions": "sinusoidal",
    "feed_forward": "gelu",
    "bias": True,
}


def build_config(
    layout: Layout,
    *,
    num_heads: int,
    num_kv_heads: int,
    iterations: tuple[int, ...],
    max_seq_len: int,
    rope_theta: float,
) -> ModelConfig:
    """The configuration of the file's model; `iterations` has one entry for each layer."""
    is_uniform = len(set(iterations)) == 1
    integrator = IntegratorConfig(
        num_iterations=max(iterations),
        iterations_per_layer=None if is_uniform else iterations,
        dt=0.1,
        dynamic_alpha=False,
        beta_max=None,
        candidate="none",
        carry_velocity=False,
        readout="state",
        mu=_mu(layout),
        excitation=ExcitationConfig(amplitude=0.0, sparsity=0.1),
        controller=ControllerConfig(
            width=layout.controller_width, shared=False, modulation="channel", activation="relu"
        ),
    )
    return ModelConfig.model_validate(
        (_RELEASED if layout.generation == "released" else _EARLIER)
        | {
            "d_model": layout.d_model,
            "num_layers": layout.num_layers,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "feedforward_hidden": layout.hidden_dim,
            "max_seq_len": max_seq_len,
            "vocab_size": layout.vocab_size,
            "rope_theta": rope_theta,
            "embedding_rank": layout.rank,
            "embedding_norm": False,
            "embedding_scale": "none",
            "tie_head": False,
            "integrator": integrator.model_dump(),
        }
    )


def _mu(layout: Layout) -> MuConfig:
    if layout.d_model % layout.group_size:
        return MuConfig(form="per_dim")
    return MuConfig(form="hierarchical", group_size=layout.group_size)


def convert(layout: Layout, read: Read) -> Iterator[tuple[str, Tensor]]:
    """Our model's parameters, one by one; `read` returns a tensor of the file by its name."""
    if layout.rank is None:
        yield "embedding.table.weight", read(FULL_EMBEDDING)
    else:
        yield "embedding.table.weight", read("token_embedding.embed_low.weight")
        yield "embedding.project_up.weight", read("token_embedding.project_up.weight")
    yield "head.weight", read("lm_head.weight")
    yield from _copies(layout, read, {"norm_final": "final_norm"})
    for layer in range(layout.num_layers):
        source, target = f"layers.{layer}.", f"blocks.{layer}."
        norms = {"norm_attention": "norm_attn", "norm_state": "norm1", "norm_feed_forward": "norm2"}
        yield from _copies(layout, read, {target + ours: source + theirs for ours, theirs in norms.items()})
        yield from _integrator(layout, read, f"{source}{layout.integrator}.", f"{target}integrator.")
        yield from (_released if layout.generation == "released" else _earlier)(layout, read, source, target)


def _copies(layout: Layout, read: Read, modules: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Modules (our name -> theirs) whose weight, and in the earlier generation bias, are taken over as they are."""
    parts = ("weight",) if layout.generation == "released" else ("weight", "bias")
    for ours, theirs in modules.items():
        for part in parts:
            yield f"{ours}.{part}", read(f"{theirs}.{part}")


def _integrator(layout: Layout, read: Read, source: str, target: str) -> Iterator[tuple[str, Tensor]]:
    """mu and the controller, whose first matrix (C, 3D) is W_h, W_x and W_v side by side."""
    dim = layout.d_model
    mu_global, offsets = read(source + "mu_global").reshape(1), read(source + "mu_local_offsets")
    if dim % layout.group_size:  # our groups are all of one size, but the last one here has fewer dimensions
        yield target + "equilibrium.mu", mu_global + offsets.repeat_interleave(layout.group_size)[:dim]
    else:
        yield target + "equilibrium.mu_global", mu_global
        yield target + "equilibrium.mu_offsets", offsets
    first = read(source + "controller.0.weight")
    yield target + "controller.context.weight", first[:, :dim]
    yield target + "controller.state_velocity.weight", first[:, dim:]
    yield target + "controller.context.bias", read(source + "controller.0.bias")
    yield target + "controller.output.weight", read(source + "controller.2.weight")
    yield target + "modulation.bias", read(source + "controller.2.bias").view(3, dim)


def _released(layout: Layout, read: Read, source: str, target: str) -> Iterator[tuple[str, Tensor]]:
    """Attention and SwiGLU: query, key and value are one matrix of ours, and so are gate (w1) and up (w3)."""
    fused = torch.cat([read(f"{source}attention.{part}_proj.weight") for part in "qkv"])
    yield target + "attention.query_key_value.weight", fused
    yield from _copies(layout, read, {target + "attention.output": source + "attention.out_proj"})
    yield target + "feed_forward.up.weight", torch.cat([read(source + "ff.w1.weight"), read(source + "ff.w3.weight")])
    yield from _copies(layout, read, {target + "feed_forward.down": source + "ff.w2"})


def _earlier(layout: Layout, read: Read, source: str, target: str) -> Iterator[tuple[str, Tensor]]:
    """Attention and GELU, with biases."""
    for part in ("weight", "bias"):
        yield f"{target}attention.query_key_value.{part}", read(f"{source}attention.{layout.fused}{part}")
    modules = {"attention.output": "attention.out_proj", "feed_forward.up": "ff.0", "feed_forward.down": "ff.3"}
    yield from _copies(layout, read, {target + ours: source + theirs for ours, theirs in modules.items()})
