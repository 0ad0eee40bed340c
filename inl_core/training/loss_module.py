"""The forward pass of one micro-batch, from token arrays to its shares of the losses. With several processes it is what
DDP and FSDP wrap (parallel.py)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inl_core.corpus.loader import Batch
from inl_core.model import IntegratorLanguageModel, ModelOutput, Options
from inl_core.training.losses import (
    AuxiliaryWeights,
    balance_share,
    expert_loads,
    mean_loss_share,
    state_moments,
    token_term,
)


@dataclass(frozen=True)
class MicroBatch:
    """A part of a Batch as tensors on the device, each (B, S); documents and positions may be None, as in a Batch."""

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor | None
    positions: Tensor | None

    @property
    def mask(self) -> Tensor:
        """1.0 on target tokens, (B, S)."""
        return (self.targets != -100).float()


def micro_batches(batch: Batch, size: int, device: torch.device) -> list[MicroBatch]:
    """Split a batch into parts of `size` rows, on the device."""

    def part(array, start: int) -> Tensor | None:
        if array is None:
            return None
        tensor = torch.from_numpy(array[start : start + size])
        # The host need not wait for a copy to the GPU only if it comes from pinned memory.
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    names = ("tokens", "targets", "document_ids", "positions")
    starts = range(0, batch.tokens.shape[0], size)
    return [MicroBatch(*(part(getattr(batch, name), start) for name in names)) for start in starts]  # type: ignore[arg-type]


class LossModule(nn.Module):
    """The model together with its losses."""

    def __init__(self, model: IntegratorLanguageModel, autocast: torch.autocast) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast

    def on_model(self, work: Callable[[IntegratorLanguageModel], Any]) -> Any:
        """What `work` makes of the model: FSDP gathers what belongs to all blocks before it, as before `forward`."""
        return work(self.model)

    def run(
        self, batch: MicroBatch, weights: AuxiliaryWeights, num_iterations: tuple[int, ...] | None = None
    ) -> ModelOutput:
        """The forward pass alone."""
        power = weights.energy_power if weights.needs_terms else None
        options = Options(num_iterations=num_iterations, energy_power=power)
        with self.autocast:
            return self.model(batch.tokens, positions=batch.positions, document_ids=batch.document_ids, options=options)

    def forward(
        self,
        batch: MicroBatch,
        weights: AuxiliaryWeights,
        count: Tensor,
        whole: dict[str, Tensor] | None,
        num_iterations: tuple[int, ...] | None = None,
        special_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """This part's shares of every loss in the mean over `count` target tokens of the global batch.

        The result has `task`, and where their weight is not zero `mean`, `speed`, `energy` and `balance`, all without
        their weights, and `total`, the weighted sum to differentiate. Without gradient it may have `moments` (2, L, D),
        this part's sums of the final states and of their squares, and `loads` (L, E), how often experts were chosen.

        Args:
            whole: `moments` and `loads` of the whole batch when this is only a part of it; None when it is all of it.
            num_iterations: each layer's iterations in this step; None takes the configured ones.
            special_ids: with them, `special` is the part of `task`, without gradient, that falls on these targets.
        """
        output, mask = self.run(batch, weights, num_iterations), batch.mask
        with self.autocast:
            task = self.model.loss_sum(output.hidden, batch.targets, output.table) / count
        terms = {"task": task}
        if special_ids is not None:
            terms["special"] = self._loss_on(special_ids, output, batch.targets) / count
        local = state_moments(output.layers, mask) if weights.mean > 0 or weights.adapts_mu else None
        if local is not None:
            terms["moments"] = local.detach()
        if local is not None and weights.mean > 0:
            total = local.detach() if whole is None else whole["moments"]
            mu = torch.stack([integrator.equilibrium() for integrator in self.model.integrators()])
            terms["mean"] = mean_loss_share(local, total, mask.sum(), count, mu, weights.variance_weighted)
        if weights.balance > 0:
            terms["loads"] = expert_loads(output.layers, mask)
            loads = terms["loads"] if whole is None else whole["loads"]
            terms["balance"] = balance_share(output.layers, loads, mask, count)
        for name in ("speed", "energy"):
            if getattr(weights, name) > 0:
                terms[name] = token_term(output.layers, name, mask, count)
        loss = task
        for name in ("mean", "speed", "energy", "balance"):
            if name in terms:
                loss = loss + getattr(weights, name) * terms[name]
        return {**terms, "total": loss}

    @torch.no_grad()
    def _loss_on(self, ids: Tensor, output: ModelOutput, targets: Tensor) -> Tensor:
        """The summed cross-entropy in nats of the targets that are among `ids`; they are few, so it costs little."""
        chosen = torch.isin(targets, ids)
        if not chosen.any():
            return torch.zeros((), device=targets.device)
        with self.autocast:
            return self.model.loss_sum(output.hidden[chosen], targets[chosen])
