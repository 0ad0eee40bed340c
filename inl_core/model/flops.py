"""Floating-point operations of one token, by part, from the equations.

- A matrix of n weights costs 2 n a token forward. Attention's two products cost 2 D (S + 1) in a causal window of S,
  where a token sees (S + 1) / 2 on average; a document mask makes it less.
- The backward pass does every product twice (for the input and for the weight): training is 3 times forward.
  Recomputation does a part of the forward pass once more; that is work of the machine, not of the model.
- The product of a low-rank embedding counts.
- What is not a matrix product is left out, as everywhere in the literature. Norms, softmax, activations and the
  dynamics themselves come to some 30 operations for each dimension and iteration. The sines, and the folding of a
  layer's modulation into W_out, are done once a step, not once a token.
- Legend: S window, D d_model, C controller width, T iterations, V vocabulary, R embedding rank.
"""

from inl_core.model.controller import num_groups
from inl_core.recipe import ModelConfig


def flops_by_part(config: ModelConfig, length: int, *, iterations: int | None = None) -> dict[str, int]:
    """Forward FLOPs of one token in a window of `length`, with T = `iterations` or the configured one."""
    assert config.vocab_size
    dim, layers, rank = config.d_model, config.num_layers, config.rank
    queries_keys_values = dim * (dim + 2 * config.key_value_heads * config.head_dim)
    matrices = 3 if config.feed_forward == "swiglu" else 2
    head = config.vocab_size * rank + rank * dim if rank and config.tie_head else config.vocab_size * dim
    parts = {
        "embedding": 2 * rank * dim if rank else 0,
        "attention": 2 * layers * (queries_keys_values + dim * dim),
        "attention scores": 2 * layers * dim * (length + 1),
        "controller": 2 * _controller_products(config, config.mean_iterations if iterations is None else iterations),
        "feed-forward": 2 * layers * matrices * dim * config.hidden_dim,
        "head": 2 * head,
    }
    return {part: count for part, count in parts.items() if count}


def training_flops(
    config: ModelConfig, length: int, *, iterations: int | None = None, recomputation: str = "none"
) -> int:
    """Forward and backward FLOPs of one token, and with `recomputation` those that the machine does once more."""
    parts = flops_by_part(config, length, iterations=iterations)
    again = 0
    if recomputation == "integrator":
        again = parts.get("controller", 0)
    elif recomputation == "block":
        again = sum(parts.values()) - parts.get("embedding", 0) - parts["head"]
        is_candidate = config.integrator is not None and config.integrator.candidate == "feed_forward"
        if not (is_candidate or config.transports_at("feed_forward")):
            # Recomputation stops when the last tensor that was saved is there again: the input of the last product,
            # unless its output is read by an integrator, or transported.
            again -= 2 * config.num_layers * config.d_model * config.hidden_dim
    return 3 * sum(parts.values()) + again - _gradients_of_rest(config)


def _gradients_of_rest(config: ModelConfig) -> int:
    """What the backward pass need not compute: the gradient of a velocity that is zero because nothing carried it."""
    integrator = config.integrator
    if integrator is None:
        return 0
    at_rest = 1 if integrator.carry_velocity else config.num_layers
    experts = integrator.controller.top_k if integrator.controller.experts > 1 else 1
    return 2 * config.d_model * integrator.controller.width * at_rest * experts


def _controller_products(config: ModelConfig, iterations: float) -> int:
    """Multiply-adds of all layers' controllers for one token, k of them in a mixture of experts.

    W_h is applied once, W_x, W_v and W_out in each iteration. `iterations` is the mean over layers; a learned budget
    runs at most one step a layer more.
    """
    integrator = config.integrator
    if integrator is None:
        return 0
    per_matrix, layers = config.d_model * integrator.controller.width, config.num_layers
    products = per_matrix * (layers + round(layers * iterations) * (2 + num_groups(integrator)))
    mixture = integrator.controller
    if mixture.experts == 1:
        return products
    return mixture.top_k * products + layers * config.d_model * mixture.experts
