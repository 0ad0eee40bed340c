"""Saving a run: the trial before the first step, what is checked before a save, what a full disk costs, what stays.

- Rank 0 writes; every rank calls, because every rank must learn how it went.
- A checkpoint with NaN or infinity in it is never sealed: it could only be resumed into the same failure.
- The scores of earlier evaluations are read once. Afterwards each evaluation adds its own, so that a save costs the
  same however long the run is.
"""

import math
import shutil
import time
from functools import cached_property
from typing import Any

import torch

from inl_core.errors import ArtefactError, InlError, NonFiniteError
from inl_core.files import describe_os_error
from inl_core.inference.checkpoint_files import verify_checkpoint
from inl_core.inference.tensor_files import first_nonfinite
from inl_core.model import IntegratorLanguageModel
from inl_core.training.checkpoint import (
    Tensors,
    TrainState,
    capture_rng,
    gather_tensors,
    load_checkpoint,
    save_checkpoint,
    training_bytes,
)
from inl_core.training.distributed import World
from inl_core.training.metrics import read_scores, score_of_row
from inl_core.training.observer import Observer
from inl_core.training.optimizers import Optimizers
from inl_core.training.parallel import own_part
from inl_core.training.retention import TRIAL, best_checkpoint, complete_checkpoints, retain
from inl_core.training.run import RunFiles


class Saver:
    """Saves the state of one run.

    scored_on: names what the periodic evaluations score; only scores on the same text are compared.
    """

    def __init__(
        self,
        run: RunFiles,
        model: IntegratorLanguageModel,
        optimizers: Optimizers,
        world: World,
        observer: Observer,
        scored_on: str,
    ) -> None:
        self.run, self.model, self.optimizers, self.world, self.observer = run, model, optimizers, world, observer
        self.settings, self.scored_on = run.recipe.training.checkpoint, scored_on
        self.saved_step: int | None = None
        """The step of the last state that was saved, or that the run was resumed from."""

    def try_before_first_step(self, state: TrainState) -> None:
        """Save, read back, compare and time a real checkpoint, then remove it; better now than after a night.

        Raises:
            InlError: the disk has no room.
            ArtefactError: what is read back is not what was written.
        """
        tensors = gather_tensors(self.model, self.optimizers)
        try:
            self.world.on_main(lambda: self._try(state, tensors))
        finally:
            # Saving a fresh optimizer makes torch allocate its moments by a step of its own, which must not count.
            self.optimizers.forget()

    def save(self, state: TrainState) -> bool:
        """Save a checkpoint; False when the disk would not take it, which costs nothing that was saved before.

        Raises:
            NonFiniteError: a weight or a moment is NaN or infinite; nothing was saved, and every rank learns it.
        """
        self._refuse_nonfinite(state.step)
        state.rng = capture_rng(self.world)
        tensors = gather_tensors(self.model, self.optimizers)
        is_saved = self.world.on_main(lambda: self._write(state, tensors))
        if is_saved:
            self.saved_step = state.step
        return is_saved

    def note_evaluation(self, row: dict[str, Any] | None) -> None:
        """Remember the score in an evaluation's row of metrics, which rank 0 has, whether or not the disk took it."""
        if row is None or not self.settings.keep_best:
            return
        score = score_of_row(row, self.scored_on)
        if score is not None:
            self._scores[row["step"]] = score

    def save_best(self, state: TrainState) -> None:
        """After an evaluation: save the state when its score beats that of every saved checkpoint.

        Where no checkpoint is due before the end (`every` is 0), none is saved for its score either.
        """
        if self.world.on_main(lambda: self._is_best(state.step)):
            self.save(state)
        elif self.world.is_main:
            self._retain(state.step)  # the checkpoint of this step may be the best one now

    def _try(self, state: TrainState, tensors: Tensors) -> None:
        run = self.run.path
        needed, free = training_bytes(self.model), shutil.disk_usage(run).free
        if free < needed:
            raise InlError(
                f"{run}: one checkpoint needs {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; make room or "
                "choose another --run-dir"
            )
        start = time.perf_counter()
        try:
            saved = save_checkpoint(
                run / TRIAL, state, self.model, self.optimizers, self.run.documents(state), tensors=tensors
            )
            seconds = time.perf_counter() - start
            verify_checkpoint(saved)
            before = {name: own_part(tensor).clone() for name, tensor in self.model.state_dict().items()}
            load_checkpoint(saved, self.model, self.optimizers)
            if not all(torch.equal(own_part(tensor), before[name]) for name, tensor in self.model.state_dict().items()):
                raise ArtefactError(f"{run}: a checkpoint read back differs from the one written; check the disk")
            size = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
            self.observer.on_message(
                f"checkpoint tried: {size / 1e6:.1f} MB written in {seconds:.2f} s and read back intact"
            )
        except OSError as error:
            error.filename = error.filename or str(run)
            raise InlError(
                f"{describe_os_error(error)}: a checkpoint cannot be saved here; make room or choose another --run-dir"
            ) from error
        finally:
            shutil.rmtree(run / TRIAL, ignore_errors=True)

    def _refuse_nonfinite(self, step: int) -> None:
        """The host waits for the device once, which saving makes it do anyway."""
        tensors = self.model.state_dict() | self.optimizers.moments()
        name = first_nonfinite({name: own_part(tensor) for name, tensor in tensors.items()})
        if self.world.sum_numbers(float(name is not None))[0] > 0:
            raise NonFiniteError(
                f"step {step}: the update left NaN or infinity in {name or 'the weights of another process'}; "
                f"nothing was saved; {advice_after_nonfinite(self.run, step)}"
            )

    def _write(self, state: TrainState, tensors: Tensors) -> bool:
        start = time.perf_counter()
        try:
            documents = self.run.documents(state)
            path = save_checkpoint(self.run.checkpoints, state, self.model, self.optimizers, documents, tensors=tensors)
        except OSError as error:
            self.observer.on_warning(
                f"{self.run.checkpoints}: checkpoint of step {state.step} not saved ({describe_os_error(error)}); "
                "earlier checkpoints are untouched and the run goes on; make room on this disk"
            )
            return False
        self.observer.on_checkpoint(path, time.perf_counter() - start)
        self._retain(state.step)
        return True

    @cached_property
    def _scores(self) -> dict[int, float]:
        """Scores by step: of the evaluations in metrics.jsonl at first, then also of those that were noted."""
        try:
            return read_scores(self.run.path, self.scored_on) if self.settings.keep_best else {}
        except (ArtefactError, OSError) as error:
            self.observer.on_warning(
                f"{error}; until now no evaluation is known, so keep_best compares those from here on"
            )
            return {}

    def _is_best(self, step: int) -> bool:
        """Whether `step` is not saved, and no saved checkpoint has as good a score."""
        scores, saved = self._scores, complete_checkpoints(self.run.checkpoints, step)
        if not self.settings.every or step in saved or step not in scores:
            return False
        best = best_checkpoint(saved, scores)
        return scores[step] < (math.inf if best is None else scores[best])

    def _retain(self, step: int) -> None:
        retain(self.run.checkpoints, step, self.settings, self._scores)


def advice_after_nonfinite(run: RunFiles, step: int) -> str:
    """What a user can do after NaN or infinity at `step`."""
    saved = list(complete_checkpoints(run.checkpoints, step).values())
    again = f"`inl resume {run.path}` goes on from {saved[-1]}" if saved else "no checkpoint was saved before"
    return f"try a lower training.optimizer.learning_rate; {again}"
