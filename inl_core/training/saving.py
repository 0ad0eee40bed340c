"""Saving a run: the trial before the first step, what is checked before a save, what a full disk costs, what stays.

- Every rank calls, because every rank must learn how it went. Rank 0 writes, and of a divided model every rank.
- What is saved is copied, and a thread writes the copy while training goes on. Two saves never overlap: the next one
  waits for the one before. What became of one is known to all after `finish`, and to rank 0 at the next step.
- A checkpoint with NaN or infinity in it is never sealed: it could only be resumed into the same failure.
- The scores of earlier evaluations are read once. Afterwards each evaluation adds its own, so that a save costs the
  same however long the run is.
"""

import math
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.tensor import DTensor

from inl_core.errors import ArtefactError, InlError, NonFiniteError
from inl_core.files import describe_os_error
from inl_core.inference.checkpoint_files import verify_checkpoint
from inl_core.inference.tensor_files import first_nonfinite
from inl_core.model import IntegratorLanguageModel
from inl_core.training.checkpoint import TrainState, capture_rng, load_checkpoint
from inl_core.training.checkpoint_writing import Snapshot, take_snapshot, write_snapshot
from inl_core.training.distributed import ALONE, LONGEST_WAIT, World
from inl_core.training.metrics import read_scores, score_of_row
from inl_core.training.observer import Observer
from inl_core.training.optimizers import Optimizers, count_states
from inl_core.training.parallel import own_part
from inl_core.training.retention import TRIAL, best_checkpoint, complete_checkpoints, retain
from inl_core.training.run import RunFiles


@dataclass
class _Pending:
    """A save that was begun."""

    step: int
    future: Future[tuple[Path, float]] | None
    """What the thread will have written, on the ranks that write."""
    is_saved: bool | None = None
    """What became of it, once rank 0 has told."""


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
        is_divided = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        # The writing threads talk in a group of their own, so that they never take part in what the ranks do meanwhile.
        group: Any = dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if is_divided else None
        self._writers = replace(world, control=group) if is_divided else ALONE
        self._writes = is_divided or world.is_main
        # The memory of a copy is kept for the next one: to get it anew takes several times as long as to fill it.
        self._stager = StateDictStager(pin_memory=world.device.type == "cuda")
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self.latest = self.longest = 0.0
        """Seconds that the newest save took, and the longest of this process, or what a resumed run's state says of
        the one before; of what this process saved rank 0 alone knows it."""
        self._pending: _Pending | None = None

    @property
    def is_saving(self) -> bool:
        """Whether a save has begun and is not known to be over, on this rank."""
        return self._pending is not None

    def try_before_first_step(self, state: TrainState) -> None:
        """Save, read back, compare and time a real checkpoint, then remove it; better now than after a night.

        Raises:
            InlError: the disk has no room.
            ArtefactError: what is read back is not what was written.
        """
        try:
            self.world.on_main(self._refuse_full_disk)
            if self._writers.size > 1:
                self.world.on_each(lambda: self._try(state))
            else:
                self.world.on_main(lambda: self._try(state))
        finally:
            if self.world.is_main:
                shutil.rmtree(self.run.path / TRIAL, ignore_errors=True)

    def start(self, state: TrainState) -> None:
        """Begin to save a checkpoint, once the save before it is over.

        Raises:
            NonFiniteError: a weight or a moment is NaN or infinite; nothing is saved, and every rank learns it.
        """
        self.finish()
        self._refuse_nonfinite(state.step)
        state.rng, state.save_seconds = capture_rng(self.world), self.latest
        future = self._thread.submit(self._write, self._snapshot(state)) if self._writes else None
        self._pending = _Pending(state.step, future)

    def finish(self) -> bool:
        """Wait until nothing is being saved; False on every rank when what was being saved could not be."""
        pending, self._pending = self._pending, None
        if pending is None:
            return True
        if pending.future is not None:
            wait([pending.future])
        is_saved = self.world.on_main(lambda: self._conclude(pending))
        if is_saved:
            self.saved_step = pending.step
        return is_saved

    def poll(self) -> None:
        """Tell of a save that is over and remove what need not stay any more, on rank 0; nothing is waited for."""
        pending = self._pending
        if self.world.is_main and pending is not None and pending.future is not None and pending.future.done():
            self._conclude(pending)

    def save(self, state: TrainState) -> bool:
        """Save a checkpoint and wait for it; False when the disk would not take it, which costs nothing that was saved.

        Raises:
            NonFiniteError: as `start`.
        """
        self.start(state)
        return self.finish()

    def close(self) -> None:
        """Wait for the thread, so that what it writes is whole when the process ends; no other rank is asked."""
        if self._pending is not None and self._pending.future is not None:
            wait([self._pending.future])
            self.poll()

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
        self.finish()
        if self.world.on_main(lambda: self._is_best(state.step)):
            self.start(state)
        elif self.world.is_main:
            self._retain(state.step)  # the checkpoint of this step may be the best one now

    def _refuse_full_disk(self) -> None:
        run = self.run.path
        needed = count_states(self.model, self.run.recipe.training.optimizer).checkpoint
        free = shutil.disk_usage(run).free
        if free < needed:
            raise InlError(
                f"{run}: one checkpoint needs {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; make room or "
                "choose another --run-dir"
            )

    def _try(self, state: TrainState) -> None:
        run, start = self.run.path, time.perf_counter()
        try:
            saved = write_snapshot(run / TRIAL, self._snapshot(state), self._writers)
            self.latest = self.longest = seconds = time.perf_counter() - start
            self._writers.on_main(lambda: verify_checkpoint(saved))
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
            # Saving a fresh optimizer makes torch allocate its moments by a step of its own, which must not count.
            self.optimizers.forget()

    def _refuse_nonfinite(self, step: int) -> None:
        """The host waits for the device once, which saving makes it do anyway."""
        tensors = self.model.state_dict() | self.optimizers.moments()
        name = first_nonfinite({name: own_part(tensor) for name, tensor in tensors.items()})
        if self.world.sum_numbers(float(name is not None))[0] > 0:
            raise NonFiniteError(
                f"step {step}: the update left NaN or infinity in {name or 'the weights of another process'}; "
                "nothing was saved"
            )

    def _snapshot(self, state: TrainState) -> Snapshot:
        return take_snapshot(state, self.model, self.optimizers, self.run.documents(state), self._stager)

    def _write(self, snapshot: Snapshot) -> tuple[Path, float]:
        """The thread's work: the checkpoint, and the seconds that it took."""
        start = time.perf_counter()
        path = write_snapshot(self.run.checkpoints, snapshot, self._writers)
        return path, time.perf_counter() - start

    def _conclude(self, pending: _Pending) -> bool:
        """Tell, on rank 0 and once, what became of a save that is over; whether it was saved."""
        assert pending.future is not None
        if pending.is_saved is not None:
            return pending.is_saved
        try:
            path, seconds = pending.future.result()
        except OSError as error:
            pending.is_saved = False
            self.observer.on_warning(
                f"{self.run.checkpoints}: checkpoint of step {pending.step} not saved ({describe_os_error(error)}); "
                "earlier checkpoints are untouched and the run goes on; make room on this disk"
            )
        else:
            pending.is_saved = True
            self.latest, self.longest = seconds, max(self.longest, seconds)
            self.observer.on_checkpoint(path, seconds)
            self._retain(pending.step)
        return pending.is_saved

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
