"""The gradient of one global batch, which may be split into micro-batches and over ranks."""

import torch
from torch import Tensor

from inl_core.recipe import TrainingSettings
from inl_core.training.cycles import Regime
from inl_core.training.loss_module import MicroBatch
from inl_core.training.losses import AuxiliaryWeights
from inl_core.training.parallel import Parallel
from inl_core.training.schedules import iterations_of_step


class Gradients:
    """Runs the forward and backward passes of a model's training."""

    def __init__(self, parallel: Parallel, settings: TrainingSettings) -> None:
        self.parallel, self.settings, self.world = parallel, settings, parallel.world
        self.config = parallel.model.config

    def backward(
        self, parts: list[MicroBatch], now: Regime, step: int, count: float, *, special_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Add the gradient of a whole global batch to the parameters; the loss terms come back.

        The terms (LossModule.forward lists them) are summed over micro-batches and ranks, and still on the device.

        Args:
            parts: this rank's micro-batches.
            count: target tokens of the global batch.
            special_ids: with them, the part of the task loss that falls on these targets comes back too.
        """
        weights, drawn = self._weights(now), iterations_of_step(self.settings, self.config, step)
        divisor = torch.full((), count, device=self.world.device)
        is_split = len(parts) > 1 or self.world.size > 1
        whole = self._whole_batch(parts, weights, divisor, drawn) if weights.needs_whole_batch and is_split else None
        totals: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            with self.parallel.accumulating(is_last=index + 1 == len(parts)):
                terms = self.parallel.trained(part, weights, divisor, whole, drawn, special_ids)
                (terms.pop("total") * self.world.size).backward()
            for name, value in terms.items():
                totals[name] = value.detach() + totals[name] if name in totals else value.detach()
        return {name: self.world.sum(value) for name, value in totals.items()}

    def _weights(self, now: Regime) -> AuxiliaryWeights:
        losses, integrator = self.settings.losses, self.config.integrator
        return AuxiliaryWeights(
            now.lambda_mean if integrator else 0.0,
            losses.lambda_speed,
            now.lambda_energy,
            balance=losses.lambda_balance if integrator and integrator.controller.experts > 1 else 0.0,
            energy_power=losses.energy_power,
            variance_weighted=losses.variance_weighted,
            adapts_mu=bool(integrator and integrator.mu.adaptation_rate > 0),
        )

    @torch.no_grad()
    def _whole_batch(
        self, parts: list[MicroBatch], weights: AuxiliaryWeights, count: Tensor, drawn: tuple[int, ...] | None
    ) -> dict[str, Tensor]:
        """The sums over the whole batch that some losses need, from a pass without gradients (losses.py says why)."""
        found = [self.parallel.losses(part, weights, count, None, drawn) for part in parts]
        names = [name for name in ("moments", "loads") if name in found[0]]
        return {name: self.world.sum(torch.stack([terms[name] for terms in found]).sum(0)) for name in names}
