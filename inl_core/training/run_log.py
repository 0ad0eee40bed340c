"""What a run writes about itself: rows of metrics for steps and evaluations, and records of the dynamics."""

import math
from dataclasses import asdict, fields
from statistics import fmean
from typing import Any, Self

import torch
from torch import Tensor

from inl_core.inference.evaluate import Evaluation
from inl_core.model import IntegratorLanguageModel
from inl_core.training.alarms import AlarmWatch
from inl_core.training.checkpoint import TrainState
from inl_core.training.dynamics import headline, record_layers
from inl_core.training.loss_module import MicroBatch
from inl_core.training.metrics import MetricsWriter
from inl_core.training.observer import Observer
from inl_core.training.parallel import Parallel
from inl_core.training.records import write_record
from inl_core.training.run import RunFiles
from inl_core.training.schedules import is_due, iterations_of_step, logs_after
from inl_core.training.spikes import SpikeWatch
from inl_core.training.step import StepResult
from inl_core.training.utilisation import utilisation_of


class RunLog:
    """Writes the rows of a run; only rank 0's log writes anything."""

    def __init__(self, parallel: Parallel, run: RunFiles, observer: Observer, num_windows: int) -> None:
        self.parallel, self.run, self.observer, self.num_windows = parallel, run, observer, num_windows
        self.model, self.settings, world = parallel.model, run.recipe.training, parallel.world
        self.device = world.device
        self.metrics = MetricsWriter(run.path, run.recipe, observer.on_warning) if world.is_main else None
        self.spikes = SpikeWatch(observer.on_warning)
        self.alarms = AlarmWatch(run.path, self.settings.num_steps, observer.on_warning)
        self.utilisation = utilisation_of(run.recipe, self.model.vocab_size, world)
        self._steps, self._tokens, self._seconds = 0, 0.0, 0.0  # since the last row

    def __enter__(self) -> Self:
        """Open the mirrors; RecipeError where one cannot be opened, on every rank."""
        self.parallel.world.on_main(lambda: self.metrics.open_mirrors() if self.metrics else None)
        return self

    def __exit__(self, *_: object) -> None:
        if self.metrics is not None:
            self.metrics.close_mirrors()

    def add_step(self, state: TrainState, result: StepResult) -> None:
        """Take note of a step, and write a row where one is due, or where the step was skipped.

        Args:
            state: the run's after the step.
        """
        self._steps += 1
        self._tokens += result.num_targets
        self._seconds += result.seconds
        if not logs_after(self.settings, state.step) and result.record is None:
            return
        # On every rank: a divided model takes part in each of its passes.
        means = self.record_dynamics(state.step, result.first_part) if self._is_recorded(state, result) else {}
        if self.metrics is not None:
            row = self._step_row(state, result) | self._model_row(state, result) | means
            if result.record is not None:
                row["skipped"] = result.record.relative_to(self.run.path).as_posix()
            written = self.metrics.write(row)
            self.observer.on_metrics(written)
            if written["loss"] is not None:
                self.spikes.hear(state.step, written["loss"])
        self._steps, self._tokens, self._seconds = 0, 0.0, 0.0

    def _is_recorded(self, state: TrainState, result: StepResult) -> bool:
        """Whether the dynamics are recorded after this step: every so often, and after the first and the last one."""
        every = self.settings.logging.dynamics_every
        if not (every and self.model.config.has_dynamics) or result.record is not None:
            return False
        return state.step in (1, self.settings.num_steps) or is_due(state.step, every)

    def add_evaluation(self, state: TrainState, evaluation: Evaluation | None, scored_on: str) -> dict[str, Any] | None:
        """Write the row of an evaluation, whose scores are all null where there was nothing to score; return it.

        Args:
            scored_on: the name of the text that was scored.
        """
        if self.metrics is None:
            return None
        scores = asdict(evaluation) if evaluation else dict.fromkeys(field.name for field in fields(Evaluation))
        row = {"step": state.step, "tokens": state.tokens, "scored_on": scored_on}
        return self.metrics.write(row | {f"validation_{name}": value for name, value in scores.items()})

    def _step_row(self, state: TrainState, result: StepResult) -> dict[str, Any]:
        """What the row of any model's step says; a step that learned nothing has no loss."""
        losses = result.losses
        task = losses["task"].item() if losses else math.nan
        row: dict[str, Any] = {"step": state.step, "tokens": state.tokens, "loss": task}
        for name in ("mean", "speed", "energy", "balance"):
            if name in losses:
                row[f"loss_{name}"] = losses[name].item()
        tokens = self._steps * self.settings.batch_tokens
        row["mfu"] = self.utilisation.of(tokens, self._seconds) if self.utilisation else None
        return row | {
            "bits_per_byte": _bits_per_byte(task - losses["special"].item(), result) if losses else None,
            "learning_rate": result.learning_rate,
            "gradient_norm": math.nan if result.gradient_norm is None else result.gradient_norm.item(),
            "tokens_per_second": self._tokens / self._seconds,
            "memory_bytes": _memory_in_use(self.device),
            "epoch": state.samples / self.num_windows,
        }

    def _model_row(self, state: TrainState, result: StepResult) -> dict[str, Any]:
        """What the row says of the dynamics, the layers' budgets and the experts, where the model has them."""
        row: dict[str, Any] = {}
        config, regime, loads = self.model.config, result.regime, result.losses.get("loads")
        if config.excites:
            row |= {"phase": regime.phase, "A": self.model.excitation_amplitude.item()}
        if config.integrator:
            drawn = iterations_of_step(self.settings, config, state.step - 1)
            row |= {"lambda_mean": regime.lambda_mean}
            row |= {"iterations": config.mean_iterations if drawn is None else fmean(drawn)}
        if self.model.budget is not None:
            row["budget"] = self.model.budget.shares().tolist()
        if loads is not None:
            row["expert_load"] = (loads / loads.sum(-1, keepdim=True)).tolist()
        return row

    def record_dynamics(self, step: int, part: MicroBatch) -> dict[str, float]:
        """Write a record of the dynamics on about a thousand tokens of the batch; its means over layers come back."""
        chosen = slice(0, max(1, 1024 // part.tokens.shape[1]))

        def rows_of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[chosen]

        def record(model: IntegratorLanguageModel) -> list[dict[str, Any]]:
            positions, document_ids = rows_of(part.positions), rows_of(part.document_ids)
            with self.parallel.losses.autocast:
                return record_layers(model, part.tokens[chosen], positions=positions, document_ids=document_ids)

        rows = self.parallel.run(record)
        try:
            if self.metrics is not None:
                write_record(self.run.path, step, rows)
        except OSError as error:
            self.observer.on_warning(f"dynamics of step {step} not written: {error.strerror or error}")
        if self.metrics is not None:
            self.alarms.hear(step, rows)
        return headline(rows)


def _bits_per_byte(nats: float, result: StepResult) -> float | None:
    """Bits per byte of text at `nats` a token; None where there is no byte, or nobody can tell how many (NaN)."""
    return nats * result.num_targets / math.log(2) / result.num_bytes if result.num_bytes > 0 else None


def _memory_in_use(device: torch.device) -> int:
    """The most bytes that were in use so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
