"""The training section of a recipe: length, batch, optimizer, schedule, losses, cycles, checkpoints.

- Everything that changes with time is a function of the step (training/schedules.py, training/cycles.py), so none of
  it has state and a resumed run needs nothing but the step.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from inl_core.recipe.base import (
    Count,
    CountOrNone,
    Iterations,
    Length,
    NonNegative,
    Positive,
    Section,
    Total,
    Unit,
)

Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]

_MOST_TOKENS = 2 * 10**18
"""Positions in the token stream are 64-bit integers."""


class OptimizerSettings(Section):
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon applies torch.optim.Muon to the blocks' 2-D matrices; the assignment is printed."""
    learning_rate: Positive = 3e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: Positive | None = None
    """Peak learning rate of Muon (muon only), whose update is scaled to AdamW's size; null is learning_rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's moment decays."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegative = 0.1
    """Decoupled decay of matrices; norms, biases, mu, gamma, phi, gains and modulations get none."""


class ScheduleSettings(Section):
    """The learning rate as a function of the step."""

    name: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd: warm up, stay, decay linearly at the end; cosine: warm up, half a cosine; constant: warm up, stay."""
    warmup_fraction: Unit = 0.05
    """Share of the steps over which the rate rises linearly."""
    decay_fraction: Unit = 0.4
    """Share of the steps over which wsd decays at the end."""
    final_ratio: Unit = 0.0
    """The last rate over the peak rate (wsd and cosine)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.name == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError("warmup_fraction + decay_fraction must not exceed 1")
        return self


class LossSettings(Section):
    """Weights of the auxiliary losses on the integrator's states (docs/model.md, "Losses"); all zero by default."""

    lambda_mean: NonNegative = 0.0
    """Weight of the mean loss without a cycle: sum_i w_i (xbar_i - mu_i)^2 / D."""
    lambda_mean_final: NonNegative | None = None
    """Where lambda_mean ends when it anneals; null keeps it constant."""
    annealing: Literal["exponential", "linear"] = "exponential"
    """How lambda_mean moves to lambda_mean_final."""
    annealing_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the run over which it anneals."""
    variance_weighted: bool = True
    """w_i = 1 / (1 + Var_i), as the documents' equation has it; false is w_i = 1."""
    lambda_speed: NonNegative = 0.0
    """Weight of the speed loss, which asks for early arrival at mu."""
    lambda_energy: NonNegative = 0.0
    """Weight of the energy loss on the velocity (a cycle sets its own)."""
    energy_power: Annotated[float, Field(ge=1, le=100)] = 2.0
    """p of |v|^p in the energy loss."""
    lambda_balance: NonNegative = 0.01
    """Weight of the experts' load balancing (with integrator.controller.experts above 1 only)."""


class PhaseSettings(Section):
    """Overrides for one phase of a cycle preset; null keeps the preset's value."""

    lambda_mean: NonNegative | None = None
    """Weight of the mean loss in this phase."""
    excitation_amplitude: NonNegative | None = None
    """A in this phase."""
    duration_epochs: Count | None = None
    """Length of the phase."""


class CycleSettings(Section):
    """Equilibrium-exploration cycles (docs/model.md, "Cycles")."""

    preset: Literal["conservative", "balanced", "aggressive"] = "balanced"
    """The documents' presets."""
    equilibrium: PhaseSettings = PhaseSettings()
    """Overrides of the equilibrium phase."""
    exploration: PhaseSettings = PhaseSettings()
    """Overrides of the exploration phase."""
    num_cycles: Count | None = None
    """Number of cycles; null is the preset's."""
    warmup_epochs: CountOrNone | None = None
    """Epochs before the first cycle; null is the preset's."""
    steps_per_epoch: Count | None = None
    """Steps that count as one epoch; null maps the whole schedule onto the run."""


class EvaluationSettings(Section):
    """Periodic evaluation on the validation split."""

    every: CountOrNone = 250
    """Steps between evaluations; 0 evaluates at the end only."""
    tokens: Total = 65_536
    """Validation tokens in a periodic evaluation (the first of the split, the same each time)."""
    final_tokens: Total | None = None
    """Validation tokens in the last evaluation; null is the whole split."""


class CheckpointSettings(Section):
    """When to save, and what to keep."""

    every: CountOrNone = 500
    """Steps between checkpoints; 0 saves at the end (and on a signal) only."""
    keep_last: Count = 2
    """The newest checkpoints that are kept; one saved between the regular ones for its score alone does not count."""
    keep_every: Count | None = None
    """Also keep the checkpoints at multiples of this step."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation bits per byte, and save one after each periodic evaluation
    that beats all saved ones (not where `every` is 0): up to one more checkpoint an evaluation."""


class LoggingSettings(Section):
    """What a run writes while it trains; metrics.jsonl is always written."""

    every: Count = 10
    """Steps between metric rows."""
    dynamics_every: CountOrNone = 100
    """Steps between records of mu, gamma, phi, alpha, beta, gate and velocity; 0 is off."""
    tensorboard: bool = False
    """Mirror the metrics to TensorBoard (`pip install "inl[logging]"`)."""
    wandb: bool = False
    """Mirror the metrics to Weights & Biases (`pip install "inl[logging]"`)."""


class TrainingSettings(Section):
    """One training run."""

    steps: Count | None = None
    """Optimizer steps; give this or tokens."""
    tokens: Total | None = None
    """Tokens to train on, rounded up to whole steps; give this or steps."""
    sequence_length: Length = 128
    """S, tokens in a window."""
    batch_tokens: Count = 2048
    """Tokens in one global batch: micro-batch x sequence_length x world size must divide it."""
    micro_batch_size: Count | None = None
    """Sequences in one forward pass of one process; null takes the whole share of the process."""
    seed: Seed = 0
    """Seed of initialisation and data order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU when there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 is autocast over fp32 weights; auto uses it on GPUs that have it."""
    compile: bool = False
    """torch.compile each block."""
    recomputation: Literal["none", "block", "integrator"] = "none"
    """What the backward pass computes again, for memory: nothing, each block, or each integrator's T iterations."""
    min_iterations: Iterations | None = None
    """Draw each layer's iterations t anew each step, from this many to its T with odds of 1/t, so that stopping early
    costs less in use; null always runs T."""
    gradient_clip: Positive = 1.0
    """Largest global norm of the gradient."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """The optimizer."""
    schedule: ScheduleSettings = ScheduleSettings()
    """The learning rate."""
    losses: LossSettings = LossSettings()
    """Auxiliary losses."""
    cycle: CycleSettings | None = None
    """Equilibrium-exploration cycles; null is off."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Periodic evaluation."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """Checkpoints."""
    logging: LoggingSettings = LoggingSettings()
    """Metrics."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give exactly one of steps and tokens")
        if self.batch_tokens % self.sequence_length:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is not a multiple of sequence_length {self.sequence_length}: "
                f"{self.batch_tokens} / {self.sequence_length} = {self.batch_tokens / self.sequence_length:.2f}; "
                f"try batch_tokens {max(1, self.batch_tokens // self.sequence_length) * self.sequence_length}"
            )
        self.micro_batch(1)
        if self.num_steps * self.batch_tokens > _MOST_TOKENS:
            raise ValueError(f"{self.num_steps:,} steps of {self.batch_tokens:,} tokens are above {_MOST_TOKENS:,}")
        return self

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps or -(-(self.tokens or 0) // self.batch_tokens)

    @property
    def batch_size(self) -> int:
        """Sequences in one global batch."""
        return self.batch_tokens // self.sequence_length

    def micro_batch(self, world_size: int) -> int:
        """Sequences in one forward pass of one of `world_size` processes; ValueError shows the arithmetic."""
        micro = self.micro_batch_size or max(1, self.batch_size // world_size)
        if self.batch_size % (micro * world_size):
            raise ValueError(
                f"batch_tokens {self.batch_tokens} = {self.batch_size} sequences of {self.sequence_length}; "
                f"micro_batch_size {micro} x world size {world_size} = {micro * world_size} does not divide "
                f"{self.batch_size}"
            )
        return micro
