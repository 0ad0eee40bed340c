"""Bytes of weights, gradients, optimizer, activations, cache and checkpoint, by recomputation and sharding degree.

- Weights and gradients are float32 (bf16 is autocast). The optimizer's tensors are counted on the optimizers that
  training builds: AdamW keeps two values a parameter, Muon one.
- Sharding degree N is FSDP's: every device keeps 1/N of weights, gradients and optimizer, and gathers the block it
  computes and the next one. Degree 1 is one device, or plain data parallelism, in which every device keeps all.
- Where a step takes several passes, FSDP divides the gradient after the last one alone, and every device keeps all of
  it until then. How many they are depends on the number of devices, which is N where nothing else is said.
- Working memory comes on top of what is kept: the block (or integrator) that is recomputed in the backward pass, and
  autocast's bfloat16 copies of the weights, which live to the end of the forward pass.
- Not counted: the allocator's fragmentation, the backward pass's own temporaries (a few tensors of one block), the
  chunk of logits that the head holds at a time, buffers of the communication library, the framework itself.
"""

from dataclasses import dataclass

from inl_core.analysis.planning.activations import RECOMPUTATIONS, Recomputation, Saved, saved_activations
from inl_core.analysis.planning.parameters import meta_model
from inl_core.kernels.apply import TORCH, Choice
from inl_core.recipe import ModelConfig, Recipe
from inl_core.training.optimizers import FLOAT32_BYTES, States, count_states

SHARDING_DEGREES = (1, 2, 4, 8, 16, 32)
CACHE_TYPES = {"float32": 4, "bfloat16": 2}
_GATHERED_BLOCKS = 2


@dataclass(frozen=True)
class Memory:
    """One device's memory under one recomputation mode and sharding degree, in bytes."""

    recomputation: Recomputation
    sharding: int
    rows: int
    """Windows in the device's micro-batch."""
    states: int
    """Weights, gradients and optimizer that this device keeps."""
    activations: int
    """Kept from the forward to the backward pass."""
    gradient: int
    """The other devices' parts of the gradient, where a step takes several passes."""
    working: int
    """At most this much more: what is recomputed or gathered, or autocast's copies of the weights."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.states + self.gradient + self.activations + self.working


def cache_bytes(config: ModelConfig, value_bytes: int) -> int:
    """Key-value cache of one token: keys and values of every layer, however many iterations it has."""
    return 2 * config.num_layers * config.key_value_heads * config.head_dim * value_bytes


def stream_bytes(config: ModelConfig) -> int:
    """What generation keeps of each sequence beside its tokens' cache: 2L + 1 rows of D float32, where v travels."""
    return (2 * config.num_layers + 1) * config.d_model * FLOAT32_BYTES if config.transport else 0


def trace_modes(
    recipe: Recipe,
    config: ModelConfig,
    *,
    bf16: bool,
    operations: dict[str, Choice] | None = None,
    modes: tuple[Recomputation, ...] = RECOMPUTATIONS,
) -> dict[Recomputation, Saved]:
    """What autograd saves under each recomputation mode, for the recipe's windows, masks and losses."""
    settings = recipe.training
    losses = settings.losses
    # The integrator in C++ computes its iterations again in any case: the mode is shown only where it is asked for.
    recomputes_itself = bool(operations) and operations.get("integrator", Choice(TORCH, "")).way != TORCH
    if config.integrator is None or (recomputes_itself and settings.recomputation != "integrator"):
        modes = tuple(mode for mode in modes if mode != "integrator")
    has_terms = losses.lambda_speed > 0 or losses.lambda_energy > 0 or settings.cycle is not None
    return {
        mode: saved_activations(
            config,
            settings.sequence_length,
            recomputation=mode,
            bf16=bf16,
            document_mask=recipe.data.document_mask,
            energy_power=losses.energy_power if has_terms else None,
            operations=operations,
        )
        for mode in modes
    }


def memory_table(
    recipe: Recipe,
    config: ModelConfig,
    saved: dict[Recomputation, Saved],
    *,
    bf16: bool,
    degrees: tuple[int, ...] = SHARDING_DEGREES,
) -> list[Memory]:
    """Every mode of `saved` (which must hold "none") at every sharding degree."""
    model = meta_model(config)
    states = count_states(model, recipe.training.optimizer)
    block = sum(parameter.numel() for parameter in model.blocks[0].parameters())
    rest = states.weights // FLOAT32_BYTES - block * config.num_layers
    table = []
    for mode, kept in saved.items():
        # While a block (or integrator) is recomputed, one layer's share of what the mode does not keep is there again.
        again = Saved(0, 0).plus(saved["none"] - kept, 1 / config.num_layers)
        for degree in degrees:
            rows = _rows(recipe, degree)
            if degree == 1:
                converted = 2 * (block * config.num_layers + rest) if bf16 and mode == "block" else 0
                activations, working = kept.bytes(rows), max(again.bytes(rows), converted)
            else:  # autocast's copies are made from gathered weights and freed with them
                gathered = (rest + _GATHERED_BLOCKS * block) * (2 if bf16 else FLOAT32_BYTES)
                activations = round(kept.per_row * rows)
                working = round(again.per_row * rows) + gathered
            own, others = -(-states.total // degree), others_gradient(recipe, states, devices=degree, degree=degree)
            table.append(Memory(mode, degree, rows, own, activations, others, working))
    return table


def others_gradient(recipe: Recipe, states: States, *, devices: int, degree: int) -> int:
    """Bytes of the other devices' parts of the gradient that one of them keeps at `degree`, of all `devices`."""
    is_one_pass = recipe.training.batch_size <= _rows(recipe, devices) * devices
    return 0 if is_one_pass else states.gradients - states.gradients // degree


def _rows(recipe: Recipe, world_size: int) -> int:
    """Windows in the micro-batch of one of `world_size` devices, also where they do not divide the batch."""
    settings = recipe.training
    return settings.micro_batch_size or max(1, settings.batch_size // world_size)
