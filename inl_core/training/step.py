"""One optimizer step: a batch, its gradient, a look at whether that is finite, and the update.

- The batch, the learning rate and the regime are functions of the step, so a step can be taken again from a checkpoint.
- A batch without a target token teaches nothing, so its step updates nothing: no decay, no momentum.
- The host waits for the device only where something is written: at log points, evaluations and checkpoints.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from inl_core.corpus.loader import Batch, BatchLoader
from inl_core.errors import NonFiniteError
from inl_core.training.adaptation import adapt_equilibrium, reallocate_budget
from inl_core.training.cycles import Regime, regime
from inl_core.training.gradients import Gradients
from inl_core.training.interruption import StopSignal
from inl_core.training.loss_module import MicroBatch
from inl_core.training.nonfinite import FiniteWatch, FlightRecorder
from inl_core.training.observer import Observer
from inl_core.training.optimizers import Optimizers
from inl_core.training.parallel import Parallel
from inl_core.training.prefetch import Prefetcher
from inl_core.training.run import RunFiles
from inl_core.training.schedules import is_due, learning_rate_factor, logs_after, writes_after


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    regime: Regime
    first_part: MicroBatch
    learning_rate: float
    num_targets: float
    """Target tokens of the global batch."""
    num_bytes: float
    """Bytes of text behind them."""
    losses: dict[str, Tensor]
    """The loss terms, still on the device; none when the batch holds no target token."""
    gradient_norm: Tensor | None
    is_stopping: bool
    """Whether a signal asked any rank to stop."""
    seconds: float
    record: Path | None = None
    """The flight record of a step that was skipped, because its loss or gradient was not finite."""


class Stepper:
    """Takes the optimizer steps of one run."""

    def __init__(
        self,
        parallel: Parallel,
        loader: BatchLoader,
        optimizers: Optimizers,
        run: RunFiles,
        observer: Observer,
    ) -> None:
        self.parallel, self.optimizers, self.run, self.observer = parallel, optimizers, run, observer
        self.model, self.world, self.settings = parallel.model, parallel.world, run.recipe.training
        world = self.world
        self.gradients = Gradients(parallel, self.settings)
        self.batches = Prefetcher(loader, self.settings.micro_batch(world.size), world.device)
        # A bad step can be skipped by the device alone where the optimizers can.
        may_defer = world.device.type == "cuda" and optimizers.can_skip
        # The record of a step that the run goes on from needs the weights of just this step.
        may_defer = may_defer and not self.settings.nonfinite.skip
        self.watch = FiniteWatch(optimizers, world.device, deferred=may_defer)
        self.recorder = FlightRecorder(self.gradients, self.batches, run)
        self.num_skipped = 0
        """Steps of the run until now that were skipped, because they were not finite."""
        self.token_num_bytes = run.tokenizer.token_num_bytes
        self.special_ids = torch.tensor(sorted(run.tokenizer.special_ids.values()), device=world.device)
        self._gradient_seconds: float | None = None
        self.num_empty = 0
        """Steps whose batch held no target token."""

    def take(self, step: int, stop: StopSignal) -> StepResult:
        """Take optimizer step `step`, counted from 0.

        Raises:
            NonFiniteError: this step's loss or gradient, or an earlier one's that is only noticed now, is NaN or
                infinite, and no more steps may be skipped; the weights are those that the bad step met.
        """
        start, now = time.perf_counter(), self._enter_regime(step)
        self.recorder.note_rng(step)
        batch, parts = self.batches.get(step)
        # An evaluation came before this step. A run that is resumed here, or on other processes, does the same.
        if step and is_due(step, self.settings.evaluation.every):
            reallocate_budget(self.parallel, parts)
        # One sum over ranks a step: target tokens, their bytes, and whether any rank was asked to stop.
        count, num_bytes, stopping = self.world.sum_numbers(*self._count(batch), float(stop.is_asking()))
        factor = learning_rate_factor(self.settings.schedule, step, self.settings.num_steps)
        rate = self.optimizers.set_learning_rate_factor(factor)
        losses, norm = self._gradient(parts, now, step, count) if count else ({}, None)
        record = None
        if not self.watch.deferred or stopping or writes_after(self.settings, step + 1):
            record = self._check_finite(step)
        if record is not None:
            losses, norm, count, num_bytes = {}, None, 0.0, 0.0
        elif count:
            self.optimizers.step()
            self.optimizers.zero_grad()
            adapt_equilibrium(self.model, losses, count, self.watch.skip)
        else:
            self._warn_of_empty_batch(step)
        seconds = time.perf_counter() - start
        return StepResult(now, parts[0], rate, count, num_bytes, losses, norm, stopping > 0, seconds, record)

    def time_gradient(self) -> float:
        """Seconds that the first batch's forward and backward passes take, found once; nothing is updated."""
        if self._gradient_seconds is None:
            parts, now = self.batches.load(0)[1], self._regime(0)
            for _ in range(2):  # the first pass warms up, and compiles
                start = time.perf_counter()
                self.gradients.backward(parts, now, 0, 1.0)["task"].item()  # waits for the device
                self._gradient_seconds = time.perf_counter() - start
                self.optimizers.zero_grad()
        assert self._gradient_seconds is not None
        return self._gradient_seconds

    def close(self) -> None:
        """Stop loading batches ahead."""
        self.batches.close()

    def _regime(self, step: int) -> Regime:
        return regime(self.settings.losses, self.settings.cycle, step, self.settings.num_steps)

    def _enter_regime(self, step: int) -> Regime:
        """The regime of a step; the excitation's amplitude A is set in the model."""
        now = self._regime(step)
        if now.excitation_amplitude is not None:
            self.model.excitation_amplitude.fill_(now.excitation_amplitude)
        return now

    def _count(self, batch: Batch) -> tuple[float, float]:
        """Target tokens of this rank's part of the batch, and the bytes of text behind them."""
        valid = batch.targets != -100
        return float(valid.sum()), float(self.token_num_bytes[batch.targets[valid]].sum())

    def _gradient(
        self, parts: list[MicroBatch], now: Regime, step: int, count: float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The loss terms and the gradient's norm; the gradient itself is left, clipped, in the parameters."""
        # Bits per byte leave special tokens out (inference/evaluate.py), so a row that is written needs their share.
        special_ids = self.special_ids if logs_after(self.settings, step + 1) else None
        losses = self.gradients.backward(parts, now, step, count, special_ids=special_ids)
        norm = self.parallel.clip_gradient(self.settings.gradient_clip)
        self.watch.observe(step, losses["task"], norm)
        return losses, norm

    def _check_finite(self, step: int) -> Path | None:
        """Wait for the device, and look at `step` and at those since the last look.

        Returns:
            The record of `step` when it is to be skipped; None when all is finite.

        Raises:
            NonFiniteError: a step was not finite, and no more may be skipped.
        """
        found = self.watch.first_bad()
        # Of one global batch all ranks find the same; if a faulty machine did not, they must still not part company.
        if not self.world.sum_numbers(float(found is not None))[0]:
            self.recorder.forget()
            return None
        bad_step, loss, norm = found or (step, math.nan, math.nan)
        now = self._enter_regime(bad_step)  # the weights are still those that it met
        count = self.world.sum_numbers(*self._count(self.batches.get(bad_step)[0]))[0]
        recorded = self.recorder.record(bad_step, now, count)
        what = f"step {bad_step + 1}: loss {loss:g}, gradient norm {norm:g}"
        if self.num_skipped >= self.settings.nonfinite.skip:
            raise NonFiniteError(f"{what}; stopped before the update. {recorded.report}")
        self.watch.forget()
        self.num_skipped += 1
        allowed = f"{self.num_skipped} of the {self.settings.nonfinite.skip} steps that training.nonfinite.skip allows"
        self.observer.on_warning(f"{what}; skipped, {allowed}. {recorded.report}")
        return recorded.path

    def _warn_of_empty_batch(self, step: int) -> None:
        """Warn of the first batch without a target token, the tenth, the hundredth and so on."""
        self.num_empty += 1
        if math.log10(self.num_empty).is_integer():
            before = f" ({self.num_empty} such steps so far)" if self.num_empty > 1 else ""
            self.observer.on_warning(
                f"step {step + 1}: prompts fill every window of the batch, so it holds no target token and updates "
                f"nothing{before}; raise training.sequence_length or training.batch_tokens, or shorten the prompts"
            )
