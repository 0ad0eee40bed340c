"""Whether a recipe fits the devices it is to be trained on, activations included, before anything is started."""

from dataclasses import dataclass

from inl_core.analysis.planning.memory import Memory
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
        "the rest of the gradient while micro-batches add up": _rest_of_gradient(plan, layout.shard_size, devices),
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


def _rest_of_gradient(plan: ModelPlan, shard_size: int, devices: Devices) -> int:
    """Bytes of the gradient that a process keeps besides its own part.

    Where a step takes several passes, FSDP divides the gradient after the last one alone, and each process has all of
    it until then.
    """
    settings = plan.recipe.training
    in_one_pass = settings.micro_batch_size is None or settings.batch_size <= settings.micro_batch_size * devices.number
    return 0 if in_one_pass else plan.states.gradients - plan.states.gradients // shard_size


def _row(plan: ModelPlan, recomputation: str, degree: int) -> Memory:
    """The figures of the nearest number of devices that the plan has: up to it, more than one where it is."""
    rows = [row for row in plan.memory if row.recomputation == recomputation and row.sharding <= degree]
    return max(rows, key=lambda row: row.sharding)


def _what_fits(plan: ModelPlan, devices: Devices) -> str:
    """The least change that makes it fit, among those that the plan has figures for."""

    def fits(row: Memory) -> bool:
        return row.total + _rest_of_gradient(plan, row.sharding, devices) <= devices.memory

    for row in plan.memory:
        if fits(row) and row.sharding <= devices.number:
            how = "ddp" if row.sharding == 1 else f"a model divided among {row.sharding} (training.distributed)"
            return f"{how} with training.recomputation {row.recomputation} would need {row.total / 1e9:.1f} GB"
    fitting = [row for row in plan.memory if fits(row)]
    if not fitting:
        return "lower training.micro_batch_size"
    row = min(fitting, key=lambda row: row.sharding)
    return f"fsdp over {row.sharding} devices with training.recomputation {row.recomputation} would fit"
