"""The language model: embedding, blocks, head; every generation and the baseline are switches of one class.

    h   = attention(norm_1(x));  x = x + h
    s_0 = norm_2(x);  s_T, v_T = integrator(h, s_0, v_0)
    x   = x + layer_gain * (s_T - s_0)        readout delta        x = x + s_T        readout state
    x   = x + feed_forward(norm_3(x))         only when the feed-forward is not the integrator's candidate

- With `candidate: feed_forward` (v4) the feed-forward of s_0 is the candidate velocity and there is no third norm.
- Without an integrator (`transformer`) the block is x + attention(norm_1(x)), x + feed_forward(norm_2(x)).
- A low-rank embedding is E (V, R) times P (R, D); the tied head is (x P^T) E^T, so (V, D) never exists.
- Legend: B batch, S sequence, D d_model, V vocabulary, R rank, L layers.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inl_core.model.attention import (
    Attention,
    AttentionPlan,
    KVCache,
    plan_attention,
    rotary_tables,
    sinusoidal_table,
)
from inl_core.model.budget import Budget, LayerBudget
from inl_core.model.controller import Controller
from inl_core.model.excitation import Excitation
from inl_core.model.feed_forward import FeedForward
from inl_core.model.initialisation import initialise
from inl_core.model.integrator import Integrator, IntegratorOutput
from inl_core.model.mixture import Experts, build_controller
from inl_core.model.norms import build_norm
from inl_core.model.shared_table import share
from inl_core.model.vocabulary import cross_entropy_sum
from inl_core.recipe import ModelConfig


class Embedding(nn.Module):
    """Token embeddings, full (V, D) or E (V, R) P (R, D), and the head that reuses them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size, "the vocabulary size is the tokenizer's: ModelConfig.with_vocab_size"
        self.normalise, self.eps = config.embedding_norm, config.norm_eps
        self.scale = math.sqrt(config.d_model) if config.embedding_scale == "sqrt_dim" else 1.0
        self.table = nn.Embedding(config.vocab_size, config.rank or config.d_model)
        self.project_up = nn.Linear(config.rank, config.d_model, bias=False) if config.rank else None

    def forward(self, ids: Tensor, shared: Tensor | None = None) -> Tensor:
        """ids (B, S) -> (B, S, D), from the table or from what `share` made of it."""
        x = self.table(ids) if shared is None else F.embedding(ids, shared, sparse=True)
        if self.project_up:
            x = self.project_up(x).to(x.dtype)  # the residual stream keeps its precision under autocast
        if self.normalise:
            x = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        return x if self.scale == 1.0 else x * self.scale

    def head_factors(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """z and E with logits = z E^T: hidden (..., D) -> z (..., R or D), E (V, R or D)."""
        return (F.linear(hidden, self.project_up.weight.T) if self.project_up else hidden), self.table.weight


class Block(nn.Module):
    """One layer: attention, then the integrator and the feed-forward in the configuration's arrangement."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        integrator = config.integrator_of(layer)
        self.feeds_candidate = integrator is not None and integrator.candidate == "feed_forward"
        self.reads_delta = integrator is not None and integrator.readout == "delta"
        self.norm_attention = build_norm(config)
        self.attention = Attention(config)
        self.norm_state = build_norm(config) if integrator else None
        self.integrator = Integrator(integrator, config.d_model) if integrator else None
        self.layer_gain = nn.Parameter(torch.empty(config.d_model)) if self.reads_delta else None
        self.norm_feed_forward = None if self.feeds_candidate else build_norm(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        velocity: Tensor | None,
        plan: AttentionPlan,
        rotary: tuple[Tensor, Tensor] | None,
        controller: Controller | Experts | None,
        amplitude: Tensor,
        options: "Options",
        cache: KVCache | None = None,
        budget: LayerBudget | None = None,
    ) -> tuple[Tensor, IntegratorOutput | None]:
        """x (B, S, D) and the velocity carried from below -> x and the integrator's output.

        `budget` is this layer's iterations; None takes the options' or the configured ones.
        """
        h = self.attention(x, self.norm_attention, plan, rotary, cache, self.layer)
        x = x + h
        output = None
        if self.integrator is not None:
            assert self.norm_state is not None
            candidate = None
            if self.feeds_candidate:
                candidate, start = self.feed_forward(x, self.norm_state, wants_norm=True)
            else:
                start = self.norm_state(x)
            output = self.integrator(
                h,
                start,
                velocity,
                amplitude=amplitude,
                candidate=candidate,
                controller=controller,
                num_iterations=budget.num_iterations if budget else options.iterations_of(self.layer),
                last_fraction=budget.last_fraction if budget else None,
                energy_power=options.energy_power,
                keep_trajectory=options.keep_trajectory,
                early_stopping=options.early_stopping,
                stream=x,
                gain=self.layer_gain,
            )
            x = self._read_out(x, start, output)
        if self.norm_feed_forward is not None:
            x = x + self.feed_forward(x, self.norm_feed_forward)[0]
        return x, output

    def _read_out(self, x: Tensor, start: Tensor, output: IntegratorOutput) -> Tensor:
        """x + layer_gain * (s_T - s_0), or x + s_T."""
        if output.stream is not None:
            return output.stream
        return x + (output.state if self.layer_gain is None else self.layer_gain * (output.state - start))


@dataclass(frozen=True)
class Options:
    """What a forward pass should do beyond computing: iterations and by-products."""

    num_iterations: int | tuple[int, ...] | None = None
    energy_power: float | None = None
    keep_trajectory: bool = False
    early_stopping: bool = True
    """False runs all T iterations also where the configuration stops early (in evaluation only)."""

    def iterations_of(self, layer: int) -> int | None:
        """T of one layer, or None for the configured one."""
        return self.num_iterations[layer] if isinstance(self.num_iterations, tuple) else self.num_iterations


@dataclass
class ModelOutput:
    """hidden (B, S, D) is the normalised final state, ready for the head; layers has one entry for each integrator."""

    hidden: Tensor
    layers: list[IntegratorOutput] = field(default_factory=list)
    table: Tensor | None = None
    """The tied table (V, R or D) for `loss_sum`, which then adds its gradient to the embedding's in place."""

    def iterations(self) -> Tensor:
        """Mean iterations over layers of each token, (B, S); a fractional last step counts as one; 0 without any."""
        total = self.hidden.new_zeros(self.hidden.shape[:2], dtype=torch.float32)
        for layer in self.layers:
            total = total + (layer.num_iterations if layer.iterations is None else layer.iterations)
        return total / max(1, len(self.layers))


class IntegratorLanguageModel(nn.Module):
    """ids -> hidden states -> logits.

    Build on any device, the meta device included, then call `initialise(seed)` or load weights.
    """

    excitation_amplitude: Tensor
    position_table: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        integrator = config.integrator
        self.embedding = Embedding(config)
        self.controller = (
            build_controller(integrator, config.d_model) if integrator and integrator.controller.shared else None
        )
        self.budget = (
            Budget(integrator.budget, config.num_layers, integrator.num_iterations)
            if integrator and integrator.budget.strategy != "uniform"
            else None
        )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm_final = build_norm(config)
        self.head = None if config.tie_head else nn.Linear(config.d_model, self.vocab_size, bias=False)
        # A is state of the run: saved with the weights, so that the trained function is the function evaluated.
        self.register_buffer("excitation_amplitude", torch.empty(()), persistent=integrator is not None)
        # rope: cos and sin, (2, max_seq_len, F/2); sinusoidal: (max_seq_len, D)
        self.register_buffer("position_table", _position_table(config), persistent=False)
        self.reset_buffers()

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.embedding.table.num_embeddings

    @property
    def carries_velocity(self) -> bool:
        """Whether a layer's final velocity is the next layer's first."""
        return bool(self.config.integrator and self.config.integrator.carry_velocity)

    def integrators(self) -> list[Integrator]:
        """The integrator of each block, bottom up; empty for a Transformer."""
        return [module for module in self.modules() if isinstance(module, Integrator)]

    def reset_buffers(self) -> None:
        """Fill every buffer that is derived from the configuration and not saved; needed after `to_empty`."""
        self.position_table.copy_(_position_table(self.config))
        for module in self.modules():
            if isinstance(module, Excitation):
                module.reset_buffers()

    def initialise(self, seed: int) -> None:
        """Draw the weights and set everything else to its start (inl_core/model/initialisation.py)."""
        initialise(self, seed)

    def new_cache(self, batch: int, slots: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty key-value cache for `batch` rows of up to `slots` tokens."""
        weight = self.embedding.table.weight
        return KVCache(self.config, batch, slots, device=weight.device, dtype=dtype or weight.dtype)

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        options: Options = Options(),
    ) -> ModelOutput:
        """Hidden states of `ids` (B, S); `logits` or `token_loss` turn them into predictions.

        Args:
            positions: (B, S) positions inside the documents; None counts from the start (or from the cache's end).
            document_ids: (B, S); attention does not cross documents. Not together with a cache.
            cache: keys and values of earlier tokens; the new ones are added to it.
            options: iterations and by-products.
        """
        dtype = self.embedding.table.weight.dtype
        plan = plan_attention(ids, dtype, positions=positions, document_ids=document_ids, cache=cache)
        shared = share(self.embedding.table.weight) if self.head is None else None
        lookup, table = shared or (None, None)
        x = self.embedding(ids, lookup)
        rotary = None
        if self.config.positions == "rope":
            cos, sin = self.position_table[:, plan.positions].unsqueeze(-2)  # ((B,) S, 1, F/2)
            rotary = (cos, sin)
        else:
            x = x + self.position_table[plan.positions]
        velocity, outputs = None, []
        budgets = self.budget() if self.budget and options.num_iterations is None else [None] * len(self.blocks)
        for block, budget in zip(self.blocks, budgets, strict=True):
            x, output = block(
                x, velocity, plan, rotary, self.controller, self.excitation_amplitude, options, cache, budget
            )
            if output is not None:
                outputs.append(output)
                velocity = output.velocity if self.carries_velocity else None
        if cache is not None:
            cache.length += ids.shape[1]
        return ModelOutput(self.norm_final(x), outputs, table)

    def head_factors(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """z (..., R or D) and W (V, R or D) with logits = z W^T."""
        return (hidden, self.head.weight) if self.head else self.embedding.head_factors(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., V) in float32."""
        return F.linear(*self.head_factors(hidden)).float()

    def loss_sum(self, hidden: Tensor, targets: Tensor, table: Tensor | None = None) -> Tensor:
        """Sum over targets other than -100 of the cross-entropy in nats, without a (B, S, V) tensor.

        Args:
            table: the same pass's `ModelOutput.table`, which saves memory and changes nothing else.
        """
        z, weight = self.head_factors(hidden)
        return cross_entropy_sum(z.flatten(0, -2), weight if table is None else table, targets.flatten())


def _position_table(config: ModelConfig) -> Tensor:
    if config.positions == "sinusoidal":
        return sinusoidal_table(config.max_seq_len, config.d_model)
    return torch.stack(rotary_tables(config.max_seq_len, config.head_dim, config.rope_theta))
