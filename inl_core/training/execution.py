"""How a model is executed in training: its operations, recomputation and compilation, all put on from outside."""

from collections.abc import Mapping
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from inl_core.kernels.apply import NOTHING, TORCH, Choice, can_run, choose, put
from inl_core.kernels.compilation import compile_parts
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import TrainingSettings
from inl_core.training.distributed import ALONE, World


def prepare_model(
    model: IntegratorLanguageModel,
    settings: TrainingSettings,
    world: World = ALONE,
    *,
    bf16: bool,
    before: Mapping[str, str] = NOTHING,
) -> dict[str, Choice]:
    """Choose the model's operations, recompute and compile as the recipe says; parameter names stay as they are.

    Rank 0 chooses for all; where another rank has not what it chose, all take torch's own operations.
    """
    weight = model.embedding.table.weight
    device = world.device if weight.is_meta else weight.device
    choices = world.on_main(
        lambda: choose(model.config, device, operations=settings.operations, bf16=bf16, before=before)
    )
    if world.sum_numbers(float(not can_run(choices)))[0]:
        torch_only = Choice(TORCH, "another process has no operations in C++")
        choices = {part: torch_only if choice.way.startswith("C++") else choice for part, choice in choices.items()}
    put(model, choices)
    if settings.compile:
        compile_parts(model)
    recompute(model, settings.recomputation)
    return choices


def recompute(model: IntegratorLanguageModel, mode: str) -> None:
    """Let the backward pass compute again each `block`, or each `integrator`'s T iterations; `none` changes nothing."""
    if mode == "block":
        for block in model.blocks:
            _recompute(block)
    elif mode == "integrator":
        for integrator in model.integrators():
            if not integrator.dynamics.keeps_nothing:
                _recompute(integrator)


def _recompute(module: nn.Module) -> None:
    module.forward = partial(checkpoint, module.forward, use_reentrant=False)
