"""The training section of a recipe: length, batch, optimizer, schedule, losses, cycles, checkpoints.

Everything that changes in the course of a run is a function of the step (training/schedules.py, training/cycles.py). So
none of it has state, and a resumed run needs to know nothing but the step.
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
    Text,
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
    """muon uses torch.optim.Muon for the matrices of the blocks, and AdamW for all other weights."""
    learning_rate: Positive = 3e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: Positive | None = None
    """Peak learning rate of Muon (muon only), whose update is scaled to AdamW's size; null is learning_rate."""
    stream_rate_factor: Positive = 5.0
    """The learning rate of the stream's coefficients (alpha, b, r, beta, mu, gamma, phi of v5, b of a Transformer with
    transport), as a multiple of learning_rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of the two moments of AdamW."""
    eps: Positive = 1e-8
    """Epsilon of AdamW."""
    weight_decay: NonNegative = 0.1
    """Decay of matrices in each step; norms, biases, mu, gamma, phi, gains and modulations have none."""


class ScheduleSettings(Section):
    """The learning rate as a function of the step."""

    name: Literal["wsd", "cosine", "constant"] = "wsd"
    """After the warm-up, wsd stays and falls linearly at the end, cosine is half a cosine, and constant stays."""
    warmup_fraction: Unit = 0.05
    """Share of the steps over which the rate rises linearly."""
    decay_fraction: Unit = 0.4
    """Share of the steps over which wsd decays at the end."""
    final_ratio: Unit = 0.0
    """The last rate as a share of the peak rate (wsd and cosine)."""

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
    """What lambda_mean becomes in the course of the run; null keeps it constant."""
    annealing: Literal["exponential", "linear"] = "exponential"
    """How lambda_mean goes to lambda_mean_final."""
    annealing_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the run in which it gets there."""
    variance_weighted: bool = True
    """w_i = 1 / (1 + Var_i), as the documents have it; false is w_i = 1."""
    lambda_speed: NonNegative = 0.0
    """Weight of the speed loss, which is small when states come near mu early."""
    lambda_energy: NonNegative = 0.0
    """Weight of the energy loss on the velocity (a cycle has its own)."""
    energy_power: Annotated[float, Field(ge=1, le=100)] = 2.0
    """p of |v|^p in the energy loss."""
    lambda_balance: NonNegative = 0.01
    """Weight of the loss that balances the load of experts (only with integrator.controller.experts above 1)."""


class PhaseSettings(Section):
    """Changes to one phase of a cycle preset; null keeps the value of the preset."""

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
    """Changes to the equilibrium phase."""
    exploration: PhaseSettings = PhaseSettings()
    """Changes to the exploration phase."""
    num_cycles: Count | None = None
    """Number of cycles; null is that of the preset."""
    warmup_epochs: CountOrNone | None = None
    """Epochs before the first cycle; null is that of the preset."""
    steps_per_epoch: Count | None = None
    """Steps that count as one epoch; null stretches all cycles over the whole run."""


class EvaluationSettings(Section):
    """Evaluation on the validation split in the course of a run."""

    every: CountOrNone = 250
    """Steps between evaluations; 0 evaluates at the end only."""
    tokens: Total = 65_536
    """Validation tokens in each evaluation: the first ones of the split, the same each time."""
    final_tokens: Total | None = None
    """Validation tokens in the last evaluation; null is the whole split."""


class CheckpointSettings(Section):
    """When to save, and what to keep."""

    every: CountOrNone = 500
    """Steps between checkpoints; 0 saves at the end (and on a signal) only."""
    keep_last: Count = 2
    """How many of the newest checkpoints are kept, besides those that were saved for their score alone."""
    keep_every: Count | None = None
    """Also keep the checkpoints at multiples of this step."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest bits per byte on the validation split. Unless `every` is 0, one is also
    saved after each evaluation that is better than all before."""


class LoggingSettings(Section):
    """What a run writes while it trains; metrics.jsonl is always written."""

    every: Count = 10
    """Steps between metric rows."""
    dynamics_every: CountOrNone = 100
    """Steps between records of what the dynamics have learned and do, besides the first and the last step; 0 is off."""
    tensorboard: bool = False
    """Mirror the metrics to TensorBoard (`pip install "inl[logging]"`)."""
    wandb: bool = False
    """Mirror the metrics to Weights & Biases (`pip install "inl[logging]"`)."""
    wandb_project: Text = "inl"
    """The project there."""
    wandb_entity: Text | None = None
    """The team or user that the project belongs to; null is the default of your account."""
    wandb_group: Text | None = None
    """A name that runs which belong together share."""
    wandb_tags: tuple[Text, ...] = ()
    """Tags of the run."""


class NonFiniteSettings(Section):
    """What a run does about a step whose loss or gradient is NaN or infinite."""

    skip: CountOrNone = 0
    """How many such steps a run may skip: the batch is passed over, nothing is updated. The next one after them stops
    the run, as the first does at 0."""


class DistributedSettings(Section):
    """How the model is divided among the processes of a run; one process has all of it, whatever is said here."""

    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """ddp keeps the whole model in each process; fsdp gives each a part of every matrix, of its gradient and of its
    moments; hsdp does so in groups of shard_size processes. auto is ddp where the model fits a device, else fsdp."""
    shard_size: Annotated[int, Field(ge=2, lt=2**31)] | None = None
    """Processes among which one copy of the model is divided (hsdp only), best those of one machine."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.shard_size is None) == (self.strategy == "hsdp"):
            raise ValueError(
                "hsdp needs shard_size, the processes among which one copy of the model is divided (say, the GPUs of "
                f"a machine), and no other strategy takes it; here strategy is {self.strategy} and shard_size is "
                f"{'null' if self.shard_size is None else self.shard_size}"
            )
        return self


class TrainingSettings(Section):
    """One training run."""

    steps: Count | None = None
    """Optimizer steps; give this or tokens."""
    tokens: Total | None = None
    """Tokens to train on, rounded up to whole steps; give this or steps."""
    sequence_length: Length = 128
    """S, tokens in a window."""
    max_hours: Positive | None = None
    """Hours after which the command saves and stops (exit code 75), counted from its start; what resumes the run has
    them anew. It stops earlier by the time of a save, so that it is over by then. The end of a Slurm job is heeded
    without it."""
    batch_tokens: Count = 2048
    """Tokens in one step over all processes; micro_batch_size x sequence_length x processes must divide it."""
    micro_batch_size: Count | None = None
    """Sequences in one forward pass of one process; null is all that the process has in a step."""
    seed: Seed = 0
    """Seed of the starting weights and of the order of the data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU when there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 is torch's autocast to bfloat16; weights stay fp32. auto is bf16 on GPUs that have it, else fp32."""
    compile: bool = False
    """Compile each block with torch.compile."""
    operations: Literal["auto", "plain"] = "auto"
    """auto takes, for each part of the model, the operation that was measured to be the fastest on this machine; plain
    takes torch's own everywhere."""
    recomputation: Literal["none", "block", "integrator"] = "none"
    """What the backward pass computes again to save memory: nothing, each block, or each integrator's iterations."""
    distributed: DistributedSettings = DistributedSettings()
    """How several processes divide the model."""
    min_iterations: Iterations | None = None
    """In each step, draw the number t of iterations of each layer anew, from this to T with odds of 1/t, so that the
    model can later be used with fewer iterations; null always runs T."""
    gradient_clip: Positive = 1.0
    """The gradient is scaled down to this norm where it is larger."""
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
    nonfinite: NonFiniteSettings = NonFiniteSettings()
    """Steps that are not finite."""

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
        """Optimizer steps in the whole run."""
        return self.steps or -(-(self.tokens or 0) // self.batch_tokens)

    @property
    def batch_size(self) -> int:
        """Sequences in one step over all processes."""
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
