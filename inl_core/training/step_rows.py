"""What a run writes of its training steps: a row of metrics at each log point, and records of the dynamics."""

import math
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import TrainingSettings
from inl_core.training.checkpoint import TrainState
from inl_core.training.cycles import Regime
from inl_core.training.dynamics import headline, record_layers, write_record
from inl_core.training.gradients import Gradients
from inl_core.training.metrics import MetricsWriter
from inl_core.training.observer import Observer
from inl_core.training.schedules import is_due
from inl_core.training.step import MicroBatch


class StepRows:
    """Writes the rows of training steps of `model`; rank 0 has one."""

    def __init__(
        self,
        model: IntegratorLanguageModel,
        settings: TrainingSettings,
        gradients: Gradients,
        metrics: MetricsWriter,
        observer: Observer,
        *,
        autocast: torch.autocast,
        num_windows: int,
    ) -> None:
        self.model, self.settings, self.gradients = model, settings, gradients
        self.metrics, self.observer = metrics, observer
        self.autocast, self.num_windows = autocast, num_windows

    def write(
        self,
        state: TrainState,
        terms: dict[str, Tensor],
        now: Regime,
        part: MicroBatch,
        *,
        rate: float,
        norm: Tensor | None,
        count: float,
        num_bytes: float,
        speed: float,
    ) -> None:
        """Write one row of metrics and, when due, a record of the dynamics; a step that learned nothing has no loss.

        Args:
            state: as it is after the step.
            terms: the losses, none when the step learned nothing.
            part: the batch's first part, on which the dynamics are recorded.
            rate: the learning rate.
            norm: of the gradient.
            count: target tokens of the global batch, and num_bytes the bytes behind them.
            speed: tokens a second since the last row.
        """
        every = self.settings.logging.dynamics_every
        gains: dict[str, float] = {}
        if self.model.config.integrator and every and (state.step == 1 or is_due(state.step, every)):
            gains = self._record_dynamics(state.step, part)
        task = terms["task"].item() if terms else math.nan
        row: dict[str, Any] = {"step": state.step, "tokens": state.tokens, "loss": task}
        row |= {f"loss_{name}": terms[name].item() for name in ("mean", "speed", "energy", "balance") if name in terms}
        row |= {
            "bits_per_byte": _bits_per_byte(task - terms["special"].item(), count, num_bytes) if terms else None,
            "learning_rate": rate,
            "gradient_norm": math.nan if norm is None else norm.item(),
            "tokens_per_second": speed,
            "memory_bytes": _memory_in_use(part.tokens.device),
            "epoch": state.samples / self.num_windows,
        }
        if self.model.config.integrator:
            drawn = self.gradients.drawn_iterations(state.step - 1)
            row |= {"phase": now.phase, "lambda_mean": now.lambda_mean, "A": self.model.excitation_amplitude.item()}
            row |= {"iterations": self.model.config.mean_iterations if drawn is None else fmean(drawn), **gains}
        if self.model.budget is not None:
            row["budget"] = self.model.budget.shares().tolist()
        if "loads" in terms:
            row["expert_load"] = (terms["loads"] / terms["loads"].sum(-1, keepdim=True)).tolist()
        self.observer.on_metrics(self.metrics.write(row))

    def _record_dynamics(self, step: int, part: MicroBatch) -> dict[str, float]:
        """Write this step's record of the dynamics; its headline comes back."""
        rows_used = slice(0, max(1, 1024 // part.tokens.shape[1]))
        extra = {
            name: None if (tensor := getattr(part, name)) is None else tensor[rows_used]
            for name in ("positions", "document_ids")
        }
        with self.autocast:
            rows = record_layers(self.model, part.tokens[rows_used], **extra)
        try:
            write_record(self.metrics.path.parent, step, rows)
        except OSError as error:
            text = f"dynamics of step {step} not written: {error.strerror or error}"
            self.observer.on_message(text, warning=True)
        return headline(rows)


def _bits_per_byte(nats: float, count: float, num_bytes: float) -> float | None:
    """Of `count` tokens of so many nats; None where there are no bytes, or nobody can tell how many (they are NaN)."""
    return nats * count / math.log(2) / num_bytes if num_bytes > 0 else None


def _memory_in_use(device: torch.device) -> int:
    """Peak bytes so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
