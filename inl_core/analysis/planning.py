"""What a recipe will cost, computed on the meta device before anything is allocated.

- Parameters are counted by part on the real module tree, so the count cannot drift from the model.
- FLOPs per token: 2 per weight of every matrix a token passes (the controller T times), plus attention's S; training
  is three times the forward pass.
- Memory is an estimate: weights, gradients and AdamW's moments exactly, activations by counting what autograd keeps.
"""

from dataclasses import dataclass

import torch

from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import ModelConfig, Recipe

# The first matching prefix or part of a parameter's name decides where it is counted.
_PARTS = (
    ("embedding", ("embedding.",)),
    ("head", ("head.",)),
    ("attention", (".attention.",)),
    ("controller", ("controller.", ".modulation.", ".router.")),
    ("budget", ("budget.",)),
    ("mu", (".equilibrium.",)),
    ("excitation", (".excitation.",)),
    ("feed-forward", (".feed_forward.",)),
    ("norms and gains", ("norm", "_gain")),
)


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Parameters by part, in a fixed order; parts a model does not have are left out."""
    counts: dict[str, int] = {name: 0 for name, _ in _PARTS}
    for name, parameter in model.named_parameters():
        part = next((part for part, marks in _PARTS if any(mark in name for mark in marks)), None)
        assert part is not None, f"parameter {name} belongs to no part"
        counts[part] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def meta_model(config: ModelConfig) -> IntegratorLanguageModel:
    """The model without memory."""
    with torch.device("meta"):
        return IntegratorLanguageModel(config)


@dataclass(frozen=True)
class Plan:
    """The figures a run starts from."""

    parameters: dict[str, int]
    num_steps: int
    train_tokens: int
    epochs: float
    flops_per_token: int
    """Training FLOPs of one token: forward and backward."""
    state_bytes: int
    """Weights, gradients and optimizer moments."""
    activation_bytes: int
    """Kept for the backward pass of one micro-batch, estimated."""
    checkpoint_bytes: int
    disk_bytes: int
    """All checkpoints that retention may hold at once."""

    @property
    def total_flops(self) -> float:
        """Training FLOPs of the whole run."""
        return float(self.flops_per_token) * self.train_tokens

    @property
    def total_parameters(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def non_embedding_parameters(self) -> int:
        """All but the embedding and the head."""
        return self.total_parameters - self.parameters.get("embedding", 0) - self.parameters.get("head", 0)


def plan_recipe(recipe: Recipe, *, vocab_size: int, num_windows: int | None = None, world_size: int = 1) -> Plan:
    """The plan of a recipe for a vocabulary; `num_windows` of the data set gives the epochs."""
    config, settings = recipe.model.with_vocab_size(vocab_size), recipe.training
    parameters = count_parameters(meta_model(config))
    total = sum(parameters.values())
    keep = settings.checkpoint
    # best, and the one being written beside those that stay
    held = keep.keep_last + int(keep.keep_best) + 1
    held += settings.num_steps // keep.keep_every if keep.keep_every else 0
    return Plan(
        parameters=parameters,
        num_steps=settings.num_steps,
        train_tokens=settings.num_steps * settings.batch_tokens,
        epochs=settings.num_steps * settings.batch_size / num_windows if num_windows else 0.0,
        flops_per_token=3 * forward_flops(config, settings.sequence_length),
        state_bytes=total * 4 * 4,
        activation_bytes=activation_bytes(recipe, config, settings.micro_batch(world_size)),
        checkpoint_bytes=total * 4 * 3,
        disk_bytes=total * 4 * 3 * held,
    )


def forward_flops(config: ModelConfig, length: int) -> int:
    """Forward FLOPs of one token in a window of `length` (causal attention sees half of it on average)."""
    assert config.vocab_size
    dim, heads = config.d_model, config.key_value_heads * config.head_dim
    matrices = 3 if config.feed_forward == "swiglu" else 2
    layer = dim * (dim + 2 * heads) + dim * dim + matrices * dim * config.hidden_dim + dim * length
    integrator = config.integrator
    if integrator:
        width, groups = integrator.controller.width, 4 if integrator.candidate == "controller" else 3
        layer += dim * width + integrator.num_iterations * (2 + groups) * dim * width
    rank = config.rank
    head = config.vocab_size * rank + rank * dim if rank else config.vocab_size * dim
    return 2 * (config.num_layers * layer + head)


def activation_bytes(recipe: Recipe, config: ModelConfig, rows: int) -> int:
    """Bytes autograd keeps for one micro-batch of `rows` windows: a count of saved (B, S, D) tensors, in float32.

    Per block: two norms, q, k, v and the mixed values, the residuals, the feed-forward's hidden tensors, and per
    iteration of the integrator about 16 tensors of the state's size. Recomputing blocks keeps their inputs only.
    """
    dim, tokens = config.d_model, rows * recipe.training.sequence_length
    per_token = 8 * dim + (4 if config.feed_forward == "swiglu" else 2) * config.hidden_dim
    if config.integrator:
        per_token += 16 * dim * config.integrator.num_iterations
    carried = (2 if config.integrator else 1) * dim
    if recipe.training.recomputation == "block":
        return 4 * tokens * (carried * config.num_layers + per_token)
    return 4 * tokens * (carried + per_token) * config.num_layers
