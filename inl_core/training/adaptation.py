"""What a run changes in the model besides its gradients: the moving average of mu, and the layers' budgets."""

import torch
from torch import Tensor

from inl_core.model import IntegratorLanguageModel
from inl_core.training.dynamics import last_residuals
from inl_core.training.loss_module import MicroBatch
from inl_core.training.parallel import Parallel


def mu_adaptation_rate(model: IntegratorLanguageModel) -> float:
    """How far mu moves towards the mean state in a step; 0 where gradients alone move it."""
    integrator = model.config.integrator
    return integrator.mu.adaptation_rate if integrator else 0.0


@torch.no_grad()
def adapt_equilibrium(
    model: IntegratorLanguageModel, losses: dict[str, Tensor], num_targets: float, skip: Tensor | None = None
) -> None:
    """Move each layer's mu towards the mean final state of the global batch (docs/model.md, "The equilibrium").

    This does nothing unless the recipe asks for it.

    Args:
        losses: of the step; its `moments` (2, L, D) hold the sums of the final states over all target tokens.
        skip: a tensor () on the device; where it is 1, nothing moves, and the host need not know.
    """
    rate = mu_adaptation_rate(model)
    if rate > 0:
        for integrator, total in zip(model.integrators(), losses["moments"][0], strict=True):
            learned = list(integrator.equilibrium.parameters())
            before = [parameter.clone() for parameter in learned]
            integrator.equilibrium.adapt(total / num_targets, rate)
            if skip is not None:
                for parameter, kept in zip(learned, before, strict=True):
                    parameter.copy_(torch.where(skip > 0, kept, parameter))


def reallocate_budget(parallel: Parallel, parts: list[MicroBatch]) -> None:
    """Divide the iterations anew among the layers by their residuals on a whole batch, where the strategy does so."""
    budget, world = parallel.model.budget, parallel.world
    if budget is None or not budget.follows_residuals:
        return

    def residuals(model: IntegratorLanguageModel) -> list[list[float]]:
        with parallel.losses.autocast:
            return [
                last_residuals(model, part.tokens, positions=part.positions, document_ids=part.document_ids)
                for part in parts
            ]

    found = parallel.run(residuals)
    total = world.sum(torch.tensor(found, dtype=torch.float64, device=world.device).sum(0))
    if bool(torch.isfinite(total).all()):  # else the step that follows is bad: it ends the run, or is skipped
        budget.reallocate(total / (len(parts) * world.size))
