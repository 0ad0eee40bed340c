"""How a model is executed in training: its operations, recomputation and compilation, all put on from outside."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from inl_core.kernels import Choice, apply
from inl_core.kernels.compilation import compile_parts
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import TrainingSettings


def prepare_model(model: IntegratorLanguageModel, settings: TrainingSettings, *, bf16: bool) -> dict[str, Choice]:
    """Choose the model's operations, recompute and compile as the recipe says; parameter names stay as they are."""
    choices = apply(model, operations=settings.operations, bf16=bf16)
    recompute(model, settings.recomputation)
    if settings.compile:
        compile_parts(model)
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
