"""The language model: embedding, blocks, head; every generation and the baseline are switches of one class.

- A block has an integrator inside it (v1 to v4, block.py) or is two steps of the stream (v5, transformer; stream.py).
- A low-rank embedding is E (V, R) times P (R, D); the tied head is (x P^T) E^T, so (V, D) never exists.
- Legend: B batch, S sequence, D d_model, V vocabulary, R rank, L layers, T iterations.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inl_core.model.attention import KVCache, Rotary, Visibility, rotary_tables, sinusoidal_table, token_positions
from inl_core.model.block import Block, Options, SharedInputs
from inl_core.model.budget import Budget, LayerBudget
from inl_core.model.derivatives import differentiable_attention
from inl_core.model.embedding import Embedding, VocabularyLoss
from inl_core.model.excitation import Excitation
from inl_core.model.feed_forward import build_norm
from inl_core.model.initialisation import initialise
from inl_core.model.integrator import Integrator, IntegratorOutput
from inl_core.model.mixture import build_controller
from inl_core.model.stream import Entry, Shared, Step, StreamBlock, flow, have_previous, stream_trajectory
from inl_core.recipe import ModelConfig


@dataclass
class ModelOutput:
    """hidden (B, S, D) is the normalised final state, ready for the head; layers has one entry for each integrator."""

    hidden: Tensor
    layers: list[IntegratorOutput] = field(default_factory=list)
    table: Tensor | None = None
    """The tied table (V, R or D) for `loss_sum` of this pass, and for nothing else: its gradient may be added to the
    embedding's in place."""

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
        self.visibility = Visibility()
        self.controller = (
            build_controller(integrator, config.d_model) if integrator and integrator.controller.shared else None
        )
        self.budget = (
            Budget(integrator.budget, config.num_layers, integrator.num_iterations)
            if integrator and integrator.budget.strategy != "uniform"
            else None
        )
        kind = Block if integrator else StreamBlock
        self.entry = None if integrator else Entry(config)
        self.blocks = nn.ModuleList(kind(config, layer) for layer in range(config.num_layers))
        self.norm_final = build_norm(config)
        self.head = None if config.tie_head else nn.Linear(config.d_model, self.vocab_size, bias=False)
        self.vocabulary_loss = VocabularyLoss()
        # A is state of the run: saved with the weights, so that the trained function is the function evaluated.
        self.register_buffer("excitation_amplitude", torch.empty(()), persistent=config.excites)
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

    def steps(self) -> list[Step]:
        """The stream's steps, two for each block, bottom up; empty where the blocks have integrators."""
        return [module for module in self.modules() if isinstance(module, Step)]

    def reset_buffers(self) -> None:
        """Fill every buffer that is derived from the configuration and not saved; needed after `to_empty`."""
        self.position_table.copy_(_position_table(self.config))
        for module in self.modules():
            if isinstance(module, Excitation | Step):
                module.reset_buffers()

    def initialise(self, seed: int, write: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """Draw the weights and set everything else to its start (inl_core/model/initialisation.py)."""
        initialise(self, seed, write)

    def new_cache(
        self, batch: int, slots: int, dtype: torch.dtype | None = None, *, is_static: bool = False
    ) -> KVCache:
        """An empty key-value cache for `batch` rows of up to `slots` tokens; KVCache says what a static one is."""
        weight = self.embedding.table.weight
        dtype = dtype or weight.dtype
        return KVCache(
            self.config,
            batch,
            slots,
            device=weight.device,
            dtype=dtype,
            stream_dtype=weight.dtype,
            is_static=is_static,
        )

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        options: Options = Options(),
    ) -> ModelOutput:
        """Hidden states of `ids` (B, S); `logits` or `loss_sum` turn them into predictions.

        Args:
            positions: (B, S) positions inside the documents; None counts from the start (or from the cache's end).
            document_ids: (B, S); attention does not cross documents. Not together with a cache.
            cache: keys and values of earlier tokens; the new ones are added to it.
            options: iterations and by-products.
        """
        num_new = ids.shape[1]
        x, table = self.embedding(ids)
        places = token_positions(ids, positions, cache, self.config.max_seq_len - 1)
        x, rotary = self._place(x, places)
        mask = self.visibility(ids, document_ids, cache)
        with differentiable_attention():
            if self.config.integrator is not None:
                x, outputs = self._integrate(x, rotary, mask, cache, options)
            else:
                has_previous = self._have_previous(places, positions, document_ids, cache)
                x, outputs = self._stream(x, rotary, mask, has_previous, cache, options)
        if cache is not None:
            cache.length += num_new
        return ModelOutput(self.norm_final(x), outputs, table if self.head is None else None)

    def _have_previous(
        self, places: Tensor, positions: Tensor | None, document_ids: Tensor | None, cache: KVCache | None
    ) -> Tensor | None:
        """As the stream wants it: None where nobody looks at the token before, or all but a text's first have one."""
        is_told = positions is not None or document_ids is not None
        # A static cache always has a mask: torch 2.13's compiler fails on transport without one from a cache.
        is_masked = cache is not None and (cache.is_static or cache.padding is not None)
        return have_previous(places, document_ids) if self.config.transport and (is_told or is_masked) else None

    def _integrate(
        self, x: Tensor, rotary: Rotary | None, mask: Tensor | None, cache: KVCache | None, options: Options
    ) -> tuple[Tensor, list[IntegratorOutput]]:
        """All layers, each with an integrator inside: x (B, S, D) and what the integrators return."""
        shared = SharedInputs(rotary, mask, self.controller, self.excitation_amplitude, options)
        still = torch.zeros_like(x)
        velocity, outputs = still, []
        caches = cache.layers(x.shape[1]) if cache else [None] * len(self.blocks)
        for block, budget, own_cache in zip(self.blocks, self.budgets(options), caches, strict=True):
            x, output = block(x, velocity, shared, budget, own_cache)
            outputs.append(output)
            velocity = output.velocity if self.carries_velocity else still
        return x, outputs

    def _stream(
        self,
        x: Tensor,
        rotary: Rotary | None,
        mask: Tensor | None,
        has_previous: Tensor | None,
        cache: KVCache | None,
        options: Options,
    ) -> tuple[Tensor, list[IntegratorOutput]]:
        """All layers as one system of 2L steps: x (B, S, D), and its trajectory if that is to be kept."""
        assert self.entry is not None
        blocks = [block for block in self.blocks if isinstance(block, StreamBlock)]
        # A view, because code compiled for two arguments that are one tensor does not serve two that are not.
        shared = Shared(x.view_as(x), self.excitation_amplitude, rotary, mask, has_previous)
        path = flow(self.entry, blocks, x, shared, cache, is_kept=options.keep_trajectory)
        if not options.keep_trajectory:
            return path[-1][0], []
        steps = self.steps()
        trajectory = stream_trajectory(path, steps, self.excitation_amplitude)
        return path[-1][0], [IntegratorOutput(*path[-1], num_iterations=len(steps), trajectory=trajectory)]

    def _place(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Rotary | None]:
        """Positions, as sines added to x or as the angles of every layer's queries and keys."""
        if self.config.positions == "sinusoidal":
            return x + self.position_table[positions].to(x.dtype), None
        cos, sin = self.position_table[:, positions].unsqueeze(-2)  # (B, S, 1, F/2)
        return x, (cos, sin)

    def budgets(self, options: Options) -> list[LayerBudget]:
        """How many iterations each layer runs in this pass."""
        if self.budget is not None and options.num_iterations is None:
            return self.budget()
        each = options.num_iterations or self.config.layer_iterations
        each = each if isinstance(each, tuple) else (each,) * len(self.blocks)
        return [LayerBudget(count, None) for count in each]

    def head_factors(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """z (..., R or D) and W (V, R or D) with logits = z W^T."""
        return (hidden, self.head.weight) if self.head else self.embedding.head_factors(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., V) in float32."""
        return F.linear(*self.head_factors(hidden)).float()

    def loss_sum(self, hidden: Tensor, targets: Tensor, table: Tensor | None = None) -> Tensor:
        """Sum over targets other than -100 of the cross-entropy in nats.

        Args:
            hidden: (..., D).
            targets: (...), int64.
            table: the same pass's `ModelOutput.table`, which saves memory and changes nothing else.

        Raises:
            ValueError: there is not one target of int64 for each hidden state.
        """
        z, weight = self.head_factors(hidden)
        z, targets = z.flatten(0, -2), targets.flatten()
        if targets.shape != z.shape[:1] or targets.dtype != torch.int64:
            found, wanted = f"{targets.dtype} {tuple(targets.shape)}", f"torch.int64 {tuple(z.shape[:1])}"
            raise ValueError(f"targets are {found}, and must be {wanted}: one for each row")
        return self.vocabulary_loss(z, weight if table is None else table, targets)


def _position_table(config: ModelConfig) -> Tensor:
    if config.positions == "sinusoidal":
        return sinusoidal_table(config.max_seq_len, config.d_model)
    return torch.stack(rotary_tables(config.max_seq_len, config.head_dim, config.rope_theta))
