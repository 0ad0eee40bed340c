"""The documents' language models: their arguments and return values around inl_core.model.IntegratorLanguageModel.

    logits, aux = model(ids)                                          aux is None
    logits, aux = model(ids, return_aux=True)                         aux holds every layer's trajectory and mu
    logits, aux, cache = model(ids, use_cache=True, return_aux=True)
    ids = model.generate(ids, max_new_tokens=100, temperature=0.8, top_p=0.9)

- The three classes differ in what a preset fills in: v1, v2 or v3 (docs/model.md, "The generations").
- The wrapped model is `.model`; checkpoints of `inl train` are its state.
- Legend: B batch, S sequence, V vocabulary, D d_model, L layers, T iterations.
"""

import inspect
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from inl_core.documents.arguments import check_name, validated
from inl_core.documents.building import materialise
from inl_core.documents.generation import continue_ids
from inl_core.documents.layer import trajectory_dict
from inl_core.documents.released_names import argument_names, one_of, released_overrides
from inl_core.inference.settings import GenerationSettings
from inl_core.model import IntegratorLanguageModel as Model
from inl_core.model import IntegratorOutput, KVCache, ModelOutput, Options
from inl_core.recipe import ModelConfig
from inl_core.recipe.fitting import fitting_heads
from inl_core.recipe.presets import GROUPED_QUERIES, PRESETS, merge
from inl_core.recipe.sizes import ALIASES, QUERIES_PER_KEY, SIZES, find_size

Preset = Literal["v1", "v2", "v3", "v4", "v5", "transformer"]
_HEAD_DIM = 64  # d_model / num_heads in the documents' sizes up to 3B
_LEAST_RANK = 64
_ARGUMENTS = {
    "integrator.num_iterations": "num_iterations_per_layer",
    "integrator.early_stopping.convergence_threshold": "convergence_threshold",
    "integrator.excitation.amplitude": "excitation_amplitude",
    "integrator.mu.adaptation_rate": "mu_adaptation_rate",
}


class IntegratorLanguageModel(nn.Module):
    """ids (B, S) -> logits (B, S, V); by default the first generation, v1.

    The preset decides what is not given. Dimensions that are not given are those of the documents' smallest model
    (d_model 512, 6 layers), with heads 64 wide and a feed-forward of 4 d_model.

    Args:
        vocab_size: V.
        d_model, num_layers, num_heads, num_kv_heads, feedforward_dim, max_seq_len: dimensions. num_kv_heads below
            num_heads is grouped-query attention; v3 has four queries a key.
        num_iterations_per_layer: T.
        use_lowrank_embeddings: factor the embedding (and with it the tied head) through rank
            max(64, int(d_model * lowrank_ratio)).
        use_gradient_checkpointing: compute each block again in the backward pass instead of keeping its activations.
        use_adaptive_stopping: in eval mode a token stops iterating when its state moves less than
            `convergence_threshold` (None: 0.001) in rms.
        excitation_amplitude: A at the start; `model.excitation_amplitude = A` sets it later.
        mu_adaptation_rate: eta of mu's moving average, taken once a training forward pass; 0 is off.
        preset: another generation: v1, v2, v3, v4, v5 or transformer.
        size: one of the documents' sizes, for the dimensions that are not given.
        overrides: further keys of a recipe's model section, {"integrator": {"dt": 0.2}}, laid over everything else.
        seed: of the initial weights; torch's global generator is neither read nor moved.
        device: where to build; "meta" gives shapes without memory. None is torch's default device.
        released: arguments by the released code's names: adaptive_convergence_threshold, hierarchical_group_size,
            excitation_sparsity, use_shared_controllers, rope_base, use_adaptive_budget, budget_strategy, dropout (0).

    Raises:
        ValueError: an argument or override that cannot be used, with the nearest valid name.
    """

    default_preset: ClassVar[Preset] = "v1"
    default_checkpointing: ClassVar[bool] = False

    def __init__(
        self,
        vocab_size: int,
        d_model: int | None = None,
        num_layers: int | None = None,
        num_heads: int | None = None,
        num_iterations_per_layer: int | None = None,
        feedforward_dim: int | None = None,
        max_seq_len: int | None = None,
        *,
        num_kv_heads: int | None = None,
        use_lowrank_embeddings: bool | None = None,
        lowrank_ratio: float = 0.125,
        use_gradient_checkpointing: bool | None = None,
        use_adaptive_stopping: bool | None = None,
        convergence_threshold: float | None = None,
        excitation_amplitude: float | None = None,
        mu_adaptation_rate: float | None = None,
        preset: Preset | None = None,
        size: str | None = None,
        overrides: dict[str, Any] | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        **released: Any,
    ) -> None:
        super().__init__()
        parameters = inspect.signature(IntegratorLanguageModel).parameters.items()
        own = [name for name, parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        of_released, convergence_threshold = released_overrides(released, convergence_threshold, own)
        dimensions = _present(
            d_model=d_model,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            feedforward_dim=feedforward_dim,
            max_seq_len=max_seq_len,
            size=size,
        )
        values = _with_dimensions(preset or self.default_preset, dimensions) | {"vocab_size": vocab_size}
        values["embedding_rank"] = _rank(values, use_lowrank_embeddings, lowrank_ratio)
        integrator = _present(
            num_iterations=num_iterations_per_layer,
            excitation=_present(amplitude=excitation_amplitude),
            mu=_present(adaptation_rate=mu_adaptation_rate),
            early_stopping=_stopping(use_adaptive_stopping, convergence_threshold),
        )
        values |= _present(integrator=integrator)
        values = merge(merge(values, of_released), overrides or {})
        with torch.device("meta"):
            self.model = Model(validated(ModelConfig, values, _ARGUMENTS | argument_names(released)))
        materialise(self, lambda: self.model.initialise(seed), device)
        self._measured: list[Tensor] = []
        if self.default_checkpointing if use_gradient_checkpointing is None else use_gradient_checkpointing:
            for block in self.model.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    @property
    def config(self) -> ModelConfig:
        """The complete configuration; a recipe's model section that says the same."""
        return self.model.config

    @property
    def excitation_amplitude(self) -> float:
        """A, of all layers; a cycle sets it."""
        return float(self.model.excitation_amplitude)

    @excitation_amplitude.setter
    def excitation_amplitude(self, value: float) -> None:
        if not 0 <= value < float("inf"):
            raise ValueError(f"excitation_amplitude {value}: must be a finite number of at least 0")
        self.model.excitation_amplitude.fill_(value)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embedding.table.weight.device

    def get_num_params(self) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def get_learned_mu(self) -> Tensor | None:
        """mu of every layer, (L, D), with its gradient; None without an integrator."""
        found = [integrator.equilibrium() for integrator in self.model.integrators()]
        return torch.stack(found) if found else None

    def forward(
        self,
        ids: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        cache: KVCache | None = None,
        return_aux: bool = False,
    ) -> tuple[Any, ...]:
        """(logits (B, S, V) in float32, aux), and the cache as a third value with `use_cache`.

        aux is None without `return_aux`, else, for L layers:
            x, v: lists of (B, S, T+1, D), the iterations' states and velocities, with gradient in training. v5 has one
                of its whole depth, of T = 2 L steps;
            alpha, beta, gate: lists of (B, S, T, D);
            mu: (L, D), or None without an integrator;
            iterations: (B, S), used by each token, the mean over layers.

        In training mode with mu_adaptation_rate above 0, this pass measures mu's next step, and the next training pass
        takes it at its start. In between, the backward pass may compute blocks again and must find mu unchanged.

        Args:
            ids: (B, S), or `input_ids`, as transformers calls them.
            labels: (B, S), with which the loss comes before the logits, as in transformers: the mean cross-entropy of
                each token's logits with the label of the next token, where that is not -100.
            use_cache: keep keys and values for the tokens that follow; no gradient is computed then. Without `cache` a
                new one is made for max_seq_len tokens; `model.model.new_cache(B, slots)` makes a shorter one.
            cache: the cache of an earlier call, which `ids` continue (implies use_cache). It is changed in place.

        Raises:
            ValueError: more tokens than max_seq_len, not one of ids and input_ids, or a shape that does not fit.
        """
        ids = one_of(ids, input_ids)
        if labels is not None and labels.shape != ids.shape:
            raise ValueError(f"labels {tuple(labels.shape)}: expected the shape of the ids, {tuple(ids.shape)}")
        use_cache = use_cache or cache is not None
        length = (cache.length if cache else 0) + ids.shape[1]
        if length > self.config.max_seq_len:
            raise ValueError(f"{length} tokens exceed the model's context, max_seq_len {self.config.max_seq_len}")
        if use_cache and cache is None:
            cache = self.model.new_cache(ids.shape[0], self.config.max_seq_len)
        self._adapt_mu()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not use_cache):
            output = self.model(ids, cache=cache, options=Options(keep_trajectory=return_aux))
            logits = self.model.logits(output.hidden)
            aux = self._aux(output) if return_aux else None
        self._measure(output.layers)
        found = (logits, aux) if cache is None else (logits, aux, cache)
        if labels is None:
            return found
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), *found

    def _aux(self, output: ModelOutput) -> dict[str, Any]:
        paths = [trajectory_dict(layer.trajectory) for layer in output.layers if layer.trajectory]
        aux: dict[str, Any] = {name: [path[name] for path in paths] for name in ("x", "v", "alpha", "beta", "gate")}
        return aux | {"mu": self.get_learned_mu(), "iterations": output.iterations()}

    def _measure(self, layers: list[IntegratorOutput]) -> None:
        """Keep the mean final states of a training pass, for the step of mu's moving average that follows it."""
        if self.training and self._adaptation_rate > 0:
            self._measured = [layer.state.detach().mean((0, 1)) for layer in layers]

    def _adapt_mu(self) -> None:
        """Move mu towards the mean states that the last training pass measured."""
        if self.training and self._measured:
            for integrator, mean_state in zip(self.model.integrators(), self._measured, strict=True):
                integrator.equilibrium.adapt(mean_state, self._adaptation_rate)
            self._measured = []

    @property
    def _adaptation_rate(self) -> float:
        return self.config.integrator.mu.adaptation_rate if self.config.integrator else 0.0

    def generate(
        self,
        ids: Tensor | None = None,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        *,
        input_ids: Tensor | None = None,
        do_sample: bool = True,
        min_p: float | None = None,
        use_cache: bool = True,
        repetition_penalty: float = 1.0,
        eos_token_id: int | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Continue `ids` (B, S): (B, S + n) ids, the prompt included, n <= max_new_tokens.

        The model runs in eval mode, so tokens stop iterating early where it is configured, and returns to its mode.

        Args:
            ids: (B, S), or `input_ids`, as transformers calls them.
            temperature: divides the logits; 0 is greedy.
            top_k: only the k most probable tokens.
            top_p: only the most probable tokens that together reach this probability.
            do_sample: False is greedy, whatever the temperature.
            min_p: only tokens at least this fraction as probable as the most probable one.
            use_cache: False computes the whole text again for every token: the same ids, slowly.
            eos_token_id: ends a row, which is filled with it until the others end.
            seed: of the draws; a row's draws depend on it and the row's number alone.

        Raises:
            ValueError: a setting out of its range, or a prompt that leaves no room for max_new_tokens in the context.
            NonFiniteError: the logits are not finite.
        """
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature if do_sample else 0.0,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        return continue_ids(self.model, one_of(ids, input_ids), settings, use_cache=use_cache, eos=eos_token_id)


class OptimizedIntegratorLanguageModel(IntegratorLanguageModel):
    """The second generation, v2: v1's block with all optimisations of documents 001 and 002 but recomputation."""

    default_preset = "v2"


class UltraOptimizedIntegratorLanguageModel(IntegratorLanguageModel):
    """The third generation, v3: v2's optimisations and recomputation in a block of RMSNorm, RoPE, GQA and SwiGLU."""

    default_preset = "v3"
    default_checkpointing = True


def _with_dimensions(preset: str, values: dict[str, Any]) -> dict[str, Any]:
    """`values` with a preset and, unless they name a size, the dimensions they lack."""
    check_name("preset", preset, PRESETS)
    values = {"preset": preset, **values}
    if "size" in values:
        check_name("size", values["size"], [*SIZES, *ALIASES])
        return values
    small = find_size("small").keys(preset)
    values = {"d_model": small["d_model"], "num_layers": small["num_layers"], **values}
    values.setdefault("num_heads", fitting_heads(values["d_model"], max(1, values["d_model"] // _HEAD_DIM)))
    if preset in GROUPED_QUERIES and values["num_heads"] % QUERIES_PER_KEY == 0:
        values.setdefault("num_kv_heads", values["num_heads"] // QUERIES_PER_KEY)
    return values


def _rank(values: dict[str, Any], use_lowrank: bool | None, ratio: float) -> int | None:
    """R, the rank of the embedding; None for a full one."""
    if not 0 < ratio <= 1:
        raise ValueError(f"lowrank_ratio {ratio}: must be above 0 and at most 1")
    by_default = PRESETS[values["preset"]]["embedding_rank"] is not None
    if not (by_default if use_lowrank is None else use_lowrank):
        return None
    d_model = values["d_model"] if "d_model" in values else find_size(values["size"]).d_model
    return max(_LEAST_RANK, int(d_model * ratio))


def _stopping(use: bool | None, threshold: float | None) -> dict[str, Any]:
    """The keys of early_stopping that the two arguments call for."""
    if use is False:
        return {"convergence_threshold": 0.0}
    if use and threshold is None:
        return dict(PRESETS["v2"]["integrator"]["early_stopping"])
    return _present(convergence_threshold=threshold)


def _present(**values: Any) -> dict[str, Any]:
    """The values that are neither None nor empty dictionaries."""
    return {key: value for key, value in values.items() if value is not None and value != {}}
