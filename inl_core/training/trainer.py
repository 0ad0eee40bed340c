"""The training loop: one loop for a fresh run and a resumed one, for one process and many.

    trainer = Trainer(recipe, model, data, run, world, observer)
    trainer.resume(checkpoint)        # or nothing
    trainer.fit()

- Batch, learning rate and regime are functions of the step; `TrainState` holds what is not.
- Order at a step: gradients, checks, update, log, save, evaluate. A checkpoint that is due comes before an evaluation;
  one that is saved because it scores best can only come after it.
- A batch without a target token teaches nothing, so its step updates nothing: no decay, no momentum.
- It prints nothing: an `Observer` hears what happens.
"""

import math
import time
from contextlib import closing
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from inl_core.corpus.loader import Batch, BatchLoader, TokenDataset
from inl_core.errors import InlError, Interrupted, NonFiniteError
from inl_core.inference.evaluate import Evaluation
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import Recipe
from inl_core.training.checkpoint import TrainState, load_checkpoint, restore_rng
from inl_core.training.cycles import Regime, regime
from inl_core.training.distributed import World, prepare_blocks
from inl_core.training.dynamics import last_residuals
from inl_core.training.gradients import Gradients
from inl_core.training.interruption import StopSignal
from inl_core.training.metrics import Interval, MetricsWriter, read_metrics
from inl_core.training.nonfinite import FiniteWatch, write_nonfinite_report
from inl_core.training.observer import Observer
from inl_core.training.optimizers import build_optimizers
from inl_core.training.prefetch import Prefetcher
from inl_core.training.retention import remove_leftovers
from inl_core.training.run import PREEMPTED, RunFiles, write_preempted
from inl_core.training.saving import Saver
from inl_core.training.schedules import is_due, learning_rate_factor
from inl_core.training.step import MicroBatch, micro_batches
from inl_core.training.step_rows import StepRows
from inl_core.training.validation import Validation


class Trainer:
    """One run: `model` trained on `data` as `recipe` says, with its files below `run`."""

    def __init__(
        self,
        recipe: Recipe,
        model: IntegratorLanguageModel,
        train: TokenDataset,
        validation: TokenDataset,
        run: RunFiles,
        world: World,
        observer: Observer,
    ) -> None:
        settings = recipe.training
        self.recipe, self.settings, self.world, self.run, self.observer = recipe, settings, world, run, observer
        self.model = model.to(world.device)
        self.token_num_bytes = run.tokenizer.token_num_bytes
        self.special_ids = torch.tensor(sorted(run.tokenizer.special_ids.values()), device=world.device)
        self.micro_batch = settings.micro_batch(world.size)
        self.loader = BatchLoader(
            train,
            sequence_length=settings.sequence_length,
            batch_size=settings.batch_size,
            seed=settings.seed,
            rank=world.rank,
            world_size=world.size,
        )
        self.optimizers = build_optimizers(self.model, settings.optimizer, world.device)
        self.autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=uses_bf16(recipe, world.device))
        prepare_blocks(self.model.blocks, settings)
        self.gradients = Gradients(self.model, settings, self.autocast, world)
        self.batches = Prefetcher(self.loader, self.micro_batch, world.device)
        self.watch = FiniteWatch(self.optimizers, world.device, deferred=self._may_defer)
        self._since_log = Interval()
        self.state = TrainState(data_fingerprint=train.fingerprint, world_size=world.size)
        self.metrics = MetricsWriter(run.path, recipe, self._warn) if world.is_main else None
        self.rows = self._step_rows(self.metrics) if self.metrics is not None else None
        self.validation = Validation(
            validation,
            run.tokenizer,
            sequence_length=settings.sequence_length,
            batch_size=self.micro_batch,
            autocast=self.autocast,
            world=world,
        )
        compared = self.validation.name(settings.evaluation.tokens)
        self.saver = Saver(run, self.model, self.optimizers, world, observer, compared)
        self.num_empty = 0
        self._is_saved = False  # whether a checkpoint holds the state as it is

    def resume(self, checkpoint: Path) -> None:
        """Continue from a verified checkpoint as if the run had never stopped."""
        self.state = load_checkpoint(checkpoint, self.model, self.optimizers)
        restore_rng(self.state.rng)
        self._is_saved = True

    def fit(self, stop: StopSignal | None = None) -> Evaluation | None:
        """Train to the recipe's last step and score the validation split; None when that holds no target token.

        Args:
            stop: who listens for signals, when somebody does already.

        Raises:
            NonFiniteError: a loss or the gradient is NaN or infinite (nothing was updated with it), or the weights are
                (nothing was saved).
            Interrupted: a signal stopped the run after its state was saved.
        """
        if stop is None:
            with StopSignal() as stop:
                return self.fit(stop)
        self.model.train()
        if self.world.is_main:
            remove_leftovers(self.run.path)
        if self.state.step == 0:
            self._try_checkpoint()
        elif self._missed_evaluation():  # the run was stopped between saving and evaluating
            self._evaluate(self.settings.evaluation.tokens)
            self.saver.save_best(self.state)
        total, saved = self.settings.num_steps, True
        with stop.deferred(), closing(self.batches):
            while self.state.step < total:
                stopping = self._train_step(stop)
                done = self.state.step == total
                if done or stopping or is_due(self.state.step, self.settings.checkpoint.every):
                    saved = self._is_saved = self.saver.save(self.state)
                    if stopping and not done:
                        raise self._interrupted(stop)
                if not done and is_due(self.state.step, self.settings.evaluation.every):
                    self._evaluate(self.settings.evaluation.tokens, stop)
                    self.saver.save_best(self.state)
            evaluation = self._evaluate(self.settings.evaluation.final_tokens, stop)
        if self.num_empty:
            self._warn(f"{self.num_empty:,} steps had no target token and updated nothing")
        if not saved:
            score = f" ({evaluation.bits_per_byte_text} bits per byte)" if evaluation else ""
            raise InlError(
                f"{self.run.path}: trained to step {total}{score}, but the "
                f"last checkpoint could not be saved; make room, then `inl resume {self.run.path}` repeats the rest"
            )
        return evaluation

    def time_step(self) -> float:
        """Seconds one step's forward and backward passes take, measured on the first batch; nothing is updated."""
        batch, now = self.loader.batch(0), regime(self.settings.losses, self.settings.cycle, 0, self.settings.num_steps)
        seconds = 0.0
        for _ in range(2):  # the first pass warms up, and compiles
            start = time.perf_counter()
            terms = self.gradients.backward(micro_batches(batch, self.micro_batch, self.world.device), now, 0, 1.0)
            terms["task"].item()  # wait for the device
            seconds = time.perf_counter() - start
            self.optimizers.zero_grad()
        return seconds

    # One step ---------------------------------------------------------------------------------------------------

    def _train_step(self, stop: StopSignal) -> bool:
        """Do one optimizer step; whether a signal asks to stop after it.

        The host waits for the device only where something is written: at log points, evaluations and checkpoints.
        """
        start, step = time.perf_counter(), self.state.step
        now = self._enter(step)
        batch, parts = self.batches.get(step)
        if step and is_due(step, self.settings.evaluation.every):
            self._reallocate(parts)
        # One sum over ranks a step: target tokens, their bytes, and whether any rank was asked to stop.
        count, num_bytes, stopping = self.world.sum_numbers(*self._count(batch), float(stop.requested))
        factor = learning_rate_factor(self.settings.schedule, step, self.settings.num_steps)
        rate = self.optimizers.set_learning_rate_factor(factor)
        terms, norm = self._gradient(parts, now, step, count) if count else ({}, None)
        if not self.watch.deferred or stopping > 0 or self._writes_after(step + 1):
            self._check_finite(terms, batch)
        if count:
            self.optimizers.step()
            self.optimizers.zero_grad()
            self._adapt_mu(terms, count)
        else:
            self._note_empty(step)
        seconds = time.perf_counter() - start
        self._since_log.add(count, seconds)
        self.state.step += 1
        self._is_saved = False
        self.state.samples += self.settings.batch_size
        self.state.tokens += int(count)
        self.state.seconds += seconds
        if self._logs_after(self.state.step):
            speed = self._since_log.restart()
            if self.rows is not None:
                self.rows.write(
                    self.state,
                    terms,
                    now,
                    parts[0],
                    rate=rate,
                    norm=norm,
                    count=count,
                    num_bytes=num_bytes,
                    speed=speed,
                )
        return stopping > 0

    def _gradient(
        self, parts: list[MicroBatch], now: Regime, step: int, count: float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The loss terms and the norm of the gradient, which is left clipped in the parameters."""
        # Bits per byte leave special tokens out (inference/evaluate.py); only a row that is written needs them apart.
        apart = self.special_ids if self._logs_after(step + 1) else None
        terms = self.gradients.backward(parts, now, step, count, special_ids=apart)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip)
        self.watch.observe(step, terms["task"], norm)
        return terms, norm

    def _note_empty(self, step: int) -> None:
        """Warn of a batch without a target token: of the first, and of every tenth power of them."""
        self.num_empty += 1
        if math.log10(self.num_empty).is_integer():
            before = f" ({self.num_empty} such steps so far)" if self.num_empty > 1 else ""
            self._warn(
                f"step {step + 1}: prompts fill every window of the batch, so it holds no target token and updates "
                f"nothing{before}; raise training.sequence_length or training.batch_tokens, or shorten the prompts"
            )

    def _enter(self, step: int) -> Regime:
        """What governs a step; the amplitude A is set."""
        now = regime(self.settings.losses, self.settings.cycle, step, self.settings.num_steps)
        if now.excitation_amplitude is not None:
            self.model.excitation_amplitude.fill_(now.excitation_amplitude)
        return now

    def _logs_after(self, step: int) -> bool:
        return step in (1, self.settings.num_steps) or is_due(step, self.settings.logging.every)

    def _writes_after(self, step: int) -> bool:
        """Whether anything is written when `step` steps are done."""
        checkpoints = is_due(step, self.settings.checkpoint.every)
        return self._logs_after(step) or checkpoints or is_due(step, self.settings.evaluation.every)

    @property
    def _may_defer(self) -> bool:
        """Whether a bad step can be skipped by the device alone: nothing but AdamW's update may follow from it."""
        return self.world.device.type == "cuda" and self.optimizers.can_skip and self._adaptation_rate == 0

    def _count(self, batch: Batch) -> tuple[float, float]:
        """Target tokens of this rank's part, and the bytes behind them."""
        valid = batch.targets != -100
        return float(valid.sum()), float(self.token_num_bytes[batch.targets[valid]].sum())

    @property
    def _adaptation_rate(self) -> float:
        integrator = self.model.config.integrator
        return integrator.mu.adaptation_rate if integrator else 0.0

    def _adapt_mu(self, terms: dict[str, Tensor], count: float) -> None:
        """The moving average of mu (docs/model.md, "The equilibrium") over the global batch's mean final states."""
        if self._adaptation_rate > 0:
            for integrator, total in zip(self.model.integrators(), terms["moments"][0], strict=True):
                integrator.equilibrium.adapt(total / count, self._adaptation_rate)

    def _reallocate(self, parts: list[MicroBatch]) -> None:
        """Move the layers' budgets after the measured residuals, when the strategy does.

        At the start of the step after an evaluation, from that step's whole batch: a run resumed there, and one on
        another number of processes, does the same.
        """
        budget = self.model.budget
        if budget is None or not budget.follows_residuals:
            return
        with self.autocast:
            found = [
                last_residuals(self.model, part.tokens, positions=part.positions, document_ids=part.document_ids)
                for part in parts
            ]
        total = torch.tensor(found, dtype=torch.float64, device=self.world.device).sum(0)
        budget.reallocate(self.world.sum(total) / (len(parts) * self.world.size))

    def _check_finite(self, terms: dict[str, Tensor], batch: Batch) -> None:
        """Wait for the device; stop the run when this step, or one since the last look, was not finite."""
        found = self.watch.first_bad()
        if found is None:
            return
        step, loss, size = found
        if step != self.state.step:  # seen late: the weights are still those it met, so its gradients can be had again
            self.optimizers.zero_grad()
            batch, parts = self.batches.get(step)
            count = self.world.sum_numbers(*self._count(batch))[0]
            terms = self.gradients.backward(parts, self._enter(step), step, max(1.0, count))
        where = self.run.path / "reports" / f"nonfinite-step-{step + 1}-rank-{self.world.rank}.json"
        try:
            write_nonfinite_report(where, self.model, step, terms, size, batch, self.run.tokenizer)
            report = f"{where} has the batch and the tensors"
        except OSError as error:
            report = f"{where}, the report, could not be written ({error.strerror or error})"
        raise NonFiniteError(
            f"step {step + 1}: loss {loss:g}, gradient norm {size:g}; stopped before the update. {report}; "
            f"{self.saver.advice(step)}"
        )

    # What is written --------------------------------------------------------------------------------------------

    def _step_rows(self, metrics: MetricsWriter) -> StepRows:
        return StepRows(
            self.model,
            self.settings,
            self.gradients,
            metrics,
            self.observer,
            autocast=self.autocast,
            num_windows=self.loader.num_windows,
        )

    def _missed_evaluation(self) -> bool:
        step, every = self.state.step, self.settings.evaluation.every
        if step == self.settings.num_steps or not is_due(step, every):
            return False
        rows = read_metrics(self.run.path) if self.world.is_main else []
        return self.world.broadcast(not any(row["step"] == step and "validation_loss" in row for row in rows))

    def _evaluate(self, tokens: int | None, stop: StopSignal | None = None) -> Evaluation | None:
        """Score the validation split and write a row; None, with a warning, when no target token was met.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
            Interrupted: a signal came; the state was saved, and the evaluation is made up for by a resume.
        """
        step, evaluation = self.state.step, self.validation.score(self.model, tokens, stop)
        if stop is not None and self.world.sum_numbers(float(stop.requested))[0] > 0:
            self._is_saved = self._is_saved or self.saver.save(self.state)
            raise self._interrupted(stop)
        if self.metrics is not None:
            scores = asdict(evaluation) if evaluation else dict.fromkeys(field.name for field in fields(Evaluation))
            row = {"step": step, "tokens": self.state.tokens, "scored_on": self.validation.name(tokens)}
            self.saver.note_evaluation(
                self.metrics.write(row | {f"validation_{name}": value for name, value in scores.items()})
            )
        if evaluation is None:
            self._warn(
                f"step {step}: not evaluated, prompts fill the validation tokens, so none is a target; raise "
                "training.evaluation.tokens and final_tokens, or data.validation_fraction"
            )
            return None
        if not math.isfinite(evaluation.loss):
            raise NonFiniteError(f"step {step}: validation loss {evaluation.loss:g}; {self.saver.advice(step)}")
        self.observer.on_evaluation(step, evaluation)
        return evaluation

    def _try_checkpoint(self) -> None:
        """Before the first step: save, read back, compare and time a real checkpoint; every rank learns how it went."""
        failure = None
        if self.world.is_main:
            try:
                self.run.try_checkpoint(self.state, self.model, self.optimizers, self.observer.on_message)
            except InlError as error:
                failure = error
        failure = self.world.broadcast(failure)
        if failure is not None:
            raise failure

    def _interrupted(self, stop: StopSignal) -> InlError:
        step = self.state.step
        stop.share(self.world.sum_numbers)
        if not self._is_saved:
            return InlError(
                f"stopped by {stop.name} at step {step}, and the checkpoint could not be saved; "
                f"`inl resume {self.run.path}` goes on from the one before"
            )
        if self.world.is_main:
            try:
                write_preempted(self.run.path, step, stop.name)
            except OSError as error:
                self._warn(f"{self.run.path / PREEMPTED}: not written ({error.strerror or error})")
        return Interrupted(f"stopped by {stop.name} at step {step}, saved; continue with: inl resume {self.run.path}")

    def _warn(self, text: str) -> None:
        self.observer.on_message(text, warning=True)


def uses_bf16(recipe: Recipe, device: torch.device) -> bool:
    """Whether forward passes run under bfloat16 autocast."""
    wanted = recipe.training.precision
    if wanted == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return wanted == "bf16"
