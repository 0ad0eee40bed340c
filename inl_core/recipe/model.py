"""The model section of a recipe: everything that decides what the model computes.

- `preset` fills in whatever the recipe leaves out. The validated object is complete, and a checkpoint keeps all of it,
  so a checkpoint never depends on what a preset means later.
- Symbols are those of docs/model.md: D d_model, L num_layers, T iterations, C controller width, R embedding rank.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, StrictBool, model_validator

from inl_core.recipe.base import FilePath, Iterations, Length, NonNegative, Positive, Section, Vocabulary, Width
from inl_core.recipe.fitting import fit_to_width
from inl_core.recipe.presets import DEFAULT_PRESET, PRESETS, merge
from inl_core.recipe.problems import did_you_mean, shown
from inl_core.recipe.sizes import ALIASES, SIZES, find_size

OpenUnit = Annotated[float, Field(gt=0, lt=1)]
Layers = Annotated[int, Field(gt=0, le=1000)]
Experts = Annotated[int, Field(gt=0, le=1024)]

_MOST_CONTROLLERS = 4096
_INSIDE = " inside its blocks (its depth is the integrator's time)"


def _list_as_tuple(value: Any) -> Any:
    """A list as a tuple, which strict validation wants: once presets are put in, the values are not JSON any more."""
    return tuple(value) if isinstance(value, list) else value


class MuConfig(Section):
    """The learned equilibrium mu."""

    form: Literal["per_dim", "hierarchical", "fixed"] = "per_dim"
    """per_dim: D values for each layer; hierarchical: one value and an offset for each group; fixed: not learned."""
    group_size: Width = 64
    """Dimensions in a group, which share one offset (hierarchical only). Where 64 does not divide d_model and none is
    given, the largest below it that does."""
    init: Annotated[float, Field(ge=-1e30, le=1e30)] = 0.0
    """Where mu starts."""
    adaptation_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """eta in mu <- (1-eta) mu + eta mean(state), which is done after each training step; 0 is off."""


class ExcitationConfig(Section):
    """The harmonic excitation A sin(gamma t + phi)."""

    amplitude: NonNegative = 0.03
    """A, the amplitude at the start of a run; in v1 to v4 a cycle may change it."""
    sparsity: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the dimensions that are excited, evenly spaced; 1 is all of them."""


class ControllerConfig(Section):
    """The small network that computes alpha, beta, gate (and the candidate velocity) from (h, x, v)."""

    width: Width = 64
    """C, the hidden width."""
    shared: bool = True
    """One controller for all layers, with a modulation per layer; false gives each layer its own."""
    modulation: Literal["scalar", "channel"] = "scalar"
    """What each layer adds to the shared controller: a scale and a bias for each output, or for each channel."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """Activation of the hidden layer."""
    experts: Experts = 1
    """E, the number of controllers. With more than one, a router picks some of them for every token."""
    top_k: Experts = 2
    """Controllers that are picked for a token (with more than one)."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if 1 < self.experts < self.top_k:
            raise ValueError(f"top_k {self.top_k} exceeds experts {self.experts}")
        return self


class BudgetConfig(Section):
    """How the L*T integrator iterations of the model are divided among its layers; their total stays the same."""

    strategy: Literal["uniform", "learned", "dynamic", "hybrid"] = "uniform"
    """uniform: T each; learned: by gradient; dynamic: by how far each layer is from converged; hybrid: both."""
    min_iterations: Iterations = 1
    """Fewest iterations of a layer (dynamic)."""
    max_iterations: Iterations | None = None
    """Most iterations of a layer (dynamic); null is 2 T."""


class EarlyStoppingConfig(Section):
    """Per-token early stopping, in evaluation and generation only."""

    convergence_threshold: NonNegative = 0.0
    """A token stops when its state changes by less than this (rms, without the excitation's part); 0 is off."""
    min_iterations: Iterations = 1
    """Iterations that every token goes through at least."""


class IntegratorConfig(Section):
    """The second-order dynamical system inside a block (docs/model.md, "One step")."""

    num_iterations: Iterations = 2
    """T, integrator iterations per layer."""
    iterations_per_layer: Annotated[tuple[Iterations, ...], BeforeValidator(_list_as_tuple)] | None = None
    """T of each layer from the first on; null is num_iterations for all. Only with a uniform budget."""
    dt: Positive = 0.7
    """Step size of the iterations."""
    velocity_scale: Positive = 1.0
    """Constant factor of the velocity where it changes the state."""
    dynamic_alpha: bool = True
    """alpha shrinks near the equilibrium: alpha = alpha_base (1 - exp(-kappa rms(x - mu)))."""
    kappa: Positive = 1.0
    """kappa in that equation."""
    beta_max: Positive | None = 2.0
    """Upper bound of beta; null is none, which imported reference weights need; training may then end in NaN."""
    init_alpha: OpenUnit = 0.5
    """alpha_base at the start."""
    init_beta: Annotated[float, Field(ge=1e-30, le=100)] = 0.05
    """beta at the start."""
    init_gate: OpenUnit = 0.9
    """gate at the start."""
    candidate: Literal["feed_forward", "controller", "none"] = "feed_forward"
    """Where v_cand comes from: the feed-forward of s_0 once in a layer, the controller in each iteration, nowhere."""
    carry_velocity: bool = True
    """Each layer starts with the velocity that the layer before ended with; if false, each starts at rest."""
    readout: Literal["delta", "state"] = "delta"
    """What joins the residual stream: layer_gain (s_T - s_0), or s_T as in the code released with the documents."""
    mu: MuConfig = MuConfig()
    """The equilibrium."""
    excitation: ExcitationConfig = ExcitationConfig()
    """The harmonic excitation."""
    controller: ControllerConfig = ControllerConfig()
    """The controller."""
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    """Per-token early stopping in evaluation."""
    budget: BudgetConfig = BudgetConfig()
    """Division of the iterations among the layers; measured every training.evaluation.every steps."""

    @model_validator(mode="before")
    @classmethod
    def _without_retired_keys(cls, values: Any) -> Any:
        """Recipes and checkpoints of earlier versions say how the iterations are computed, which changes no result.

        recipe/load.py warns of it.
        """
        if not isinstance(values, dict) or "backend" not in values:
            return values
        if values["backend"] not in ("auto", "eager", "native", "compiled", "triton"):
            raise ValueError(
                f"backend {shown(values['backend'])}: this key is not used any more (training.operations chooses); "
                "remove it"
            )
        return {key: value for key, value in values.items() if key != "backend"}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.beta_max is not None and self.init_beta >= self.beta_max:
            raise ValueError(f"init_beta {self.init_beta} must be below beta_max {self.beta_max}")
        fewest = min(self.iterations_per_layer or (self.num_iterations,))
        if self.early_stopping.min_iterations > fewest:
            raise ValueError(
                f"early_stopping.min_iterations {self.early_stopping.min_iterations} exceeds num_iterations {fewest}"
            )
        if self.iterations_per_layer and self.budget.strategy != "uniform":
            raise ValueError(f"iterations_per_layer needs budget.strategy uniform, not {self.budget.strategy}")
        highest = self.budget.max_iterations
        if self.budget.min_iterations > self.num_iterations or (highest and highest < self.num_iterations):
            raise ValueError(
                f"budget: num_iterations {self.num_iterations} must lie between min_iterations "
                f"{self.budget.min_iterations} and max_iterations {highest}"
            )
        return self


class StreamConfig(Section):
    """The residual stream as a second-order system, one step a sub-layer (docs/model.md, "v5")."""

    momentum: bool = True
    """alpha: each channel keeps a learned share of its velocity from sub-layer to sub-layer."""
    anchor: bool = True
    """r: each channel gets back a learned share of the embedding that the token began as."""
    equilibrium: bool = True
    """beta (mu - x): each channel is pulled towards a learned equilibrium with a learned strength."""
    excitation: ExcitationConfig | None = ExcitationConfig()
    """The harmonic excitation, with t counting sub-layers; null is none."""
    dynamic_alpha: bool = False
    """alpha shrinks near the equilibrium, alpha (1 - exp(-kappa rms(x - mu))): costs time and gained nothing."""
    kappa: Positive = 1.0
    """kappa in that equation."""


class ModelConfig(Section):
    """Everything that decides what the model computes."""

    preset: Literal["v1", "v2", "v3", "v4", "v5", "transformer"] = DEFAULT_PRESET
    """The generation whose values fill in every key that is not given here."""
    size: str | None = None
    """Fills in the dimensions: one of small, medium, large, xlarge, 3B, 7B, 13B, 3072x32."""
    d_model: Width = 128
    """D, width of the residual stream."""
    num_layers: Layers = 4
    """L, number of blocks."""
    num_heads: Width = 4
    """Query heads; must divide d_model. Where 4 does not fit and none is given, the most below it that do."""
    num_kv_heads: Width | None = None
    """Key and value heads (grouped-query attention); null means num_heads."""
    feedforward_dim: Width | None = None
    """Hidden width of a GELU feed-forward; SwiGLU, with one more matrix, has two thirds of it; null means 4 d_model."""
    feedforward_hidden: Width | None = None
    """The hidden width that the feed-forward really has; null derives it from feedforward_dim, rounded as below."""
    max_seq_len: Length = 1024
    """The longest context that the model takes, in tokens."""
    vocab_size: Vocabulary | None = None
    """V; null takes that of the tokenizer."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation of the input of each block and of the final state."""
    norm_eps: Positive = 1e-6
    """Added to the mean square in each normalisation."""
    positions: Literal["rope", "sinusoidal"] = "rope"
    """How positions get in: as rotations in attention, or as sinusoids added to the embedding."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary frequencies."""
    feed_forward: Literal["swiglu", "gelu"] = "swiglu"
    """Kind of feed-forward."""
    feed_forward_rounding: Literal["exact", "down_64", "up_16"] = "exact"
    """How the derived hidden width is rounded: v4 rounds down to pay for its controller, the Transformer rounds up."""
    bias: bool = False
    """Whether attention and feed-forward have biases."""
    embedding_rank: Width | Literal["auto"] | None = None
    """R, when the embedding is a product of two matrices of rank R; auto is max(64, D/8); null is one full matrix."""
    embedding_norm: bool = True
    """RMS-normalise the embeddings after the look-up."""
    embedding_std: Positive | None = None
    """Standard deviation with which the channels of embeddings start; null derives it from d_model."""
    embedding_scale: Literal["none", "sqrt_dim"] = "none"
    """sqrt_dim multiplies the embeddings by sqrt(d_model), or sinusoidal positions would outweigh them."""
    tie_head: bool = True
    """The output head uses the embedding's weights, in both factors where it has two."""
    integrator: IntegratorConfig | None = None
    """The integrator inside each block (v1 to v4); null is none."""
    stream: StreamConfig | None = StreamConfig()
    """The second-order residual stream (v5); null is a Transformer's, x + c."""
    transport: StrictBool | Literal["embedding", "attention", "feed_forward"] = True
    """b: the velocity of the token before moves this token, too, at the embedding and every sub-layer (true), or there
    and after one kind of sub-layer, or there alone. For v5 and transformer."""
    init_from: FilePath | None = None
    """Begin at step 0 with the weights of this checkpoint, run or exported directory; null draws them."""

    @model_validator(mode="before")
    @classmethod
    def _lay_over_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name = str(values.get("preset", DEFAULT_PRESET))
        preset = PRESETS.get(name)
        if preset is None:  # the field's own validation names the valid presets
            return values
        if preset["integrator"] is None and values.get("integrator") is not None:
            default = "" if "preset" in values else ", the default,"
            inside = _INSIDE if preset.get("stream") else ""
            raise ValueError(
                f"the {name} preset{default} has no integrator{inside}: "
                "set preset: v4 (or v1, v2, v3), or remove the integrator section"
            )
        size = values.get("size")
        if isinstance(size, str):
            names = (*SIZES, *ALIASES)
            if size not in names:
                raise ValueError(f"size {shown(size)} is not one of {', '.join(names)}{did_you_mean(size, names)}")
            preset = merge(preset, find_size(size).keys(name))
        merged = merge(preset, values)
        return fit_to_width(merged, merged.get("d_model", cls.model_fields["d_model"].default))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} must divide d_model {self.d_model}")
        if self.num_heads % self.key_value_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head size, got {self.d_model}/{self.num_heads}")
        mu = self.integrator.mu if self.integrator else None
        if mu and mu.form == "hierarchical" and self.d_model % mu.group_size:
            raise ValueError(f"integrator.mu.group_size {mu.group_size} must divide d_model {self.d_model}")
        if self.hidden_dim < 1:
            raise ValueError(f"feedforward_dim {self.feedforward_dim} leaves no hidden width; raise it")
        controllers = self.num_layers * self.integrator.controller.experts if self.integrator else 0
        if controllers > _MOST_CONTROLLERS:
            raise ValueError(f"num_layers x experts is {controllers:,}, above {_MOST_CONTROLLERS:,}; lower one of them")
        if self.stream and self.preset != "v5":
            raise ValueError("stream is for v5: set preset: v5 (and switch its terms off one by one), or remove it")
        if self.transport and self.preset not in ("v5", "transformer"):
            raise ValueError(f"transport is for v5 and transformer, not for {self.preset}: remove it")
        if self.stream and self.stream.dynamic_alpha and not self.stream.momentum:
            raise ValueError("stream.dynamic_alpha acts on the momentum: set stream.momentum true")
        each = self.integrator.iterations_per_layer if self.integrator else None
        if each is not None and len(each) != self.num_layers:
            raise ValueError(f"integrator.iterations_per_layer has {len(each)} entries for {self.num_layers} layers")
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.num_heads

    @property
    def key_value_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def rank(self) -> int | None:
        """Rank R of the embedding; None for a full one."""
        return max(64, self.d_model // 8) if self.embedding_rank == "auto" else self.embedding_rank

    @property
    def hidden_dim(self) -> int:
        """The hidden width that the feed-forward really has."""
        if self.feedforward_hidden:
            return self.feedforward_hidden
        nominal = self.feedforward_dim or 4 * self.d_model
        hidden = nominal * 2 // 3 if self.feed_forward == "swiglu" else nominal
        if self.feed_forward_rounding == "down_64":
            return max(64, hidden // 64 * 64)
        return -(-hidden // 16) * 16 if self.feed_forward_rounding == "up_16" else hidden

    @property
    def without_integrator(self) -> str:
        """For messages about an integrator's keys and options, of a model that has none."""
        return f"this model has no integrator{_INSIDE if self.stream else ''}"

    @property
    def num_iterations(self) -> int:
        """T, or 0 without an integrator."""
        return self.integrator.num_iterations if self.integrator else 0

    @property
    def layer_iterations(self) -> tuple[int, ...]:
        """T of each layer from the first on; zeros without an integrator."""
        own = self.integrator.iterations_per_layer if self.integrator else None
        return own or (self.num_iterations,) * self.num_layers

    @property
    def mean_iterations(self) -> float:
        """The mean of T over the layers; 0 without an integrator."""
        return sum(self.layer_iterations) / self.num_layers

    @property
    def excites(self) -> bool:
        """Whether there is an excitation, whose amplitude A belongs to the weights."""
        return self.integrator is not None or (self.stream is not None and self.stream.excitation is not None)

    @property
    def initial_amplitude(self) -> float:
        """A at the start of a run."""
        excitation = (self.integrator or self.stream or StreamConfig(excitation=None)).excitation
        return excitation.amplitude if excitation else 0.0

    @property
    def stream_terms(self) -> tuple[str, ...]:
        """The terms of the stream's equation that are on; empty with an integrator, and for a plain Transformer."""
        own = ("momentum", "anchor", "equilibrium", "excitation")
        found = tuple(name for name in own if getattr(self.stream, name, None))
        return ("transport", *found) if self.transport else found

    @property
    def has_dynamics(self) -> bool:
        """Whether the model is more than a plain Transformer: there are integrators, or terms of the stream."""
        return self.integrator is not None or bool(self.stream_terms)

    def transports_at(self, place: str) -> bool:
        """Whether a token's velocity moves the next token at the `embedding`, after `attention`, or `feed_forward`."""
        return self.transport is True or self.transport == place or bool(self.transport and place == "embedding")

    def integrator_of(self, layer: int) -> IntegratorConfig | None:
        """The settings of the integrator of one layer, with its own number of iterations."""
        if self.integrator is None or self.integrator.iterations_per_layer is None:
            return self.integrator
        own = {"num_iterations": self.integrator.iterations_per_layer[layer], "iterations_per_layer": None}
        return self.integrator.model_copy(update=own)

    def with_vocab_size(self, vocab_size: int) -> "ModelConfig":
        """The same model for a vocabulary of this size (the tokenizer's), as a checkpoint keeps it.

        What weights it began with is left out: that is no part of what the model computes.
        """
        return self.model_copy(update={"vocab_size": vocab_size, "init_from": None})
