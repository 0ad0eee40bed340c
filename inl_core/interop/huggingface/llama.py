"""A Transformer of ours as a Llama, which computes the same: its weights renamed, nothing trained or rounded anew.

- Our rotary positions turn the pairs (i, i + F/2) of a head, as transformers' Llama does, so no row changes places.
- Our embeddings are normalised after the look-up. Here the table holds them normalised; the head keeps them as they
  are, so the two are not tied.
- A product of two matrices, a low-rank embedding, is multiplied out.
- Legend: D d_model, V vocabulary, H hidden width.
"""

from typing import Any

import torch
from torch import Tensor

from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import ModelConfig


def why_not_llama(config: ModelConfig) -> str | None:
    """What this model computes that a Llama does not, in a few words; None where there is nothing."""
    reasons = {
        "has an integrator in each block": config.integrator is not None,
        f"has {', '.join(config.stream_terms)} in its residual stream": bool(config.stream_terms),
        f"has {config.positions} positions": config.positions != "rope",
        f"has {config.norm} for its norms": config.norm != "rmsnorm",
        f"has a {config.feed_forward} feed-forward": config.feed_forward != "swiglu",
    }
    return next((reason for reason, is_so in reasons.items() if is_so), None)


def llama_config(config: ModelConfig, ids: dict[str, Any]) -> Any:
    """The LlamaConfig of a model that `why_not_llama` has nothing against; `ids` are those of the special tokens."""
    from transformers import LlamaConfig

    assert why_not_llama(config) is None
    assert config.vocab_size
    found = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.key_value_heads,
        hidden_act="silu",
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attention_bias=config.bias,
        mlp_bias=config.bias,
        tie_word_embeddings=False,
        **ids,
    )
    found.rope_theta = config.rope_theta  # where transformers 4 looks for it; without it, it takes 10,000
    return found


@torch.no_grad()
def llama_weights(model: IntegratorLanguageModel) -> dict[str, Tensor]:
    """The tensors of a LlamaForCausalLM by name, from the model's own."""
    config, own = model.config, model.state_dict()
    every_id = torch.arange(model.vocab_size, device=own["norm_final.weight"].device)
    embedded, _ = model.embedding(every_id[None])
    if model.head is not None:
        head = model.head.weight
    elif model.embedding.project_up is not None:
        head = model.embedding.table.weight @ model.embedding.project_up.weight.T  # (V, R) (R, D)
    else:
        head = model.embedding.table.weight
    found = {
        "model.embed_tokens.weight": embedded[0],  # (V, D)
        "model.norm.weight": own["norm_final.weight"],
        "lm_head.weight": head,
    }
    key_value_rows = config.key_value_heads * config.head_dim
    attention_rows = {"q_proj": config.d_model, "k_proj": key_value_rows, "v_proj": key_value_rows}
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        found[f"{theirs}.input_layernorm.weight"] = own[f"{ours}.norm_attention.weight"]
        found[f"{theirs}.post_attention_layernorm.weight"] = own[f"{ours}.norm_feed_forward.weight"]
        for kind in ("weight", "bias") if config.bias else ("weight",):
            packed = own[f"{ours}.attention.query_key_value.{kind}"].split(list(attention_rows.values()))
            for name, rows in zip(attention_rows, packed, strict=True):
                found[f"{theirs}.self_attn.{name}.{kind}"] = rows
            found[f"{theirs}.self_attn.o_proj.{kind}"] = own[f"{ours}.attention.output.{kind}"]
            gate, up = own[f"{ours}.feed_forward.up.{kind}"].chunk(2)  # each (H, D)
            found[f"{theirs}.mlp.gate_proj.{kind}"], found[f"{theirs}.mlp.up_proj.{kind}"] = gate, up
            found[f"{theirs}.mlp.down_proj.{kind}"] = own[f"{ours}.feed_forward.down.{kind}"]
    return {name: tensor.clone() for name, tensor in found.items()}
