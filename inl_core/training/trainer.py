"""The training loop: one loop for a fresh run and a resumed one, for one process and many.

    trainer = Trainer(model, data, run, world, observer)
    trainer.resume(checkpoint)        # or not
    trainer.fit()

- Data order, learning rate and regime are functions of the step; `TrainState` holds what is not.
- After a step comes its log row, then a checkpoint that is due, then an evaluation that is due. A checkpoint that is
  saved because its state scored best can only come after the evaluation.
- It prints nothing: an `Observer` hears what happens.
"""

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from inl_core.corpus.loader import BatchLoader
from inl_core.errors import InlError, Interrupted, NonFiniteError
from inl_core.inference.evaluate import Evaluation
from inl_core.model import IntegratorLanguageModel
from inl_core.training.checkpoint import TrainState, load_checkpoint, restore_rng
from inl_core.training.distributed import World
from inl_core.training.execution import prepare_model
from inl_core.training.interruption import StopSignal
from inl_core.training.layout import choose_layout, device_memory
from inl_core.training.loss_module import LossModule
from inl_core.training.metrics import stream_metrics
from inl_core.training.observer import Observer
from inl_core.training.optimizers import build_optimizers, count_states
from inl_core.training.parallel import parallelize
from inl_core.training.precision import autocast_of, uses_bf16
from inl_core.training.retention import complete_checkpoints, remove_leftovers
from inl_core.training.run import RunFiles
from inl_core.training.run_data import RunData
from inl_core.training.run_log import RunLog
from inl_core.training.run_status import PREEMPTED, write_preempted
from inl_core.training.saving import Saver
from inl_core.training.schedules import is_due
from inl_core.training.step import Stepper
from inl_core.training.time_limit import find_limit
from inl_core.training.validation import Validation


class Trainer:
    """One run: `model` trained on `data` as the run's recipe says, with the run's files below `run.path`.

    A model on the meta device gets memory and the recipe's starting weights here: all of it, or this process's part.
    """

    def __init__(
        self, model: IntegratorLanguageModel, data: RunData, run: RunFiles, world: World, observer: Observer
    ) -> None:
        settings = run.recipe.training
        states, bf16 = count_states(model, settings.optimizer), uses_bf16(run.recipe, world.device)
        layout = choose_layout(settings, world.size, states, device_memory(world.device))
        operations = prepare_model(model, settings, world, bf16=bf16, before=run.computed_before)
        run = replace(run, operations=operations)  # so that each checkpoint says how it was computed
        losses = LossModule(model, autocast_of(run.recipe, world.device))
        self.parallel = parallelize(losses, layout, world, seed=settings.seed, bf16=bf16)
        self.model = model
        self.settings, self.run, self.world, self.observer = settings, run, world, observer
        self.loader = BatchLoader(
            data.train,
            sequence_length=settings.sequence_length,
            batch_size=settings.batch_size,
            seed=settings.seed,
            rank=world.rank,
            world_size=world.size,
        )
        self.optimizers = build_optimizers(self.model, settings.optimizer, world.device)
        self.state = TrainState(data_fingerprint=data.train.fingerprint, world_size=world.size)
        self._longest_step: float | None = None
        self.stepper = Stepper(self.parallel, self.loader, self.optimizers, run, observer)
        self.log = RunLog(self.parallel, run, observer, self.loader.num_windows)
        self.validation = Validation(data.validation, run, world)
        scored_on = self.validation.name(settings.evaluation.tokens)
        self.saver = Saver(run, self.model, self.optimizers, world, observer, scored_on)

    def resume(self, checkpoint: Path) -> None:
        """Continue from a verified checkpoint as if the run had never stopped.

        Raises:
            ArtefactError: a file is damaged, or does not fit the model or the optimizer.
        """
        self.state = load_checkpoint(checkpoint, self.model, self.optimizers)
        restore_rng(self.state.rng, self.world.rank)
        self.stepper.num_skipped = self.state.skipped
        self.saver.saved_step = self.state.step
        self.saver.latest = self.saver.longest = self.state.save_seconds

    def fit(self, stop: StopSignal | None = None) -> Evaluation | None:
        """Train to the recipe's last step, and score the validation split; None when that holds no target token.

        Args:
            stop: who listens for signals, when somebody does already.

        Raises:
            NonFiniteError: a loss or the gradient is NaN or infinite (nothing was updated with it), or the weights are
                (nothing was saved).
            Interrupted: a signal, or a time limit, stopped the run after its state was saved.
            InlError: the disk has no room for a checkpoint before the first step, or after the last one.
        """
        if stop is None:
            with StopSignal() as stop:
                return self.fit(stop)
        if self.world.is_main:
            stop.limit = find_limit(self.settings.max_hours, stop.started)
        stop.is_saving = lambda: self.saver.is_saving
        try:
            with self.log, closing(self.saver):
                self._begin()
                self._check_time(stop)
                with stop.deferred(), closing(self.stepper):
                    evaluation = self._train(stop)
        except NonFiniteError as error:
            # Said here and not earlier, because a checkpoint may have been on its way.
            raise NonFiniteError(f"{error}; {self._advice()}") from None
        self._end(evaluation)
        return evaluation

    def _begin(self) -> None:
        self.model.train()
        if self.world.is_main:
            remove_leftovers(self.run.path)
        if self.state.step == 0:
            self.saver.try_before_first_step(self.state)
        if self.settings.compile and self.state.step < self.settings.num_steps:
            self._compile()
        if self.state.step and self._missed_evaluation():
            self._evaluate_and_save_best()

    def _compile(self) -> None:
        """Compile training and evaluation while nothing needs to be saved, so that a signal need not wait for it."""
        self.stepper.time_gradient()
        tokens = self.validation.sequence_length * self.validation.batch_size
        self.parallel.run(lambda model: self.validation.score(model, tokens))

    def _check_time(self, stop: StopSignal) -> None:
        """See that every session gets further: one that has steps to take takes one, another its final evaluation."""
        if self.state.step == self.settings.num_steps:
            stop.limit = None
        if stop.limit is None:
            return
        limit = stop.limit
        limit.needed = self._seconds_to_leave()
        if limit.is_near():
            self.observer.on_warning(
                f"{limit.name}: all of the time goes into starting and saving, so only one step is taken; allow more"
            )

    def _seconds_to_leave(self) -> float:
        """What the step at work when the time is up takes, the one that notices it, and a save of unsure length."""
        return 2 * (self._longest_step or 0.0) + 2 * self.saver.longest

    def _train(self, stop: StopSignal) -> Evaluation | None:
        """The steps, with what is due between them, and the final evaluation."""
        while self.state.step < self.settings.num_steps:
            is_stopping = self._train_step(stop)
            self._save_if_due(stop, is_stopping)
            self._evaluate_if_due(stop)
        return self._evaluate(self.settings.evaluation.final_tokens, stop)

    def _train_step(self, stop: StopSignal) -> bool:
        """Take one optimizer step; whether the run is asked to stop after it."""
        result = self.stepper.take(self.state.step, stop)
        self.state.step += 1
        self.state.samples += self.settings.batch_size
        self.state.tokens += int(result.num_targets)
        self.state.seconds += result.seconds
        self.state.skipped = self.stepper.num_skipped
        # The first step also warms up, or compiles, and says nothing of those to come.
        self._longest_step = 0.0 if self._longest_step is None else max(self._longest_step, result.seconds)
        if stop.limit is not None:
            stop.limit.needed = self._seconds_to_leave()
        self.log.add_step(self.state, result)
        return result.is_stopping

    def _save_if_due(self, stop: StopSignal, is_stopping: bool) -> None:
        is_done = self.state.step == self.settings.num_steps
        self.saver.poll()
        if is_done or is_stopping:
            self.saver.save(self.state)
        elif is_due(self.state.step, self.settings.checkpoint.every):
            self.saver.start(self.state)
        if is_stopping and not is_done:
            raise self._stopped_by(stop)

    def _evaluate_if_due(self, stop: StopSignal) -> None:
        """Only between steps: after the last one comes the final evaluation."""
        if self.state.step < self.settings.num_steps and is_due(self.state.step, self.settings.evaluation.every):
            self._evaluate_and_save_best(stop)

    def _missed_evaluation(self) -> bool:
        """Whether the run was stopped after it saved this state and before it evaluated it."""
        step, every = self.state.step, self.settings.evaluation.every
        if step == self.settings.num_steps or not is_due(step, every):
            return False

        def is_missing() -> bool:
            rows = stream_metrics(self.run.path)
            return not any(row["step"] == step and "validation_loss" in row for row in rows)

        return self.world.on_main(is_missing)

    def _evaluate_and_save_best(self, stop: StopSignal | None = None) -> None:
        self._evaluate(self.settings.evaluation.tokens, stop)
        self.saver.save_best(self.state)

    def _evaluate(self, tokens: int | None, stop: StopSignal | None = None) -> Evaluation | None:
        """Score the validation split and write a row; None, with a warning, when no target token was met.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
            Interrupted: the run is asked to stop; the state was saved, and a resumed run evaluates it again.
        """
        step, evaluation = self.state.step, self.parallel.run(lambda model: self.validation.score(model, tokens, stop))
        if stop is not None and self.world.sum_numbers(float(stop.is_asking()))[0] > 0:
            self.saver.finish()
            if self.saver.saved_step != step:
                self.saver.save(self.state)
            raise self._stopped_by(stop)
        self.saver.note_evaluation(self.log.add_evaluation(self.state, evaluation, self.validation.name(tokens)))
        if evaluation is None:
            self.observer.on_warning(
                f"step {step}: not evaluated, prompts fill the validation tokens, so none is a target; raise "
                "training.evaluation.tokens and final_tokens, or data.validation_fraction"
            )
            return None
        if not math.isfinite(evaluation.loss):
            raise NonFiniteError(f"step {step}: validation loss {evaluation.loss:g}")
        self.observer.on_evaluation(step, evaluation)
        return evaluation

    def _end(self, evaluation: Evaluation | None) -> None:
        """Warn of what was left out; InlError when the disk did not take the last checkpoint."""
        step, path = self.state.step, self.run.path
        if self.stepper.num_empty:
            self.observer.on_warning(f"{self.stepper.num_empty:,} steps had no target token and updated nothing")
        if self.saver.saved_step != step:
            score = f" ({evaluation.bits_per_byte_text} bits per byte)" if evaluation else ""
            raise InlError(
                f"{path}: trained to step {step}{score}, but the last checkpoint could not be saved; make room, then "
                f"`inl resume {path}` repeats the rest"
            )

    def _advice(self) -> str:
        """What a user can do after NaN or infinity."""
        saved = list(complete_checkpoints(self.run.checkpoints, self.state.step).values())
        again = f"`inl resume {self.run.path}` goes on from {saved[-1]}" if saved else "no checkpoint was saved before"
        return f"try a lower training.optimizer.learning_rate; {again}"

    def _stopped_by(self, stop: StopSignal) -> InlError:
        """The error that ends a run which was asked to stop; preempted.json says so too, if the state was saved."""
        step, path = self.state.step, self.run.path
        stop.share(self.world.sum_numbers)
        if self.saver.saved_step != step:
            return InlError(
                f"stopped by {stop.name} at step {step}, and the checkpoint could not be saved; `inl resume {path}` "
                "goes on from the one before"
            )
        # The other ranks wait for it: torchrun ends all that are left as soon as one of them has gone.
        self.world.on_main(lambda: self._leave_word(stop.name))
        return Interrupted(f"stopped by {stop.name} at step {step}, saved; continue with: inl resume {path}")

    def _leave_word(self, asked_by: str) -> None:
        """Write preempted.json; a disk that will not take it costs a warning."""
        path = self.run.path
        try:
            write_preempted(path, self.state.step, asked_by)
        except OSError as error:
            self.observer.on_warning(f"{path / PREEMPTED}: not written ({error.strerror or error})")
