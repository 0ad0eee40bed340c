"""Whether a recipe fits the devices it is to be trained on, activations included, before anything is started."""

from dataclasses import dataclass

from inl_core.analysis.planning.memory import Memory, others_gradient
from inl_core.analysis.planning.plan import ModelPlan
from inl_core.errors import RecipeError
from inl_core.training.layout import Layout, choose_layout


@dataclass(frozen=True)
class Devices:
    """What a run is to be trained on: one process for each device."""

    number: int
    memory: int
    """Bytes of each."""


def check_fit(plan: ModelPlan, devices: Devices) -> Layout:
    """Who keeps what of the model on these devices.

    Raises:
        RecipeError: it does not fit under the recipe's strategy; the message has the arithmetic, and says what would.
    """
    settings = plan.recipe.training
    layout = choose_layout(settings, devices.number, plan.states, devices.memory)
    row = _row(plan, settings.recomputation, layout.shard_size)
    parts = {
        "weights, gradients and moments": plan.states.total // layout.shard_size,
        "the rest of the gradient while micro-batches add up": others_gradient(
            plan.recipe, plan.states, devices=devices.number, degree=layout.shard_size
        ),
        "activations": row.activations,
        "working memory": row.working,
    }
    total = sum(parts.values())
    if total <= devices.memory:
        return layout
    terms = " + ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size)
    raise RecipeError(
        f"{layout.strategy} on {devices.number} of these devices with recomputation {settings.recomputation} needs "
        f"{terms} = {total / 1e9:.1f} GB on each, which has {devices.memory / 1e9:.1f} GB; {_what_fits(plan, devices)}"
    )


def _row(plan: ModelPlan, recomputation: str, degree: int) -> Memory:
    """The figures of the nearest number of devices that the plan has: up to it, more than one where it is."""
    rows = [row for row in plan.memory if row.recomputation == recomputation and row.sharding <= degree]
    return max(rows, key=lambda row: row.sharding)


def _what_fits(plan: ModelPlan, devices: Devices) -> str:
    """The least change that makes it fit, among those that the plan has figures for."""

    def needs(row: Memory) -> int:
        number = max(devices.number, row.sharding)
        gradient = others_gradient(plan.recipe, plan.states, devices=number, degree=row.sharding)
        return row.total - row.gradient + gradient

    for row in plan.memory:
        if needs(row) <= devices.memory and row.sharding <= devices.number:
            how = "ddp" if row.sharding == 1 else f"a model divided among {row.sharding} (training.distributed)"
            return f"{how} with training.recomputation {row.recomputation} would need {needs(row) / 1e9:.1f} GB"
    if fitting := [row for row in plan.memory if needs(row) <= devices.memory]:
        row = min(fitting, key=lambda row: row.sharding)
        return f"fsdp over {row.sharding} devices with training.recomputation {row.recomputation} would fit"
    if fitting := [row for row in plan.memory if row.total - row.gradient <= devices.memory]:
        row = min(fitting, key=lambda row: (row.sharding > devices.number, row.total - row.gradient))
        less, windows = row.total - row.gradient, plan.recipe.training.batch_size
        return (
            f"fsdp over {row.sharding} devices with training.recomputation {row.recomputation} would need "
            f"{less / 1e9:.1f} GB in one pass a step: raise training.micro_batch_size, take more devices, or lower "
            f"training.batch_tokens, until micro_batch_size x devices is the windows of a step, now {windows:,}"
        )
    if any(row.rows > 1 for row in plan.memory):
        return "lower training.micro_batch_size"
    return "take devices with more memory, or lower training.sequence_length"
